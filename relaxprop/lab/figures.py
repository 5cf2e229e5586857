"""The experiments: each is a list of runs, and a table and figures made from their metrics alone."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from relaxprop.diagnostics import Convergence, convergence
from relaxprop.frozen import ALL_FROZEN, Frozen
from relaxprop.lab import models, plots
from relaxprop.lab.data import Dataset, DatasetName
from relaxprop.lab.engine import FinishedRun
from relaxprop.lab.models import ModelName
from relaxprop.lab.records import RULES, Rule, RunConfig, environment, write_atomically
from relaxprop.lab.training import squared_error
from relaxprop.relaxation import ActivationRelaxation
from relaxprop.solvers import Euler
from relaxprop.transients import Order

Claim = Literal["equivalent", "destroyed"]
RULE_NAMES: dict[Rule, str] = {"ar": "Activation Relaxation", "backprop": "Backpropagation"}
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
    claim: Claim = "equivalent"
    versus: str = "baseline"


# Figures 1 and 3 (the paper, section 4.1).
CONDITIONS: dict[str, Condition] = {
    "baseline": Condition("Activation Relaxation", versus="backprop"),
    "a": Condition("f' at x in the relaxation", frozen=Frozen(relaxation_derivative=False)),
    "b": Condition("f' at x in the update", frozen=Frozen(update_derivative=False)),
    "c": Condition("f' at x in both", frozen=Frozen(relaxation_derivative=False, update_derivative=False)),
    "d": Condition("presynaptic activity x in the update", frozen=Frozen(update_activity=False), claim="destroyed"),
    "backprop": Condition("Backpropagation", rule="backprop"),
}


def condition_runs(
    dataset: DatasetName, *, seeds: int, epochs: int, data: str | None = None, as_coded: bool = False
) -> dict[str, list[RunConfig]]:
    """The runs of every condition, by seed: the same initial weights and minibatches in all conditions.

    ``as_coded`` takes the authors' code where it differs from the paper's text on purpose: vertices are updated in
    sequence from the output down, the last two minibatches are left out, and d relaxes the input too.
    """
    return {
        name: [_run(condition, seed, as_coded, dataset=dataset, data=data, epochs=epochs) for seed in range(seeds)]
        for name, condition in CONDITIONS.items()
    }


def _run(condition: Condition, seed: int, as_coded: bool, **values: Any) -> RunConfig:
    values |= {"rule": condition.rule, "seed": seed, "frozen": condition.frozen}
    if as_coded:
        values["left_out"] = 2
        values["solver_options"] = {"order": "sequential"}
        if not condition.frozen.update_activity:
            values["frozen"] = replace(condition.frozen, input=False)
    return RunConfig(**values)


def demo_runs(dataset: DatasetName, *, seeds: int, epochs: int, data: str | None = None) -> list[RunConfig]:
    """Activation Relaxation beside backpropagation: per seed the same initial weights and minibatches."""
    return [
        RunConfig(dataset=dataset, data=data, rule=rule, seed=seed, epochs=epochs)
        for seed in range(seeds)
        for rule in RULES
    ]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its standard error, not a number where there is one seed."""

    mean: float
    standard_error: float
    n: int

    def __str__(self) -> str:
        if self.n == 1:
            return f"{100 * self.mean:.2f}"
        return f"{100 * self.mean:.2f} ± {100 * self.standard_error:.2f}"


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Mean and standard error ``s / √n``."""
    n = len(values)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Mean(statistics.fmean(values), error, n)


@dataclass(frozen=True)
class Row:
    """One rule's results."""

    rule: Rule
    accuracies: tuple[Mean, ...]  # test accuracy after each epoch
    final: tuple[float, ...]  # test accuracy after the last epoch, by seed
    seconds: float  # of training, median over seeds
    relative_cost: float  # median seconds of an epoch over backpropagation's


def summarise(runs: Sequence[FinishedRun]) -> list[Row]:
    """Results by rule, seeds in order."""
    by_rule = {rule: [run.metrics for run in runs if run.config.rule == rule] for rule in RULES}
    epoch_seconds = {
        rule: statistics.median(m.seconds for metrics in by_rule[rule] for m in metrics) for rule in by_rule
    }
    return [
        Row(
            rule=rule,
            accuracies=tuple(mean_over_seeds([m.test_accuracy for m in epoch]) for epoch in zip(*by_seed, strict=True)),
            final=tuple(metrics[-1].test_accuracy for metrics in by_seed),
            seconds=statistics.median(sum(m.seconds for m in metrics) for metrics in by_seed),
            relative_cost=epoch_seconds[rule] / epoch_seconds["backprop"],
        )
        for rule, by_seed in by_rule.items()
    ]


def paired_difference(rows: Sequence[Row]) -> Mean:
    """Final test accuracy of Activation Relaxation minus backpropagation's, seed by seed."""
    final = {row.rule: row.final for row in rows}
    return mean_over_seeds([a - b for a, b in zip(final["ar"], final["backprop"], strict=True)])


COLUMNS = ("rule", "test accuracy (%)", "n", "training (s)", "cost")


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The cells under ``COLUMNS``."""
    return [
        (
            RULE_NAMES[row.rule],
            str(row.accuracies[-1]),
            str(row.accuracies[-1].n),
            f"{row.seconds:.1f}",
            f"{row.relative_cost:.2f}×",
        )
        for row in rows
    ]


def write_demo(runs: Sequence[FinishedRun], dataset: Dataset, folder: Path, command: str) -> list[Path]:
    """Writes the table, the figures and what they were made from; returns the files, figures last."""
    rows = summarise(runs)
    files = {
        "table.md": _markdown(COLUMNS, table(rows)),
        "accuracy.csv": _accuracy_csv(rows),
        "summary.json": json.dumps(_summary(rows, runs, command), indent=2) + "\n",
    }
    for name, text in files.items():
        write_atomically(folder / name, text)
    n = rows[0].accuracies[-1].n
    title = f"{dataset.name}, MLP, n = {n} seed{'s' if n > 1 else ''}"
    curves = [(RULE_NAMES[row.rule], row.accuracies) for row in rows]
    figures = [
        plots.learning_curves(curves, title, folder / "accuracy.png"),
        plots.convergence_curves(convergence_by_step_size(dataset), dataset.name, folder / "convergence.png"),
    ]
    return [*(folder / name for name in files), *figures]


def convergence_by_step_size(
    dataset: Dataset,
    *,
    model: ModelName = "mlp",
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


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _accuracy_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("rule", "epoch", "test_accuracy", "standard_error", "n"))
    for row in rows:
        for epoch, mean in enumerate(row.accuracies, 1):
            error = "" if mean.n == 1 else f"{mean.standard_error:.6f}"
            writer.writerow((row.rule, epoch, f"{mean.mean:.6f}", error, mean.n))
    return text.getvalue()


def _summary(rows: Sequence[Row], runs: Sequence[FinishedRun], command: str) -> dict[str, Any]:
    difference = paired_difference(rows)
    return {
        "command": command,
        "environment": environment(),
        "results": {
            row.rule: {
                "test_accuracy_mean": row.accuracies[-1].mean,
                "test_accuracy_standard_error": _number(row.accuracies[-1].standard_error),
                "test_accuracy_by_seed": row.final,
                "n": row.accuracies[-1].n,
                "training_seconds_median": row.seconds,
                "cost_relative_to_backpropagation": row.relative_cost,
            }
            for row in rows
        },
        "paired_difference": {
            "mean": difference.mean,
            "standard_error": _number(difference.standard_error),
            "n": difference.n,
        },
        "runs": {run.config.id: run.config.model_dump() for run in runs},
    }


def _number(x: float) -> float | None:
    return None if math.isnan(x) else x
