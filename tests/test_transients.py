"""The hop distributions c_k, d_k against exact rational arithmetic, SciPy, and the recurrence that defines them."""

from fractions import Fraction
from math import comb
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from relaxprop import ActivationRelaxation, Euler, steps_to_converge
from relaxprop.transients import Hops, Order, continuous_hops, discrete_hops
from tests.compare import gradients, largest_distance, squares
from tests.problems import mlp

ORDERS: tuple[Order, ...] = ("simultaneous", "sequential", "asynchronous")
SCHEDULES = [(1, 0.1, 1), (4, 0.1, 100), (12, 0.5, 7), (5, 1e-3, 5000), (30, 0.9, 40), (6, 0.99, 3), (3, 0.1, 2000)]


def recurrence(depth: int, step_size: float, num_steps: int, order: Order) -> tuple[list[Fraction], list[Fraction]]:
    """n steps of ``x ← x + η (A x + s − x)`` on the coefficients of A^k x̄ and A^k s, without rounding."""
    eta = Fraction(step_size) / (2 if order == "asynchronous" else 1)
    c, d = [Fraction(k == 0) for k in range(depth)], [Fraction(0)] * depth
    for _ in range(num_steps):
        new_c, new_d = list(c), list(d)
        for k in range(depth):
            read_c, read_d = (new_c, new_d) if order == "sequential" else (c, d)
            new_c[k] = (1 - eta) * c[k] + eta * (read_c[k - 1] if k else 0)
            new_d[k] = (1 - eta) * d[k] + eta * (read_d[k - 1] if k else 1)
        c, d = new_c, new_d
    return c, d


def formula(depth: int, step_size: float, num_steps: int, order: Order) -> tuple[list[Fraction], list[Fraction]]:
    """The table's c_k, and ``d_k = 1 − Σ_{j≤k} c_j``, without rounding."""
    eta, n = Fraction(step_size) / (2 if order == "asynchronous" else 1), num_steps
    if order == "sequential":
        c = [comb(n - 1 + k, k) * eta**k * (1 - eta) ** n for k in range(depth)]
    else:
        c = [comb(n, k) * eta**k * (1 - eta) ** (n - k) if k <= n else Fraction(0) for k in range(depth)]
    return c, [1 - sum(c[: k + 1], Fraction(0)) for k in range(depth)]


def distribution(step_size: float, num_steps: int, order: Order) -> Any:
    if order == "sequential":
        return stats.nbinom(num_steps, 1 - step_size)
    return stats.binom(num_steps, step_size / 2 if order == "asynchronous" else step_size)


def floats(values: list[Fraction]) -> NDArray[np.float64]:
    return np.array([float(v) for v in values])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_hops_are_the_distributions_in_the_table(schedule: tuple[int, float, int], order: Order) -> None:
    depth, step_size, num_steps = schedule
    hops, expected, k = discrete_hops(*schedule, order), distribution(step_size, num_steps, order), np.arange(depth)
    np.testing.assert_allclose(hops.initial, expected.pmf(k), rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(hops.source, expected.sf(k), rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("schedule", [(8, 1e-3, 7), (8, 0.1, 600), (8, 0.9, 60), (8, 0.999, 20), (20, 0.01, 19)])
def test_tiny_coefficients_keep_their_relative_precision(schedule: tuple[int, float, int], order: Order) -> None:
    hops, (c, d) = discrete_hops(*schedule, order), formula(*schedule, order)
    assert min(floats([*c, *d])) < 1e-5
    np.testing.assert_allclose(hops.initial, floats(c), rtol=1e-12, atol=0)
    np.testing.assert_allclose(hops.source, floats(d), rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("schedule", [(5, 1.1, 1), (5, 1.5, 3), (7, 1.5, 40), (4, 1.9, 30), (3, 1.99, 10)])
def test_hops_beyond_step_size_one_follow_the_recurrence(schedule: tuple[int, float, int], order: Order) -> None:
    hops, (c, d) = discrete_hops(*schedule, order), recurrence(*schedule, order)
    size = max(1.0, np.abs(floats(c)).max())
    np.testing.assert_allclose(hops.initial / size, floats(c) / size, rtol=0, atol=1e-12)
    np.testing.assert_allclose(hops.source / size, floats(d) / size, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("schedule", [(6, 0.3, 9), (6, 1.0, 9), (6, 1.5, 9), (12, 1.75, 4)])
def test_the_tables_formulas_solve_the_recurrence(schedule: tuple[int, float, int], order: Order) -> None:
    assert formula(*schedule, order) == recurrence(*schedule, order)


@pytest.mark.parametrize("duration", [0.01, 1.0, 10.0, 300.0])
def test_continuous_hops_are_poisson(duration: float) -> None:
    k = np.arange(6)
    hops = continuous_hops(6, duration)
    np.testing.assert_allclose(hops.initial, np.exp(stats.poisson.logpmf(k, duration)), rtol=1e-10)
    np.testing.assert_allclose(hops.source, stats.gamma.cdf(duration, k + 1), rtol=1e-10)


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_discrete_hops_tend_to_the_continuous_ones_with_first_order(order: Order) -> None:
    limit = continuous_hops(6, 3.0).initial
    errors = [np.abs(discrete_hops(6, 3 / n, n, order).initial - limit).max() for n in (400, 800)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)


def test_remaining_adds_the_weights_whatever_their_sign() -> None:
    assert Hops(np.array([0.5, -0.25, 0.125]), np.zeros(3)).remaining == 0.875


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("step_size", [0.05, 0.3, 1.0, 1.5, 1.95])
@pytest.mark.parametrize("depth", [1, 4, 20])
def test_steps_to_converge_is_the_boundary(depth: int, step_size: float, order: Order) -> None:
    tolerance = 1e-3
    n = steps_to_converge(depth, step_size, tolerance, order=order)

    def weight(num_steps: int) -> float:
        return float(np.abs(discrete_hops(depth, step_size, num_steps, order).initial).sum())

    assert all(weight(m) > tolerance for m in range(n))
    assert all(weight(m) <= tolerance for m in range(n, n + 50))


def test_steps_to_converge_at_step_size_one() -> None:
    for depth in (1, 2, 7, 50):
        assert steps_to_converge(depth, 1.0, 1e-12) == depth
        assert steps_to_converge(depth, 1, 1e-12, order="sequential") == 1


def test_steps_to_converge_agrees_with_the_tail_of_the_binomial_distribution() -> None:
    n = steps_to_converge(10, 0.1, 0.01)
    assert stats.binom.cdf(9, n, 0.1) <= 0.01 < stats.binom.cdf(9, n - 1, 0.1)


@pytest.mark.parametrize("order", ORDERS)
def test_a_record_says_what_steps_to_converge_promises(order: Order) -> None:
    network, x = mlp(4, 5, 5, 5, 2).double(), torch.randn(3, 4).double()
    n = steps_to_converge(3, 0.2, 1e-4, order=order)
    remaining: list[float] = []
    for num_steps in (n - 1, n):
        model = ActivationRelaxation(network, solver=Euler(0.2, num_steps, order=order))
        gradients(model, (x,))
        assert model.last_relaxation is not None
        assert model.last_relaxation.remaining is not None
        remaining.append(model.last_relaxation.remaining)
    assert remaining[1] <= 1e-4 < remaining[0]


@pytest.mark.parametrize(
    ("depth", "step_size", "order"),
    [(50, 0.8, "simultaneous"), (50, 0.5, "sequential"), (50, 1.5, "asynchronous"), (200, 1.0, "simultaneous")],
)
def test_a_tolerance_does_not_stop_before_the_gradient_has_come_by(depth: int, step_size: float, order: str) -> None:
    network, x = mlp(*[4] * (depth + 2)).double(), torch.randn(3, 4).double()
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() == 2:
                torch.nn.init.orthogonal_(weight, gain=1.1)
            else:
                weight.zero_()
    tolerance = 1e-3
    solver = Euler(step_size, 100_000, order=cast(Order, order), tolerance=tolerance)
    model = ActivationRelaxation(network, solver=solver)
    error = largest_distance(gradients(model, (x,), squares), gradients(network, (x,), squares))
    record = model.last_relaxation
    assert record is not None
    assert record.depth == depth
    assert record.converged
    assert record.num_steps is not None
    assert record.num_steps >= steps_to_converge(depth, step_size, tolerance, order=solver.order)
    # Each vertex adds at most tolerance times its own size to what is above it.
    assert error <= depth * tolerance


def test_a_tolerance_that_is_out_of_reach_is_recorded() -> None:
    model = ActivationRelaxation(mlp(4, 5, 5, 2).double(), solver=Euler(0.1, 5, tolerance=1e-6))
    gradients(model, (torch.randn(3, 4).double(),))
    assert model.last_relaxation is not None
    assert model.last_relaxation.num_steps == 5
    assert not model.last_relaxation.converged
