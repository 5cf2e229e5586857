"""The experiments: each is a list of runs, and a table and figures made from their metrics alone.

May import: feedback, frozen, public names, transients, lab.data, lab.engine, lab.models, lab.plots, lab.records,
lab.training.
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
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy import special

from relaxprop import ActivationRelaxation, Convergence, Euler, Frozen, convergence
from relaxprop.feedback import FeedbackRule
from relaxprop.frozen import ALL_FROZEN
from relaxprop.lab import models, plots
from relaxprop.lab.data import Dataset
from relaxprop.lab.engine import FinishedRun
from relaxprop.lab.models import Dropped, ModelName, PapersModel, Part
from relaxprop.lab.records import (
    AlignmentSample,
    EpochMetrics,
    Rule,
    RunConfig,
    RunLine,
    environment,
    markdown_table,
    write_atomically,
    write_lines,
)
from relaxprop.lab.training import squared_error
from relaxprop.transients import Order

Claim = Literal["equivalent", "worse", "destroyed"]
FigureName = Literal["demo", "figure1", "figure2", "figure3", "appendix-c", "graphs"]
MARGIN = 0.01  # test accuracies that differ by less are equivalent: one margin for all conditions and data
CONFIDENCE = 0.95
STEP_SIZES = (0.05, 0.1, 0.2, 0.5)


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


BASELINES = {
    "backprop": Condition("Backpropagation", rule="backprop"),
    "baseline": Condition("Activation Relaxation", versus="backprop"),
}
# Figures 1 and 3 (the paper, section 4.1).
UNFROZEN = BASELINES | {
    "a": Condition("f'(W x) in the relaxation", frozen=Frozen(relaxation_derivative=False)),
    "b": Condition("f'(W x) in the update", frozen=Frozen(update_derivative=False)),
    "c": Condition("f'(W x) in both", frozen=Frozen(relaxation_derivative=False, update_derivative=False)),
    "d": Condition("presynaptic x in the update", frozen=Frozen(update_activity=False), claim="destroyed"),
}
# Figure 2 and Appendix C.
SIMPLIFIED = BASELINES | {
    "ψ-conv": Condition("learned ψ in convolutions", feedback={"convolutional": "learned"}),
    "ψ-fc": Condition("learned ψ in linear layers", feedback={"fully_connected": "learned"}),
    "ψ": Condition("learned ψ everywhere", feedback={"all": "learned"}),
    "f'-conv": Condition("no f' in convolutions", dropped={"convolutional": "both"}),
    "f'-fc": Condition("no f' in linear layers", dropped={"fully_connected": "both"}),
    "f'": Condition("no f' anywhere", dropped={"all": "both"}),
    "ψ-f'": Condition("learned ψ, no f' anywhere", feedback={"all": "learned"}, dropped={"all": "both"}),
    "random": Condition("fixed random feedback", feedback={"all": "random"}, claim="worse"),
}
# The paper calls it an anomaly of this data set.
SIMPLIFIED_SVHN = SIMPLIFIED | {"f'": replace(SIMPLIFIED["f'"], claim="worse")}


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


# Deep graphs, of which every operation is a vertex, need more steps than the paper's networks. So many leave nothing of
# the initial state at depth 60, and the closed form is one sweep.
OPERATIONS = {"vertices": "operations", "solver_options": {"step_size": 0.5, "num_steps": 300}}
TRANSFORMER = {"model": "transformer", "loss": "cross-entropy", "optimizer": "adam", "learning_rate": 1e-3}
RESNET = TRANSFORMER | {"model": "resnet"}

EXPERIMENTS: dict[FigureName, Experiment] = {
    "demo": Experiment("every condition on scikit-learn's digits", {"digits": UNFROZEN}, seeds=3, epochs=8),
    "figure1": Experiment("the paper's Figure 1", {"mnist": UNFROZEN}),
    "figure2": Experiment("the paper's Figure 2", {"cifar10": SIMPLIFIED}, model="cnn"),
    "figure3": Experiment("the paper's Figure 3", {"fashion_mnist": UNFROZEN}),
    "appendix-c": Experiment("the paper's Appendix C", {"cifar100": SIMPLIFIED, "svhn": SIMPLIFIED_SVHN}, model="cnn"),
    "graphs": Experiment(
        "training on other graphs (Appendix A)",
        {"docstrings": BASELINES, "cifar10": BASELINES},
        seeds=3,
        epochs=5,
        settings={"docstrings": OPERATIONS | TRANSFORMER, "cifar10": OPERATIONS | RESNET},
    ),
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
    if as_coded:
        if values["model"] == "cnn":
            values |= {"model": "cnn-as-coded", "signed_inputs": True, "convolutional_factor": 2.0}
        values |= {"left_out": 2, "solver_options": {"order": "sequential"} | values.get("solver_options", {})}
        if not condition.frozen.update_activity:
            values["frozen"] = replace(condition.frozen, input=False)
    return RunConfig(**values)


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
    rows = summarise(experiment.of(dataset.name), names, runs, chance=_chance(dataset))
    epochs, n = len(rows[0].accuracies), rows[0].accuracies[-1].n
    model = runs[0].config.model.upper()
    about = f"{dataset.title}, {model}, {epochs} epoch{'s' if epochs > 1 else ''}, n = {n} seed{'s' if n > 1 else ''}"
    notes = "".join(f"* {note}\n" for note in NOTES)
    files = {
        "table.md": f"{markdown_table(COLUMNS, table(rows))}\n{about}\n\n{notes}",
        "accuracy.csv": _accuracy_csv(rows),
        "summary.json": json.dumps(_summary(rows, runs, command), indent=2) + "\n",
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


class AlignmentCurve(NamedTuple):
    """A cosine over training."""

    epochs: tuple[float, ...]
    cosines: tuple[Mean, ...]


class AlignmentCurves(NamedTuple):
    """A condition's: to backpropagation's gradient by parameter, and of backwards weights to weights by layer."""

    gradients: dict[str, AlignmentCurve]
    feedback: dict[str, AlignmentCurve]


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


def convergence_by_step_size(
    dataset: Dataset,
    *,
    model: PapersModel = "mlp",
    step_sizes: Sequence[float] = STEP_SIZES,
    num_steps: int = 100,
    order: Order = "simultaneous",
    seed: int = 0,
    batch_size: int = 64,
) -> list[Convergence]:
    """Distance to backpropagation's gradient over the relaxation phase, for a network as it is initialised.

    In float64, so that the curves end at convergence and not at float32's rounding.
    """
    network = models.build(model, dataset, seed=seed).double()
    inputs = dataset.train.images[:batch_size].double()
    targets = torch.nn.functional.one_hot(dataset.train.labels[:batch_size], len(dataset.classes)).double()
    wrapped = ActivationRelaxation(network)
    return [
        convergence(wrapped, lambda y: squared_error(y, targets), inputs, solver=Euler(eta, num_steps, order=order))
        for eta in step_sizes
    ]


def write_convergence(curves: Sequence[Convergence], title: str, folder: Path, command: str) -> list[Path]:
    """Writes the figure and the curves as a table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("step_size", "order", "parameter", "steps", "measured", "predicted"))
    for curve in curves:
        for name, measured in curve.measured.items():
            pairs = zip(measured, curve.predicted[name], strict=True)
            for step, (m, p) in enumerate(pairs):
                writer.writerow((curve.solver.step_size, curve.solver.order, name, step, f"{m:.6e}", f"{p:.6e}"))
    write_atomically(folder / "convergence.csv", text.getvalue())
    about = {"command": command, "environment": environment(), "largest_deviation": _largest_deviation(curves)}
    write_atomically(folder / "convergence.json", json.dumps(about, indent=2) + "\n")
    figure = plots.convergence_curves(curves, title, folder / "convergence.png")
    return [folder / "convergence.csv", folder / "convergence.json", figure]


def _largest_deviation(curves: Sequence[Convergence]) -> float:
    """Of the measured curves from the predicted ones, anywhere."""
    return max(float(np.abs(m - c.predicted[name]).max()) for c in curves for name, m in c.measured.items())


def _accuracy_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("condition", "epoch", "test_accuracy", "standard_error", "n"))
    for row in rows:
        for epoch, mean in enumerate(row.accuracies, 1):
            error = "" if mean.n == 1 else f"{mean.standard_error:.6f}"
            writer.writerow((row.name, epoch, f"{mean.mean:.6f}", error, mean.n))
    return text.getvalue()


def _summary(rows: Sequence[Row], runs: Sequence[FinishedRun], command: str) -> dict[str, Any]:
    return {
        "command": command,
        "environment": environment(),
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
