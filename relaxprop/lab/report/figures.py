"""A figure's folder: tables, plots and a summary, all of them made from its file of records alone.

May import: lab.files, lab.records, lab.report.claims, lab.report.plots, lab.report.tables, lab.results, lab.stats,
lab.store.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from relaxprop.lab.files import OutputError, write_atomically
from relaxprop.lab.records import RECORDS
from relaxprop.lab.report import plots
from relaxprop.lab.report.claims import (
    BESIDE,
    COLUMNS,
    RULES,
    Beside,
    Row,
    beside_table,
    label,
    notes,
    summarise,
    table,
)
from relaxprop.lab.report.tables import markdown_table
from relaxprop.lab.results import (
    BASELINE,
    BATCHED,
    AlignmentCurve,
    AlignmentCurves,
    AlignmentSample,
    FinishedRun,
)
from relaxprop.lab.stats import CONFIDENCE, LEVEL, MARGIN, PROBABILITY, Mean, mean_over_seeds
from relaxprop.lab.store import Records, read_lines


class Figure(NamedTuple):
    """What a file of records tells of an experiment on one data set."""

    command: str
    experiment: str  # its title
    dataset: str  # its title
    chance: float  # test accuracy of naming the most frequent class
    names: list[str]  # the conditions of the runs
    runs: list[FinishedRun]
    rows: list[Row]
    planned: int | None = None  # runs of the command, where some of them are missing

    @property
    def about(self) -> str:
        """Data, network and sizes."""
        epochs = len(self.rows[0].accuracies)
        least, *_, most = sorted(2 * [row.accuracies[-1].n for row in self.rows])
        n = f"{least} to {most}" if least < most else f"{most}"
        model = self.runs[0].config.model.upper()
        missing = "" if self.planned is None else f", {len(self.runs)} of {self.planned} runs"
        return f"{self.dataset}, {model}, {epochs} epoch{'s' * (epochs > 1)}, n = {n} seed{'s' * (most > 1)}{missing}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the table's columns mean, and what its verdicts rest on."""
        found = notes(self.rows, self.chance, runs=len(self.runs), planned=self.planned)
        return (*found, *_batched_note(self.runs))


def _batched_note(runs: Sequence[FinishedRun]) -> list[str]:
    """How runs were computed whose seeds were trained as one network; empty where none was."""
    seeds = [n for run in runs if (n := run.environment.get(BATCHED, 1)) > 1]
    if not seeds:
        return []
    return [
        f"batched with {max(seeds)} seeds: {len(seeds)} of {len(runs)} runs were trained as one network for "
        "all seeds of a condition. Starts and minibatches are those of single runs, results are equal to theirs to "
        "rounding, not to the last bit; seconds are the network's divided by its number of seeds"
    ]


def read_figure(path: Path, *, margin: float = MARGIN, probability: float = PROBABILITY) -> Figure:
    """Reads a figure's file of records, or the one in its folder.

    Args:
        path: of the file or the folder.
        margin: as `summarise`.
        probability: as `summarise`.

    Raises:
        OutputError: as `store.read_lines`, or the file does not say to which conditions its runs belong, or they
            cannot be paired.
    """
    path = path / RECORDS if path.is_dir() else path
    records = read_lines(path)
    if not is_complete(records):
        raise OutputError(
            f"{path} is older and does not say to which conditions its runs belong and where chance lies: "
            f"`relaxprop table {path.parent}` completes it"
        )
    return figure_of(records, path, margin=margin, probability=probability)


def is_complete(records: Records) -> bool:
    """Whether a figure can be made of the records alone."""
    head = records.head
    known = set(records.conditions) <= head.conditions.keys()
    return None not in (head.experiment, head.dataset, head.chance) and known


def figure_of(records: Records, path: Path, *, margin: float = MARGIN, probability: float = PROBABILITY) -> Figure:
    """The figure of complete records.

    Raises:
        OutputError: there are none, or they cannot be paired.
    """
    head, conditions, runs = records
    assert head.experiment is not None
    assert head.dataset is not None
    assert head.chance is not None
    names = [name for name in conditions if name is not None]
    if not runs:
        raise OutputError(f"{path} holds no runs")
    try:
        rows = summarise(
            head.conditions,
            names,
            runs,
            chance=head.chance,
            margin=margin,
            probability=probability,
            partial=head.planned is not None,
        )
    except ValueError as error:
        raise OutputError(f"{path}: {error}") from error
    return Figure(head.command, head.experiment, head.dataset, head.chance, names, runs, rows, head.planned)


def write_figure(folder: Path) -> tuple[Figure, list[Path]]:
    """Makes a figure's files from its records; returns what they show and the files, the figure last.

    Raises:
        OutputError: as `read_figure`, or nothing can be written.
    """
    figure = read_figure(folder)
    rows = figure.rows
    files = {
        "table.md": table_document(figure),
        "accuracy.csv": _accuracy_csv(rows),
        "summary.json": json.dumps(summary(figure), indent=2) + "\n",
    }
    for name, text in files.items():
        write_atomically(folder / name, text)
    title = f"{figure.experiment}\n{figure.about}"
    drawn = plots.learning_curves(_panels(rows), _LINES, title, folder / "accuracy.png")
    paths = [*(folder / name for name in files), folder / RECORDS, drawn]
    seeds = {row.name: row.of_seeds for row in rows}
    counted = [
        (name, run)
        for name, run in zip(figure.names, figure.runs, strict=True)
        if run.config.seed in seeds.get(name, ())
    ]
    if measured := alignment_curves([name for name, _ in counted], [run for _, run in counted]):
        by_label = {label(row): measured[row.name] for row in rows if row.name in measured}
        paths += _write_alignment(by_label, figure.about, folder)
    return figure, paths


_LINES = ("Activation Relaxation", "the panel's condition", "the same as the paper's text has it")


def _panels(rows: Sequence[Row]) -> dict[str, tuple[Sequence[Mean] | None, ...]]:
    """The learning curves of each panel: the baseline's, the condition's, and in another version the written one's."""
    panels: dict[str, tuple[Sequence[Mean] | None, ...]] = {}
    for row in rows:
        written = row.beside and row.beside.accuracies
        if row.name != BASELINE:
            panels[label(row)] = (None if row.condition.beside == BASELINE else row.versus, row.accuracies, written)
    return panels


def alignment_curves(names: Sequence[str], runs: Sequence[FinishedRun]) -> dict[str, AlignmentCurves]:
    """By condition, where the runs have measured it: mean over seeds with standard error."""
    samples: dict[str, list[list[AlignmentSample]]] = {}
    for name, run in zip(names, runs, strict=True):
        if by_seed := [sample for metrics in run.metrics for sample in metrics.alignment]:
            samples.setdefault(name, []).append(by_seed)

    def curves(by_seed: list[list[AlignmentSample]], quantity: str) -> dict[str, AlignmentCurve]:
        epochs = tuple(sample.epochs for sample in by_seed[0])
        return {
            key: AlignmentCurve(
                epochs,
                tuple(mean_over_seeds([getattr(s, quantity)[key] for s in at]) for at in zip(*by_seed, strict=True)),
            )
            for key in getattr(by_seed[0][0], quantity)
        }

    return {
        name: AlignmentCurves(curves(by_seed, "gradients"), curves(by_seed, "feedback"))
        for name, by_seed in samples.items()
    }


def _write_alignment(curves: Mapping[str, AlignmentCurves], about: str, folder: Path) -> list[Path]:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("condition", "quantity", "name", "epochs", "cosine", "standard_error", "n"))
    for condition, quantities in curves.items():
        for quantity, by_name in quantities._asdict().items():
            for name, curve in by_name.items():
                for epochs, mean in zip(*curve, strict=True):
                    error = "" if mean.n == 1 else f"{mean.standard_error:.6f}"
                    writer.writerow((condition, quantity, name, f"{epochs:.4f}", f"{mean.mean:.6f}", error, mean.n))
    write_atomically(folder / "alignment.csv", text.getvalue())
    return [folder / "alignment.csv", plots.alignment_curves(curves, about, folder / "alignment.png")]


def _accuracy_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("condition", "epoch", "test_accuracy", "standard_error", "n"))
    for row in rows:
        for epoch, mean in enumerate(row.accuracies, 1):
            error = "" if mean.n == 1 else f"{mean.standard_error:.6f}"
            writer.writerow((row.name, epoch, f"{mean.mean:.6f}", error, mean.n))
    return text.getvalue()


def table_document(figure: Figure) -> str:
    """The table with what it is about and what its columns mean."""
    listed = "".join(f"* {note}\n" for note in figure.notes)
    tables = [markdown_table(COLUMNS, table(figure.rows))]
    if beside := beside_table(figure.rows):
        tables.append(markdown_table(BESIDE, beside))
    return "\n".join([*tables, f"{figure.about}\n", listed])


def summary(figure: Figure) -> dict[str, Any]:
    """The results in full, what their verdicts rest on, and the runs that they are of."""
    return {
        "command": figure.command,
        **({} if figure.planned is None else {"runs_there": len(figure.runs), "runs_planned": figure.planned}),
        "environments": _environments(figure.runs),
        "chance": figure.chance,
        "margin": MARGIN,
        "confidence": CONFIDENCE,
        "rule": RULES[0],
        "family": {
            "claims": [row.name for row in figure.rows if row.judgement.holm is not None],
            "correction": "Holm",
            "level": LEVEL,
        },
        "power": PROBABILITY,
        "results": {
            row.name: {
                "test_accuracy_mean": row.accuracies[-1].mean,
                "test_accuracy_standard_error": _number(row.accuracies[-1].standard_error),
                "test_accuracy_by_seed": row.final,
                "seeds": row.of_seeds,
                "n": row.accuracies[-1].n,
                "training_seconds_median": row.seconds,
                "cost_relative_to_backpropagation": row.relative_cost,
                "paired_difference": None if row.difference is None else _difference(row, row.difference),
            }
            | ({} if row.beside is None else {"beside": _beside(row, row.beside)})
            for row in figure.rows
        },
        "runs": {run.config.id: run.config.model_dump(mode="json") for run in figure.runs},
    }


def _environments(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """Where the runs were computed, each with how many were."""
    counts: dict[str, int] = {}
    for run in runs:
        where = json.dumps(dict(run.environment))
        counts[where] = counts.get(where, 0) + 1
    return [json.loads(where) | {"runs": n} for where, n in counts.items()]


def _difference(row: Row, difference: Mean) -> dict[str, Any]:
    low, high = difference.interval
    return {
        "to": row.condition.versus,
        "mean": difference.mean,
        "standard_error": _number(difference.standard_error),
        "interval": [_number(low), _number(high)],
        "n": difference.n,
        "claim": row.condition.claim,
        "verdict": row.judgement.verdict,
        "p": row.judgement.p,
        "p_holm": row.judgement.holm,
        "decided_after_holm": row.judgement.is_decided_after_holm,
        "seeds_to_decide": row.judgement.seeds,
    }


def _beside(row: Row, beside: Beside) -> dict[str, Any]:
    low, high = beside.difference.interval
    return {
        "to": row.condition.beside,
        "mean": beside.difference.mean,
        "standard_error": _number(beside.difference.standard_error),
        "interval": [_number(low), _number(high)],
        "n": beside.difference.n,
        "within_margin": beside.verdict,
    }


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None
