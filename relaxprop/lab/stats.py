"""Means over seeds, their intervals, verdicts on the paper's claims, and how many seeds a verdict takes.

A claim says in which region the true difference lies. One rule decides on it: the 95 % interval lies within the region,
or outside of it. The same rule as a test: each of its one-sided t tests is at a level of 2.5 %.

May import: nothing of this project.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Claim = Literal["equivalent", "worse", "destroyed"]
MARGIN = 0.01  # test accuracies that differ by less are equivalent: one margin for all conditions and data
LEVEL = 0.025  # of each one-sided test
CONFIDENCE = 1 - 2 * LEVEL
PROBABILITY = 0.8  # with which so many seeds decide
MOST_SEEDS = 1_000_000


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its standard error, not a number where there is one seed."""

    mean: float
    standard_error: float
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval, of Student's t distribution."""
        if self.n == 1:
            return -math.inf, math.inf
        from scipy import special  # here and below, as SciPy and NumPy take half a second to import

        half = float(special.stdtrit(self.n - 1, 1 - LEVEL)) * self.standard_error
        return self.mean - half, self.mean + half

    @property
    def limits(self) -> str:
        """The interval as tables show it, in percent; nothing for one seed."""
        low, high = self.interval
        return f"{100 * low:.2f} to {100 * high:.2f}" if self.n > 1 else ""

    @property
    def deviation(self) -> float:
        """The standard deviation over seeds."""
        return self.standard_error * math.sqrt(self.n)

    def __str__(self) -> str:
        if self.n == 1:
            return f"{100 * self.mean:.2f}"
        return f"{100 * self.mean:.2f} ± {100 * self.standard_error:.2f}"


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Mean and standard error ``s / √n``."""
    n = len(values)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 and all(map(math.isfinite, values)) else math.nan
    return Mean(statistics.fmean(values), error, n)


class Region(NamedTuple):
    """Where a claim says that the true difference lies, without the bounds themselves."""

    low: float
    high: float


def region(claim: Claim, reference: float, chance: float, margin: float = MARGIN) -> Region:
    """Of "equivalent" ±``margin``, of "worse" below −``margin``, of "destroyed" below minus half of what the reference
    has learned beyond chance."""
    if claim == "equivalent":
        return Region(-margin, margin)
    return Region(-math.inf, -margin if claim == "worse" else (chance - reference) / 2)


def is_tested(difference: Mean, reference: float, chance: float, margin: float = MARGIN) -> bool:
    """Whether either side has learned anything: else there is nothing to compare."""
    return max(reference, reference + difference.mean) >= chance + margin


def verdict(claim: Claim, difference: Mean, reference: float, chance: float, margin: float = MARGIN) -> str:
    """On the paper's claim, from the 95 % interval of the paired difference.

    The claim holds where the interval lies within its `region`. It is refuted where the interval lies outside, else
    left open. Where neither side has learned anything, nothing is tested.
    """
    low, high = difference.interval
    if not is_tested(difference, reference, chance, margin):
        return "open: nothing has been learned"
    claimed = region(claim, reference, chance, margin)
    if low > claimed.low and high < claimed.high:
        return "holds"
    if high < claimed.low or low > claimed.high:
        return f"does not hold: {100 * difference.mean:+.1f} points"
    return f"open: {difference.n} seed{'s' if difference.n > 1 else ''} cannot tell"


class PValues(NamedTuple):
    """Of the one-sided t tests for a claim and against it: at most one is below `LEVEL`."""

    holds: float  # of two one-sided tests the larger, where the region has two bounds
    refuted: float  # the smaller


def p_values(difference: Mean, claimed: Region) -> PValues:
    """The tests that the rule of `verdict` is: a p below ``LEVEL`` where the interval lies within, or outside.

    Not numbers where one seed has no spread.
    """
    if difference.n == 1 or not math.isfinite(difference.standard_error):
        return PValues(math.nan, math.nan)
    # P(T ≥ t) of each bound's t: how far the mean lies above the lower bound, below the upper.
    above, below = (
        _upper_tail(distance, difference)
        for distance in (difference.mean - claimed.low, claimed.high - difference.mean)
    )
    return PValues(max(above, below), min(1 - above, 1 - below))


def _upper_tail(distance: float, difference: Mean) -> float:
    if difference.standard_error == 0 or math.isinf(distance):
        return 0.5 if distance == 0 else 0.0 if distance > 0 else 1.0
    from scipy import special

    return float(special.stdtr(difference.n - 1, -distance / difference.standard_error))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p-values of a family of tests: of all m the smallest times m, the next times m − 1, …"""
    corrected = [math.nan] * len(p)
    least = 0.0
    for place, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, min(1.0, (len(p) - place) * p[i]))
        corrected[i] = least
    return corrected


class Comparison(NamedTuple):
    """What was measured on a claim: the paired difference to a reference, which has this mean accuracy."""

    claim: Claim
    difference: Mean
    reference: float
    chance: float
    margin: float = MARGIN


class Judgement(NamedTuple):
    """What a comparison says.

    Attributes:
        verdict: on the claim.
        p: of the test that decides on it, or comes nearest to it; None where nothing is tested.
        holm: the same after Holm's correction over all claims that were judged together.
        seeds: how many decide; None where nothing is tested or no number would.
    """

    verdict: str
    p: float | None
    holm: float | None
    seeds: int | None

    @property
    def is_decided_after_holm(self) -> bool:
        """Whether a test decides when all claims are looked at together."""
        return self.holm is not None and self.holm < LEVEL

    @property
    def is_open_after_holm(self) -> bool:
        """Whether the verdict does not stay then."""
        return self.holm is not None and not (self.verdict.startswith("open") or self.is_decided_after_holm)

    @property
    def would(self) -> str:
        """How many seeds would decide on what is tested."""
        return f"{self.seeds:,}" if self.seeds else f"not even {MOST_SEEDS:,}"

    def __str__(self) -> str:
        is_left_open = self.p is not None and self.verdict.startswith("open")
        return f"{self.verdict}, {self.would} would" if is_left_open else self.verdict


K = TypeVar("K")


def judged(found: Mapping[K, Comparison], probability: float = PROBABILITY) -> dict[K, Judgement]:
    """Verdicts on claims that are looked at together.

    Args:
        probability: with which the number of seeds that is told decides.
    """
    regions = {
        key: region(x.claim, x.reference, x.chance, x.margin)
        for key, x in found.items()
        if is_tested(x.difference, x.reference, x.chance, x.margin) and math.isfinite(x.difference.standard_error)
    }
    tests = {key: p_values(found[key].difference, claimed) for key, claimed in regions.items()}
    corrected = [PValues(*p) for p in zip(*(holm(p) for p in zip(*tests.values(), strict=True)), strict=True)]
    result = {key: Judgement(verdict(*x), None, None, None) for key, x in found.items()}
    for (key, p), after in zip(tests.items(), corrected, strict=True):
        nearest, its_holm = min(zip(p, after, strict=True))
        seeds = seeds_to_decide(found[key].difference, regions[key], probability)
        result[key] = result[key]._replace(p=nearest, holm=its_holm, seeds=seeds)
    return result


def judge(comparison: Comparison) -> Judgement:
    """As `judged`, of one claim by itself."""
    return judged({None: comparison})[None]


def probability_within(seeds: int, mean: float, deviation: float, low: float, high: float) -> float:
    """That the 95 % interval of so many seeds lies within (low, high), where the mean and the deviation are true.

    Owen's integral: over the observed deviation, of the probability that the mean falls where its interval fits.
    """
    freedom = seeds - 1
    quantiles, weights = _quadrature()
    import numpy as np
    from scipy import special

    observed = deviation * np.sqrt(2 * special.gammaincinv(freedom / 2, quantiles) / freedom)
    half = special.stdtrit(freedom, 1 - LEVEL) * observed / math.sqrt(seeds)
    error = deviation / math.sqrt(seeds)
    falls = special.ndtr((high - half - mean) / error) - special.ndtr((low + half - mean) / error)
    return float(weights @ np.maximum(falls, 0))


@cache
def _quadrature() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes and weights on (0, 1)."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(256)
    return (nodes + 1) / 2, weights / 2


def seeds_to_decide(difference: Mean, claimed: Region, probability: float = PROBABILITY) -> int | None:
    """How many seeds decide on a claim with such a probability, where the mean and the spread so far are the truth.

    None where one seed tells no spread, or where the mean lies on a bound of the region or so near to it that
    ``MOST_SEEDS`` seeds would not do.
    """
    mean, deviation = difference.mean, difference.deviation
    if not (math.isfinite(mean) and math.isfinite(deviation)) or mean in claimed:
        return None
    low, high = claimed
    if mean < low:
        low, high = -math.inf, low
    elif mean > high:
        low, high = high, math.inf
    if deviation == 0:
        return 2

    def enough(seeds: int) -> bool:
        return probability_within(seeds, mean, deviation, low, high) >= probability

    most = 2
    while not enough(most):
        if most >= MOST_SEEDS:
            return None
        most = min(2 * most, MOST_SEEDS)
    too_few = most // 2
    while most - too_few > 1:
        middle = (most + too_few) // 2
        most, too_few = (middle, too_few) if enough(middle) else (most, middle)
    return most
