"""Verdicts as tests: p-values beside intervals, Holm's correction, and how many seeds decide."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import special

from relaxprop.lab import stats
from relaxprop.lab.stats import LEVEL, MARGIN, Mean, Region, mean_over_seeds

CLAIMS: tuple[stats.Claim, ...] = ("equivalent", "worse", "destroyed")


def drawn(number: int) -> list[Mean]:
    """Differences of all sizes and spreads around the margin."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(number):
        n, centre, spread = int(rng.integers(2, 12)), rng.uniform(-0.03, 0.03), 10 ** rng.uniform(-4, -1.5)
        found.append(mean_over_seeds(list(centre + spread * rng.standard_normal(n))))
    return found


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_verdict_by_interval_is_the_verdict_by_p_value(claim: stats.Claim) -> None:
    seen = set()
    for difference in drawn(2000):
        p = stats.p_values(difference, stats.region(claim, 0.13, 0.1))
        by_p = "holds" if p.holds < LEVEL else "does not hold" if p.refuted < LEVEL else "open"
        assert stats.verdict(claim, difference, 0.13, 0.1).partition(":")[0] == by_p
        assert not (p.holds < LEVEL and p.refuted < LEVEL)
        seen.add(by_p)
    assert seen == {"holds", "does not hold", "open"}


def test_the_p_values_are_the_t_distributions() -> None:
    difference = mean_over_seeds([-0.002, 0.001, 0.004])  # mean 0.001, s = 0.003, over √3
    error = 0.003 / math.sqrt(3)
    t = np.linspace(0.009 / error, 2000, 4_000_001)  # from the nearer margin
    density = 1 / (2 * math.sqrt(2) * (1 + t * t / 2) ** 1.5)  # of two degrees of freedom
    tail = float(np.trapezoid(density, t)) + 1 / (2 * 2000**2)  # and what is left beyond
    holds, refuted = stats.p_values(difference, Region(-MARGIN, MARGIN))
    assert holds == pytest.approx(tail, abs=1e-6)
    assert refuted == pytest.approx(1 - tail, abs=1e-6)


def test_no_spread_and_one_seed() -> None:
    assert stats.p_values(mean_over_seeds([0.0, 0.0]), Region(-MARGIN, MARGIN)) == (0, 1)
    assert stats.p_values(mean_over_seeds([0.5, 0.5]), Region(-MARGIN, MARGIN)) == (1, 0)
    on_the_bound = stats.p_values(Mean(-MARGIN, 0.0, 3), Region(-MARGIN, MARGIN))
    assert min(on_the_bound) > LEVEL
    assert all(math.isnan(p) for p in stats.p_values(mean_over_seeds([0.5]), Region(-MARGIN, MARGIN)))


def test_holms_correction() -> None:
    # 4 × 0.01, 3 × 0.015, 2 × 0.03 and 1 × 0.04, which may not fall below the one before.
    assert stats.holm([0.03, 0.01, 0.04, 0.015]) == pytest.approx([0.06, 0.04, 0.06, 0.045])
    assert stats.holm([0.9, 0.8]) == [1, 1]
    assert stats.holm([]) == []


def test_holms_correction_rejects_as_his_procedure_does() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        p = list(rng.uniform(0, 0.1, rng.integers(1, 8)))
        rejected = set()
        for place, i in enumerate(np.argsort(p)):  # from the smallest on, until one is too large
            if p[i] > LEVEL / (len(p) - place):
                break
            rejected.add(i)
        assert {i for i, corrected in enumerate(stats.holm(p)) if corrected <= LEVEL} == rejected


def simulated(seeds: int, mean: float, deviation: float, low: float, high: float) -> float:
    """How often the interval lies within, of 40,000 experiments."""
    x = mean + deviation * np.random.default_rng(seeds).standard_normal((40_000, seeds))
    half = special.stdtrit(seeds - 1, 0.975) * x.std(axis=1, ddof=1) / math.sqrt(seeds)
    return float(np.mean((x.mean(axis=1) - half > low) & (x.mean(axis=1) + half < high)))


@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 40])
@pytest.mark.parametrize(
    ("mean", "low", "high"), [(0.0, -0.01, 0.01), (-0.007, -0.01, 0.01), (-0.02, -math.inf, -0.01)]
)
def test_the_probability_is_the_frequency_of_simulated_experiments(
    seeds: int, mean: float, low: float, high: float
) -> None:
    expected = simulated(seeds, mean, 0.006, low, high)
    four_errors = 4 * math.sqrt(max(expected * (1 - expected), 1e-4) / 40_000)
    assert stats.probability_within(seeds, mean, 0.006, low, high) == pytest.approx(expected, abs=four_errors)


@pytest.mark.parametrize("seeds", [2, 3, 10, 100])
def test_beyond_one_bound_the_probability_is_the_noncentral_t_distributions(seeds: int) -> None:
    shift = math.sqrt(seeds) * 0.004 / 0.006
    exact = special.nctdtr(seeds - 1, -shift, -special.stdtrit(seeds - 1, 0.975))
    assert stats.probability_within(seeds, -0.014, 0.006, -math.inf, -0.01) == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize(
    ("claim", "mean"), [("equivalent", -0.004), ("equivalent", 0.016), ("worse", -0.016), ("worse", 0.001)]
)
def test_so_many_seeds_decide_and_one_less_does_not(claim: stats.Claim, mean: float) -> None:
    so_far = Mean(mean, 0.008 / math.sqrt(3), 3)
    needed = stats.seeds_to_decide(so_far, stats.region(claim, 0.9, 0.1))
    assert needed is not None
    low, high = {("equivalent", -0.004): (-0.01, 0.01), ("equivalent", 0.016): (0.01, math.inf)}.get(
        (claim, mean), (-math.inf, -0.01) if mean < 0 else (-0.01, math.inf)
    )
    assert simulated(needed, mean, 0.008, low, high) > 0.79
    assert simulated(needed - 1, mean, 0.008, low, high) < 0.81
    assert simulated(needed // 2, mean, 0.008, low, high) < 0.7


def test_what_is_open_takes_more_seeds_than_there_are() -> None:
    numbers = []
    for difference, claim in itertools.product(drawn(300), CLAIMS):
        if stats.verdict(claim, difference, 0.13, 0.1).endswith("cannot tell"):
            needed = stats.seeds_to_decide(difference, stats.region(claim, 0.13, 0.1))
            assert needed is None or needed > difference.n
            numbers.append(needed)
    assert len(numbers) > 50


def test_no_number_decides_at_the_bound_or_without_a_spread() -> None:
    equivalent = Region(-MARGIN, MARGIN)
    assert stats.seeds_to_decide(Mean(-MARGIN, 0.001, 5), equivalent) is None
    assert stats.seeds_to_decide(Mean(-MARGIN + 1e-12, 0.001, 5), equivalent) is None
    assert stats.seeds_to_decide(mean_over_seeds([0.0]), equivalent) is None
    assert stats.seeds_to_decide(Mean(0.0, 0.0, 3), equivalent) == 2
