"""`alignment`, `certificate` and `convergence` against gradients by hand, by the literal loop and by autograd."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from relaxprop import (
    ActivationRelaxation,
    ClosedForm,
    Continuous,
    Equilibrium,
    Euler,
    Frozen,
    alignment,
    certificate,
    convergence,
    feedback_alignment,
    use_feedback,
)
from relaxprop.recording import OutputRule
from relaxprop.transients import Order
from tests.compare import Gradients, backward, distance, gradients, squares
from tests.literal import literal_problems, relax
from tests.problems import PROBLEMS, Problem, mlp, name_of, regularised

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)


def named(found: Gradients) -> dict[str, Tensor]:
    return {name: g for name, g in found.items() if g is not None and not name.startswith("input")}


def wrapped(problem: Problem, solver: Any) -> tuple[ActivationRelaxation, tuple[Any, ...]]:
    module, inputs = problem.build()
    return ActivationRelaxation(module, solver=solver, vertices=problem.vertices), inputs


@every_problem
def test_alignment_is_perfect_at_equilibrium(problem: Problem) -> None:
    for solver in (Equilibrium(), ClosedForm(0.9, 100)):
        model, inputs = wrapped(problem, solver)
        found = alignment(model, problem.loss, *inputs)
        assert found.keys() == named(problem.gradients()).keys()
        for a in found.values():
            assert a.cosine == pytest.approx(1, abs=1e-12)
            assert a.angle == pytest.approx(0, abs=1e-9)
            assert a.norm_ratio == pytest.approx(1, abs=1e-10)


def test_alignment_of_a_stopped_relaxation() -> None:
    for module, z, literal in literal_problems():
        stopped, exact = (
            named(literal.gradients(relax(literal, 0.3, 4, "simultaneous"))),
            named(gradients(module, (z,))),
        )
        found = alignment(ActivationRelaxation(module, solver=ClosedForm(0.3, 4)), squares, z)
        assert found.keys() == exact.keys()
        for name, b in exact.items():
            g = stopped[name]
            cosine = float((g * b).sum() / (g.norm() * b.norm()))
            assert found[name].cosine == pytest.approx(cosine, rel=1e-10)
            assert found[name].angle == pytest.approx(math.degrees(math.acos(min(1.0, cosine))), abs=1e-5)
            assert found[name].norm_ratio == pytest.approx(float(g.norm() / b.norm()), rel=1e-10)
            assert found[name].distance == pytest.approx(distance(g, b), rel=1e-8)
        assert min(a.cosine for a in found.values()) < 0.999


def test_alignment_resolves_small_angles() -> None:
    """What is left of the initial state is 0.5^40 = 1e-12 of it, far below the arc cosine's resolution of 1e-8."""
    chain, z = mlp(3, 4, 2).double(), torch.randn(2, 3).double()
    found = alignment(ActivationRelaxation(chain, solver=ClosedForm(0.5, 40)), squares, z)
    assert 0 < found["0.weight"].angle < 1e-9
    assert found["2.weight"].angle < 1e-13


def test_alignment_of_a_gradient_that_is_zero_is_not_a_number() -> None:
    chain = mlp(3, 4, 2).double()
    found = alignment(ActivationRelaxation(chain), lambda y: 0 * squares(y), torch.randn(2, 3).double())
    assert all(math.isnan(a.cosine) and math.isnan(a.angle) and math.isnan(a.norm_ratio) for a in found.values())


@pytest.mark.parametrize("overflow", [math.inf, math.nan])
def test_alignment_of_a_gradient_that_overflows_is_not_a_number(overflow: float) -> None:
    chain = mlp(3, 4, 2).double()
    model = ActivationRelaxation(chain, check_finite=False)
    found = alignment(model, lambda y: overflow * squares(y), torch.randn(2, 3).double())
    assert all(math.isnan(a.cosine) and math.isnan(a.angle) for a in found.values())


def test_feedback_alignment_is_the_angle_between_the_matrices() -> None:
    module: Any = mlp(3, 4, 5, 2).double()
    assert feedback_alignment(module) == {}
    use_feedback(module[2], "random")
    use_feedback(module[4], "sign")
    b, w = module[2].feedback, module[2].weight.detach()
    found = feedback_alignment(ActivationRelaxation(module))
    assert found == feedback_alignment(module)
    assert found.keys() == {"2", "4"}
    assert found["2"].cosine == pytest.approx(float((b * w).sum() / (b.norm() * w.norm())), rel=1e-10)
    assert found["2"].norm_ratio == pytest.approx(float(b.norm() / w.norm()), rel=1e-10)
    # sign(W) · mean |W|, at W: mean |W| over the root of mean W².
    w = module[4].weight.detach()
    assert found["4"].cosine == pytest.approx(float(w.abs().mean() / w.square().mean().sqrt()), rel=1e-10)
    with pytest.raises(TypeError, match="module must be a torch"):
        feedback_alignment(None)  # type: ignore[arg-type]


def test_learned_backwards_weights_that_are_the_weights_align() -> None:
    module: Any = use_feedback(mlp(3, 4, 2).double(), "learned")
    module[0].feedback.data.copy_(2 * module[0].weight)
    found = feedback_alignment(module)["0"]
    assert found.cosine == pytest.approx(1)
    assert found.norm_ratio == pytest.approx(2)


# -------------------------------------------------------------------------------------------------------- certificate

SCHEDULES = [
    Euler(0.3, 7),
    ClosedForm(0.3, 7),
    ClosedForm(0.3, 7, order="sequential"),
    ClosedForm(1.0, 2),
    Continuous(2.5),
    Equilibrium(),
]


@pytest.mark.parametrize("output", ["clamped", "relaxed"])
@pytest.mark.parametrize("ends_in_vertex", [False, True])
@pytest.mark.parametrize("solver", SCHEDULES, ids=str)
def test_the_certificate_is_what_is_left_of_the_initial_state(
    solver: Any, ends_in_vertex: bool, output: OutputRule
) -> None:
    """On a chain of identities x̄ is the same everywhere: driven by nothing, each state is its share of it."""
    layers = [nn.Linear(3, 3) for _ in range(5)]
    for layer in layers:
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    chain: Any = nn.Sequential(*(m for layer in layers for m in (layer, nn.Identity()))).double()
    chain = chain if ends_in_vertex else chain[:-1]
    model = ActivationRelaxation(chain, solver=solver, vertices=list(chain)[1::2], measure_residual=True, output=output)
    z = torch.rand(1, 3).double()
    left = certificate(model, z)
    (0 * model(z).sum()).backward()
    names = ["9", "7", "5", "3", "1"] if ends_in_vertex else ["7", "5", "3", "1"]
    assert [name for name in left if not name.startswith("output")] == names
    for i, layer in enumerate(layers[: len(names)]):
        torch.testing.assert_close(layer.bias.grad, left[str(2 * i + 1)] * z[0], rtol=1e-12, atol=1e-15)


@every_problem
@pytest.mark.parametrize("solver", SCHEDULES, ids=str)
def test_the_certificates_largest_is_the_records(problem: Problem, solver: Any) -> None:
    model, inputs = wrapped(problem, solver)
    model.measure_residual = True  # so that the graph is cut at equilibrium too
    left = certificate(model, *inputs)
    assert model.last_relaxation is None
    backward(problem.loss(model(*inputs)))
    record = model.last_relaxation
    assert record is not None
    assert record.remaining is not None
    if problem.ends_in_vertex:  # one hop less is counted
        assert max(left.values()) <= record.remaining
    else:
        assert max(left.values()) == pytest.approx(record.remaining, rel=1e-12)
    assert len(left) == record.vertices


def test_a_certificate_needs_a_linear_relaxation_and_a_wrapped_model() -> None:
    chain, z = mlp(3, 4, 2).double(), torch.randn(2, 3).double()
    frozen = Frozen(relaxation_derivative=False)
    with pytest.raises(ValueError, match=r"relaxation_derivative=False.*compare the outcome by alignment"):
        certificate(ActivationRelaxation(chain, solver=Euler(), frozen=frozen), z)
    with pytest.raises(TypeError, match="model must be an ActivationRelaxation"):
        certificate(chain, z)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
@pytest.mark.parametrize("step_size", [0.1, 0.6, 1.0, 1.5])
def test_convergence_measures_what_the_literal_loop_does_and_predicts_it(step_size: float, order: Order) -> None:
    for module, z, literal in literal_problems():
        exact, solver = named(gradients(module, (z,))), Euler(step_size, 12, order=order)
        curves = convergence(ActivationRelaxation(module), squares, z, solver=solver)
        assert curves.solver == solver
        assert curves.depth == 3
        assert curves.measured.keys() == curves.predicted.keys() == exact.keys()
        for n in range(13):
            loop = named(literal.gradients(relax(literal, step_size, n, order)))
            for name, b in exact.items():
                expected = distance(loop[name], b)
                assert curves.measured[name][n] == pytest.approx(expected, rel=1e-8, abs=1e-12)
                assert curves.predicted[name][n] == pytest.approx(expected, rel=1e-6, abs=1e-7)


@every_problem
def test_prediction_agrees_with_measurement_for_any_model(problem: Problem) -> None:
    model, inputs = wrapped(problem, ClosedForm(0.4, 15))
    curves = convergence(model, problem.loss, *inputs)
    assert curves.solver == Euler(0.4, 15)
    assert curves.depth == problem.depth
    for name, measured in curves.measured.items():
        assert measured.shape == (16,)
        np.testing.assert_allclose(curves.predicted[name], measured, rtol=1e-6, atol=1e-7)


@every_problem
def test_step_size_one_reaches_zero_after_depth_steps(problem: Problem) -> None:
    model, inputs = wrapped(problem, Euler(1.0, problem.depth + 1))
    curves = convergence(model, problem.loss, *inputs)
    for curve in (*curves.measured.values(), *curves.predicted.values()):
        np.testing.assert_allclose(curve[problem.depth :], 0, atol=1e-11)
    if not problem.ends_in_vertex:
        assert max(curve[problem.depth - 1] for curve in curves.measured.values()) > 1e-4


def test_the_layer_next_to_the_output_is_exact_from_the_start() -> None:
    chain, z = mlp(3, 4, 4, 2).double(), torch.randn(2, 3).double()
    curves = convergence(ActivationRelaxation(chain), squares, z, solver=Euler(0.1, 20))
    assert curves.measured["4.weight"].max() < 1e-12
    one_hop = curves.measured["2.weight"]
    np.testing.assert_allclose(one_hop / one_hop[0], 0.9 ** np.arange(21), rtol=1e-9)


def test_an_asynchronous_order_is_predicted_in_expectation() -> None:
    """One hop above the output the expected error shrinks by 1 − η/2 a step."""
    chain, z = mlp(3, 4, 2).double(), torch.randn(2, 3).double()
    model = ActivationRelaxation(chain, solver=Euler(0.4, 10))
    predicted = convergence(model, squares, z, solver=Euler(0.4, 10, order="asynchronous")).predicted["0.weight"]
    np.testing.assert_allclose(predicted / predicted[0], 0.8 ** np.arange(11), rtol=1e-9)


def test_layers_frozen_or_unused_have_no_curve() -> None:
    problem = next(p for p in PROBLEMS if p.name == "nested")
    model, inputs = wrapped(problem, ClosedForm())
    model.module.get_parameter("head.bias").requires_grad_(False)
    expected = set(named(problem.gradients())) - {"head.bias"}
    assert "other.weight" not in expected
    assert convergence(model, problem.loss, *inputs).measured.keys() == expected
    assert alignment(model, problem.loss, *inputs).keys() == expected


@pytest.mark.parametrize("diagnose", [alignment, convergence])
def test_diagnostics_change_nothing(diagnose: Any) -> None:
    model = ActivationRelaxation(regularised().double())
    x = torch.randn(6, 4).double()
    backward(squares(model(x)))
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    record, random_state = model.last_relaxation, torch.random.get_rng_state()
    diagnose(model, squares, x)
    assert model.last_relaxation is record
    assert torch.equal(torch.random.get_rng_state(), random_state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for p, g in zip(model.parameters(), grads, strict=True):
        assert g is not None
        assert p.grad is not None
        assert torch.equal(p.grad, g)
    assert model.training


def test_diagnostics_compare_on_the_same_dropout_mask() -> None:
    torch.manual_seed(6)
    network = nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Dropout(0.5), nn.Linear(50, 2)).double()
    found = alignment(ActivationRelaxation(network, solver=Equilibrium()), squares, torch.randn(3, 4).double())
    assert all(a.cosine == pytest.approx(1, abs=1e-12) for a in found.values())


def test_diagnostics_work_without_gradient_mode() -> None:
    chain, z = mlp(3, 4, 2).double(), torch.randn(2, 3).double()
    model = ActivationRelaxation(chain, solver=ClosedForm(0.3, 4))
    with torch.no_grad():
        quiet = alignment(model, squares, z), convergence(model, squares, z)
    assert quiet[0] == alignment(model, squares, z)
    for name, curve in convergence(model, squares, z).measured.items():
        np.testing.assert_array_equal(curve, quiet[1].measured[name])


def test_the_models_own_solver_is_the_default() -> None:
    chain, z = mlp(3, 4, 2).double(), torch.randn(2, 3).double()
    for solver, steps in (
        (ClosedForm(0.2, 7, order="sequential"), Euler(0.2, 7, order="sequential")),
        (Euler(0.2, 7), Euler(0.2, 7)),
    ):
        assert convergence(ActivationRelaxation(chain, solver=solver), squares, z).solver == steps
    for model in (ActivationRelaxation(chain, solver=Continuous()), ActivationRelaxation(chain, solver=Equilibrium())):
        assert convergence(model, squares, z, solver=Euler(0.2, 3)).solver == Euler(0.2, 3)


@pytest.mark.parametrize("diagnose", [alignment, convergence])
def test_a_loss_that_is_no_function_is_refused(diagnose: Any) -> None:
    model, x = ActivationRelaxation(mlp(4, 5, 2)), torch.randn(3, 4)
    with pytest.raises(TypeError, match=r"loss_fn must be a function .*alignment\(model, loss_fn, x\), got Tensor"):
        diagnose(model, x, squares)
    with pytest.raises(TypeError, match=r"loss_fn must be a function .*got Tensor in its place"):
        diagnose(model, squares(model(x)), x)


def test_convergence_wants_everything_frozen() -> None:
    model = ActivationRelaxation(mlp(4, 5, 2), frozen=Frozen(update_activity=False))
    with pytest.raises(ValueError, match=r"everything frozen, got a model with frozen=Frozen\(.*update_activity=False"):
        convergence(model, squares, torch.randn(3, 4))
