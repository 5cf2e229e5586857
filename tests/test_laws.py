"""The laws of the relaxation phase on chains and on graphs with branches, in float64; numbered as in the project's
mathematics: 1 closed form, 2 step size one, 3 convergence, 4 equilibrium, 5 autograd, 7 batches and zeros."""

import random
from collections.abc import Callable
from itertools import islice
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from relaxprop import PAPER, ActivationRelaxation, ClosedForm, Continuous, Equilibrium, Euler
from relaxprop.graph import SMALL, Graph, States, Vertex
from relaxprop.recording import record
from relaxprop.solvers import Solver
from relaxprop.transients import Order, discrete_hops
from relaxprop.update import gradients as weight_gradients
from tests.compare import (
    Gradients,
    assert_same,
    assert_same_gradients,
    backward,
    distance,
    driven_graph,
    gradients,
    largest_distance,
    random_states,
    squares,
)
from tests.literal import LiteralBranches, LiteralChain, literal_problems, relax
from tests.problems import PROBLEMS, SOLVERS, STOPPED_EARLY, Branches, Problem, activity_gradients, mlp, name_of

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=name_of)
ORDERS: tuple[Order, ...] = ("simultaneous", "sequential", "asynchronous")
every_order = pytest.mark.parametrize("order", ORDERS)
both_orders = pytest.mark.parametrize("order", ["simultaneous", "sequential"])


def equilibrium(graph: Graph) -> States:
    return Equilibrium().solve(graph)[0]


def furthest(states: States, expected: States) -> float:
    return max(distance(states[v], x) for v, x in expected.items())


# ------------------------------------------------------------------------------- the equations, as a literal slow loop


def test_literal_networks_agree_with_autograd() -> None:
    """The oracle itself: states at equilibrium give autograd's gradients."""
    for module, z, literal in literal_problems():
        assert isinstance(literal, LiteralChain | LiteralBranches)
        settled, exact = literal.gradients(relax(literal, 1.0, 3, "simultaneous")), gradients(module, (z,))
        assert settled.keys() == exact.keys()
        for name, g in exact.items():
            found = settled[name]
            assert found is not None
            assert g is not None
            assert distance(found, g) < 1e-13


@pytest.mark.parametrize("schedule", [(0.1, 1), (0.1, 30), (0.7, 2), (1.0, 2), (1.6, 5)], ids=str)
@both_orders
def test_gradients_are_those_of_the_literal_loop(schedule: tuple[float, int], order: Literal["simultaneous"]) -> None:
    for module, z, literal in literal_problems():
        expected = literal.gradients(relax(literal, *schedule, order))
        for solver in (Euler(*schedule, order=order), ClosedForm(*schedule, order=order)):
            assert_same_gradients(gradients(ActivationRelaxation(module, solver=solver), (z,)), expected)


@pytest.mark.parametrize("duration", [0.2, 2.0, 10.0])
def test_continuous_solves_the_differential_equation(duration: float) -> None:
    for module, z, literal in literal_problems():
        shapes = [x.shape for x in literal.activities]
        sizes = [x.numel() for x in literal.activities]

        def unpacked(flat: Any, shapes: Any = shapes, sizes: Any = sizes) -> list[Tensor]:
            parts = np.split(flat, np.cumsum(sizes)[:-1])
            return [torch.as_tensor(x).view(shape) for x, shape in zip(parts, shapes, strict=True)]

        def velocity(_t: float, flat: Any, literal: Any = literal, unpacked: Any = unpacked) -> Any:
            x = unpacked(flat)
            return np.concatenate([(d - x_i).flatten() for d, x_i in zip(literal.drive(x), x, strict=True)])

        start = np.concatenate([x.flatten() for x in literal.activities])
        path = solve_ivp(velocity, (0, duration), start, method="DOP853", rtol=1e-11, atol=1e-13)
        expected = literal.gradients(unpacked(path.y[:, -1]))
        model = ActivationRelaxation(module, solver=Continuous(duration))
        assert_same_gradients(gradients(model, (z,)), expected, tolerance=1e-8)


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_euler_tends_to_the_differential_equation_with_first_order(order: Order) -> None:
    problem = PROBLEMS[2]
    limit = problem.gradients(Continuous(2.0))
    errors = [largest_distance(problem.gradients(ClosedForm(2 / n, n, order=order)), limit) for n in (200, 400)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


# ----------------------------------------------------------------------------------------------------------- the laws


@pytest.mark.parametrize("schedule", [(0.1, 1), (0.1, 25), (0.5, 3), (1.0, 2), (1.7, 8)], ids=str)
@both_orders
@every_problem
def test_1_closed_form_is_euler(problem: Problem, order: Order, schedule: tuple[float, int]) -> None:
    simulated = problem.gradients(Euler(*schedule, order=order))
    assert_same_gradients(problem.gradients(ClosedForm(*schedule, order=order)), simulated)


@every_problem
def test_1_closed_form_is_euler_at_the_default_schedule_in_float32(problem: Problem) -> None:
    simulated = problem.gradients(Euler(), torch.float32)
    assert_same_gradients(problem.gradients(ClosedForm(), torch.float32), simulated)


@every_problem
def test_2_step_size_one_is_exact_after_depth_steps_and_not_before(problem: Problem) -> None:
    exact = problem.gradients()
    # A clamped output is exact from the start, so there the last vertex above it is exact one step sooner.
    enough = problem.depth - problem.ends_in_vertex
    for solver in (Euler, ClosedForm):
        assert_same_gradients(problem.gradients(solver(1.0, enough)), exact)
        for too_few in range(1, enough):
            assert largest_distance(problem.gradients(solver(1.0, too_few)), exact) > 1e-4


@every_problem
def test_2_step_size_one_in_sequence_is_exact_after_one_step(problem: Problem) -> None:
    exact = problem.gradients()
    for solver in (Euler(1.0, 1, order="sequential"), ClosedForm(1.0, 1, order="sequential")):
        assert_same_gradients(problem.gradients(solver), exact)


def euler_beyond_its_range(step_size: float, order: Order) -> Euler:
    solver = Euler(0.1, order=order)
    object.__setattr__(solver, "step_size", step_size)
    return solver


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@both_orders
def test_3_converges_if_and_only_if_the_step_size_is_between_0_and_2(order: Order, scale: float) -> None:
    for module, z, _ in literal_problems():
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(scale)
        graph = driven_graph(module, "activations", (z,))
        target, start = equilibrium(graph), random_states(graph)

        def error_after(step_size: float, num_steps: int, context: Any = (graph, start, target)) -> float:
            graph, start, target = context
            trajectory = euler_beyond_its_range(step_size, order).trajectory(graph, start)
            states = next(islice((x for x, _ in trajectory), num_steps - 1, None))
            return furthest(states, target)

        for inside in (0.1, 0.6, 1.4, 1.9):
            assert error_after(inside, 400) < 1e-9
        for outside in (-0.1, 2.0, 2.05):
            assert error_after(outside, 100) > 0.1
        for outside in (-0.1, 2.05):
            assert error_after(outside, 200) > 10 * error_after(outside, 100)


@every_order
@every_problem
def test_4_equilibrium_is_independent_of_the_initial_state_and_of_the_schedule(problem: Problem, order: Order) -> None:
    graph = problem.graph()
    target = equilibrium(graph)
    for step_size in (0.6, 1.0, 1.3):
        trajectory = Euler(step_size, order=order).trajectory(graph, random_states(graph))
        states = next(islice((x for x, _ in trajectory), 150, None))
        assert furthest(states, target) < 1e-10


@pytest.mark.parametrize("solver", SOLVERS + STOPPED_EARLY, ids=lambda s: f"{name_of(s)}-{s}")
def test_4_gradients_are_affine_in_the_output_gradient_and_linear_at_equilibrium(solver: Solver) -> None:
    for module, z, _ in literal_problems():
        output = ActivationRelaxation(module, solver=solver)(z)
        parameters = list(module.parameters())

        def given(g: Tensor, output: Tensor = output, parameters: Any = parameters) -> Tensor:
            torch.manual_seed(3)  # asynchronous updates must be the same ones
            found = torch.autograd.grad(output, parameters, g, retain_graph=True)
            return torch.cat([x.flatten() for x in found])

        g, h, zero = torch.randn_like(output), torch.randn_like(output), torch.zeros_like(output)
        transient = given(zero)
        assert_same(2.5 * given(g) - 0.5 * given(h) - transient, given(2.5 * g - 0.5 * h))
        assert (float(transient.norm()) < 1e-10) == (solver in SOLVERS)


@every_solver
@every_problem
def test_5_parameter_and_input_gradients_at_equilibrium_are_autograds(problem: Problem, solver: Solver) -> None:
    assert_same_gradients(problem.gradients(solver), problem.gradients())


@every_solver
@every_problem
def test_5_states_at_equilibrium_are_the_gradients_of_the_activities(problem: Problem, solver: Solver) -> None:
    graph = problem.graph()
    states, record = solver.solve(graph)
    expected = activity_gradients(problem)
    assert len(graph.recorded) == len(expected)
    for vertex, gradient in zip(graph.recorded, expected, strict=True):
        assert (vertex in states) == (gradient is not None)
        if gradient is not None:
            assert_same(states[vertex], gradient, vertex.name)
    assert record.depth == problem.depth
    assert record.vertices == len(states)


@every_problem
def test_5_in_float32(problem: Problem) -> None:
    for solver in (ClosedForm(0.9, 100), Equilibrium()):
        exact = problem.gradients(dtype=torch.float32)
        assert_same_gradients(problem.gradients(solver, torch.float32), exact)


@pytest.mark.parametrize("solver", SOLVERS + STOPPED_EARLY, ids=lambda s: f"{name_of(s)}-{s}")
@every_problem
def test_7_a_samples_states_do_not_depend_on_its_batch_mates(problem: Problem, solver: Solver) -> None:
    module, inputs = problem.build()
    if problem.mixes_samples:
        module.eval()  # batch statistics and dropout masks are the only things that samples share

    def solved(rows: slice) -> list[Tensor]:
        def chosen(x: Any) -> Any:
            return {name: y[rows] for name, y in x.items()} if isinstance(x, dict) else x[rows]

        arguments = [chosen(x) for x in inputs]
        graph = driven_graph(module, problem.vertices, arguments, problem.loss)
        torch.manual_seed(3)
        states, _ = solver.solve(graph)
        return [states[v] for v in graph.recorded if v in states]

    for together, alone in zip(solved(slice(None)), solved(slice(1)), strict=True):
        assert_same(together[:1], alone)


@every_order
@every_problem
def test_7_nothing_comes_from_nothing(problem: Problem, order: Order) -> None:
    graph = problem.graph()
    graph.drive_outputs([torch.zeros_like(output) for output in graph.outputs])
    zeros = {v: v.zeros() for v in graph.vertices}
    for states, _ in islice(Euler(0.3, order=order).trajectory(graph, zeros), 5):
        found = weight_gradients(graph, states, list(graph.read.values()), driven=False)
        assert all(g is None or not g.any() for g in found)


@pytest.mark.parametrize("solver", SOLVERS + STOPPED_EARLY, ids=lambda s: f"{name_of(s)}-{s}")
def test_7_zero_activity_and_zero_output_gradient_give_zero_gradients(solver: Solver) -> None:
    for module in (mlp(4, 5, 5, 3), Branches()):
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        found = gradients(ActivationRelaxation(module, solver=solver), (torch.zeros(2, 4),), lambda y: 0 * squares(y))
        assert all(g is not None and not g.any() for g in found.values())


class RandomGraph(nn.Module):
    """Ten vertices that read up to three of those before them, each as it is or through a layer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draws = random.Random(seed)
        self.reads = [draws.sample(range(i), min(i, draws.randint(1, 3))) for i in range(1, 11)]
        self.layers = nn.ModuleDict({
            f"{j} to {i}": nn.Linear(4, 4) if j == 0 or draws.random() < 0.6 else nn.Identity()
            for i, read in enumerate(self.reads, 1)
            for j in read
        })  # fmt: skip
        self.f = nn.ModuleList([nn.Tanh() for _ in self.reads])

    def forward(self, x: Tensor) -> Tensor:
        activities = [x]
        for i, (f, read) in enumerate(zip(self.f, self.reads, strict=True), 1):
            first, *others = [self.layers[f"{j} to {i}"](activities[j]) for j in read]
            activities.append(f(sum(others, first)))
        return activities[-1] + activities[-4]


def writing_into(states: States) -> Callable[[Vertex, Tensor], Tensor]:
    return lambda vertex, drive: states[vertex].copy_(drive)


@pytest.mark.parametrize("small", [0, SMALL])
def test_a_step_may_write_into_the_states_that_it_reads(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relaxprop.graph.SMALL", small)
    drawn = [
        driven_graph(RandomGraph(seed).double(), "activations", (torch.randn(2, 4).double(),)) for seed in range(50)
    ]
    for graph in (*drawn, *(problem.graph() for problem in PROBLEMS)):
        states = random_states(graph)
        expected = graph.drive(states)
        advanced = graph.advance(states, writing_into(states))
        assert advanced.keys() == expected.keys()
        for v, drive in expected.items():
            assert_same(advanced[v], drive)


def test_asynchronous_steps_update_a_random_half_of_the_vertices_completely() -> None:
    chain, z = mlp(3, *[4] * 40, 2).double(), torch.randn(2, 3).double()
    literal = LiteralChain(chain, z)
    graph = driven_graph(chain, "activations", (z,))
    updated = 0
    for seed in range(20):
        torch.manual_seed(seed)
        states, _ = Euler(1.0, 1, order="asynchronous").solve(graph)
        for vertex, x_bar, drive in zip(
            graph.recorded, literal.activities, literal.drive(literal.activities), strict=True
        ):
            moved = distance(states[vertex], x_bar) > 1e-12
            assert_same(states[vertex], drive if moved else x_bar)
            updated += moved
    assert abs(updated - 400) < 5 * 800**0.5 / 2  # five standard deviations of Binomial(800, 1/2)


def test_asynchronous_steps_are_fixed_by_the_seed() -> None:
    graph = PROBLEMS[2].graph()

    def solved(seed: int) -> States:
        torch.manual_seed(seed)
        return Euler(0.3, 5, order="asynchronous").solve(graph)[0]

    assert furthest(solved(1), solved(1)) == 0
    assert furthest(solved(1), solved(2)) > 1e-3


def test_asynchronous_steps_have_the_expectation_of_the_hop_distribution() -> None:
    graph = PROBLEMS[2].graph()
    source, runs = graph.source(), 1000
    initial = graph.initial_states()
    hops = discrete_hops(graph.depth, 0.8, 4, "asynchronous")
    expected = {v: v.zeros() for v in graph.vertices}
    x_term, s_term = initial, source
    for c, d in zip(hops.initial, hops.source, strict=True):
        for v in graph.vertices:
            expected[v] = expected[v] + c * x_term.get(v, v.zeros()) + d * s_term.get(v, v.zeros())
        x_term, s_term = graph.transport(x_term), graph.transport(s_term)
    drawn = [Euler(0.8, 4, order="asynchronous").solve(graph)[0] for _ in range(runs)]
    for v in graph.vertices:
        samples = torch.stack([states[v] for states in drawn])
        standard_error = samples.std(0) / runs**0.5
        assert ((samples.mean(0) - expected[v]).abs() <= 5 * standard_error + 1e-12).all()


# --------------------------------------------------------------------------------------------- what a solver may cost


class CountedTransports:
    """Records which vertices each product with A was computed for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.onto: list[set[Vertex]] = []
        original = Graph.transport

        def counted(graph: Graph, states: States, onto: Any = None, at: Any = None) -> States:
            if states and (onto is None or onto):
                self.onto.append(set(graph.vertices if onto is None else onto))
            return original(graph, states, onto, at)

        monkeypatch.setattr(Graph, "transport", counted)


@pytest.mark.parametrize("num_steps", [1, 3, 100])
def test_closed_form_visits_only_vertices_with_enough_upstream(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    depth = 7
    chain = mlp(*[4] * (depth + 2)).double()
    graph = driven_graph(chain, "activations", (torch.randn(2, 4).double(),))
    counted = CountedTransports(monkeypatch)
    _, record = ClosedForm(0.1, num_steps).solve(graph)
    # A^k reaches what has k vertices above it, and n steps make no more than n hops.
    products = min(num_steps, depth - 1)
    assert counted.onto == [set(graph.recorded[k:]) for k in reversed(range(products))]
    assert record.transports == products


def test_closed_form_visits_by_the_longest_path_where_paths_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = PROBLEMS[2].graph()
    a, b, c, d = graph.recorded
    assert [v.upstream for v in (a, b, c, d)] == [0, 1, 2, 1]
    assert [set(level) for level in graph.levels()] == [{c, d}, {b}, {a}]
    counted = CountedTransports(monkeypatch)
    _, record = PAPER.solve(graph)
    assert counted.onto == [{b, c, d}, {a, b, c, d}]
    assert record.transports == 2


@pytest.mark.parametrize("depth", [10, 40])
def test_a_sweep_asks_each_level_for_what_it_reads_only(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One vertex a level on a chain: linear in depth, where all that are still to come would be quadratic."""
    network, x = mlp(*[3] * (depth + 2)).double(), torch.randn(2, 3).double()
    graph = record(network, "activations", [x]).graph
    graph.drive_outputs([torch.ones_like(graph.outputs[0])])
    counted = CountedTransports(monkeypatch)
    states = graph.sweep(lambda _, arriving: arriving)
    assert [len(onto) for onto in counted.onto] == [1] * (depth - 1)
    assert len(states) == depth


@pytest.mark.parametrize("solver", [ClosedForm(0.9, 100), ClosedForm(1.0, 1, order="sequential"), Continuous(200.0)])
def test_one_sweep_is_enough_where_nothing_of_the_initial_state_is_left(
    solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = PROBLEMS[2].graph()
    counted = CountedTransports(monkeypatch)
    _, record = solver.solve(graph)
    assert record.transports == 1
    visited = [v for onto in counted.onto for v in onto]
    assert all(visited.count(v) <= height for height, level in enumerate(graph.levels()) for v in level)
    assert record.converged


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_euler_makes_one_product_a_step(order: Order) -> None:
    assert Euler(0.1, 9, order=order).solve(PROBLEMS[0].graph())[1].transports == 9


def test_no_product_goes_to_waste_on_a_single_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = mlp(4, 5, 2)
    graph = driven_graph(chain, "activations", (torch.randn(2, 4),))
    counted = CountedTransports(monkeypatch)
    ClosedForm().solve(graph)
    assert counted.onto == []


def test_gradients_do_not_depend_on_where_the_graph_is_cut() -> None:
    def found(vertices: Any) -> Gradients:
        module, inputs = PROBLEMS[2].build()
        chosen = [getattr(module, name) for name in vertices] if isinstance(vertices, tuple) else vertices
        return gradients(ActivationRelaxation(module, solver=ClosedForm(0.9, 200), vertices=chosen), inputs)

    exact = PROBLEMS[2].gradients()
    for vertices in ("activations", "modules", ("f_a",), ("W",), ("W", "f_b", "P")):
        assert_same_gradients(found(vertices), exact)


@pytest.mark.parametrize("solver", STOPPED_EARLY, ids=name_of)
def test_the_transient_weighs_more_where_the_loss_is_scaled_down(solver: Solver) -> None:
    chain, z = mlp(4, 6, 5, 3).double(), torch.randn(3, 4).double()
    model = ActivationRelaxation(chain, solver=solver)

    def error(scale: float) -> float:
        scaled = gradients(model, (z,), lambda y: scale * squares(y))
        return largest_distance(scaled, gradients(chain, (z,), lambda y: scale * squares(y)))

    assert error(1e-3) > 10 * error(1.0) > 0


def test_zero_gradients_leave_the_transient_alone() -> None:
    chain, z = mlp(4, 6, 5, 3).double(), torch.randn(3, 4).double()
    output = ActivationRelaxation(chain, solver=ClosedForm(0.5, 3))(z)
    backward((0 * output).sum())
    literal = LiteralChain(chain, z)
    literal.error = 0 * literal.error
    expected = literal.gradients(relax(literal, 0.5, 3, "simultaneous"))
    del expected["input 0"]
    assert_same_gradients({name: p.grad for name, p in chain.named_parameters()}, expected)
