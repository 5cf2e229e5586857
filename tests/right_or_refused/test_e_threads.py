"""Kind E: other passes over the same modules, in other threads or within this one, while a pass is being recorded.

A `Pause` in the model lets the other pass happen at a given place of this one, so each test takes the same path always.
"""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relaxprop import ActivationRelaxation, ClosedForm, Equilibrium, Euler, Frozen
from tests.right_or_refused.helper import (
    CONVERGED,
    CUTTING,
    VERTICES,
    Seen,
    all_solvers,
    all_vertices,
    assert_same,
    backward,
    cutting_solvers,
    right_or_refused,
    squares,
)

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)


class Pause(nn.Module):
    """Does, once and in another thread, what it is told to while the pass that called it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Callable[[], Any] | None = None
        self.in_thread = True
        self.after = 0  # calls to let pass before
        self.got: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.meanwhile is None:
            return x * 1.0
        if self.after:
            self.after -= 1
            return x * 1.0
        todo, self.meanwhile = self.meanwhile, None
        if self.in_thread:
            with ThreadPoolExecutor(1) as pool:
                self.got.append(pool.submit(todo).result(timeout=60))
        else:
            self.got.append(todo())
        return x * 1.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.f, self.pause = nn.Linear(4, 4), nn.Tanh(), Pause()
        self.second, self.g, self.head = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pause(self.f(self.first(x)))
        output: Tensor = self.head(h + self.g(self.second(h)))
        return output


def build() -> Net:
    torch.manual_seed(1)
    return Net().double()


def parameter_gradients(model: nn.Module, x: Tensor, plain: nn.Module) -> Seen:
    """Not into ``.grad``, which threads share."""
    parameters = dict(plain.named_parameters())
    found = torch.autograd.grad(squares(model(x)), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def saliency(model: nn.Module, x: Tensor) -> Seen:
    x = x.clone().requires_grad_()
    backward(model(x).sum())
    return {} if x.grad is None else {"saliency": x.grad}


def saliency_by_grad(model: nn.Module, x: Tensor) -> Seen:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x)
    return {"saliency": slope}


def evaluated(model: nn.Module, x: Tensor) -> Seen:
    with torch.no_grad():
        return {"output": model(x)}


def inferred(model: nn.Module, x: Tensor) -> Seen:
    with torch.inference_mode():
        output: Tensor = model(x)
    return {"output": output.clone()}


def activities(model: nn.Module, x: Tensor) -> Seen:
    """Feature extraction with gradients enabled: what a hook of the other thread sees is attached."""
    seen: Seen = {}
    net: Any = getattr(model, "module", model)
    handle = net.g.register_forward_hook(lambda m, i, o: seen.update(activity=o))
    try:
        output = model(x)
    finally:
        handle.remove()
    (slope,) = torch.autograd.grad(output.sum(), net.first.weight)
    return {"activity": seen["activity"].detach(), "slope": slope}


def second_derivative(model: nn.Module, x: Tensor) -> Seen:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad((slope**2).sum(), x)
    return {"curvature": curvature}


OTHERS: dict[str, Callable[[nn.Module, Tensor], Seen]] = {
    "evaluated": evaluated,
    "inferred": inferred,
    "saliency-by-grad": saliency_by_grad,
    "activities": activities,
    "second-derivative": second_derivative,
    "trained": lambda model, x: parameter_gradients(model, x, getattr(model, "module", model)),
}


def during_a_pass(
    solver: Any, vertices: Any, other: Callable[[nn.Module, Tensor], Seen], on_wrapper: bool, *, in_thread: bool = True
) -> None:
    """Both passes have, one within the other, what each has alone."""
    plain = build()
    expected, expected_other = parameter_gradients(plain, X, plain), other(build(), 2 * X)
    net = build()
    model = ActivationRelaxation(net, solver=solver, vertices=vertices)
    net.pause.in_thread = in_thread
    net.pause.meanwhile = lambda: other(model if on_wrapper else net, 2 * X)
    found = parameter_gradients(model, X, net)
    (found_other,) = net.pause.got
    assert_same(found_other, expected_other)
    assert_same(found, expected)
    assert_same(parameter_gradients(model, X, net), expected)  # and nothing is left behind


@all_vertices
@all_solvers
@pytest.mark.parametrize("other", OTHERS)
def test_another_thread_uses_the_plain_module(other: str, solver: Any, vertices: Any) -> None:
    during_a_pass(solver, vertices, OTHERS[other], on_wrapper=False)


@all_solvers
@pytest.mark.parametrize("other", ["evaluated", "inferred", "saliency-by-grad", "trained"])
def test_another_thread_uses_the_wrapper(other: str, solver: Any) -> None:
    during_a_pass(solver, "activations", OTHERS[other], on_wrapper=True)


@pytest.mark.parametrize(
    ("other", "solver", "vertices"),
    [("evaluated", solver, vertices) for solver in CONVERGED for vertices in VERTICES]
    + [(other, Equilibrium(), vertices) for other in ("saliency-by-grad", "trained") for vertices in VERTICES]
    + [
        (other, solver, vertices)
        for other in ("saliency-by-grad", "trained")
        for solver in CUTTING
        for vertices in VERTICES
    ],
)
def test_the_plain_module_is_used_within_a_pass(other: str, solver: Any, vertices: Any) -> None:
    """In the same thread, as by a callback that logs. It is the model's own doing: right, or refused."""
    try:
        during_a_pass(solver, vertices, OTHERS[other], on_wrapper=False, in_thread=False)
    except (ValueError, RuntimeError) as error:
        message = str(error)
        assert any(name in message for name in ("Net", "pause", "calls grad")), message
        assert "vertices=" in message or "Equilibrium()" in message
        assert solver != Equilibrium()


@all_solvers
def test_the_wrapper_is_used_within_its_own_pass(solver: Any) -> None:
    during_a_pass(solver, "activations", OTHERS["trained"], on_wrapper=True, in_thread=False)


@all_solvers
def test_saliency_fills_grad_in_another_thread(solver: Any) -> None:
    """``backward()``, whose gradient of the input was None."""
    expected = saliency(build(), 2 * X)
    net = build()
    model = ActivationRelaxation(net, solver=solver)
    net.pause.meanwhile = lambda: saliency(net, 2 * X)
    model(X)
    assert_same(net.pause.got[0], expected)


@all_solvers
def test_two_wrappers_share_a_part(solver: Any) -> None:
    """A common body with two heads, each trained in its own thread."""
    torch.manual_seed(1)
    body = build()

    def with_head() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(body, nn.Tanh(), nn.Linear(3, 2)).double()

    nets = with_head(), with_head()
    expected = [parameter_gradients(net, x, net) for net, x in zip(nets, (X, 2 * X), strict=True)]
    one, two = (ActivationRelaxation(net, solver=solver) for net in nets)
    body.pause.meanwhile = lambda: parameter_gradients(two, 2 * X, nets[1])
    assert_same(parameter_gradients(one, X, nets[0]), expected[0])
    assert_same(body.pause.got[0], expected[1])


@cutting_solvers
def test_two_settings_on_one_module(solver: Any) -> None:
    """Two wrappers of the same module with different vertices, one pass within the other."""
    net = build()
    wanted = parameter_gradients(net, X, net), parameter_gradients(net, 2 * X, net)
    one = ActivationRelaxation(net, solver=solver)
    two = ActivationRelaxation(net, solver=solver, vertices="modules")
    net.pause.meanwhile = lambda: parameter_gradients(two, 2 * X, net)
    assert_same(parameter_gradients(one, X, net), wanted[0])
    assert_same(net.pause.got[0], wanted[1])
    assert one.last_relaxation is not None
    assert one.last_relaxation.vertices == 2


@cutting_solvers
def test_each_pass_counts_its_own_vertices(solver: Any) -> None:
    """A pass of another thread is no vertex of this one, whatever its gradients."""
    net = build()
    model = ActivationRelaxation(net, solver=solver)
    net.pause.meanwhile = lambda: net(2 * X).sum().item()
    backward(squares(model(X)))
    assert model.last_relaxation is not None
    assert model.last_relaxation.vertices == 2


@cutting_solvers
def test_names_of_vertices_are_their_own(solver: Any) -> None:
    """Evaluation in another thread does not count as a call of a vertex's module."""
    net = build()
    model = ActivationRelaxation(net, solver=solver, measure_residual=True)
    net.pause.meanwhile = lambda: evaluated(net, X)
    backward(squares(model(X)))
    assert model.last_relaxation is not None
    assert model.last_relaxation.residuals is not None
    assert set(model.last_relaxation.residuals) == {"f", "g"}


@pytest.mark.parametrize("vertices", ["activations", "modules", "operations"])
def test_another_threads_overflow_is_its_own(vertices: Any) -> None:
    """Equilibrium watches its own pass for infinities, not that of the plain module."""
    net = build()
    model = ActivationRelaxation(net, solver=Equilibrium(), vertices=vertices)

    def infinite() -> str:
        x = X.clone().requires_grad_()
        backward((net(x) * torch.inf).sum())
        return "done"

    net.pause.meanwhile = infinite
    model(X)
    assert net.pause.got == ["done"]


@pytest.mark.parametrize(
    "frozen", [Frozen(relaxation_derivative=False), Frozen(update_derivative=False, update_activity=False)], ids=str
)
def test_inference_while_the_model_runs_again(frozen: Any) -> None:
    """In the backward pass: the other thread's output is that of its own input."""
    expected = evaluated(build(), 2 * X)
    net = build()
    model = ActivationRelaxation(net, solver=Euler(0.5, 4), frozen=frozen)
    got: list[dict[str, Tensor]] = []  # not an attribute, since a rerun leaves these as they were
    net.pause.meanwhile = lambda: got.append(evaluated(net, 2 * X))
    loss = squares(model(X))
    in_forward = len(got)
    backward(loss)
    assert len(got) > in_forward
    for found in got:
        assert_same(found, expected)


@all_solvers
def test_a_copy_that_is_made_within_a_pass_is_plain(solver: Any) -> None:
    """A thread that keeps a running average or a checkpoint copies the module while a pass is recorded."""
    net = build()
    expected = parameter_gradients(net, X, net)
    model = ActivationRelaxation(net, solver=solver)
    net.pause.meanwhile = lambda: copy.deepcopy(net)
    backward(squares(model(X)))
    (copied,) = net.pause.got
    copied.pause.meanwhile = None
    assert_same(parameter_gradients(copied, X, copied), expected)
    assert saliency(copied, X).keys() == {"saliency"}


@all_solvers
def test_a_checkpoint_of_the_whole_module_within_a_pass(solver: Any) -> None:
    """What is saved is the module without what a pass has put on it."""
    net = build()
    expected = parameter_gradients(net, X, net)
    model = ActivationRelaxation(net, solver=solver)
    file = io.BytesIO()
    net.pause.meanwhile = lambda: torch.save(net, file)
    backward(squares(model(X)))
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_same(parameter_gradients(loaded, X, loaded), expected)


@pytest.mark.parametrize("solver", [ClosedForm(0.5, 300), Equilibrium()], ids=lambda s: type(s).__name__)
def test_many_threads_train_one_wrapper(solver: Any) -> None:
    """Free-running: each thread's gradients are those of its own minibatch."""
    net = build()
    inputs = [X * (1 + i / 7) for i in range(4)]
    expected = [parameter_gradients(net, x, net) for x in inputs]
    model = ActivationRelaxation(net, solver=solver)
    start = threading.Barrier(len(inputs))

    def train(i: int) -> list[Seen]:
        start.wait(timeout=60)
        return [parameter_gradients(model, inputs[i], net) for _ in range(25)]

    with ThreadPoolExecutor(len(inputs)) as pool:
        found = list(pool.map(train, range(len(inputs))))
    for each, wanted in zip(found, expected, strict=True):
        for gradients in each:
            assert_same(gradients, wanted)


@all_vertices
@all_solvers
def test_a_pass_whose_part_runs_in_another_thread(solver: Any, vertices: Any) -> None:
    """A model that sends a branch to a thread of its own is right, or refused."""

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), Net(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            enabled = torch.is_grad_enabled()

            def branch() -> Tensor:
                with torch.set_grad_enabled(enabled):
                    y: Tensor = self.right(x)
                return y

            with ThreadPoolExecutor(1) as pool:
                there = pool.submit(branch)
                here = self.left(x)
                output: Tensor = self.head(here[:, :3] + there.result(timeout=60))
            return output

    outcome = right_or_refused(Parallel, [X], solver=solver, vertices=vertices, names=["Parallel", "right"])
    if solver == Equilibrium():
        assert outcome == "right"


def _vertices_of(solver: Any, make: Callable[[nn.Module], nn.Module], use_first: bool) -> tuple[Any, Seen, list[str]]:
    net = build()
    parts = nn.Sequential(net.first, net.f, make(nn.Sequential(net.second, net.g)), net.head)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # the compiler has its own
        if use_first:
            backward(squares(parts(X)))
            parts.zero_grad()
        model = ActivationRelaxation(parts, solver=solver)
        backward(squares(model(X)))
    assert model.last_relaxation is not None
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return model.last_relaxation.vertices, found, [str(w.message) for w in caught if "relax" in str(w.message)]


@cutting_solvers
@pytest.mark.parametrize("use_first", [False, True])
def test_a_compiled_block_keeps_its_vertices_or_says_so(use_first: bool, solver: Any) -> None:
    """Compiled and used before wrapping, a block's compiled code runs past the hooks of its modules."""
    torch.compiler.reset()
    try:
        expected = _vertices_of(solver, lambda block: block, use_first)

        def compiled(block: nn.Module) -> nn.Module:
            done: Any = torch.compile(block, backend="eager")
            return done  # type: ignore[no-any-return]

        vertices, found, said = _vertices_of(solver, compiled, use_first)
    except (ValueError, RuntimeError) as error:
        message = str(error)
        assert "compile" in message
    else:
        assert_same(found, expected[1])
        assert vertices == expected[0] or any("compile" in message for message in said), (
            f"{vertices} vertices of {expected[0]}, in silence"
        )
    finally:
        torch.compiler.reset()


@all_vertices
@all_solvers
def test_the_plain_module_is_right_after_a_pass(solver: Any, vertices: Any) -> None:
    """Control: one after the other, nothing is left on the module."""
    net = build()
    expected = saliency_by_grad(net, X)
    for _ in range(2):
        backward(squares(ActivationRelaxation(net, solver=solver, vertices=vertices)(X)))
        assert_same(saliency_by_grad(net, X), expected)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@cutting_solvers
@pytest.mark.parametrize("vertices", ["activations", "operations"])
def test_overlapping_passes_leave_the_compiler_as_it_was(vertices: Any, solver: Any) -> None:
    """A pass that is watched runs what is compiled as it was written, and the compiler knows one stance for all
    threads: the pass that began first ends first here."""
    began, ended = threading.Event(), threading.Event()
    calls: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append("compiled")
        return graph

    def wait() -> None:
        began.set()
        assert ended.wait(60)

    torch.compiler.reset()
    torch.compile(lambda x: x + 1, backend=backend)(X)
    first, second = build(), build()
    models = [ActivationRelaxation(net, solver=solver, vertices=vertices) for net in (first, second)]
    second.pause.in_thread = False
    second.pause.meanwhile = wait
    with ThreadPoolExecutor(1) as pool:

        def start() -> None:
            other = pool.submit(models[1], X)
            assert began.wait(60)
            waiting.append(other)

        waiting: list[Any] = []
        first.pause.in_thread = False
        first.pause.meanwhile = start
        models[0](X)
        ended.set()
        waiting[0].result(timeout=60)
    before = len(calls)
    assert torch.equal(torch.compile(lambda x: x - 1, backend=backend)(X), X - 1)
    assert len(calls) == before + 1
    torch.compiler.reset()
