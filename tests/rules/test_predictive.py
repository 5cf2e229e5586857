"""Strict predictive coding, and equilibrium propagation on its energy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from relaxprop import (
    ActivationRelaxation,
    DivergedError,
    EquilibriumPropagation,
    Euler,
    NonFiniteStateError,
    PredictiveCoding,
    drop_derivatives,
    use_feedback,
)
from relaxprop.graph import vector_jacobian_product
from relaxprop.rules.predictive import EnergyRule
from relaxprop.vertices import find_vertices
from tests.compare import (
    Gradients,
    assert_same,
    assert_same_gradients,
    backward,
    largest_distance,
    of_parameters,
    refuses,
    squares,
)
from tests.literal import affine, weight
from tests.problems import PROBLEMS, Problem, mlp, name_of

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)


# ----------------------------------------------------------------------------------- the energy, as a literal slow loop


class Literal:
    """F of a problem at any activities, by plain hooks: each vertex's output is replaced by its activity.

    The activities move down ∂F/∂v by plain autograd, and the gradients are ∂F/∂W.
    """

    def __init__(self, problem: Problem, factor: float = 1.0) -> None:
        self.problem, self.factor = problem, factor
        self.module, inputs = problem.build()
        self.vertices = find_vertices(self.module, problem.vertices)
        self.inputs = [x.requires_grad_() if x.is_floating_point() else x for x in pytree.tree_leaves(inputs)]
        self.structure = pytree.tree_structure(inputs)
        self.start: list[Tensor] = []
        self.run(None)

    def run(self, activities: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
        """E and L."""
        errors: list[Tensor] = []
        given = None if activities is None else iter(activities)

        def replace_output(_part: nn.Module, _args: Any, output: Tensor) -> Tensor:
            if given is None:
                self.start.append(output.detach().clone())
                return output
            v = next(given)
            errors.append(v - output.clone())
            return v.clone()

        handles = [part.register_forward_hook(replace_output) for part in self.vertices]
        torch.manual_seed(2)
        loss = self.factor * self.problem.loss(self.module(*pytree.tree_unflatten(self.inputs, self.structure)))
        for handle in handles:
            handle.remove()
        return torch.stack([e.square().sum() / 2 for e in errors] or [loss * 0]).sum(), loss

    def moved(self, step_size: float, num_steps: int, beta: float = 1.0) -> list[Tensor]:
        activities = list(self.start)
        for _ in range(num_steps):
            leaves = [v.clone().requires_grad_() for v in activities]
            energy, loss = self.run(leaves)
            slopes = torch.autograd.grad(energy + beta * loss, leaves, allow_unused=True)
            activities = [v if g is None else v - step_size * g for v, g in zip(activities, slopes, strict=True)]
        return activities

    def gradients(self, activities: Sequence[Tensor], beta: float = 1.0) -> Gradients:
        wanted = [x for x in self.inputs if x.is_floating_point()]
        names = [*(f"input {i}" for i in range(len(wanted))), *(n for n, _ in self.module.named_parameters())]
        energy, loss = self.run([v.detach() for v in activities])
        found = torch.autograd.grad(energy + beta * loss, [*wanted, *self.module.parameters()], allow_unused=True)
        return dict(zip(names, found, strict=True))


def by_rule(
    kind: type[EnergyRule], problem: Problem, factor: float = 1.0, **options: Any
) -> tuple[Gradients, EnergyRule]:
    module, inputs = problem.build()
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in pytree.tree_leaves(inputs)]
    inputs = pytree.tree_unflatten(leaves, pytree.tree_structure(inputs))
    rule: Any = kind
    if problem.name == "own-loss":
        model = rule(module, vertices=problem.vertices, **options)
    else:
        model = rule(module, lambda result, target: problem.loss(result), vertices=problem.vertices, **options)
    torch.manual_seed(2)
    loss = model(*inputs) if problem.name == "own-loss" else model(*inputs, target=None)
    backward(factor * loss)
    found: Gradients = {f"input {i}": x.grad for i, x in enumerate(x for x in leaves if x.is_floating_point())}
    return found | of_parameters(module), model


def assert_equal(found: Gradients, expected: Gradients, tolerance: float | None = None) -> None:
    """Where the loop finds a zero, none may have been made."""
    missing = {name for name, g in found.items() if g is None}
    for name in missing:
        g = expected[name]
        assert g is None or not bool(g.any())
    kept = {name: g for name, g in expected.items() if name not in missing}
    assert_same_gradients({name: g for name, g in found.items() if name not in missing}, kept, tolerance)


@pytest.mark.parametrize("schedule", [(0.1, 1), (0.1, 7), (0.15, 4)], ids=str)
@every_problem
def test_predictive_coding_is_the_literal_loop(problem: Problem, schedule: tuple[float, int]) -> None:
    """On chains, branches, convolutions, recurrent and residual graphs, with dropout and batch norm."""
    literal = Literal(problem)
    expected = literal.gradients(literal.moved(*schedule))
    found, model = by_rule(PredictiveCoding, problem, step_size=schedule[0], num_steps=schedule[1])
    assert_equal(found, expected)
    phase = model.last_phase
    assert phase is not None
    assert (phase.depth, phase.num_steps, phase.passes) == (problem.depth, schedule[1], schedule[1])
    energy = literal.run(literal.moved(*schedule))[0].detach()
    assert phase.energy == pytest.approx(float(energy), rel=1e-6)


@pytest.mark.parametrize("centred", [True, False])
@every_problem
def test_equilibrium_propagation_is_the_literal_loop(problem: Problem, centred: bool) -> None:
    literal, beta = Literal(problem), 0.03
    found, model = by_rule(EquilibriumPropagation, problem, beta=beta, centred=centred, step_size=0.2, num_steps=6)
    up, down = (literal.gradients(literal.moved(0.2, 6, b), b) for b in (beta, -beta))
    expected: Gradients = {}
    for name, g in up.items():
        other = down[name]
        assert (g is None) == (other is None)
        if g is not None and other is not None:
            expected[name] = (g - other) / (2 * beta) if centred else g / beta
        else:
            expected[name] = None
    assert_equal(found, expected, 1e-9)
    assert model.last_phase is not None
    assert model.last_phase.passes == 6 * (1 + centred)


@pytest.mark.parametrize("kind", [PredictiveCoding, EquilibriumPropagation])
def test_a_factor_outside_of_the_loss(kind: type[EnergyRule]) -> None:
    """Part of predictive coding's loss; of equilibrium propagation's gradient alone."""
    problem, options = PROBLEMS[2], {"step_size": 0.1, "num_steps": 8}
    found, _ = by_rule(kind, problem, 0.25, **options)
    if kind is PredictiveCoding:
        literal = Literal(problem, 0.25)
        assert_equal(found, literal.gradients(literal.moved(0.1, 8)))
    else:
        whole, _ = by_rule(kind, problem, **options)
        assert_equal(found, {name: None if g is None else 0.25 * g for name, g in whole.items()})


# ------------------------------------------------------------------------------------------- independent formulas


def labelled() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(6, 5).double(), torch.eye(3).double()[torch.tensor([0, 2, 1, 1, 0, 2])]


def half_squares(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).sum() / 2


def settled(
    network: Any, x: Tensor, t: Tensor, eta: float, steps: int, beta: float = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Whittington and Bogacz's perceptron by matrices: values v_1, v_2, and the errors ε_1, ε_2 and ε_3, the output's.

    The output's value is held at the target: its energy ½ ‖t − f_3‖² is the loss.
    """
    v1 = torch.tanh(affine(network[0], x))
    v2 = torch.tanh(affine(network[2], v1))

    def errors() -> list[Tensor]:
        f2 = torch.tanh(affine(network[2], v1))
        return [v1 - torch.tanh(affine(network[0], x)), v2 - f2, beta * (t - affine(network[4], v2))]

    for _ in range(steps):
        e1, e2, e3 = errors()
        slope = 1 - torch.tanh(affine(network[2], v1)) ** 2
        v1, v2 = v1 + eta * (-e1 + (slope * e2) @ weight(network[2])), v2 + eta * (-e2 + e3 @ weight(network[4]))
    return [v1, v2], errors()


def outer(network: Any, x: Tensor, values: list[Tensor], errors: list[Tensor]) -> dict[str, Tensor]:
    """−Σ (∂f/∂W)^T ε."""
    v1, v2 = values
    d1 = (1 - torch.tanh(affine(network[0], x)) ** 2) * errors[0]
    d2 = (1 - torch.tanh(affine(network[2], v1)) ** 2) * errors[1]
    return {
        "0.weight": -d1.T @ x, "0.bias": -d1.sum(0), "2.weight": -d2.T @ v1, "2.bias": -d2.sum(0),
        "4.weight": -errors[2].T @ v2, "4.bias": -errors[2].sum(0),
    }  # fmt: skip


@pytest.mark.parametrize("kind", [PredictiveCoding, EquilibriumPropagation])
def test_training_is_that_of_the_papers_formula(kind: Any) -> None:
    x, t = labelled()
    torch.manual_seed(0)
    network = mlp(5, 8, 7, 3).double()
    by_hand: Any = copy.deepcopy(network)
    model = kind(network, half_squares, step_size=0.15, num_steps=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(x, target=t)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        if kind is PredictiveCoding:
            steps = outer(by_hand, x, *settled(by_hand, x, t, 0.15, 12))
        else:
            up, down = (outer(by_hand, x, *settled(by_hand, x, t, 0.15, 12, b)) for b in (0.01, -0.01))
            steps = {name: (g - down[name]) / 0.02 for name, g in up.items()}
        with torch.no_grad():
            for name, p in by_hand.named_parameters():
                p.sub_(0.05 * steps[name])
    for (name, p), q in zip(network.named_parameters(), by_hand.parameters(), strict=True):
        assert_same(p.detach(), q.detach(), name, 1e-10)
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------------------ laws


def small(problem: Problem) -> Problem:
    """The same with smaller weights, whose activities come to rest sooner."""

    def module() -> nn.Module:
        made = problem.module()
        with torch.no_grad():
            for p in made.parameters():
                p.mul_(0.7)
        return made

    return replace(problem, module=module)


AT_REST = {"step_size": 0.4, "num_steps": 400}
LAWFUL = [small(p) for p in PROBLEMS if p.name in ("mlp", "branches", "residual", "nested")]


@pytest.mark.parametrize("problem", LAWFUL, ids=name_of)
def test_predictive_coding_at_rest_goes_to_backpropagation_with_first_order_in_the_losss_scale(
    problem: Problem,
) -> None:
    exact = problem.gradients()
    errors = []
    for scale in (0.02, 0.01):
        found, _ = by_rule(PredictiveCoding, problem, scale, **AT_REST)
        errors.append(largest_distance({n: None if g is None else g / scale for n, g in found.items()}, exact))
    assert errors[1] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(("centred", "factor"), [(True, 4), (False, 2)])
@pytest.mark.parametrize("problem", LAWFUL, ids=name_of)
def test_equilibrium_propagation_goes_to_backpropagation_with_second_order_in_beta(
    problem: Problem, centred: bool, factor: float
) -> None:
    exact = problem.gradients()
    errors = []
    for beta in (0.02, 0.01):
        found, model = by_rule(EquilibriumPropagation, problem, beta=beta, centred=centred, **AT_REST)
        errors.append(largest_distance(found, exact))
        assert model.last_phase is not None
        assert model.last_phase.residual is not None
        assert model.last_phase.residual < 1e-8
    assert errors[1] < (0.01 if centred else 0.1)
    assert errors[0] / errors[1] == pytest.approx(factor, rel=0.1)


def test_fixed_predictions_are_activation_relaxation_from_zero() -> None:
    """Where strict predictive coding's error is small, at rest, both are the same."""
    problem, scale = LAWFUL[0], 1e-4
    found, _ = by_rule(PredictiveCoding, problem, scale, **AT_REST)
    module, inputs = problem.build()
    model = ActivationRelaxation(module, solver=Euler(0.4, 200), initial="zero")
    backward(scale * problem.loss(model(*inputs)))
    assert_same_gradients({n: g for n, g in found.items() if "input" not in n}, of_parameters(module), 1e-3)


def test_a_sample_does_not_see_its_batch_mates() -> None:
    x, t = labelled()
    torch.manual_seed(0)
    model = PredictiveCoding(mlp(5, 8, 7, 3).double(), half_squares, num_steps=9, keep_states=True)
    backward(model(x, target=t))
    assert model.last_phase is not None
    together = model.last_phase.states
    backward(model(x[2:4], target=t[2:4]))
    alone = model.last_phase.states
    assert together is not None
    assert alone is not None
    assert len(alone) == 2
    for ours, theirs in zip(alone.values(), together.values(), strict=True):
        assert_same(ours, theirs[2:4])


def test_no_error_moves_nothing() -> None:
    x, _ = labelled()
    network = mlp(5, 8, 7, 3).double()
    model = PredictiveCoding(network, half_squares, num_steps=5)
    backward(model(x, target=network(x).detach()))
    for g in of_parameters(network).values():
        assert g is not None
        assert not bool(g.any())


@pytest.mark.parametrize("kind", [PredictiveCoding, EquilibriumPropagation])
def test_backwards_weights_carry_the_errors(kind: Any) -> None:
    """Set to the weights they are exact; at random they are not."""
    x, t = labelled()
    torch.manual_seed(0)
    network = mlp(5, 8, 7, 3).double()

    def found(module: nn.Module) -> Gradients:
        module.zero_grad()
        backward(kind(module, half_squares, num_steps=9)(x, target=t))
        return {name: p.grad for name, p in module.named_parameters() if "feedback" not in name}

    exact = found(network)
    use_feedback(network, "random")
    assert largest_distance(found(network), exact) > 0.1
    for layer in network:
        if isinstance(layer, nn.Linear):
            held: Any = layer
            held.feedback.copy_(layer.weight.detach())
    assert_same_gradients(found(network), exact)


def test_dropped_derivatives_are_left_out_in_both_places() -> None:
    x, t = labelled()
    torch.manual_seed(0)
    network: Any = mlp(5, 8, 7, 3).double()
    drop_derivatives(network, update=False)
    backward(PredictiveCoding(network, half_squares, step_size=0.15, num_steps=2)(x, target=t))
    # After two steps v_1 has moved by W_2 alone, without f', and its update has f'.
    v1, v2 = (y := torch.tanh(affine(network[0], x))), torch.tanh(affine(network[2], y))
    moved = 0.15 * (t - affine(network[4], v2)) @ weight(network[4])
    e1 = 0.15 * moved @ weight(network[2])
    grad = of_parameters(network)["0.weight"]
    assert grad is not None
    assert_same(grad, -((1 - v1**2) * e1).T @ x)


# ------------------------------------------------------------------------------------- the wrapper, and what it refuses


def test_the_loss_is_within_and_the_output_is_there_as_ever() -> None:
    x, t = labelled()
    network = mlp(5, 8, 7, 3).double()
    model = PredictiveCoding(network, half_squares, num_steps=3)
    assert torch.equal(model(x), network(x))
    expected = half_squares(network(x), t).detach()
    assert_same(model(x, target=t).detach(), expected)
    with torch.no_grad():
        assert_same(model(x, target=t), expected)
    assert model.state_dict().keys() == network.state_dict().keys()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.zero_grad()
        for each in (model, twin):
            backward(each(x, target=t))
        assert_same_gradients(of_parameters(twin), of_parameters(model))
    with refuses(RuntimeError, "PredictiveCoding needs the loss at moved activities", "model(x, target=…)"):
        backward(squares(model(x)))


def test_a_loss_that_is_a_module_is_no_vertex() -> None:
    x, t = labelled()
    model = PredictiveCoding(mlp(5, 8, 3).double(), nn.MSELoss(reduction="sum"), vertices="modules", keep_states=True)
    backward(model(x, target=t))
    assert model.last_phase is not None
    assert model.last_phase.vertices == 3


def test_a_module_without_a_loss_is_refused() -> None:
    x, t = labelled()
    network = mlp(5, 8, 3).double()
    with refuses(ValueError, "result of shape (6, 3) is none", "EquilibriumPropagation(module, loss_fn)"):
        backward(squares(EquilibriumPropagation(network)(x)))
    with refuses(ValueError, "loss_fn must return a loss of one number, got a tensor of shape (6, 3)"):
        backward(PredictiveCoding(network, lambda y, t: (y - t) ** 2)(x, target=t).sum())
    with refuses(TypeError, "loss_fn must map the module's result and the target to a loss, got 'mse'"):
        PredictiveCoding(network, "mse")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [PredictiveCoding, EquilibriumPropagation])
def test_options_outside_their_range_are_refused_by_name(kind: Any) -> None:
    network = mlp(3, 4, 2)
    for step_size in (0, 2.0, -0.1, float("nan")):
        with refuses(ValueError, "step_size must be in (0, 2)"):
            kind(network, half_squares, step_size=step_size)
    with refuses(ValueError, "num_steps must be at least 1, got 0"):
        kind(network, half_squares, num_steps=0)
    with refuses(TypeError, "num_steps must be an integer"):
        kind(network, half_squares, num_steps=1.5)
    with refuses(ValueError, "vertices='operations'"):
        kind(network, half_squares, vertices="operations")
    model = kind(network, half_squares)
    with refuses(ValueError, "step_size must be in (0, 2)"):
        model.settings = replace(model.settings, step_size=3)


def test_beta_outside_its_range_is_refused_by_name() -> None:
    network = mlp(3, 4, 2)
    for beta in (0, -0.1, float("inf"), float("nan")):
        with refuses(ValueError, "beta must be positive and finite"):
            EquilibriumPropagation(network, half_squares, beta=beta)
    with refuses(TypeError, "beta must be a positive number, got '1'"):
        EquilibriumPropagation(network, half_squares, beta="1")  # type: ignore[arg-type]
    with refuses(TypeError, "centred must be True or False, got 1"):
        EquilibriumPropagation(network, half_squares, centred=1)  # type: ignore[arg-type]


def test_activities_that_run_away_are_refused_by_name() -> None:
    x, t = labelled()
    torch.manual_seed(0)
    network: Any = nn.Sequential(nn.Linear(5, 8), nn.Identity(), nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 3))
    network.double()
    with torch.no_grad():
        network[2].weight.mul_(5)
    vertices = [network[1], network[3]]
    model = PredictiveCoding(network, half_squares, step_size=0.9, num_steps=6, vertices=vertices)
    with refuses(DivergedError, "the energy rose from", "lower the step size"):
        backward(model(x, target=t))
    model.settings = replace(model.settings, num_steps=2000)
    with refuses(NonFiniteStateError, "is not finite", "lower the step size"):
        backward(model(x, target=t))
    model.settings = replace(model.settings, check_finite=False)
    backward(model(x, target=t))
    model.zero_grad()
    model.settings = replace(model.settings, check_finite=True, step_size=0.01, num_steps=6)
    backward(model(x, target=t))
    error = pickle.loads(pickle.dumps(DivergedError(1.0, 2.0, "less")))
    assert str(error) == "the energy rose from 1 to 2 over the phase: less"


def test_a_backward_that_is_not_linear_is_refused() -> None:
    class Clamp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradient: Tensor) -> Tensor:
            return gradient[0].clamp(-0.1, 0.1)

    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.f, self.head = nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(Clamp.apply(self.f(self.layer(x))))  # type: ignore[no-untyped-call]
            return y

    x, t = labelled()
    model = PredictiveCoding(Clamped().double(), half_squares, num_steps=3)
    with refuses(RuntimeError, "the backward of Clamp", "is not linear", "PredictiveCoding cannot train it"):
        backward(model(x, target=t))


def test_a_module_that_cannot_be_run_again_is_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.f = nn.Linear(5, 3), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            y: Tensor = self.f(self.layer(x)) * len(calls)
            return y

    calls: list[int] = []
    x, t = labelled()
    with pytest.raises(RuntimeError, match="a state that is not put back") as caught:
        PredictiveCoding(Counts().double(), half_squares)(x, target=t)
    assert "PredictiveCoding runs the module again" in caught.value.__notes__[0]


@pytest.mark.parametrize("kind", [PredictiveCoding, EquilibriumPropagation])
def test_what_it_costs(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """n forward passes, n products onto activities and one onto weights, in each phase."""
    x, t = labelled()
    network = mlp(5, 8, 7, 3).double()
    model = kind(network, half_squares, num_steps=4)
    passes: list[int] = []
    products: list[int] = []
    network[2].register_forward_pre_hook(lambda *_: passes.append(1))
    for _ in range(2):  # the first passes of a setting are looked at, and learn where copies are needed
        backward(model(x, target=t))
    passes.clear()
    original = vector_jacobian_product

    def counted(*args: Any, **kwargs: Any) -> Any:
        products.append(1)
        return original(*args, **kwargs)

    for room in ("graph", "update", "rules.predictive"):
        monkeypatch.setattr(f"relaxprop.{room}.vector_jacobian_product", counted)
    backward(model(x, target=t))
    phase = model.last_phase
    phases = 1 if kind is PredictiveCoding else 2
    assert phase.passes == 4 * phases == len(passes) - 1
    assert phase.products == 5 * phases == len(products)


@pytest.mark.parametrize("kind", [PredictiveCoding, EquilibriumPropagation])
def test_vertices_have_the_networks_own_names(kind: Any) -> None:
    network, x, y = mlp(4, 5, 5, 3), torch.randn(2, 4), torch.randn(2, 3)
    for loss_fn in (nn.MSELoss(), nn.functional.mse_loss):
        model = kind(network, loss_fn, num_steps=2, keep_states=True)
        backward(model(x, target=y))
        assert list(model.last_phase.states) == ["1", "3"]
