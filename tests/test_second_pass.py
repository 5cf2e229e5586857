"""Nothing of one pass leaks into the next, and nothing of a part of a graph into the whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relaxprop import ActivationRelaxation, ClosedForm, Equilibrium, Euler, Frozen
from relaxprop.solvers import Solver
from tests.compare import assert_same, assert_same_gradients, backward, gradients, squares
from tests.problems import PROBLEMS, STOPPED_EARLY, Problem, mlp


@pytest.mark.parametrize("solver", STOPPED_EARLY, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_later_passes_are_like_the_first(problem: Problem, solver: Solver) -> None:
    """The first pass hands on copies, later ones do not: the gradient must not tell."""
    module, inputs = problem.build()
    buffers = [(b, b.clone()) for b in module.buffers()]
    model = ActivationRelaxation(module, solver=solver, vertices=problem.vertices)
    found = []
    for _ in range(3):
        for buffer, value in buffers:
            buffer.copy_(value)
        torch.manual_seed(2)
        found.append(gradients(model, inputs, problem.loss))
    assert_same_gradients(found[1], found[0])
    assert_same_gradients(found[2], found[0])


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.act, self.deep, self.a, self.b = (
            nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.act(self.trunk(x))
        return self.a(self.act(self.deep(h))), self.b(h)


@pytest.mark.parametrize(
    "solver", [ClosedForm(0.9, 200), Euler(0.9, 200), Euler(0.9, 200, order="sequential")], ids=str
)
def test_the_loss_of_one_head_and_then_of_both(solver: Solver) -> None:
    """One recorded pass serves several losses (retain_graph), whichever outputs they depend on."""
    module, x = TwoHeads().double(), torch.randn(5, 3).double()
    parameters = list(module.parameters())
    found: list[tuple[Tensor | None, ...]] = []
    expected: list[tuple[Tensor | None, ...]] = []
    for model, gathered in ((ActivationRelaxation(module, solver=solver), found), (module, expected)):
        ya, yb = model(x)
        for loss in (squares(ya), squares(ya) + squares(yb), squares(yb), squares(yb) * 2 + squares(ya)):
            gathered.append(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
    for actual, exact in zip(found, expected, strict=True):
        for g, b in zip(actual, exact, strict=True):
            assert (g is None) == (b is None)
            if g is not None and b is not None:
                assert_same(g, b)


def test_a_kept_activity_is_refused_in_every_pass() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.act, self.above = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.act(self.below(x))
            output: Tensor = self.above(self.kept)
            return output

    module, x = Keeps(), torch.randn(2, 3)
    model = ActivationRelaxation(module)
    for _ in range(2):
        backward(squares(model(x)))
    loss = squares(model(x)) + squares(module.kept)
    with pytest.raises(RuntimeError, match="return it from the model"):
        backward(loss)


def test_a_hook_on_an_activity_acts_in_every_pass() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.act, self.above = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.below(x))
            h.register_hook(lambda g: 2 * g)
            output: Tensor = self.above(h)
            return output

    module, x = Hooked().double(), torch.randn(2, 3).double()
    expected = gradients(module, (x,))
    model = ActivationRelaxation(module, solver=ClosedForm(1.0, 5))
    for _ in range(3):
        assert_same_gradients(gradients(model, (x,)), expected)


def test_a_model_that_calls_none_of_its_vertices_is_told_so() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act = nn.Linear(3, 2), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x))

    model = ActivationRelaxation(Functional())
    with pytest.warns(UserWarning, match="none of the vertices .act, …. was called.*vertices='modules'"):
        model(torch.randn(2, 3))


def test_a_subclass_of_an_activation_is_a_vertex() -> None:
    class Mine(nn.Tanh):
        pass

    model = ActivationRelaxation(nn.Sequential(nn.Linear(3, 4), Mine(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    backward(squares(model(torch.randn(2, 3))))
    assert model.last_relaxation is not None
    assert model.last_relaxation.vertices == 2


def test_vertices_given_as_a_module_list_stay_out_of_the_state() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    module = Layers()
    larger = nn.Sequential(ActivationRelaxation(module, vertices=module.layers), nn.Linear(3, 1))
    larger.load_state_dict(larger.state_dict())
    assert len(larger.state_dict()) == 6
    with pytest.raises(TypeError, match=r"vertices must be .* got Sequential"):
        ActivationRelaxation(nn.Sequential(nn.Sequential(nn.Tanh())), vertices=nn.Sequential(nn.Tanh()))


def test_half_precision_activities_relax_in_float32() -> None:
    """Steps of 0.001 are below bfloat16's resolution, so states kept in it would never move."""
    module, x = mlp(4, 8, 8, 2), torch.randn(16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(
            ActivationRelaxation(module, solver=ClosedForm(0.001, 700)), (x,), lambda y: squares(y.float())
        )
        found = gradients(ActivationRelaxation(module, solver=Euler(0.001, 700)), (x,), lambda y: squares(y.float()))
    for name, gradient in expected.items():
        assert gradient is not None
        assert (actual := found[name]) is not None  # noqa: RUF018
        assert_same(actual.float(), gradient.float(), name, tolerance=5e-2)


def test_the_default_says_once_when_a_graph_is_too_deep_for_it() -> None:
    x = torch.randn(2, 3)
    deep, shallow = mlp(*[3] * 12), mlp(3, 3, 3)
    model = ActivationRelaxation(deep)
    with pytest.warns(UserWarning, match=r"of depth 10, .* pass solver=ClosedForm\(0\.5, \d+\)"):
        backward(squares(model(x)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(squares(model(x)))
        for module, solver in ((deep, ClosedForm(0.1, 100)), (deep, Equilibrium()), (shallow, ClosedForm())):
            backward(squares(ActivationRelaxation(module, solver=solver)(x)))
        backward(squares(ActivationRelaxation(shallow)(x)))


def _replace_the_activation(network: nn.Sequential) -> None:
    network[1] = nn.Sigmoid()


def _append_to_a_part(network: nn.Sequential) -> None:
    part = network[2]
    assert isinstance(part, nn.Sequential)
    part.append(nn.Tanh())


def _take_an_activation_out(network: nn.Sequential) -> None:
    del network[1]


def _change_the_class(network: nn.Sequential) -> None:
    network[1].__class__ = nn.Identity  # no activation any more


def _take_nothing_out_and_replace_the_activation(network: nn.Sequential) -> None:
    del network[9:]  # PyTorch gives the module another dict of its children
    network[1] = nn.ReLU()


CHANGES = (
    _replace_the_activation,
    _append_to_a_part,
    _take_an_activation_out,
    _change_the_class,
    _take_nothing_out_and_replace_the_activation,
)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("solver", [ClosedForm(0.3, 4), Equilibrium()], ids=str)
def test_a_model_that_changed_between_passes_is_like_one_just_wrapped(
    change: Callable[[nn.Sequential], None], solver: Solver
) -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        layers = [nn.Linear(3, 3), nn.Tanh(), nn.Sequential(nn.Linear(3, 3)), nn.SiLU(), nn.Linear(3, 2)]
        return nn.Sequential(*layers).double()

    torch.manual_seed(1)
    x = torch.randn(5, 3, dtype=torch.float64)
    changed, afresh = network(), network()
    model = ActivationRelaxation(changed, solver=solver, measure_residual=True)
    gradients(model, [x])
    change(changed)
    change(afresh)
    wrapped = ActivationRelaxation(afresh, solver=solver, measure_residual=True)
    assert_same_gradients(gradients(model, [x]), gradients(wrapped, [x]))
    assert model.last_relaxation is not None
    assert wrapped.last_relaxation is not None
    assert model.last_relaxation.residuals is not None
    assert wrapped.last_relaxation.residuals is not None
    assert model.last_relaxation.residuals.keys() == wrapped.last_relaxation.residuals.keys()


def test_vertices_chosen_anew_hold_from_the_next_pass_on() -> None:
    torch.manual_seed(0)
    model = ActivationRelaxation(mlp(3, 4, 4, 2), solver=Euler(0.3, 4))
    x = torch.randn(5, 3)
    chosen = [model.module.get_submodule("1")]

    def vertices_that_relaxed() -> int | None:
        gradients(model, [x])
        assert model.last_relaxation is not None
        return model.last_relaxation.vertices

    for vertices, expected in (("activations", 2), ("modules", 5), (chosen, 1)):
        model.vertices = vertices  # type: ignore[assignment]
        assert vertices_that_relaxed() == expected
    model.vertices = nn.ModuleList([*chosen, model.module.get_submodule("3")])
    assert vertices_that_relaxed() == 2
    model.vertices = (m for m in model.module.children() if not isinstance(m, nn.Linear))
    for _ in range(2):
        assert vertices_that_relaxed() == 2


SETTINGS: list[dict[str, Any]] = [
    {"solver": Euler(0.3, 4)},
    {"frozen": Frozen(update_activity=False)},
    {"frozen": Frozen(update_derivative=False), "output": "relaxed"},
    {"output": "relaxed"},
    {"vertices": "modules"},
    {"solver": Euler(0.3, 4), "frozen": Frozen(relaxation_derivative=False)},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_that_are_set_later_are_those_of_a_new_wrapper(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network, x = mlp(3, 4, 4, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    model = ActivationRelaxation(network, solver=ClosedForm(0.3, 4))
    before = gradients(model, [x])
    for name, value in settings.items():
        setattr(model, name, value)
    found = gradients(model, [x])
    assert_same_gradients(
        found, gradients(ActivationRelaxation(network, **{"solver": ClosedForm(0.3, 4)} | settings), [x])
    )
    if list(settings) != ["solver"]:
        with pytest.raises(AssertionError):
            assert_same_gradients(found, before)
