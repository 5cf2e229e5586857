"""What a phase of moving activities makes of the gradients of CIFAR-10's CNN, where strict predictive coding lags.

    RELAXPROP_DATA=FOLDER python results/moving-phase/measure.py       # half a minute, one thread

The network starts as in the runs of `relaxprop reproduce rules` (seed 0), and the minibatch is the first 64 training
images. Each row is a rule, a number of steps of 0.1, and a factor by which the loss is multiplied. For every weight it
has the cosine of the gradient to backpropagation's, and its norm over the factor, relative to backpropagation's norm.
The network is looked at twice: at the start, and after updates by backpropagation at the rate that `reproduce rules`
has chosen for it. Writes outcome.json and, made of it alone, table.md.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from relaxprop import EquilibriumPropagation, PredictiveCoding
from relaxprop.inspect.alignment import numbers
from relaxprop.lab import models
from relaxprop.lab.data import load
from relaxprop.lab.environment import environment
from relaxprop.lab.files import write_atomically
from relaxprop.lab.report.tables import markdown_table
from relaxprop.lab.training import limited_threads, squared_error

HERE = Path(__file__).parent
BATCH, UPDATES, RATE = 64, 60, 0.0005
PHASES: list[tuple[str, Any, int, float]] = [
    ("predictive coding, strict", PredictiveCoding, 20, 1.0),
    ("predictive coding, strict", PredictiveCoding, 200, 1.0),
    ("predictive coding, strict", PredictiveCoding, 20, 0.01),
    ("predictive coding, strict", PredictiveCoding, 200, 0.01),
    ("equilibrium propagation, centred", EquilibriumPropagation, 20, 1.0),
]


def gradients(network: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    network.zero_grad()
    loss().backward()
    named = network.named_parameters()
    return {name: numbers(p.grad) for name, p in named if name.endswith("weight") and p.grad is not None}


def measured(network: nn.Module, images: Tensor, targets: Tensor) -> list[dict[str, Any]]:
    exact = gradients(network, lambda: squared_error(network(images), targets))
    found = []
    for title, kind, steps, factor in PHASES:
        rule = kind(network, lambda y, t, by=factor: by * squared_error(y, t), step_size=0.1, num_steps=steps)
        own = gradients(network, lambda rule=rule: rule(images, target=targets))
        layers = {
            name: {
                "cosine": float(functional.cosine_similarity(g, exact[name], dim=0)),
                "size": float(g.norm() / exact[name].norm()) / factor,
            }
            for name, g in own.items()
        }
        found.append({"rule": title, "steps": steps, "factor": factor, "layers": layers})
    return found


def main() -> None:
    dataset = load("cifar10")
    network = models.build("cnn", dataset, seed=0)
    images = dataset.train.images.split(BATCH)
    targets = functional.one_hot(dataset.train.labels, len(dataset.classes)).to(images[0].dtype).split(BATCH)
    with limited_threads(1):
        outcome = {"start": measured(network, images[0], targets[0])}
        optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
        for batch in range(UPDATES):
            optimizer.zero_grad()
            squared_error(network(images[batch]), targets[batch]).backward()
            optimizer.step()
        outcome[f"{UPDATES} updates"] = measured(network, images[0], targets[0])
        where = environment()
    command = shlex.join(["python", *sys.argv])
    told = {"command": command, "environment": where, "dataset": dataset.title, "outcome": outcome}
    write_atomically(HERE / "outcome.json", json.dumps(told, indent=2) + "\n")
    write_table()


def write_table() -> None:
    told = json.loads((HERE / "outcome.json").read_text(encoding="utf-8"))
    names = list(told["outcome"]["start"][0]["layers"])
    short = [name.split(".")[1] for name in names]
    rows = [
        [
            after, row["rule"], str(row["steps"]), f"{row['factor']:g}",
            *(f"{row['layers'][n]['cosine']:.2f}, {row['layers'][n]['size']:.2f}" for n in names),
        ]
        for after, phases in told["outcome"].items()
        for row in phases
    ]  # fmt: skip
    table = markdown_table(("after", "rule", "steps", "loss ×", *short), rows)
    where = ", ".join(f"{name} {value}" for name, value in told["environment"].items() if value is not None)
    write_atomically(HERE / "table.md", f"{table}\n{told['dataset']}, `{told['command']}`: {where}\n")


if __name__ == "__main__":
    main()
