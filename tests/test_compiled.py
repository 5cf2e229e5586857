"""Steps compiled by ``torch.compile``: the same to rounding, once for each form, and told where they cannot be."""

from __future__ import annotations

import copy
import gc
import shutil
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from relaxprop import ActivationRelaxation, DirectFeedback, EquilibriumPropagation, Euler, Frozen, PredictiveCoding
from relaxprop.compiled import MOST_FORMS
from relaxprop.rule import LearningRule
from tests.compare import assert_same_gradients, backward, gradients, of_parameters, squares
from tests.problems import PROBLEMS, A, C, Problem, mlp, name_of
from tests.test_replay import REPLAYS, looked_at

EULER = Euler(0.3, 5)
pytestmark = pytest.mark.skipif(not REPLAYS, reason="this PyTorch does not tell whether it is undisturbed")
both_conditions = pytest.mark.parametrize("frozen", [A, C], ids=name_of)


class Counting:
    """A backend that runs what it is given, and counts how often it is given something."""

    def __init__(self, factor: float | None = None) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.factor = factor

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        if self.factor is None:
            return graph.forward
        return lambda *args: tuple(self.factor * x for x in graph.forward(*args))


def network(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return mlp(4, 5, 5, 2).double()


def samples(n: int = 3) -> Tensor:
    return torch.linspace(-1, 1, 4 * n).view(n, 4).double().sin()


def relaxed(module: nn.Module, frozen: Frozen = A) -> ActivationRelaxation:
    return ActivationRelaxation(module, solver=EULER, frozen=frozen)


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch.compiler.reset()


@both_conditions
@pytest.mark.parametrize("problem", PROBLEMS[:6], ids=name_of)
def test_the_gradients_are_those_without(problem: Problem, frozen: Frozen) -> None:
    module, inputs = problem.build()
    plain, compiled = (relaxed(copy.deepcopy(module), frozen) for _ in range(2))
    backend = Counting()
    compiled.compile_steps(backend=backend)
    for _ in range(3):
        found, expected = gradients(compiled, inputs), gradients(plain, inputs)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14)
    assert len(backend.graphs) == 1


@pytest.mark.parametrize("rule", [PredictiveCoding, EquilibriumPropagation])
def test_activities_that_move_are_those_without(rule: type[PredictiveCoding | EquilibriumPropagation]) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum()

    plain, compiled = (rule(network(), loss, step_size=0.3, num_steps=6) for _ in range(2))
    backend = Counting()
    compiled.compile_steps(backend=backend)
    x, target = samples(), torch.ones(3, 2).double()
    for _ in range(3):
        for model in (plain, compiled):
            model.zero_grad()
            backward(model(x, target=target))
        found, expected = of_parameters(compiled), of_parameters(plain)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14)
    assert len(backend.graphs) == 1


def test_each_form_is_compiled_once() -> None:
    model, backend = relaxed(network()), Counting()
    model.compile_steps(backend=backend)
    for n in (3, 3, 2, 3, 2):
        backward(squares(model(samples(n))))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert len(backend.graphs) == 2


def test_a_copy_compiles_too_and_other_settings_compile_anew() -> None:
    model, backend = relaxed(network()), Counting()
    model.compile_steps(backend=lambda graph, inputs: backend(graph, inputs))  # a function is not copied
    backward(squares(model(samples())))
    other = copy.deepcopy(model)
    for _ in range(2):
        backward(squares(other(samples())))
    assert len(backend.graphs) == 2
    model.solver = Euler(0.2, 4)
    for _ in range(2):
        backward(squares(model(samples())))
    assert len(backend.graphs) == 3


def test_nothing_of_a_pass_is_kept() -> None:
    class Gated(nn.Module):
        """Whose steps read the input."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = network(), nn.Sequential(nn.Linear(2, 4), nn.Tanh()).double()

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.second(self.first(x)) * x
            return output

    model = relaxed(Gated())
    model.compile_steps(backend=Counting())
    kept = []
    for _ in range(3):
        x = samples().clone()
        kept.append(weakref.ref(x))
        backward(squares(model(x)))
    del x
    gc.collect()
    assert [reference() for reference in kept] == [None, None, None]


def test_what_takes_ever_other_forms_runs_uncompiled() -> None:
    model, plain, backend = relaxed(network()), relaxed(network()), Counting()
    model.compile_steps(backend=backend)
    for n in range(1, MOST_FORMS + 3):
        told = pytest.warns(UserWarning, match="forms") if n == MOST_FORMS + 1 else nullcontext()
        with told:
            found = gradients(model, (samples(n),))
        assert_same_gradients(found, gradients(plain, (samples(n),)))
    assert len(backend.graphs) == MOST_FORMS


def test_a_backend_that_computes_something_else_is_left() -> None:
    model, plain = relaxed(network()), relaxed(network())
    model.compile_steps(backend=Counting(factor=1.01))
    with pytest.warns(UserWarning, match="make something else than without, so they run uncompiled"):
        found = gradients(model, (samples(),))
    assert_same_gradients(found, gradients(plain, (samples(),)))
    assert_same_gradients(gradients(model, (samples(),)), gradients(plain, (samples(),)))


def test_a_backend_that_fails_is_named() -> None:
    def failing(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        raise OSError("no compiler is found")

    model = relaxed(network())
    model.compile_steps(backend=failing)
    with pytest.raises(RuntimeError, match=r"compile_steps: torch.compile fails .*backend='aot_eager'") as caught:
        backward(squares(model(samples())))
    assert "no compiler is found" in str(caught.value.__cause__)


@pytest.mark.parametrize(("options", "message"), [({"nonsense": 1}, "nonsense"), ({"backend": "none"}, "'none'")])
def test_options_that_are_not_known_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    model = relaxed(network())
    with pytest.raises((TypeError, RuntimeError), match=message):
        model.compile_steps(**options)
    model.solver = Euler(0.2, 4)
    backward(squares(model(samples())))


@pytest.mark.parametrize("change", [looked_at, lambda m: nn.Sequential(m, nn.Dropout(0.5))], ids=["hook", "dropout"])
def test_where_the_model_runs_in_every_step_that_is_told(change: Callable[[nn.Module], nn.Module]) -> None:
    model, plain, backend = relaxed(change(network())), relaxed(change(network())), Counting()
    model.compile_steps(backend=backend)

    def seeded(model: nn.Module) -> Any:
        torch.manual_seed(3)
        return gradients(model, (samples(),))

    with pytest.warns(UserWarning, match="nothing is compiled, as the model runs in every step"):
        found = seeded(model)
    assert_same_gradients(found, seeded(plain))
    assert_same_gradients(seeded(model), seeded(plain))  # which warns no more
    assert backend.graphs == []


@pytest.mark.parametrize("make", [
    ActivationRelaxation,
    lambda module: relaxed(module, Frozen(update_derivative=False)),
    DirectFeedback,
], ids=["frozen", "b", "direct"])  # fmt: skip
def test_where_no_step_runs_the_model_there_is_nothing_to_compile(make: Callable[[nn.Module], LearningRule]) -> None:
    with pytest.raises(ValueError, match=r"compile_steps: no step of .* runs the model"):
        make(network()).compile_steps()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_convolutions_by_pytorchs_own_compiler() -> None:
    """In float32, whose rounding differs more between a fused loop and the operations one by one."""

    def convolutional() -> nn.Module:
        torch.manual_seed(1)
        layers = nn.Conv2d(1, 3, 3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 6), nn.Tanh()
        return nn.Sequential(*layers, nn.Linear(6, 2))

    plain, compiled = relaxed(convolutional()), relaxed(convolutional())
    compiled.compile_steps()
    images = torch.rand(4, 1, 8, 8)
    for _ in range(2):
        found, expected = gradients(compiled, (images,)), gradients(plain, (images,))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
