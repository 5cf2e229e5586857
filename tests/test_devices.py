"""On every device that is there the results are those of the processor; a GPU is waited for once in a backward pass.

What a GPU is looked at for at the end of a pass is tried on the processor too, as if it were one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relaxprop import (
    PAPER,
    ActivationRelaxation,
    ClosedForm,
    Continuous,
    DirectFeedback,
    Equilibrium,
    EquilibriumPropagation,
    Euler,
    Frozen,
    NonFiniteStateError,
    PredictiveCoding,
    UnconvergedWarning,
    finite,
    use_feedback,
)
from relaxprop import rerun as rerun_module
from relaxprop import rule as rule_module
from relaxprop._pytorch import OperationMode
from relaxprop.lab.config import RunConfig
from relaxprop.lab.training import train
from relaxprop.solvers import Solver
from tests.compare import Gradients, assert_same_gradients, backward, gradients, of_parameters, squares
from tests.lab.problem import few_digits
from tests.problems import COMBINATIONS, PROBLEMS, SOLVERS, Problem, mlp, name_of

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])
WITHOUT_CHANCE = tuple(s for s in SOLVERS if getattr(s, "order", None) != "asynchronous")


def on(device: str, x: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, x)


def at_home(found: Gradients) -> Gradients:
    return {name: None if x is None else x.cpu() for name, x in found.items()}


# ---------------------------------------------------------------------------------------------- the same on each device


@every_device
@pytest.mark.parametrize("solver", WITHOUT_CHANCE, ids=name_of)
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if not p.mixes_samples], ids=name_of)
def test_gradients(device: str, problem: Problem, solver: Solver) -> None:
    module, inputs = problem.build()
    model = ActivationRelaxation(module.to(device), solver=solver, vertices=problem.vertices)
    found = at_home(gradients(model, on(device, inputs), problem.loss))
    assert_same_gradients(found, problem.gradients(solver), 1e-9)


@every_device
@pytest.mark.parametrize("frozen", COMBINATIONS, ids=str)
def test_what_is_not_frozen(device: str, frozen: Frozen) -> None:
    def of(device: str) -> Gradients:
        torch.manual_seed(0)
        model = ActivationRelaxation(mlp(5, 7, 6, 3).double().to(device), solver=Euler(0.3, 7), frozen=frozen)
        return at_home(gradients(model, [torch.randn(4, 5).double().to(device)]))

    assert_same_gradients(of(device), of("cpu"), 1e-9)


@every_device
def test_a_model_that_draws_is_run_again_with_what_it_drew(device: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(5, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
    )
    model = ActivationRelaxation(network.to(device), solver=Euler(1.0, 4), frozen=Frozen(relaxation_derivative=False))
    x, losses = torch.randn(8, 5).to(device), []
    for again in (False, True):
        torch.manual_seed(3)
        if again:
            torch.rand(1)  # the processor's generator is another's on a GPU
            torch.manual_seed(3)
        model.zero_grad()
        loss = squares(model(x))
        backward(loss)
        losses.append((float(loss.detach()), torch.rand(3, device=device).cpu(), at_home(of_parameters(network))))
    (first, after, found), (second, later, same) = losses
    assert first == second
    assert torch.equal(after, later)
    assert_same_gradients(same, found, 1e-6)


@every_device
@pytest.mark.parametrize("rule", ["dfa", "pc", "ep", "random", "learned"])
def test_other_rules(device: str, rule: str) -> None:
    def of(device: str) -> Gradients:
        torch.manual_seed(0)
        network = mlp(5, 7, 6, 3).double()
        x, target = torch.randn(4, 5).double().to(device), torch.randn(4, 3).double().to(device)

        def loss(y: Tensor, t: Tensor) -> Tensor:
            return ((y - t) ** 2).sum()

        if rule in ("random", "learned"):
            use_feedback(network, "random" if rule == "random" else "learned")
            backward(loss(ActivationRelaxation(network.to(device))(x), target))
        elif rule == "dfa":
            backward(loss(DirectFeedback(network.to(device))(x), target))
        else:
            kind = PredictiveCoding if rule == "pc" else EquilibriumPropagation
            backward(kind(network.to(device), loss, step_size=0.1, num_steps=5)(x, target=target))
        return at_home(of_parameters(network))

    assert_same_gradients(of(device), of("cpu"), 1e-9)


@every_device
def test_a_run_of_the_lab(device: str) -> None:
    digits, config = few_digits(), RunConfig(epochs=1, alignment_every=1000)
    (found,), (expected,) = train(config, digits, device=device), train(config, digits)
    assert found.train_loss == pytest.approx(expected.train_loss, rel=1e-3)
    assert found.test_accuracy == pytest.approx(expected.test_accuracy, abs=0.02)


# ------------------------------------------------------------------------------------------- how often it is waited for


@no_gpu
@pytest.mark.parametrize("solver", [PAPER, ClosedForm(), Equilibrium(), Euler(0.1, 20)], ids=str)
def test_a_gpu_is_waited_for_once(solver: Solver) -> None:
    model = ActivationRelaxation(mlp(5, *[7] * 12, 3).cuda(), solver=solver)
    x = torch.randn(4, 5).cuda()
    for _ in range(3):  # the first passes look at the model
        loss = squares(model(x))
        backward(loss)
    loss = squares(model(x))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")
            backward(loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "called a synchronizing" in str(w.message)]) <= 1


@pytest.fixture
def all_are_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "is_away", lambda x: True)


@pytest.mark.usefixtures("all_are_away")
@pytest.mark.parametrize("solver", [Euler(), PAPER, ClosedForm(), Equilibrium()], ids=str)
def test_what_is_not_finite_is_found_at_the_end(solver: Solver) -> None:
    torch.manual_seed(0)
    network, x = mlp(3, 4, 4, 2), torch.ones(1, 3)
    model = ActivationRelaxation(network, solver=solver)
    for _ in range(3):
        with pytest.raises(NonFiniteStateError, match="vertex '3'"):
            backward((math.inf * model(x)).sum())
        network.zero_grad()
        backward(model(x).sum())  # the one pass knows nothing of the other
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.usefixtures("all_are_away")
def test_a_pass_that_ends_by_another_error_leaves_nothing_to_the_next() -> None:
    torch.manual_seed(0)
    model, x = ActivationRelaxation(mlp(3, 4, 4, 2), solver=Equilibrium()), torch.ones(1, 3, requires_grad=True)
    y = model(x)

    def interrupt(gradient: Tensor) -> None:
        raise KeyError("of the user's own")

    handle = x.register_hook(interrupt)  # type: ignore[no-untyped-call]
    with pytest.raises(KeyError):
        y.backward(torch.full_like(y, math.inf), retain_graph=True)
    handle.remove()
    model.zero_grad()
    y.backward(torch.ones_like(y), retain_graph=True)
    with pytest.raises(NonFiniteStateError):
        y.backward(torch.full_like(y, math.nan))


@pytest.mark.usefixtures("all_are_away")
def test_states_of_several_types_are_looked_at_together() -> None:
    numbers = [torch.tensor(2.0), torch.tensor(3.0).double(), torch.tensor(1 + 1j), torch.tensor(5.0)]
    assert sorted(map(abs, finite._numbers(numbers))) == pytest.approx([2**0.5, 2, 3, 5])
    assert finite._numbers([]) == []


# --------------------------------------------------------------------------------------------------------- CUDA graphs

SWITCHES = [frozen for frozen in COMBINATIONS if not frozen.relaxation_derivative]
STEPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    **{
        str(solver): partial(ActivationRelaxation, solver=solver, check_finite=False)
        for solver in (PAPER, ClosedForm(), Equilibrium(), Euler(0.1, 20), Euler(0.1, 20, order="sequential"))
    },
    **{
        f"unfrozen {i}": partial(ActivationRelaxation, solver=Euler(0.3, 7), frozen=frozen, check_finite=False)
        for i, frozen in enumerate(SWITCHES)
    },
    "direct feedback": partial(DirectFeedback, check_finite=False),
}


def training_step(rule: str, device: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    network = mlp(5, 7, 6, 3).double().to(device)
    model = STEPS[rule](network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = squares(model(x))
        backward(loss)
        optimizer.step()
        return loss.detach()

    return network, step


class Reads(OperationMode):
    """Within it, an operation whose value decides what Python does next is an error, as in the capture of a graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        generators = [x for x in args if isinstance(x, Tensor) and x.dtype is torch.uint8]  # of the processor
        by_value = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        assert generators or by_value.isdisjoint(func.tags), f"{func} is waited for"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", STEPS)
def test_a_step_decides_nothing_by_values(rule: str) -> None:
    _, step = training_step(rule, "cpu")
    x = torch.randn(4, 5).double()
    for _ in range(2):  # the first passes look at the model
        step(x)
    with Reads():  # type: ignore[no-untyped-call]
        step(x)


def test_a_value_that_is_read_would_be_noticed() -> None:
    with pytest.raises(AssertionError, match="is waited for"), Reads():  # type: ignore[no-untyped-call]
        torch.ones(1).item()


@no_gpu
@pytest.mark.parametrize("rule", STEPS)
def test_a_captured_step_trains_as_the_steps_do(rule: str) -> None:
    minibatches = torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(0)).double().cuda()
    network, step = training_step(rule, "cuda")
    losses = [float(step(x)) for x in minibatches]
    other, step = training_step(rule, "cuda")
    side, x = torch.cuda.Stream(), minibatches[0].clone()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = [float(step(x.copy_(each))) for each in minibatches[:3]]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        loss = step(x)
    for each in minibatches[3:]:
        x.copy_(each)
        graph.replay()
        found.append(float(loss))
    assert found == pytest.approx(losses, rel=1e-9)
    for one, expected in zip(other.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-12)


def drawing() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


UNFROZEN = Frozen(relaxation_derivative=False)
NOT_REPEATED: list[tuple[dict[str, Any], str]] = [
    ({"check_finite": True}, "check_finite=True looks at the states"),
    ({"measure_residual": True}, "measure_residual=True reads"),
    ({"solver": Euler(tolerance=0.1)}, "solver=Euler.* reads after every step whether to stop"),
    ({"solver": Euler(order="asynchronous")}, "draws the vertices of every step"),
    ({"solver": Continuous(), "frozen": UNFROZEN}, "unfrozen, is integrated outside of PyTorch"),
    ({"solver": Euler(0.3, 7), "frozen": UNFROZEN}, "the model draws random numbers"),
]


@pytest.mark.parametrize(("options", "reason"), NOT_REPEATED, ids=[reason for _, reason in NOT_REPEATED])
def test_what_a_graph_cannot_repeat_is_refused(
    options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = ActivationRelaxation(drawing(), **{"check_finite": False} | options)
    x = torch.randn(3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvergedWarning)
        backward(squares(model(x)))
    for module in (rule_module, rerun_module):
        monkeypatch.setattr(module, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=reason):
        model(x)


def test_the_capture_of_a_first_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5)
    model = ActivationRelaxation(mlp(5, 4, 2), check_finite=False)
    with monkeypatch.context() as patch:
        patch.setattr(rule_module, "is_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="run some training steps on a side stream before the capture"):
            model(x)
    backward(squares(model(x)))
    monkeypatch.setattr(rule_module, "is_capturing", lambda: True)
    model(x)  # the same is allowed then
