"""The table of an experiment: results by condition, paired differences, and verdicts on the paper's claims.

May import: lab.results, lab.stats.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from relaxprop.lab.results import BASELINE, REFERENCE, Compared, FinishedRun
from relaxprop.lab.stats import (
    CONFIDENCE,
    LEVEL,
    MARGIN,
    MOST_SEEDS,
    PROBABILITY,
    Mean,
    PValues,
    Region,
    holm,
    is_tested,
    mean_over_seeds,
    p_values,
    region,
    seeds_to_decide,
    verdict,
)


@dataclass(frozen=True)
class Row:
    """One condition's results.

    Attributes:
        accuracies: test accuracy after each epoch.
        final: test accuracy after the last epoch, by seed.
        seconds: of training, median over seeds.
        relative_cost: median seconds of an epoch over backpropagation's.
        difference: final test accuracy minus that of ``condition.versus``, seed by seed; None for the reference.
        verdict: on the paper's claim.
        p: of the test that decides on the claim, or comes nearest to it; None where nothing is tested.
        holm: the same after Holm's correction over the claims of this table.
        seeds: how many decide on the claim; None where nothing is tested or no number would.
    """

    name: str
    condition: Compared
    accuracies: tuple[Mean, ...]
    final: tuple[float, ...]
    seconds: float
    relative_cost: float
    difference: Mean | None
    verdict: str
    p: float | None
    holm: float | None
    seeds: int | None


def summarise(
    conditions: Mapping[str, Compared],
    names: Sequence[str],
    runs: Sequence[FinishedRun],
    *,
    chance: float,
    margin: float = MARGIN,
    probability: float = PROBABILITY,
) -> list[Row]:
    """Results by condition; ``names`` are those of the runs.

    Args:
        chance: accuracy of naming the most frequent class, in [0, 1].
        margin: differences below it are none, as a part of 1.
        probability: with which the number of seeds that is told decides.

    Raises:
        ValueError: the conditions have not all the same seeds, epochs and data, or a run is there twice.
    """
    by_name = _by_name(conditions, names, runs)
    final = {name: [run.metrics[-1].test_accuracy for run in own] for name, own in by_name.items()}
    seconds = {name: statistics.median(m.seconds for run in own for m in run.metrics) for name, own in by_name.items()}
    differences: dict[str, Mean] = {}
    claimed: dict[str, Region] = {}
    for name in by_name:
        if name == REFERENCE:
            continue
        condition = conditions[name]
        pairs = zip(final[name], final[condition.versus], strict=True)
        differences[name] = mean_over_seeds([a - b for a, b in pairs])
        claimed[name] = region(condition.claim, statistics.fmean(final[condition.versus]), chance, margin)
    family = [
        name
        for name, difference in differences.items()
        if is_tested(difference, statistics.fmean(final[conditions[name].versus]), chance, margin)
        and math.isfinite(difference.standard_error)
    ]
    tests = [p_values(differences[name], claimed[name]) for name in family]
    corrected = [PValues(*p) for p in zip(*(holm(p) for p in zip(*tests, strict=True)), strict=True)]
    nearest = {name: min(zip(p, after, strict=True)) for name, p, after in zip(family, tests, corrected, strict=True)}
    rows = []
    for name, own in by_name.items():
        condition, difference = conditions[name], differences.get(name)
        reference = statistics.fmean(final[condition.versus])
        said = verdict(condition.claim, difference, reference, chance, margin) if difference is not None else ""
        p, after = nearest.get(name, (None, None))
        rows.append(
            Row(
                name=name,
                condition=condition,
                accuracies=tuple(
                    mean_over_seeds([m.test_accuracy for m in epoch])
                    for epoch in zip(*(run.metrics for run in own), strict=True)
                ),
                final=tuple(final[name]),
                seconds=statistics.median(sum(m.seconds for m in run.metrics) for run in own),
                relative_cost=seconds[name] / seconds[REFERENCE],
                difference=difference,
                verdict=said,
                p=p,
                holm=after,
                seeds=seeds_to_decide(differences[name], claimed[name], probability) if name in family else None,
            )
        )
    return rows


def _by_name(
    conditions: Mapping[str, Compared], names: Sequence[str], runs: Sequence[FinishedRun]
) -> dict[str, list[FinishedRun]]:
    """The runs of each condition in the order of their seeds, which are the same in all."""
    found: dict[str, dict[int, FinishedRun]] = {}
    for name, run in zip(names, runs, strict=True):
        if run.config.seed in found.setdefault(name, {}):
            raise ValueError(f"condition {name} has seed {run.config.seed} twice")
        found[name][run.config.seed] = run
    for name in [REFERENCE, *(conditions[name].versus for name in found)]:
        if name not in found:
            raise ValueError(f"there are no runs of {name}, with which others are compared")
    for name, by_seed in found.items():
        if others := found[REFERENCE].keys() ^ by_seed.keys():
            seeds = ", ".join(map(str, sorted(others)))
            raise ValueError(f"conditions {REFERENCE} and {name} have not both seed {seeds}")
    for what in ("data", "epochs"):
        if len(kinds := {getattr(run.config, what) for run in runs}) > 1:
            raise ValueError(f"the runs differ in their {what}: {', '.join(map(str, sorted(kinds, key=str)))}")
    return {name: [by_seed[seed] for seed in sorted(by_seed)] for name, by_seed in found.items()}


RESULT = ("condition", "test accuracy (%)", "n", "seconds", "cost")
CLAIM = ("difference (points)", "95 % interval", "paper", "verdict", "Holm's p")
COLUMNS = RESULT + CLAIM


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The cells under ``COLUMNS``."""
    return [
        (
            label(row),
            str(row.accuracies[-1]),
            str(row.accuracies[-1].n),
            f"{row.seconds:.1f}" if row.seconds < 100 else f"{row.seconds:.0f}",
            f"{row.relative_cost:.1f}×",
            str(row.difference or ""),
            _interval(row.difference),
            f"{row.condition.claim}" if row.difference is not None else "",
            _verdict(row),
            _holm(row),
        )
        for row in rows
    ]


def label(row: Row) -> str:
    """The condition's, as tables and figures show it."""
    return row.condition.title if row.name in (REFERENCE, BASELINE) else f"{row.name}: {row.condition.title}"


def _interval(difference: Mean | None) -> str:
    if difference is None or difference.n == 1:
        return ""
    low, high = difference.interval
    return f"{100 * low:.2f} to {100 * high:.2f}"


def _verdict(row: Row) -> str:
    if row.difference is None or row.p is None or not row.verdict.startswith("open"):
        return row.verdict
    return row.verdict + would(row.seeds, row.difference)


def would(seeds: int | None, difference: Mean) -> str:
    """How many seeds would decide, said behind an open verdict."""
    if difference.n == 1:
        return ""
    return f", {seeds:,} would" if seeds else f", not even {MOST_SEEDS:,} would"


def is_decided_after_holm(row: Row) -> bool:
    """Whether the verdict stays when all claims of the table are looked at together."""
    return row.holm is not None and row.holm < LEVEL


def _holm(row: Row) -> str:
    if row.holm is None:
        return ""
    p = f"{row.holm:.2g}" if row.holm >= 0.0001 else "< 0.0001"
    return p if row.verdict.startswith("open") or is_decided_after_holm(row) else f"{p}: open"


RULES = (
    f"equivalent: the {100 * CONFIDENCE:g} % interval of the difference lies within ±{100 * MARGIN:g} point; worse: "
    "below that; destroyed: below minus half of what the baseline has learned beyond chance; does not hold: the "
    "interval lies outside; open: else",
    f"… would: so many seeds decide with a probability of {100 * PROBABILITY:g} %, if the mean and the spread so far "
    "are the truth",
)
NOTES = (
    "difference: of the final test accuracy, seed by seed, to the baseline (Activation Relaxation with everything "
    "frozen); the baseline's own, to backpropagation",
    *RULES,
    "seconds: of training, median over seeds; cost: median time of an epoch of it relative to backpropagation's",
)


def notes(rows: Sequence[Row], chance: float) -> tuple[str, ...]:
    """What the table's columns mean, and what its verdicts rest on."""
    family = [row.name for row in rows if row.holm is not None]
    holms = (
        f"Holm's p: of the one-sided t test that decides (of an equivalence, of the two the larger), corrected for the "
        f"family of this table's {len(family)} claims ({', '.join(family)}); the verdict stays where it is below "
        f"{LEVEL:.3g}"
    )
    return (*NOTES, *([holms] if family else []), f"chance: {100 * chance:.2f} %, naming the most frequent class")
