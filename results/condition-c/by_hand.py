"""Condition c of Figure 1 by its equations alone, in float64: do the kept runs lose accuracy because of rounding?

    python results/condition-c/by_hand.py --seed 3                      # a quarter of an hour, one thread
    python results/condition-c/by_hand.py --seed 3 --epochs 1 --folder /tmp/c      # to see that it works

It starts where a kept run has started (results/figure1, condition c), and takes the same minibatches. The library
computes no state and no gradient here: f is tanh, the output is linear, x̄ are the feedforward activities, x the states.

    x_l ← x_l + η ((f'(W_{l+1} x_l + b_{l+1}) ⊙ x_{l+1}) W_{l+1} − x_l),   at the top  f' = 1, x = ∂L/∂output
    ∂L/∂W_l → (f'(W_l x_{l−1} + b_l) ⊙ x_l)^T x̄_{l−1}                      after 100 steps of η = 0.1

After each epoch it measures, on the first 1,000 training images, how the update lies to the gradient, and how far the
hidden units are saturated. Writes outcome.json and, made of it alone, table.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from relaxprop.lab import models
from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import load
from relaxprop.lab.environment import environment
from relaxprop.lab.files import write_atomically
from relaxprop.lab.report.tables import markdown_table
from relaxprop.lab.store import read_lines
from relaxprop.lab.training import limited_threads, minibatches

HERE = Path(__file__).parent
KEPT = HERE.parent / "figure1" / "runs.jsonl"
MEASURED = 1000  # training images


class Network(NamedTuple):
    """A perceptron with tanh and a linear output: its weights, of shape (out, in), and its biases."""

    weights: list[Tensor]
    biases: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Network:
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        return cls([m.weight.detach() for m in layers], [m.bias.detach() for m in layers])

    def argument(self, layer: int, x: Tensor) -> Tensor:
        """``W_l x + b_l`` of each sample."""
        return torch.addmm(self.biases[layer], x, self.weights[layer].T)

    def activities(self, images: Tensor) -> list[Tensor]:
        """Of the input, the hidden layers and the output."""
        found = [images]
        for layer in range(len(self.weights) - 1):
            found.append(torch.tanh(self.argument(layer, found[-1])))
        return [*found, self.argument(len(self.weights) - 1, found[-1])]


def derivative(u: Tensor) -> Tensor:
    """tanh'(u)."""
    return 1 - torch.tanh(u) ** 2


def update(
    network: Network, images: Tensor, targets: Tensor, eta: float, num_steps: int
) -> list[tuple[Tensor, Tensor]]:
    """By layer, what c has in the place of the gradients of weights and bias, of the summed squared error."""
    *activities, output = network.activities(images)
    error = 2 * (output - targets)
    hidden = range(1, len(activities))
    states = dict(zip(hidden, activities[1:], strict=True))
    from_top = error @ network.weights[-1]
    for _ in range(num_steps):
        drive = {
            i: (derivative(network.argument(i, states[i])) * states[i + 1]) @ network.weights[i] for i in hidden[:-1]
        } | {hidden[-1]: from_top}
        states = {i: x + eta * (drive[i] - x) for i, x in states.items()}
    below = [images, *(states[i] for i in hidden[:-1])]
    errors = [derivative(network.argument(i - 1, below[i - 1])) * states[i] for i in hidden]
    return [(e.T @ x, e.sum(0)) for e, x in zip([*errors, error], activities, strict=True)]


def gradient(network: Network, images: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """By layer, of weights and bias, by the chain rule."""
    *activities, output = network.activities(images)
    errors = [2 * (output - targets)]
    for i in range(len(activities) - 1, 0, -1):
        errors.insert(0, (errors[0] @ network.weights[i]) * (1 - activities[i] ** 2))
    return [(e.T @ x, e.sum(0)) for e, x in zip(errors, activities, strict=True)]


def measured(network: Network, images: Tensor, targets: Tensor, eta: float, num_steps: int) -> dict[str, list[float]]:
    """By layer: cosine of the update to the gradient, their sizes' ratio; by hidden layer: the mean of 1 − tanh'."""
    pairs = zip(update(network, images, targets, eta, num_steps), gradient(network, images, targets), strict=True)
    found: dict[str, list[float]] = {"cosine": [], "size": []}
    for (ours, _), (theirs, _) in pairs:
        found["cosine"].append(float((ours * theirs).sum() / (ours.norm() * theirs.norm())))
        found["size"].append(float(ours.norm() / theirs.norm()))
    found["saturation"] = [float((y**2).mean()) for y in network.activities(images)[1:-1]]
    return found


def train(config: RunConfig, kept: Any, epochs: int) -> list[dict[str, Any]]:
    """What each epoch has come to, beside the kept run."""
    data = load("mnist")
    assert data.digest == config.data, "these are other data"
    model = models.build(config.model, data, seed=config.seed).double()
    network = Network.of(model)
    images, test = (split.images.double().flatten(1) for split in (data.train, data.test))
    targets = functional.one_hot(data.train.labels, len(data.classes)).double()
    eta, num_steps = config.solver_options["step_size"], config.solver_options["num_steps"]
    found = []
    for epoch in range(1, epochs + 1):
        loss = 0.0
        for rows in minibatches(len(images), config, epoch):
            x, t = images[rows], targets[rows]
            loss += float(((network.activities(x)[-1] - t) ** 2).sum())
            changes = update(network, x, t, eta, num_steps)
            for parameters, of_layer in zip(zip(*network, strict=True), changes, strict=True):
                for parameter, change in zip(parameters, of_layer, strict=True):
                    parameter.sub_(change, alpha=config.learning_rate)
        right = (network.activities(test)[-1].argmax(1) == data.test.labels).double().mean()
        found.append({
            "epoch": epoch,
            "accuracy": float(right),
            "loss": loss / len(images),
            "kept_accuracy": kept[epoch - 1].test_accuracy,
            "kept_loss": kept[epoch - 1].train_loss,
            **measured(network, images[:MEASURED], targets[:MEASURED], eta, num_steps),
        })  # fmt: skip
        print(found[-1], flush=True)
    return found


def table(outcome: dict[str, Any]) -> str:
    """Of the outcome alone."""
    layers = range(len(outcome["epochs"][0]["cosine"]) - 1)
    columns = (
        "epoch", "accuracy by hand (%)", "kept (%)", "loss by hand", "kept loss",
        *(f"cosine, layer {i + 1}" for i in layers), *(f"saturation, layer {i + 1}" for i in layers),
    )  # fmt: skip
    rows = [
        (
            str(row["epoch"]),
            f"{100 * row['accuracy']:.2f}",
            f"{100 * row['kept_accuracy']:.2f}",
            f"{row['loss']:.4f}",
            f"{row['kept_loss']:.4f}",
            *(f"{row['cosine'][i]:.3f}" for i in layers),
            *(f"{row['saturation'][i]:.3f}" for i in layers),
        )
        for row in outcome["epochs"]
    ]
    about = ", ".join(f"{name} {value}" for name, value in outcome["environment"].items() if value is not None)
    return f"{markdown_table(columns, rows)}\nseed {outcome['seed']}, `{outcome['command']}`: {about}\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seed", type=int, default=3, help="of the kept run")
    options.add_argument("--epochs", type=int, default=10, help="at most as many as the kept run has")
    options.add_argument("--folder", type=Path, default=HERE, help="for outcome.json and table.md")
    given = options.parse_args()
    lines = read_lines(KEPT)
    runs = {run.config.seed: run for name, run in zip(lines.conditions, lines.runs, strict=True) if name == "c"}
    if given.seed not in runs:
        options.error(f"--seed must be one of {', '.join(map(str, sorted(runs)))}, got {given.seed}")
    run = runs[given.seed]
    if not 1 <= given.epochs <= len(run.metrics):
        options.error(f"--epochs must be in 1 to {len(run.metrics)}, got {given.epochs}")
    with limited_threads(1):
        outcome = {
            "command": shlex.join(["python", "results/condition-c/by_hand.py", *sys.argv[1:]]),
            "environment": environment(),
            "seed": given.seed,
            "epochs": train(run.config, run.metrics, given.epochs),
        }
    given.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(given.folder / "outcome.json", json.dumps(outcome, indent=2) + "\n")
    write_atomically(given.folder / "table.md", table(outcome))


if __name__ == "__main__":
    main()
