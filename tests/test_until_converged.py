"""The default trains what backpropagation trains; what a finite relaxation phase leaves is measured and told."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import warnings
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from relaxprop import (
    PAPER,
    ActivationRelaxation,
    ClosedForm,
    Continuous,
    Equilibrium,
    Euler,
    Frozen,
    UnconvergedWarning,
    alignment,
    drop_derivatives,
    steps_to_converge,
    use_feedback,
)
from relaxprop.feedback import FeedbackRule
from relaxprop.recording import InitialState
from relaxprop.solvers import Solver
from relaxprop.transients import Order, discrete_hops
from tests.compare import (
    assert_literal,
    assert_same,
    assert_same_gradients,
    backward,
    gradients,
    largest_distance,
    refuses,
    squares,
)
from tests.literal import LiteralChain, literal_problems, relax
from tests.problems import PROBLEMS, Problem, mlp, name_of

ROUNDING = float(torch.finfo(torch.float64).eps)
UNTIL_CONVERGED = (ClosedForm(), ClosedForm(0.7, order="sequential"), Euler(0.7), Euler(0.7, order="sequential"))
REMEDIES = (Equilibrium(), ClosedForm(), Euler(), ClosedForm(0.1, steps_to_converge(12, 0.1, ROUNDING)))


def perceptron(depth: int, activation: type[nn.Module], dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(depth)
    sizes = [64] * (depth + 1)
    layers = [layer for n, m in pairwise(sizes) for layer in (nn.Linear(n, m), activation())]
    return nn.Sequential(*layers, nn.Linear(64, 10)).to(dtype)


def mean_cross_entropy(output: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, torch.arange(len(output)) % 10)


# ---------------------------------------------------------------------------------------------------- the default


@pytest.mark.parametrize("keep_states", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("depth", [1, 2, 3, 6, 12])
def test_the_default_gives_backpropagations_gradients_of_a_mean(
    depth: int, activation: type[nn.Module], keep_states: bool
) -> None:
    network, x = perceptron(depth, activation), torch.rand(64, 64).double()
    model = ActivationRelaxation(network, keep_states=keep_states)
    for scale in (1, 1e-6):  # as gradient accumulation or a gradient scaler has it

        def loss(output: Tensor, scale: float = scale) -> Tensor:
            return scale * mean_cross_entropy(output)

        assert_same_gradients(gradients(model, (x,), loss), gradients(network, (x,), loss))


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
@pytest.mark.parametrize("solver", UNTIL_CONVERGED, ids=name_of)
def test_without_a_number_of_steps_every_graph_converges(problem: Problem, solver: Solver) -> None:
    assert_same_gradients(problem.gradients(solver, keep_states=True), problem.gradients())


def test_an_asynchronous_relaxation_converges() -> None:
    problem = PROBLEMS[2]
    assert_same_gradients(problem.gradients(Euler(0.7, order="asynchronous")), problem.gradients())


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
@pytest.mark.parametrize("step_size", [0.1, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("depth", [1, 3, 12])
def test_the_number_of_steps_is_the_fewest_that_leave_rounding(depth: int, step_size: float, order: Order) -> None:
    euler, closed = Euler(step_size, order=order), ClosedForm(step_size, order=order)
    n = euler.steps(depth)
    assert n == steps_to_converge(depth, step_size, ROUNDING, order=order)
    for solver in (euler, closed):
        assert solver.hops(depth).remaining <= ROUNDING
    if n > 1:
        assert discrete_hops(depth, step_size, n - 1, order).remaining > ROUNDING


@pytest.mark.parametrize("depth", [1, 3, 6])
@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_without_a_number_of_steps_smooth_activations_unfrozen_come_to_rest(depth: int, order: Order) -> None:
    """The relaxation is nonlinear then, and no plan is exact. With tanh the states are at their own fixed point all the
    same (results/unfrozen), and three times as many steps change no gradient."""
    network, x = perceptron(depth, nn.Tanh), torch.rand(16, 64).double()
    frozen = Frozen(relaxation_derivative=False)
    model = ActivationRelaxation(network, solver=Euler(0.2, order=order), frozen=frozen, measure_residual=True)
    found = gradients(model, (x,), mean_cross_entropy)
    record = model.last_relaxation
    assert record is not None
    assert record.residuals is not None
    assert max(record.residuals.values()) <= 1e-11
    assert record.num_steps is not None
    model.solver = Euler(0.2, 3 * record.num_steps, order=order)
    assert_same_gradients(found, gradients(model, (x,), mean_cross_entropy))


def test_the_record_says_how_many_steps_were_taken() -> None:
    model = ActivationRelaxation(mlp(4, 5, 5, 3), solver=Euler(0.5))
    backward(squares(model(torch.randn(2, 4))))
    record = model.last_relaxation
    assert record is not None
    assert (record.depth, record.num_steps, record.converged) == (2, steps_to_converge(2, 0.5, ROUNDING), True)


def test_a_tolerance_stops_before_the_planned_steps() -> None:
    model = ActivationRelaxation(mlp(4, 5, 5, 3).double(), solver=Euler(0.5, tolerance=1e-3))
    backward(squares(model(torch.randn(2, 4).double())))
    assert model.last_relaxation is not None
    assert model.last_relaxation.converged
    assert (model.last_relaxation.num_steps or math.inf) < steps_to_converge(2, 0.5, ROUNDING)


def test_papers_setting() -> None:
    assert ClosedForm(0.1, 100) == PAPER


# ------------------------------------------------------------------------------------------------- the initial state


@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("n", [2, 3, 6, 41])
def test_from_zero_it_is_predictive_coding_with_fixed_predictions(n: int, eta: float) -> None:
    """n iterations of it, literally: each takes the errors ε_i = v_i − x̄_i, then moves v_i along −ε_i + Σ_j J_ji^T ε_j,
    the Jacobians and the predictions x̄ being the feedforward pass's. The output's error is ∂L/∂x^L throughout, in the
    sign of gradients."""
    network, z = mlp(4, 6, 5, 5, 3).double(), torch.randn(3, 4).double()
    literal = LiteralChain(network, z)
    predictions = [x.clone() for x in literal.activities]
    v = [x.clone() for x in predictions]
    errors: list[Tensor] = []
    for _ in range(n):
        errors = [v_i - p for v_i, p in zip(v, predictions, strict=True)]
        v = [v_i + eta * (d - e) for v_i, d, e in zip(v, literal.drive(errors), errors, strict=True)]
    model = ActivationRelaxation(network, solver=Euler(eta, n - 1), initial="zero", keep_states=True)
    found = gradients(model, (z,))
    assert model.last_relaxation is not None
    assert model.last_relaxation.states is not None
    for x, e in zip(model.last_relaxation.states.values(), errors, strict=True):
        assert_same(x, e)
    assert_literal(found, literal.gradients(errors))


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
@pytest.mark.parametrize("make", [Euler, ClosedForm])
@pytest.mark.parametrize("n", [1, 3, 30])
def test_zero_start_against_the_literal_loop(n: int, make: type[Euler] | type[ClosedForm], order: Order) -> None:
    for network, z, literal in literal_problems():
        model = ActivationRelaxation(network, solver=make(0.3, n, order=order), initial="zero")
        states = relax(literal, 0.3, n, order, [torch.zeros_like(x) for x in literal.activities])
        assert_literal(gradients(model, (z,)), literal.gradients(states))


def test_continuous_from_zero_is_many_small_steps() -> None:
    network, z, _ = literal_problems()[0]
    exact = gradients(ActivationRelaxation(network, solver=Continuous(1.5), initial="zero"), (z,))
    steps = gradients(ActivationRelaxation(network, solver=ClosedForm(1.5e-6, 10**6), initial="zero"), (z,))
    assert_same_gradients(steps, exact, 1e-5)


@pytest.mark.parametrize("rule", ["learned", "random", "sign"])
@pytest.mark.parametrize("frozen", [Frozen(), Frozen(update_derivative=False), Frozen(update_activity=False)])
def test_from_zero_the_closed_form_is_its_steps_under_every_condition(frozen: Frozen, rule: FeedbackRule) -> None:
    def of(solver: Solver, initial: InitialState) -> dict[str, Tensor | None]:
        torch.manual_seed(3)
        network = use_feedback(drop_derivatives(mlp(4, 6, 5, 3).double(), update=False), rule)
        model = ActivationRelaxation(network, solver=solver, frozen=frozen, initial=initial)
        return gradients(model, (torch.randn(3, 4).double(),))

    assert_same_gradients(of(ClosedForm(0.3, 6), "zero"), of(Euler(0.3, 6), "zero"))
    assert largest_distance(of(Euler(0.3, 6), "feedforward"), of(Euler(0.3, 6), "zero")) > 1e-2


@pytest.mark.parametrize("solver", [Euler(0.7, 80), Continuous(80.0)], ids=name_of)
def test_from_zero_an_unfrozen_relaxation_starts_at_zero(solver: Solver) -> None:
    """Scaled by λ, its states stay near zero, where tanh' is 1: the linear network with f' = 1, to first order in λ."""
    frozen = Frozen(relaxation_derivative=False)
    network, z = mlp(4, 5, 5, 3).double(), torch.randn(3, 4).double()
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    small = 1e-6
    model = ActivationRelaxation(network, solver=solver, frozen=frozen, initial="zero", keep_states=True)
    backward(small * squares(model(z)))
    assert model.last_relaxation is not None
    states = list((model.last_relaxation.states or {}).values())
    output_error = 2 * small * (network(z) - 0.3).detach()
    last = output_error @ network.get_parameter("4.weight").detach()
    assert_same(states[1], last, tolerance=1e-6)
    assert_same(states[0], last @ network.get_parameter("2.weight").detach(), tolerance=1e-6)


def test_an_output_that_is_a_vertex_starts_at_its_gradient() -> None:
    problem = next(p for p in PROBLEMS if p.ends_in_vertex)
    for solver in (Euler(1.0, problem.depth - 1), ClosedForm(1.0, problem.depth - 1)):
        assert_same_gradients(problem.gradients(solver, initial="zero"), problem.gradients())


def test_an_unknown_initial_state() -> None:
    with refuses(ValueError, "initial", "'feedforward' or 'zero'", "'random'"):
        ActivationRelaxation(mlp(3, 4, 2), initial="random")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- the warning


def warned(model: nn.Module, x: Tensor) -> Sequence[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mean_cross_entropy(model(x)).backward()  # type: ignore[no-untyped-call]  # the user's own line
    return [w for w in caught if issubclass(w.category, UnconvergedWarning)]


def test_a_phase_that_does_not_converge_is_told_once_at_the_users_line() -> None:
    network, x = perceptron(6, nn.ReLU), torch.rand(64, 64).double()
    model = ActivationRelaxation(network, solver=PAPER)
    (told,) = warned(model, x)
    lines, start = inspect.getsourcelines(warned)
    assert told.filename == __file__
    assert told.lineno == start + next(i for i, line in enumerate(lines) if "the user's own line" in line)
    for part in ("'1'", "%", "Equilibrium()", "ClosedForm()", "depth 6"):
        assert part in str(told.message)
    assert not warned(model, x)
    model.solver = ClosedForm(0.1, 90)  # another setting
    assert len(warned(model, x)) == 1


def test_the_share_is_measured_and_not_the_weight_alone() -> None:
    """100 steps leave 0.2 % of the initial state at depth 3: little beside a sum's gradient, much beside a mean's."""
    network, x = perceptron(3, nn.ReLU), torch.rand(64, 64).double()
    assert len(warned(ActivationRelaxation(network, solver=PAPER), x)) == 1
    model = ActivationRelaxation(network, solver=PAPER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(1e4 * mean_cross_entropy(model(x)))


def test_the_share_is_what_is_left_of_the_initial_state() -> None:
    """One vertex, one step of η: x = (1 − η) x̄ + η x*, so the share is (1 − η) ‖x̄ − x*‖ / ‖x‖."""
    network, x = mlp(3, 4, 2).double(), torch.randn(2, 3).double()
    model = ActivationRelaxation(network, solver=Euler(0.25, 1), keep_states=True)
    with pytest.warns(UnconvergedWarning) as caught:
        backward(squares(model(x)))
    activity = network[:2](x).detach()
    exact = 2 * (network(x) - 0.3).detach() @ network.get_parameter("2.weight").detach()
    share = 0.75 * (activity - exact).norm() / (0.75 * activity + 0.25 * exact).norm()
    assert f"{float(share):.0%} of the final state of vertex '1'" in str(caught[0].message)


@pytest.mark.parametrize("remedy", REMEDIES, ids=str)
def test_the_remedies_work(remedy: Solver) -> None:
    for depth in (3, 12):
        network, x = perceptron(depth, nn.ReLU), torch.rand(64, 64).double()
        assert len(warned(ActivationRelaxation(network, solver=PAPER), x)) == 1
        assert not warned(ActivationRelaxation(network, solver=remedy), x)
        model = ActivationRelaxation(network, solver=remedy)
        found = alignment(model, mean_cross_entropy, x)
        assert max(a.distance for a in found.values()) < 1e-8


def test_a_copy_is_told_again() -> None:
    network, x = perceptron(6, nn.ReLU), torch.rand(64, 64).double()
    model = ActivationRelaxation(network, solver=PAPER)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(warned(twin, x)) == 1
    assert len(warned(model, x)) == 1
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(warned(twin, x)) == 1


# ---------------------------------------------------------------------------------------------------- the final states


def test_states_are_kept_where_asked_for() -> None:
    network, x = mlp(4, 6, 5, 3).double(), torch.randn(3, 4).double()
    model = ActivationRelaxation(network, keep_states=True)
    backward(squares(model(x)))
    assert model.last_relaxation is not None
    assert model.last_relaxation.states is not None
    assert list(model.last_relaxation.states) == ["1", "3"]
    h1 = network[:2](x).detach().requires_grad_()
    h3 = network[2:4](h1)
    exact = torch.autograd.grad(squares(network[4](h3)), [h1, h3])
    for found, wanted in zip(model.last_relaxation.states.values(), exact, strict=True):
        assert_same(found, wanted)
    plain = ActivationRelaxation(network, solver=PAPER)
    backward(squares(plain(x)))
    assert plain.last_relaxation is not None
    assert plain.last_relaxation.states is None
