"""The table of an experiment: results by condition, paired differences, and verdicts on the paper's claims.

May import: lab.results, lab.stats.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from relaxprop.lab.results import BASELINE, REFERENCE, Compared, EpochMetrics, FinishedRun, relative_cost
from relaxprop.lab.stats import (
    CONFIDENCE,
    LEVEL,
    MARGIN,
    PROBABILITY,
    Comparison,
    Judgement,
    Mean,
    judged,
    mean_over_seeds,
    verdict,
)


class Beside(NamedTuple):
    """A condition's results next to those of the same condition as the paper's text has it.

    Attributes:
        accuracies: test accuracy of that one after each epoch, over the same seeds.
        difference: of the final test accuracy, this one's minus that one's, seed by seed.
        verdict: on their being equivalent.
    """

    accuracies: tuple[Mean, ...]
    difference: Mean
    verdict: str


@dataclass(frozen=True)
class Row:
    """One condition's results, over the seeds that it and what it is compared with both have.

    Attributes:
        accuracies: test accuracy after each epoch.
        versus: the same of what it is compared with; of the reference, of what is compared with it.
        final: test accuracy after the last epoch, by seed.
        of_seeds: these seeds.
        seconds: of training, median over seeds.
        relative_cost: of an epoch, to backpropagation's (`relative_cost`).
        difference: final test accuracy minus that of ``condition.versus``, seed by seed; None for the reference.
        judgement: on the paper's claim, among those of this table; an empty verdict for the reference.
        beside: the condition as the paper's text has it, where this one is another version.
    """

    name: str
    condition: Compared
    accuracies: tuple[Mean, ...]
    versus: tuple[Mean, ...]
    final: tuple[float, ...]
    of_seeds: tuple[int, ...]
    seconds: float
    relative_cost: float | None
    difference: Mean | None
    judgement: Judgement
    beside: Beside | None = None


BySeed = dict[int, FinishedRun]


def summarise(
    conditions: Mapping[str, Compared],
    names: Sequence[str],
    runs: Sequence[FinishedRun],
    *,
    chance: float,
    margin: float = MARGIN,
    probability: float = PROBABILITY,
    partial: bool = False,
) -> list[Row]:
    """Results by condition; ``names`` are those of the runs.

    Args:
        chance: accuracy of naming the most frequent class, in [0, 1].
        margin: differences below it are none, as a part of 1.
        probability: with which the number of seeds that is told decides.
        partial: whether runs may be missing. Then each condition counts over the seeds that it and what it is compared
            with both have, and one without such seeds is left out.

    Raises:
        ValueError: the conditions have not all the same seeds, epochs and data, or a run is there twice; of
            ``partial`` runs, no condition has a seed with what it is compared with.
    """
    found = _by_name(conditions, names, runs, partial=partial)
    references = {name for name in found if REFERENCE in (name, conditions[name].beside)}
    partners = {name: conditions[name].versus for name in found if name not in references}
    partners |= {name: next((n for n, other in partners.items() if other == name), name) for name in references}
    pairs = {name: paired(found[name], found.get(other, {})) for name, other in partners.items()}
    pairs = {name: pairs[name] for name in found if pairs[name]}
    if not pairs:
        raise ValueError("no condition has a seed with the one that it is compared with")
    differences = {name: difference_of(pair) for name, pair in pairs.items() if name not in references}
    levels = {name: statistics.fmean(final(other) for _, other in pair) for name, pair in pairs.items()}
    judgements = judged(
        {
            name: Comparison(conditions[name].claim, difference, levels[name], chance, margin)
            for name, difference in differences.items()
        },
        probability,
    )

    def reference_of(name: str) -> str:
        return name if name in references else reference_of(conditions[name].versus)

    rows = []
    for name, pair in pairs.items():
        condition = conditions[name]
        own = [run for run, _ in pair]
        rows.append(
            Row(
                name=name,
                condition=condition,
                accuracies=_by_epoch(own),
                versus=_by_epoch([other for _, other in pair]),
                final=tuple(map(final, own)),
                of_seeds=tuple(run.config.seed for run in own),
                seconds=statistics.median(sum(m.seconds for m in run.metrics) for run in own),
                relative_cost=relative_cost(found[name], found[reference_of(name)]),
                difference=differences.get(name),
                judgement=judgements.get(name, Judgement("", None, None, None)),
                beside=_beside(paired(found[name], found.get(condition.beside or "", {})), chance, margin),
            )
        )
    return rows


def _by_name(
    conditions: Mapping[str, Compared], names: Sequence[str], runs: Sequence[FinishedRun], *, partial: bool
) -> dict[str, BySeed]:
    """The runs of each condition by their seeds, which are the same in all, unless they are partial."""
    found: dict[str, BySeed] = {}
    for name, run in zip(names, runs, strict=True):
        if run.config.seed in found.setdefault(name, {}):
            raise ValueError(f"condition {name} has seed {run.config.seed} twice")
        found[name][run.config.seed] = run
    for name in [REFERENCE, *(conditions[name].versus for name in found)]:
        if name not in found:
            raise ValueError(f"there are no runs of {name}, with which others are compared")
    for name, by_seed in found.items():
        if not partial and (others := found[REFERENCE].keys() ^ by_seed.keys()):
            seeds = ", ".join(map(str, sorted(others)))
            raise ValueError(f"conditions {REFERENCE} and {name} have not both seed {seeds}")
    for what in ("data", "epochs"):
        if len(kinds := {getattr(run.config, what) for run in runs}) > 1:
            raise ValueError(f"the runs differ in their {what}: {', '.join(map(str, sorted(kinds, key=str)))}")
    return found


Pairs = list[tuple[FinishedRun, FinishedRun]]


class Ended(Protocol):
    """A run whose epochs are all there, wherever it is kept."""

    @property
    def metrics(self) -> Sequence[EpochMetrics]: ...


R = TypeVar("R")


def paired(own: Mapping[int, R], other: Mapping[int, R]) -> list[tuple[R, R]]:
    """The runs of two conditions, of the seeds that both have, in their order."""
    return [(own[seed], other[seed]) for seed in sorted(own.keys() & other.keys())]


def final(run: Ended) -> float:
    """Test accuracy after the last epoch."""
    return run.metrics[-1].test_accuracy


def difference_of(pairs: Sequence[tuple[Ended, Ended]]) -> Mean:
    """Of the final test accuracies: the first's minus the second's."""
    return mean_over_seeds([final(own) - final(other) for own, other in pairs])


def _by_epoch(runs: Sequence[FinishedRun]) -> tuple[Mean, ...]:
    return tuple(
        mean_over_seeds([m.test_accuracy for m in epoch]) for epoch in zip(*(run.metrics for run in runs), strict=True)
    )


def _beside(pairs: Pairs, chance: float, margin: float) -> Beside | None:
    if not pairs:
        return None
    others = [other for _, other in pairs]
    difference = difference_of(pairs)
    said = verdict("equivalent", difference, statistics.fmean(map(final, others)), chance, margin)
    return Beside(_by_epoch(others), difference, said)


RESULT = ("condition", "test accuracy (%)", "n", "seconds", "cost")
CLAIM = ("difference (points)", "95 % interval", "paper", "verdict", "Holm's p")
COLUMNS = RESULT + CLAIM
BESIDE = ("condition", "test accuracy (%)", "as written (%)", "n", "difference (points)", "95 % interval", "within ±1")


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The cells under ``COLUMNS``."""
    return [
        (
            label(row),
            str(row.accuracies[-1]),
            str(row.accuracies[-1].n),
            f"{row.seconds:.1f}" if row.seconds < 100 else f"{row.seconds:.0f}",
            "" if row.relative_cost is None else f"{row.relative_cost:.1f}×",
            str(row.difference or ""),
            row.difference.limits if row.difference is not None else "",
            f"{row.condition.claim}" if row.difference is not None else "",
            str(row.judgement),
            _holm(row.judgement),
        )
        for row in rows
    ]


def beside_table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The cells under ``BESIDE``, of the conditions in another version than the paper's text."""
    return [
        (
            label(row),
            str(row.accuracies[-1]),
            str(row.beside.accuracies[-1]),
            str(row.beside.difference.n),
            str(row.beside.difference),
            row.beside.difference.limits,
            row.beside.verdict.replace("does not hold", "no").replace("holds", "yes"),
        )
        for row in rows
        if row.beside is not None
    ]


def label(row: Row) -> str:
    """The condition's, as tables and figures show it."""
    is_baseline = {row.name, row.condition.beside} & {REFERENCE, BASELINE}
    return row.condition.title if is_baseline else f"{row.name}: {row.condition.title}"


def _holm(judgement: Judgement) -> str:
    if judgement.holm is None:
        return ""
    p = f"{judgement.holm:.2g}" if judgement.holm >= 0.0001 else "< 0.0001"
    return f"{p}: open" if judgement.is_open_after_holm else p


RULES = (
    f"equivalent: the {100 * CONFIDENCE:g} % interval of the difference lies within ±{100 * MARGIN:g} point; worse: "
    "below that; destroyed: below minus half of what the baseline has learned beyond chance; does not hold: the "
    "interval lies outside; open: else",
    f"… would: this number of seeds would decide with a probability of {100 * PROBABILITY:g} %, if the mean and the "
    "spread so far are the truth",
)
NOTES = (
    "difference: that of the final test accuracy, seed by seed, to the baseline, which is Activation Relaxation with "
    "everything frozen; for the baseline itself, to backpropagation",
    *RULES,
    "seconds: the time of training, median over seeds; cost: the median time of an epoch, relative to "
    "backpropagation's, of runs that were computed in the same place",
)


BESIDE_NOTE = (
    "as written: the same condition as the paper's text has it; the difference to it is paired by seed, within ±1: its "
    "95 % interval lies within ±1 point, as above and without Holm's correction. In the first table a condition is "
    "compared with what it is compared with in the same version"
)


def notes(rows: Sequence[Row], chance: float, *, runs: int, planned: int | None = None) -> tuple[str, ...]:
    """What the table's columns mean, and what its verdicts rest on.

    Args:
        runs: how many there are.
        planned: how many there will be, where some are missing.
    """
    family = [row.name for row in rows if row.judgement.holm is not None]
    separator = "; " if any(row.beside for row in rows) else ", "  # names of versions have commas
    holms = (
        f"Holm's p: the p-value of the one-sided t test that decides (for an equivalence, the larger of the two), "
        f"corrected for this table's {len(family)} claims ({separator.join(family)}); the verdict stays if it is below "
        f"{LEVEL:.3g}"
    )
    missing = (
        f"not finished: {runs} of {planned} runs are there; a row is over the seeds that are finished in it and in "
        "what it is compared with, and other seeds are left out"
    )
    return (
        *([missing] if planned is not None else []),
        *NOTES,
        *([BESIDE_NOTE] if any(row.beside for row in rows) else []),
        *([holms] if family else []),
        f"chance: {100 * chance:.2f} %, naming the most frequent class",
    )
