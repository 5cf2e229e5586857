"""What is frozen and what is not, against loops written from equations (1) and (2)."""

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
from tests.compare import assert_literal, gradients
from tests.literal import NETWORKS, network, simulate
from tests.problems import COMBINATIONS, name_of

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
