"""Do the default settings train ordinary networks? They do it beside backpropagation and the paper's steps here.

Every rule sees the same network, the same minibatches and the same optimiser; what is compared is the training loss at
the end. The default is measured twice: as its user has it, and on the cut graph (``keep_states=True``), where every
vertex really relaxes.

May import: public names, lab.config, lab.data, lab.environment, lab.models, lab.report.tables, lab.results,
lab.files, lab.training.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import nn
from torch.nn import functional

from relaxprop import (
    PAPER,
    ActivationRelaxation,
)
from relaxprop.lab import models
from relaxprop.lab.config import OptimizerName
from relaxprop.lab.data import Dataset, load
from relaxprop.lab.environment import environment
from relaxprop.lab.files import write_atomically
from relaxprop.lab.report.tables import markdown_table
from relaxprop.lab.results import LastLoss, Reduction
from relaxprop.lab.training import expected_transients

DEPTHS = (1, 2, 3, 6, 12)
BATCH = 64
LOSSES = "losses.jsonl"
LAST = 10  # minibatches that the last loss is averaged over
WIDTH = 64
RULES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "backpropagation": lambda network: network,
    "default": ActivationRelaxation,
    "default, cut": lambda network: ActivationRelaxation(network, keep_states=True),
    "PAPER": lambda network: ActivationRelaxation(network, solver=PAPER),
}


class Setting(NamedTuple):
    """A network and how it is trained."""

    network: str
    reduction: Reduction
    optimizer: OptimizerName


def settings(depths: Sequence[int] = DEPTHS) -> Iterator[Setting]:
    """Perceptrons of every depth, and two deep networks of other kinds as they are usually trained."""
    for depth, activation in itertools.product(depths, ("ReLU", "Tanh")):
        for reduction, optimizer in itertools.product(get_args(Reduction), get_args(OptimizerName)):
            yield Setting(f"{activation} MLP, {depth} hidden", reduction, optimizer)
    for network in ("ResNet", "12-layer transformer"):
        yield Setting(network, "mean", "adam")


@expected_transients()
def measure(
    chosen: Sequence[Setting], *, seeds: int = 3, minibatches: int = 100, on_run: Callable[[], None] = lambda: None
) -> list[LastLoss]:
    """The last losses of all settings under all rules."""
    data = {name: load(name, None) for name in ("digits", "docstrings")}
    found = []
    for setting, seed, rule in itertools.product(chosen, range(seeds), RULES):
        loss = _last_loss(setting, rule, seed, minibatches, data)
        found.append(LastLoss(**setting._asdict(), rule=rule, seed=seed, loss=loss))
        on_run()
    return found


def _last_loss(setting: Setting, rule: str, seed: int, minibatches: int, data: Mapping[str, Dataset]) -> float:
    network_is_text = "transformer" in setting.network  # of whose labels a sequence has one at every place
    dataset = data["docstrings" if network_is_text else "digits"]
    torch.manual_seed(seed)
    network = _network(setting.network, dataset)
    model = RULES[rule](network)
    summed, batch = setting.reduction == "sum", BATCH // 4 if network_is_text else BATCH
    rate = 1e-3 if setting.optimizer == "adam" else 0.1 / BATCH if summed else 0.1
    kind = torch.optim.Adam if setting.optimizer == "adam" else torch.optim.SGD
    optimizer = kind(network.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(minibatches):
        rows = torch.randint(len(dataset.train), (batch,), generator=generator)
        labels = dataset.train.labels[rows]
        loss = functional.cross_entropy(model(dataset.train.images[rows]), labels, reduction=setting.reduction)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()) / (labels.numel() if summed else 1))
    return statistics.fmean(losses[-LAST:])


def _network(name: str, dataset: Dataset) -> nn.Module:
    classes = len(dataset.classes)
    if name == "ResNet":
        enlarged = nn.Upsample(scale_factor=3.0)  # digits are of 8×8 pixels, too few for its strides
        return nn.Sequential(enlarged, models.Logits(models.resnet(1, classes, (8, 16, 32), (1, 1, 1))))
    if name == "12-layer transformer":
        return models.Logits(models.gpt2(classes, dataset.train.images.shape[1], width=32, layers=12, heads=2))
    activation, depth = name.split(" ")[0], int(name.split(", ")[1].split(" ")[0])
    widths = [dataset.train.images[0].numel(), *[WIDTH] * depth]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), getattr(nn, activation)()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def table(found: Sequence[LastLoss]) -> tuple[list[str], list[list[str]]]:
    """Means over seeds, and the largest difference of the default to backpropagation at any seed."""
    header = ["network", "loss", "optimiser", *RULES, "largest difference"]
    rows = []
    for setting in dict.fromkeys(Setting(x.network, x.reduction, x.optimizer) for x in found):
        by_rule = {
            rule: {x.seed: x.loss for x in found if Setting(x.network, x.reduction, x.optimizer) == setting
                   and x.rule == rule}
            for rule in RULES
        }  # fmt: skip
        exact = by_rule["backpropagation"]
        differences = [abs(by_rule[rule][s] - exact[s]) for rule in ("default", "default, cut") for s in exact]
        means = [f"{statistics.fmean(losses.values()):.3f}" for losses in by_rule.values()]
        rows.append([*setting, *means, f"{max(differences):.0e}"])
    return header, rows


def write(found: Sequence[LastLoss], minibatches: int, folder: Path, command: str) -> list[Path]:
    """Writes the table and all losses."""
    header, rows = table(found)
    seeds = len({x.seed for x in found})
    about = (
        f"Training loss in nats per label, mean over the last {LAST} of {minibatches} minibatches ({BATCH} images, or "
        f"{BATCH // 4} sequences) and over {seeds} seeds; *largest difference*: of the default to backpropagation, at "
        "any seed."
    )
    write_atomically(folder / "table.md", f"{markdown_table(header, rows)}\n{about}\n")
    kept = {"command": command, "environment": environment(), "minibatches": minibatches}
    lines = [json.dumps(kept), *(x.model_dump_json() for x in found)]
    write_atomically(folder / LOSSES, "".join(f"{line}\n" for line in lines))
    return [folder / "table.md", folder / LOSSES]
