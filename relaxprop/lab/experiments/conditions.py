"""An experiment: conditions side by side, from the same start and on the same minibatches; its runs, table and figures.

May import: feedback, frozen, public names, lab.config, lab.data, lab.environment, lab.files, lab.models,
lab.report.plots, lab.report.tables, lab.results, lab.stats, lab.store.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from relaxprop import (
    Frozen,
)
from relaxprop.feedback import FeedbackRule
from relaxprop.frozen import ALL_FROZEN
from relaxprop.lab.config import Rule, RunConfig
from relaxprop.lab.data import Dataset
from relaxprop.lab.environment import environment
from relaxprop.lab.files import write_atomically
from relaxprop.lab.models import Dropped, ModelName, Part
from relaxprop.lab.report import plots
from relaxprop.lab.report.tables import markdown_table
from relaxprop.lab.results import AlignmentCurve, AlignmentCurves, AlignmentSample, EpochMetrics, FinishedRun, RunLine
from relaxprop.lab.stats import MARGIN, Claim, Mean, mean_over_seeds, verdict
from relaxprop.lab.store import write_lines


@dataclass(frozen=True)
class Condition:
    """One curve of a figure.

    Attributes:
        title: what is changed.
        claim: the paper's, of its final accuracy beside that of ``versus``.
        versus: the condition that it is compared with.
    """

    title: str
    rule: Rule = "ar"
    frozen: Frozen = ALL_FROZEN
    feedback: Mapping[Part, FeedbackRule] = field(default_factory=dict)
    dropped: Mapping[Part, Dropped] = field(default_factory=dict)
    claim: Claim = "equivalent"
    versus: str = "baseline"


@dataclass(frozen=True)
class Experiment:
    """A figure's protocol.

    Attributes:
        conditions: by data set.
        settings: fields of `RunConfig` that are not the paper's, by data set.
    """

    title: str
    conditions: Mapping[str, Mapping[str, Condition]]
    seeds: int = 10
    epochs: int = 30
    model: ModelName = "mlp"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, dataset: str) -> Mapping[str, Condition]:
        """The conditions on a data set; on one that the figure does not have, those of its first."""
        return self.conditions.get(dataset) or next(iter(self.conditions.values()))


BASELINES = {
    "backprop": Condition("Backpropagation", rule="backprop"),
    "baseline": Condition("Activation Relaxation", versus="backprop"),
}
BASELINE, REFERENCE = "baseline", "backprop"


def condition_runs(
    experiment: Experiment,
    dataset: str,
    *,
    seeds: int,
    epochs: int,
    data: str | None = None,
    as_coded: bool = False,
    only: Sequence[str] = (),
    alignment_every: int = 0,
) -> list[tuple[str, RunConfig]]:
    """The runs with the names of their conditions: per seed the same initial weights and minibatches in all of them.

    ``only`` names conditions to which the baselines are added; by default all.

    ``as_coded`` takes the authors' code where it differs from the paper's text on purpose: vertices are updated in
    sequence from the output towards the input, the last two minibatches are left out, d relaxes the input too, and the
    CNN has the code's sizes, inputs in [−1, 1] and twice the learning rate in its convolutions. Not taken: the code's
    defects, and its bound of 50 on the convolutions' steps.
    """
    values = {"model": experiment.model, "dataset": dataset, "data": data, "epochs": epochs}
    values |= {"alignment_every": alignment_every} | dict(experiment.settings.get(dataset, {}))
    if experiment.settings and dataset not in experiment.settings:
        raise ValueError(f"dataset must be one of {', '.join(experiment.settings)} in this experiment, got {dataset!r}")
    conditions = experiment.of(dataset)
    if unknown := [name for name in only if name not in conditions]:
        raise ValueError(f"condition must be one of {', '.join(conditions)}, got {unknown[0]!r}")
    return [
        (name, _run(condition, as_coded, seed=seed, **values))
        for seed in range(seeds)
        for name, condition in conditions.items()
        if not only or name in only or name in BASELINES
    ]


def _run(condition: Condition, as_coded: bool, **values: Any) -> RunConfig:
    values |= {name: getattr(condition, name) for name in ("rule", "frozen", "feedback", "dropped")}
    return RunConfig(**(as_the_code_has_it(values) if as_coded else values))


def as_the_code_has_it(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `RunConfig` as the authors' code has them, where it differs from the paper's text on purpose."""
    found = dict(values)
    if found["model"] == "cnn":
        found |= {"model": "cnn-as-coded", "signed_inputs": True, "convolutional_factor": 2.0}
    found |= {"left_out": 2, "solver_options": {"order": "sequential"} | found.get("solver_options", {})}
    if not found["frozen"].update_activity:
        found["frozen"] = replace(found["frozen"], input=False)
    return found


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
    """

    name: str
    condition: Condition
    accuracies: tuple[Mean, ...]
    final: tuple[float, ...]
    seconds: float
    relative_cost: float
    difference: Mean | None
    verdict: str


def summarise(
    conditions: Mapping[str, Condition], names: Sequence[str], runs: Sequence[FinishedRun], *, chance: float
) -> list[Row]:
    """Results by condition; ``names`` are those of the runs, and seeds are in the same order in all conditions."""
    metrics: dict[str, list[list[EpochMetrics]]] = {}
    for name, run in zip(names, runs, strict=True):
        metrics.setdefault(name, []).append(run.metrics)
    final = {name: [m[-1].test_accuracy for m in by_seed] for name, by_seed in metrics.items()}
    seconds = {
        name: statistics.median(m.seconds for seed in by_seed for m in seed) for name, by_seed in metrics.items()
    }
    rows = []
    for name, by_seed in metrics.items():
        condition = conditions[name]
        pairs = zip(final[name], final[condition.versus], strict=True)
        difference = mean_over_seeds([a - b for a, b in pairs]) if name != REFERENCE else None
        reference = statistics.fmean(final[condition.versus])
        rows.append(
            Row(
                name=name,
                condition=condition,
                accuracies=tuple(
                    mean_over_seeds([m.test_accuracy for m in epoch]) for epoch in zip(*by_seed, strict=True)
                ),
                final=tuple(final[name]),
                seconds=statistics.median(sum(m.seconds for m in metrics) for metrics in by_seed),
                relative_cost=seconds[name] / seconds[REFERENCE],
                difference=difference,
                verdict=verdict(condition.claim, difference, reference, chance) if difference is not None else "",
            )
        )
    return rows


RESULT = ("condition", "test accuracy (%)", "n", "seconds", "cost")
CLAIM = ("difference (points)", "95 % interval", "paper", "verdict")
COLUMNS = RESULT + CLAIM


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The cells under ``COLUMNS``."""
    return [
        (
            _label(row),
            str(row.accuracies[-1]),
            str(row.accuracies[-1].n),
            f"{row.seconds:.1f}" if row.seconds < 100 else f"{row.seconds:.0f}",
            f"{row.relative_cost:.1f}×",
            str(row.difference or ""),
            _interval(row.difference),
            f"{row.condition.claim}" if row.difference is not None else "",
            row.verdict,
        )
        for row in rows
    ]


def _label(row: Row) -> str:
    return row.condition.title if row.name in BASELINES else f"{row.name}: {row.condition.title}"


def _interval(difference: Mean | None) -> str:
    if difference is None or difference.n == 1:
        return ""
    low, high = difference.interval
    return f"{100 * low:.2f} to {100 * high:.2f}"


NOTES = (
    "difference: of the final test accuracy, seed by seed, to the baseline (Activation Relaxation with everything "
    "frozen); the baseline's own, to backpropagation",
    f"equivalent: the 95 % interval of the difference lies within ±{100 * MARGIN:g} point; worse: below that; "
    "destroyed: below minus half of what the baseline has learned beyond chance",
    "seconds: of training, median over seeds; cost: median time of an epoch of it relative to backpropagation's",
)


def write_conditions(
    experiment: Experiment,
    names: Sequence[str],
    runs: Sequence[FinishedRun],
    dataset: Dataset,
    folder: Path,
    command: str,
) -> tuple[list[Row], list[Path]]:
    """Writes the table, the figure and what they were made from; returns the rows and the files, the figure last."""
    chance = _chance(dataset)
    rows = summarise(experiment.of(dataset.name), names, runs, chance=chance)
    epochs, n = len(rows[0].accuracies), rows[0].accuracies[-1].n
    model = runs[0].config.model.upper()
    about = f"{dataset.title}, {model}, {epochs} epoch{'s' if epochs > 1 else ''}, n = {n} seed{'s' if n > 1 else ''}"
    notes = "".join(f"* {note}\n" for note in NOTES)
    files = {
        "table.md": f"{markdown_table(COLUMNS, table(rows))}\n{about}\n\n{notes}",
        "accuracy.csv": _accuracy_csv(rows),
        "summary.json": json.dumps(_summary(rows, runs, dataset, chance, command), indent=2) + "\n",
    }
    for name, text in files.items():
        write_atomically(folder / name, text)
    lines = [RunLine.of(run.config, dict(run.environment), run.metrics) for run in runs]
    write_lines(folder / "runs.jsonl", command, lines)
    curves = {_label(row): row.accuracies for row in rows}
    title = f"{experiment.title}\n{about}"
    figure = plots.learning_curves(curves, BASELINES[BASELINE].title, title, folder / "accuracy.png")
    paths = [*(folder / name for name in files), folder / "runs.jsonl", figure]
    if measured := alignment_curves(names, runs):
        paths += _write_alignment(
            {_label(row): measured[row.name] for row in rows if row.name in measured}, about, folder
        )
    return rows, paths


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


def _chance(dataset: Dataset) -> float:
    """Accuracy of the most frequent class."""
    labels = dataset.test.labels.flatten()
    return float(labels.bincount().max()) / len(labels)


def _accuracy_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("condition", "epoch", "test_accuracy", "standard_error", "n"))
    for row in rows:
        for epoch, mean in enumerate(row.accuracies, 1):
            error = "" if mean.n == 1 else f"{mean.standard_error:.6f}"
            writer.writerow((row.name, epoch, f"{mean.mean:.6f}", error, mean.n))
    return text.getvalue()


def _summary(
    rows: Sequence[Row], runs: Sequence[FinishedRun], dataset: Dataset, chance: float, command: str
) -> dict[str, Any]:
    return {
        "command": command,
        "environment": environment(),
        "data": {"title": dataset.title, "digest": dataset.digest, "chance": chance},
        "margin": MARGIN,
        "results": {
            row.name: {
                "test_accuracy_mean": row.accuracies[-1].mean,
                "test_accuracy_standard_error": _number(row.accuracies[-1].standard_error),
                "test_accuracy_by_seed": row.final,
                "n": row.accuracies[-1].n,
                "training_seconds_median": row.seconds,
                "cost_relative_to_backpropagation": row.relative_cost,
                "paired_difference": None if row.difference is None else _difference(row, row.difference),
            }
            for row in rows
        },
        "runs": {run.config.id: run.config.model_dump(mode="json") for run in runs},
    }


def _difference(row: Row, difference: Mean) -> dict[str, Any]:
    low, high = difference.interval
    return {
        "to": row.condition.versus,
        "mean": difference.mean,
        "standard_error": _number(difference.standard_error),
        "interval": [_number(low), _number(high)],
        "n": difference.n,
        "claim": row.condition.claim,
        "verdict": row.verdict,
    }


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None
