"""vertices="operations" beside the other options, diagnostics and files."""

import copy
import io
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from relaxprop import (
    ActivationRelaxation,
    Euler,
    Frozen,
    NonFiniteStateError,
    alignment,
    certificate,
    convergence,
    describe_locality,
    drop_derivatives,
    use_feedback,
)
from relaxprop.solvers import Solver
from tests.compare import Gradients, assert_same_gradients, gradients
from tests.operations.models import (
    EARLY,
    WORKS,
    adds_in_place,
    build,
    every_solver,
    loss_of,
    relaxing,
    returns_all_sorts,
    x34,
)
from tests.problems import mlp


@every_solver
@pytest.mark.parametrize(
    "change",
    [
        lambda m: use_feedback(m, "random"),
        use_feedback,
        drop_derivatives,
        lambda m: drop_derivatives(m, update=False),
        lambda m: drop_derivatives(use_feedback(m, "sign"), relaxation=False),
    ],
)
def test_biological_rules_are_those_of_modules_at_equilibrium(change: Any, solver: Solver) -> None:
    def found(vertices: Any) -> Gradients:
        torch.manual_seed(4)
        module = change(mlp(4, 5, 5, 3).double())
        return gradients(ActivationRelaxation(module, solver=solver, vertices=vertices), (x34(),))

    assert_same_gradients(found("operations"), found("modules"))


@every_solver
def test_a_relaxed_output_ends_at_the_same_equilibrium(solver: Solver) -> None:
    model = relaxing(build(returns_all_sorts), solver, output="relaxed")
    expected = gradients(build(returns_all_sorts), (x34(),), loss_of)
    for _ in range(2):
        assert_same_gradients(gradients(model, (x34(),), loss_of), expected)


@pytest.mark.parametrize("split", ["update_derivative", "update_activity"])
def test_a_split_update_is_refused(split: str) -> None:
    with pytest.raises(ValueError, match=r"vertices='operations' .* frozen="):
        relaxing(mlp(3, 4, 2), frozen=Frozen(**{split: False}))


def test_locality_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="vertices='operations'"):
        describe_locality(relaxing(build(call_linear)), x34())


def call_linear(s: Any, x: Tensor) -> Any:
    return s.b(torch.tanh(s.a(x)))


@every_solver
def test_an_overflow_names_the_operation(solver: Solver) -> None:
    model = relaxing(build(lambda s, x: s.b(s.a(x).pow(3))), solver)
    with torch.no_grad():
        cast(Any, model.module).a.weight.fill_(1e200)
    with pytest.raises(NonFiniteStateError, match=r"vertex '(pow|linear|linear#2)'"):
        gradients(model, (x34(),))


def test_copies_and_files_and_evaluation() -> None:
    module = build(adds_in_place)
    model = relaxing(module, EARLY[2])
    expected = gradients(model, (x34(),), loss_of)
    assert_same_gradients(gradients(copy.deepcopy(model), (x34(),), loss_of), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    build(adds_in_place).load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        found, direct = model(x34()), module(x34())
    assert all(torch.equal(ours, theirs) and not ours.requires_grad for ours, theirs in zip(found, direct, strict=True))
    assert "operations" in repr(model)


@pytest.mark.parametrize("name", ["adds_in_place", "takes_lists", "has_several_results", "checkpoints"])
def test_diagnostics_know_operations(name: str) -> None:
    model = relaxing(build(WORKS[name]), Euler(0.5, 12))
    gradients(model, (x34(),), loss_of)
    assert model.last_relaxation is not None
    weights = certificate(model, x34())
    assert len(weights) == model.last_relaxation.vertices
    assert model.last_relaxation.remaining is not None
    assert max(weights.values()) <= model.last_relaxation.remaining  # an output that is a vertex is not counted
    for below, above in pairwise(list(weights.values())):
        assert below <= above
    curves = convergence(model, loss_of, x34())
    for parameter, measured in curves.measured.items():
        assert measured == pytest.approx(curves.predicted[parameter], rel=1e-6, abs=1e-10)
    found = alignment(relaxing(build(WORKS[name])), loss_of, x34())
    assert all(a.angle < 1e-5 for a in found.values())
