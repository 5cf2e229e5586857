"""Ten seeds trained as one network, against the same seeds trained one after the other.

    python results/batched-seeds/measure.py

One epoch of the one way and one of the other follow each other, after a first epoch of both that does not count. The
times are those that the lab keeps as `seconds`: of training alone. Kept are all of them, in outcome.json; table.md is
made of it. The images are random, as no time depends on what they show.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from relaxprop import Frozen
from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import Dataset, Split
from relaxprop.lab.environment import environment
from relaxprop.lab.files import write_atomically
from relaxprop.lab.report.tables import markdown_table
from relaxprop.lab.results import EpochMetrics
from relaxprop.lab.training import epochs_at_once

Epochs = Generator[tuple[RunConfig, EpochMetrics, bool]]

HERE = Path(__file__).parent
UNFROZEN = Frozen(relaxation_derivative=False)
CONDITIONS: dict[str, tuple[dict[str, Any], int]] = {  # and its minibatches in an epoch
    "backpropagation": ({"rule": "backprop"}, 60),
    "PAPER": ({}, 40),
    "a": ({"frozen": UNFROZEN}, 4),
    "c": ({"frozen": Frozen(relaxation_derivative=False, update_derivative=False)}, 4),
}
COLUMNS = (
    "model",
    "condition",
    "seeds",
    "batched (ms)",
    "one after the other (ms)",
    "ratio",
    "least",
    "most",
    "losses",
)
BATCH = 64
SHAPES = {"mlp": (1, 28, 28), "cnn": (3, 32, 32)}


def images(model: str, minibatches: int) -> Dataset:
    """As large as MNIST's or CIFAR-10's."""
    generator = torch.Generator().manual_seed(0)

    def split(size: int) -> Split:
        return Split(torch.rand(size, *SHAPES[model], generator=generator), torch.arange(size) % 10)

    return Dataset("random", tuple("0123456789"), split(BATCH * minibatches), split(BATCH))


def epoch(runs: Sequence[Epochs], seeds: int) -> tuple[float, list[float]]:
    """The next epoch of some runs: seconds of training of all seeds, and each seed's loss."""
    found = [next(run)[1] for run in runs for _ in range(seeds // len(runs))]
    return sum(metrics.seconds for metrics in found), [metrics.train_loss for metrics in found]


def measure(model: str, condition: str, *, seeds: int, rounds: int, device: str, minibatches: int) -> dict[str, Any]:
    """Both ways in turn; which of them is first changes every time."""
    options = CONDITIONS[condition][0]
    configs = [RunConfig(model=model, batch_size=BATCH, epochs=rounds + 1, seed=s, **options) for s in range(seeds)]
    dataset = images(model, minibatches)
    with ExitStack() as stack:

        def begun(own: Sequence[RunConfig]) -> Epochs:
            return stack.enter_context(closing(epochs_at_once(own, dataset, device=device, check_finite=False)))

        ways = {"batched": [begun(configs)], "single": [begun([config]) for config in configs]}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        apart = 0.0
        for number in range(rounds + 1):
            losses = {}
            for way in ways if number % 2 else reversed(ways):
                taken, losses[way] = epoch(ways[way], seeds)
                seconds[way] += [taken] if number else []
            pairs = zip(losses["batched"], losses["single"], strict=True)
            apart = max([apart, *(abs(a - b) / abs(b) for a, b in pairs)])
    return {
        "model": model, "condition": condition, "seeds": seeds, "minibatches": minibatches, "seconds": seconds,
        "largest relative difference of losses": apart,
    }  # fmt: skip


def cells(found: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table: milliseconds for a step of all seeds, and the ratio of neighbours in time."""
    seconds, steps = found["seconds"], found["minibatches"]
    ratios = [a / b for a, b in zip(seconds["batched"], seconds["single"], strict=True)]
    times = [f"{1e3 * statistics.median(seconds[way]) / steps:.2f}" for way in ("batched", "single")]
    spread = [f"{x:.2f}" for x in (statistics.median(ratios), min(ratios), max(ratios))]
    apart = f"{found['largest relative difference of losses']:.0e}"
    return (found["model"], found["condition"], str(found["seeds"]), *times, *spread, apart)


def document(outcome: dict[str, Any]) -> str:
    """The table, with what it was measured on."""
    where = outcome["environment"]
    device = where["gpu"] if outcome["device"].startswith("cuda") else f"{where['processor']}, one thread"
    about = f"`{outcome['command']}`, {where['date']}, {device}, torch {where['torch']}, commit {where['commit']}"
    return f"{markdown_table(COLUMNS, [cells(found) for found in outcome['results']])}\n{about}\n"


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--small", action="store_true", help="seconds, and says nothing about speed")
    options.add_argument("--device", default="cpu")
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--rounds", type=int, default=11)
    options.add_argument("--model", choices=tuple(SHAPES), action="append", help="default: mlp")
    options.add_argument("--out", type=Path, default=HERE)
    given = options.parse_args()
    torch.set_num_threads(1)
    results = []
    seeds, rounds = (2, 1) if given.small else (given.seeds, given.rounds)
    for model in given.model or ("mlp",):
        for condition, (_, minibatches) in CONDITIONS.items():
            steps = 2 if given.small else minibatches
            found = measure(model, condition, seeds=seeds, rounds=rounds, device=given.device, minibatches=steps)
            results.append(found)
            print(*cells(results[-1]), flush=True)
    outcome = {
        "command": shlex.join(["python", "results/batched-seeds/measure.py", *sys.argv[1:]]),
        "environment": environment(),
        "device": given.device,
        "results": results,
    }
    write_atomically(given.out / "outcome.json", json.dumps(outcome, indent=2) + "\n")
    write_atomically(given.out / "table.md", document(outcome))


if __name__ == "__main__":
    main()
