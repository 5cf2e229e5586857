"""What ``num_steps=None`` reaches where the relaxation's derivative is not frozen.

    python results/unfrozen/measure.py --out results/unfrozen/steps.json

With Frozen(relaxation_derivative=False) the number of steps is the one that the same graph takes with everything
frozen. Nothing guarantees that it is enough there. So it is measured on perceptrons of width 64 on digits: the
largest residual ``‖A x + s − x‖ / ‖A x + s‖`` of a final state, and the largest distance of a parameter's gradient to
that after four times as many steps, relative to its norm.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from relaxprop import ActivationRelaxation, Euler, Frozen
from relaxprop.lab.data import load
from relaxprop.lab.environment import environment
from relaxprop.solvers import planned_steps

DEPTHS, SEEDS, BATCH, WIDTH, TRAINED = (2, 4, 8), 3, 64, 64, 50
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


def network(depth: int, activation: str, inputs: int, classes: int) -> nn.Sequential:
    sizes = [inputs, *[WIDTH] * depth]
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, classes)).double()


def gradients(module: nn.Module, steps: int | None, x: Tensor, labels: Tensor, reduction: str) -> tuple[Any, Any]:
    frozen = Frozen(relaxation_derivative=False)
    model = ActivationRelaxation(module, solver=Euler(0.1, steps), frozen=frozen, measure_residual=True)
    module.zero_grad()
    functional.cross_entropy(model(x), labels, reduction=reduction).backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}, model.last_relaxation


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    warnings.simplefilter("ignore")
    digits = load("digits")
    found = []
    for depth, activation, reduction, trained in itertools.product(DEPTHS, ACTIVATIONS, ("mean", "sum"), (0, TRAINED)):
        residuals, distances = [], []
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            module = network(depth, activation, digits.train.images[0].numel(), len(digits.classes))
            optimizer = torch.optim.Adam(module.parameters(), 1e-3)
            for rows in torch.randperm(len(digits.train.labels)).split(BATCH)[:trained]:
                optimizer.zero_grad()
                functional.cross_entropy(
                    module(digits.train.images[rows].double()), digits.train.labels[rows]
                ).backward()
                optimizer.step()
            x, labels = digits.train.images[:BATCH].double(), digits.train.labels[:BATCH]
            planned = planned_steps(depth, 0.1, "simultaneous")
            ours, record = gradients(module, None, x, labels, reduction)
            later, _ = gradients(module, 4 * planned, x, labels, reduction)
            residuals.append(record.residual)
            distances.append(max(float((ours[n] - later[n]).norm() / later[n].norm()) for n in later))
        row = {
            "depth": depth, "activation": activation, "loss": reduction, "minibatches trained": trained,
            "steps": record.num_steps, "n": SEEDS,
            "residual, median": statistics.median(residuals), "residual, largest": max(residuals),
            "distance, median": statistics.median(distances), "distance, largest": max(distances),
        }  # fmt: skip
        found.append(row)
        print(*row.values(), flush=True)
    command = f"python results/unfrozen/measure.py --out {given.out}"
    kept = {"command": command, "environment": environment(), "results": found}
    given.out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
