"""The paper's claims, and what the kept results say on each.

May import: lab.experiments.paper, lab.experiments.plan, lab.files, lab.records,
lab.report.figures, lab.results, lab.stats.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from relaxprop.lab import stats
from relaxprop.lab.experiments.paper import EXPERIMENTS, FigureName
from relaxprop.lab.experiments.plan import COMMAND, Plan, plan_of
from relaxprop.lab.files import OutputError
from relaxprop.lab.records import RECORDS
from relaxprop.lab.report.figures import Figure, read_figure
from relaxprop.lab.results import BASELINE, REFERENCE, Compared
from relaxprop.lab.stats import Comparison, Judgement, Mean


class Claim(NamedTuple):
    """A sentence of the paper: what becomes of the accuracy of a figure's condition on a data set."""

    figure: FigureName
    dataset: str
    name: str  # of the condition

    @property
    def condition(self) -> Compared:
        """What is changed, and what the paper says of it."""
        return EXPERIMENTS[self.figure].of(self.dataset)[self.name]


FIGURES: tuple[tuple[FigureName, str], ...] = (
    ("figure1", "mnist"),
    ("figure3", "fashion_mnist"),
    ("figure2", "cifar10"),
    ("appendix-c", "svhn"),
    ("appendix-c", "cifar100"),
)
_ALL = [Claim(figure, dataset, name) for figure, dataset in FIGURES for name in EXPERIMENTS[figure].of(dataset)]
# What the others rest on: that the baseline is backpropagation's equal, and that worse feedback is seen to be worse.
SUPPORTING = tuple(claim for claim in _ALL if claim.name in (BASELINE, "random"))
CLAIMS = tuple(claim for claim in _ALL if claim not in SUPPORTING and claim.name != REFERENCE)


class Source(NamedTuple):
    """One place of kept results: of one command, on one data set.

    Attributes:
        place: its folder, below the folder of results.
        planned: runs of the command, where some of them are missing.
        data: the data set's digest.
        title: the data set's.
        chance: accuracy of naming the most frequent class, in [0, 1].
        seconds: of training for one epoch, median by network and condition.
        figure: its runs.
    """

    place: str
    command: str
    plan: Plan
    runs: int
    planned: int | None
    dataset: str
    data: str
    title: str
    chance: float
    epochs: int
    found: tuple[Found, ...]
    seconds: dict[tuple[str, str], float]
    figure: Figure


class Found(NamedTuple):
    """What a source says on one condition beside the one that it is compared with.

    Attributes:
        reference: mean final accuracy of the latter.
    """

    name: str
    difference: Mean
    reference: float


class Line(NamedTuple):
    """A claim beside the best evidence for it, which may be none.

    Attributes:
        judgement: on the claim, among all claims that are judged together.
    """

    claim: Claim
    source: Source | None
    found: Found | None
    judgement: Judgement


def sources(results: Path) -> list[Source]:
    """All that is kept of the paper's figures in a folder.

    Raises:
        OutputError: the folder is not there, something in it is damaged or cannot be read, or two places hold
            different data under one name.
    """
    if not results.is_dir():
        raise OutputError(f"there is no folder {results}: name the folder of kept results")
    found = list(_sources(results))
    digests: dict[str, Source] = {}
    for source in found:
        other = digests.setdefault(source.dataset, source)
        if other.data != source.data:
            raise OutputError(
                f"{source.place} and {other.place} hold different data of the name {source.dataset} ({source.data} and "
                f"{other.data}): keep one of them elsewhere"
            )
    return found


def _sources(results: Path) -> Iterator[Source]:
    for path in sorted(results.rglob(RECORDS)):
        try:
            first = path.read_text(encoding="utf-8").partition("\n")[0]
        except (OSError, ValueError) as error:
            raise OutputError(f"{path} is no file of records: {error}") from error
        command = _command(path, first)
        if command is None:
            continue
        figure = read_figure(path)
        config = figure.runs[0].config
        seconds: dict[tuple[str, str], list[float]] = {}
        for name, run in zip(figure.names, figure.runs, strict=True):
            seconds.setdefault((run.config.model, name), []).extend(metrics.seconds for metrics in run.metrics)
        yield Source(
            place=_place(path, results),
            command=command,
            plan=_plan(path, command),
            runs=len(figure.runs),
            planned=figure.planned,
            dataset=config.dataset,
            data=config.data or "",
            title=figure.dataset,
            chance=figure.chance,
            epochs=config.epochs,
            found=tuple(
                Found(row.name, row.difference, row.versus[-1].mean)
                for row in figure.rows
                if row.difference is not None
            ),
            seconds={name: statistics.median(values) for name, values in seconds.items()},
            figure=figure,
        )


def _command(path: Path, text: str) -> str | None:
    """Of a figure's results; None where they are of something else, as the comparison of the rules is."""
    try:
        command = json.loads(text)["command"]
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} does not say by which command it was made") from error
    words = tuple(str(command).split())
    return command if words[:2] == COMMAND and words[2:3] != ("rules",) else None


def _plan(path: Path, command: str) -> Plan:
    try:
        return plan_of(command)
    except ValueError as error:
        raise OutputError(f"{path} was made by a command that is not known: {error}") from error


def _place(path: Path, results: Path) -> str:
    return (Path(results.resolve().name) / path.parent.relative_to(results)).as_posix()


def best(claim: Claim, found: Sequence[Source]) -> tuple[Source, Found] | None:
    """The evidence for a claim: of most seeds, then of most epochs, then with records and complete.

    Runs of another version than the paper's text are none.
    """
    candidates = [
        (source, on)
        for source in found
        if (source.plan.figure, source.dataset) == claim[:2] and is_as_written(source.plan)
        for on in source.found
        if on.name == claim.name
    ]
    if not candidates:
        return None
    return max(candidates, key=lambda pair: (pair[1].difference.n, pair[0].epochs, pair[0].planned is None))


def is_as_written(plan: Plan) -> bool:
    """Whether a plan's conditions are, under their own names, those of the paper's text."""
    return plan.beside or not (plan.as_coded or plan.initial != "feedforward")


def judged(claims: Sequence[Claim], found: Sequence[Source]) -> list[Line]:
    """Each claim beside its evidence; Holm's correction is over all of them."""
    evidence = [best(claim, found) for claim in claims]
    judgements = stats.judged(
        {
            claim: Comparison(claim.condition.claim, on.difference, on.reference, source.chance)
            for claim, pair in zip(claims, evidence, strict=True)
            if pair is not None
            for source, on in [pair]
        }
    )
    nothing = Judgement("open: no runs", None, None, None)
    lines = []
    for claim, pair in zip(claims, evidence, strict=True):
        source, on = (None, None) if pair is None else pair
        lines.append(Line(claim, source, on, judgements.get(claim, nothing)))
    return lines
