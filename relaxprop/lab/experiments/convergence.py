"""How fast the relaxation phase reaches backpropagation's gradient, by step size.

May import: public names, transients, lab.data, lab.environment, lab.models, lab.report.plots, lab.files,
lab.training.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from relaxprop import (
    ActivationRelaxation,
    Convergence,
    Euler,
    convergence,
)
from relaxprop.lab import models
from relaxprop.lab.data import Dataset
from relaxprop.lab.environment import environment
from relaxprop.lab.files import write_atomically
from relaxprop.lab.models import PapersModel
from relaxprop.lab.report import plots
from relaxprop.lab.training import squared_error
from relaxprop.transients import Order

STEP_SIZES = (0.05, 0.1, 0.2, 0.5)


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
    about = {
        "command": command,
        "environment": environment(),
        "title": title,
        "largest_deviation": _largest_deviation(curves),
    }
    write_atomically(folder / "convergence.json", json.dumps(about, indent=2) + "\n")
    figure = plots.convergence_curves(curves, title, folder / "convergence.png")
    return [folder / "convergence.csv", folder / "convergence.json", figure]


def _largest_deviation(curves: Sequence[Convergence]) -> float:
    """Of the measured curves from the predicted ones, anywhere."""
    return max(float(np.abs(m - c.predicted[name]).max()) for c in curves for name, m in c.measured.items())
