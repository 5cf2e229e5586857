r"""What is left of the initial state after n steps: the hop distributions of the relaxation phase.

With a frozen feedforward pass the relaxation ``dx/dt = -x + A x + s`` is linear and A is nilpotent
(``A^D = 0``, D vertices on the longest path), so every schedule started at the feedforward activity x̄ gives

    x_n = Σ_{k<D} [ c_k A^k x̄ + d_k A^k s ],        d_k = 1 − Σ_{j≤k} c_j.

c_k is the probability that a random walk made exactly k hops from child to parent:

    simultaneous   x ← x + η (A x + s − x), all at once             Binomial(n, η)
    sequential     the same in place, towards the input             negative binomial: k successes of
                                                                     probability η before the n-th failure
    asynchronous   each vertex updates with probability p a step    Binomial(n, p η), in expectation
    continuous     dx/dt = −x + A x + s for a duration T            Poisson(T)

For 1 < η < 2 the first two are no probabilities any more (the c_k alternate in sign), but the formulas hold.
Source: Millidge et al., arXiv 2010.06219, equation (1); the closed form is this project's own.

May import: nothing of this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Real
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Order = Literal["simultaneous", "sequential", "asynchronous"]
ORDERS: tuple[Order, ...] = ("simultaneous", "sequential", "asynchronous")

UPDATE_PROBABILITY = 0.5  # of a vertex, in one step of an asynchronous relaxation

VANISHING = float(np.finfo(np.float64).eps) ** 2

Coefficients = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Hops:
    """Weights of ``x_n = Σ_k [ c_k A^k x̄ + d_k A^k s ]`` for k < depth."""

    initial: Coefficients  # c_k, of the initial state x̄
    source: Coefficients  # d_k, of the source s

    @cached_property
    def remaining(self) -> float:
        """``Σ_k |c_k|``: what the initial state weighs in the vertex that is farthest from the output."""
        return float(np.abs(self.initial).sum())

    @cached_property
    def terms(self) -> list[tuple[float, float]]:
        """The pairs (c_k, d_k) from k = 0 to the last that does not vanish, those numbers that do as zero.

        The weights of far fewer or far more hops than are likely go down to η^n. Rounding squared leaves no trace, even
        in a graph where gradients grow by 1 / rounding on their way, and arithmetic with numbers so small is slow.
        """
        pairs = [(_unless_vanishing(c), _unless_vanishing(d)) for c, d in zip(self.initial, self.source, strict=True)]
        while len(pairs) > 1 and pairs[-1] == (0, 0):
            pairs.pop()
        return pairs

    @cached_property
    def largest(self) -> float:
        """``max_k |c_k|``."""
        return float(np.abs(self.initial).max(initial=0))


def _unless_vanishing(weight: float) -> float:
    return float(weight) if abs(weight) >= VANISHING else 0.0


@lru_cache(maxsize=1024)
def discrete_hops(depth: int, step_size: float, num_steps: int, order: Order) -> Hops:
    """c_k and d_k after ``num_steps`` Euler steps of size η = ``step_size``.

    One step is an affine map ``x ← P(A) x + S(A) s``, so n steps are its n-th power, taken by repeated squaring
    of polynomials in A that are cut off at ``A^depth = 0``. For η ≤ 1 all terms are positive: every
    coefficient, however small, keeps its full relative precision (1 − Σ c_j would not).
    """
    if depth == 0:
        return Hops(np.zeros(0), np.zeros(0))
    identity, hop = np.zeros(depth), np.zeros(depth)
    identity[0] = 1
    hop[1:2] = 1
    if order == "sequential":  # x' = (1 − η) x + η (A x' + s), so both carry (1 − η A)^{-1} = Σ_k η^k A^k
        geometric = step_size ** np.arange(depth)
        step = Hops((1 - step_size) * geometric, step_size * geometric)
    else:
        rate = step_size * UPDATE_PROBABILITY if order == "asynchronous" else step_size
        step = Hops((1 - rate) * identity + rate * hop, rate * identity)

    def after(second: Hops, first: Hops) -> Hops:
        return Hops(
            np.convolve(second.initial, first.initial)[:depth],
            np.convolve(second.initial, first.source)[:depth] + second.source,
        )

    result = Hops(identity, np.zeros(depth))
    for bit in f"{num_steps:b}":
        result = after(result, result)
        if bit == "1":
            result = after(step, result)
    return result


@lru_cache(maxsize=1024)
def continuous_hops(depth: int, duration: float) -> Hops:
    """c_k and d_k at time T = ``duration`` of the paper's differential equation: Poisson(T)."""
    from scipy import stats  # here, as few need it and it takes a third of a second to import

    k = np.arange(depth)
    return Hops(
        np.asarray(stats.poisson.pmf(k, duration)),
        np.asarray(stats.poisson.sf(k, duration)),
    )


def steps_to_converge(depth: int, step_size: float, tolerance: float, *, order: Order = "simultaneous") -> int:
    """Fewest steps after which the initial state weighs at most ``tolerance`` at every vertex.

    Solves ``Σ_{k<depth} |c_k(n)| ≤ tolerance`` for n. This is known before anything runs: it depends on the
    schedule and on the depth alone, not on the network's weights. The error that is left is
    ``Σ_k c_k A^k (x̄ − x*)``; where activities are much larger than gradients ask for a smaller tolerance.

    Args:
        depth: number of vertices on the longest path of the graph, ≥ 1.
        step_size: η in (0, 2).
        tolerance: weight of the initial state that may be left, in (0, 1).
        order: "simultaneous" (the paper's text), "sequential" (the authors' code), or "asynchronous"
            (the expected weight, each vertex updating in a step with probability 1/2).

    Returns:
        The number of steps. With step size 1 it is ``depth`` for a simultaneous and 1 for a sequential relaxation.

    Raises:
        TypeError, ValueError: if an argument has the wrong type or is outside its range.
    """
    check_count("depth", depth)
    check_step_size(step_size)
    check_order(order)
    check_tolerance(tolerance)
    return _fewest_steps(depth, step_size, tolerance, order)


@lru_cache(maxsize=1024)
def _fewest_steps(depth: int, step_size: float, tolerance: float, order: Order) -> int:
    def enough(num_steps: int) -> bool:
        return discrete_hops(depth, step_size, num_steps, order).remaining <= tolerance

    # The weight starts at 1 or above and is log-concave in n, so it crosses the tolerance once.
    low, high = 0, 1
    while not enough(high):
        if high > 2**53:  # 1 − η rounds to 1
            raise ValueError(f"step_size {step_size!r} is too small for floating-point arithmetic")
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def check_step_size(step_size: object) -> None:
    """Refuse step sizes at which the relaxation diverges (it converges if and only if 0 < η < 2)."""
    if isinstance(step_size, bool) or not isinstance(step_size, Real):
        raise TypeError(f"step_size must be a number in (0, 2), got {step_size!r}")
    if not 0 < float(step_size) < 2:
        raise ValueError(f"step_size must be in (0, 2), where the relaxation converges, got {step_size!r}")


def check_tolerance(tolerance: object) -> None:
    """Refuse anything but a number strictly between 0 and 1."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real):
        raise TypeError(f"tolerance must be a number in (0, 1), got {tolerance!r}")
    if not 0 < float(tolerance) < 1:
        raise ValueError(f"tolerance must be in (0, 1), got {tolerance!r}")


def check_count(name: str, value: object) -> None:
    """Refuse anything but an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")


def check_order(order: object, allowed: tuple[Order, ...] = ORDERS) -> None:
    """Refuse an unknown order of updates."""
    if order not in allowed:
        raise ValueError(f"order must be one of {', '.join(map(repr, allowed))}, got {order!r}")
