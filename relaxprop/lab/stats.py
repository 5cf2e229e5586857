"""Means over seeds, their intervals, and verdicts on the paper's claims.

May import: nothing of this project.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import special

Claim = Literal["equivalent", "worse", "destroyed"]
MARGIN = 0.01  # test accuracies that differ by less are equivalent: one margin for all conditions and data
CONFIDENCE = 0.95


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
        half = float(special.stdtrit(self.n - 1, (1 + CONFIDENCE) / 2)) * self.standard_error
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        if self.n == 1:
            return f"{100 * self.mean:.2f}"
        return f"{100 * self.mean:.2f} ± {100 * self.standard_error:.2f}"


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Mean and standard error ``s / √n``."""
    n = len(values)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 and all(map(math.isfinite, values)) else math.nan
    return Mean(statistics.fmean(values), error, n)


def verdict(claim: Claim, difference: Mean, reference: float, chance: float) -> str:
    """On the paper's claim, from the 95 % interval of the paired difference.

    "equivalent" holds where the interval lies within ±``MARGIN``, "worse" where it lies below −``MARGIN``, "destroyed"
    where it lies below minus half of what the reference has learned beyond chance. A claim is refuted where the
    interval lies outside, else left open. Where neither side has learned anything, nothing is tested.
    """
    low, high = difference.interval
    if max(reference, reference + difference.mean) < chance + MARGIN:
        return "open: nothing has been learned"
    if claim == "equivalent":
        holds, refuted = low > -MARGIN and high < MARGIN, high < -MARGIN or low > MARGIN
    elif claim == "worse":
        holds, refuted = high < -MARGIN, low > -MARGIN
    else:
        limit = (chance - reference) / 2
        holds, refuted = high < limit, low > limit
    if holds:
        return "holds"
    if refuted:
        return f"does not hold: {100 * difference.mean:+.1f} points"
    return f"open: {difference.n} seed{'s' if difference.n > 1 else ''} cannot tell"
