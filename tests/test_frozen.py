"""What is frozen and what is not, against loops written from equations (1) and (2), and the laws of both."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from relaxprop import (
    ActivationRelaxation,
    ClosedForm,
    Continuous,
    Equilibrium,
    Euler,
    Frozen,
    drop_derivatives,
    use_feedback,
)
from relaxprop.feedback import FeedbackRule
from relaxprop.solvers import Solver
from tests.compare import assert_literal, assert_same, assert_same_gradients, gradients, largest_distance, squares
from tests.literal import NETWORKS, network, simulate
from tests.problems import COMBINATIONS, PROBLEMS, A, B, C, D, Problem, name_of

LINEAR: tuple[Solver, ...] = (
    ClosedForm(0.3, 7),
    ClosedForm(0.3, 7, order="sequential"),
    ClosedForm(0.9, 300),
    Continuous(2.0),
    Equilibrium(),
)
SIMULATED: tuple[Solver, ...] = tuple(
    Euler(0.3, 7, order=order) for order in ("simultaneous", "sequential", "asynchronous")
)
EULER = Euler(0.3, 4)


# ---------------------------------------------------------------------------------------------------------- the loops


def assert_same_as_loop(
    name: str,
    frozen: Frozen,
    solver: Solver,
    *,
    rule: FeedbackRule = "symmetric",
    dropped: tuple[bool, bool] = (False, False),
    tolerance: float | None = None,
) -> None:
    module, z = network(name)
    use_feedback(module, rule)
    expected = simulate(name, module, z, frozen, solver, dropped)
    drop_derivatives(module, relaxation=dropped[0], update=dropped[1])
    found = gradients(ActivationRelaxation(module, solver=solver, frozen=frozen), (z,))
    assert_literal(found, expected, tolerance)


every_network = pytest.mark.parametrize("name", NETWORKS)


# -------------------------------------------------------------------------------------------------- every combination


@every_network
@pytest.mark.parametrize("frozen", COMBINATIONS, ids=name_of)
@pytest.mark.parametrize("solver", SIMULATED, ids=name_of)
def test_simulated_relaxation(name: str, frozen: Frozen, solver: Solver) -> None:
    assert_same_as_loop(name, frozen, solver)


@every_network
@pytest.mark.parametrize("frozen", [f for f in COMBINATIONS if f.relaxation_derivative], ids=name_of)
@pytest.mark.parametrize("solver", LINEAR, ids=name_of)
def test_relaxation_in_closed_form(name: str, frozen: Frozen, solver: Solver) -> None:
    assert_same_as_loop(name, frozen, solver)


@every_network
@pytest.mark.parametrize("frozen", [f for f in COMBINATIONS if not f.relaxation_derivative], ids=name_of)
def test_unfrozen_relaxation_in_continuous_time(name: str, frozen: Frozen) -> None:
    # The solver allows an error of 1e-8 per step. Max-pooling's choice jumps later on: see the next test.
    assert_same_as_loop(name, frozen, Continuous(0.02 if name == "cnn" else 2.0), tolerance=1e-6)


def test_a_derivative_that_jumps_is_not_integrated_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relaxprop.solvers.MAX_EVALUATIONS", 500)
    module, z = network("cnn")
    model = ActivationRelaxation(module, solver=Continuous(2.0), frozen=Frozen(relaxation_derivative=False))
    with pytest.raises(RuntimeError, match=r"Continuous\(duration=2.0\): .* more than 500 evaluations; .* use Euler"):
        gradients(model, (z,))


@every_network
@pytest.mark.parametrize("frozen", [f for f in COMBINATIONS if f.input], ids=name_of)
@pytest.mark.parametrize("rule", ["learned", "random", "sign"])
@pytest.mark.parametrize("dropped", [(False, False), (True, True), (True, False), (False, True)])
def test_every_rule_under_every_condition(
    name: str, frozen: Frozen, rule: FeedbackRule, dropped: tuple[bool, bool]
) -> None:
    linear: tuple[Solver, ...] = (ClosedForm(0.3, 7), Equilibrium()) if frozen.relaxation_derivative else ()
    for solver in (*linear, *SIMULATED):
        assert_same_as_loop(name, frozen, solver, rule=rule, dropped=dropped)


@pytest.mark.parametrize("frozen", [f for f in COMBINATIONS if f.input], ids=name_of)
@pytest.mark.parametrize("rule", ["learned", "random", "sign"])
@pytest.mark.parametrize("dropped", [(True, False), (False, True)])
def test_every_rule_under_every_condition_in_continuous_time(
    frozen: Frozen, rule: FeedbackRule, dropped: tuple[bool, bool]
) -> None:
    assert_same_as_loop("mlp", frozen, Continuous(0.5), rule=rule, dropped=dropped, tolerance=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_integration_is_as_exact_at_any_scale_of_the_loss(scale: float, dtype: torch.dtype) -> None:
    """Where the model is linear there is nothing to unfreeze, and the Poisson weights are exact."""
    torch.manual_seed(4)
    layers = [nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 2)]
    module, z = nn.Sequential(*layers).to(dtype), torch.randn(3, 4, dtype=dtype)
    found = []
    for frozen in (Frozen(), Frozen(relaxation_derivative=False)):
        module.zero_grad()
        model = ActivationRelaxation(module, solver=Continuous(15.0), vertices=[layers[1], layers[3]], frozen=frozen)
        (scale * model(z).abs().square().sum()).backward()
        found.append([p.grad for p in module.parameters()])
    for exact, integrated in zip(*found, strict=True):
        assert exact is not None
        assert integrated is not None
        assert float((integrated - exact).norm()) < 0.01 * float(exact.norm())


# ----------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("solver", [EULER, ClosedForm(0.3, 4), Continuous(2.0), Equilibrium()], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_all_frozen_is_the_default(problem: Problem, solver: Solver) -> None:
    found, expected = problem.gradients(solver, frozen=Frozen(True, True, True, True)), problem.gradients(solver)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        actual = found[name]
        assert (actual is None and gradient is None) or torch.equal(actual, gradient)  # type: ignore[arg-type]


@pytest.mark.parametrize("frozen", [A, B, C], ids=name_of)
@pytest.mark.parametrize("solver", [EULER, Continuous(2.0)], ids=str)
def test_a_linear_network_has_one_derivative(frozen: Frozen, solver: Solver) -> None:
    def network() -> nn.Module:
        linear = [nn.Linear(4, 5), nn.Hardtanh(-1e9, 1e9), nn.Linear(5, 5), nn.Hardtanh(-1e9, 1e9)]
        return nn.Sequential(*linear, nn.Linear(5, 2))

    problem = Problem("linear", network, lambda: (torch.randn(3, 4),), squares, depth=2)
    tolerance = 1e-6 if isinstance(solver, Continuous) else None
    assert_same_gradients(problem.gradients(solver, frozen=frozen), problem.gradients(solver), tolerance)
    changed = problem.gradients(solver, frozen=D)
    assert largest_distance(changed, problem.gradients(solver)) > 0.1  # the activity is another thing


def test_biases_have_no_presynaptic_activity() -> None:
    problem = PROBLEMS[0]
    found, expected = problem.gradients(EULER, frozen=D), problem.gradients(EULER)
    for name, gradient in expected.items():
        actual = found[name]
        assert actual is not None
        assert gradient is not None
        if "weight" not in name or name == "0.weight":  # nor does what reads the input change
            assert_same(actual, gradient, name)
        else:
            assert float((actual - gradient).norm()) > 1e-3 * float(gradient.norm()), name


# An output that is held does not start at its activity.
FREE = [problem for problem in PROBLEMS if not problem.ends_in_vertex and problem.name != "nested"]


@pytest.mark.parametrize("frozen", COMBINATIONS, ids=name_of)
@pytest.mark.parametrize("problem", FREE, ids=name_of)
def test_states_that_have_not_moved_are_activities(problem: Problem, frozen: Frozen) -> None:
    still = Euler(1e-9, 1)
    found, expected = problem.gradients(still, frozen=frozen), problem.gradients(still)
    # Unfrozen, an input's error is its state, not what drives it.
    compared = [n for n, g in expected.items() if g is not None and (frozen.input or not n.startswith("input"))]
    assert_literal(found, {name: expected[name] for name in compared}, 1e-7)
