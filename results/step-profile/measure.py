"""Where the time of a training step goes, beside backpropagation's own.

    python results/step-profile/measure.py                # half a minute on an idle machine
    python results/step-profile/measure.py --rounds 3 --folder /tmp/profile      # to see that it works

Parts of the step are timed from within (their own time, without that of the parts that they call), step by step in turn
with backpropagation, on the paper's MLP. Writes outcome.json and, made of it alone, table.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from relaxprop import PAPER, ActivationRelaxation, relaxation, solvers, wrapper
from relaxprop.graph import Graph
from relaxprop.lab import models
from relaxprop.lab.data import Dataset, Split
from relaxprop.lab.environment import environment
from relaxprop.lab.files import write_atomically
from relaxprop.lab.report.tables import markdown_table
from relaxprop.lab.training import expected_transients, squared_error
from relaxprop.update import Update

HERE = Path(__file__).parent
# What is timed: the owner of a function, its name, and what it stands for.
PARTS: tuple[tuple[Any, str, str], ...] = (
    (wrapper, "record", "recording: hooks, stand-ins, arguments"),
    (nn.Linear, "forward", "the model's own layers"),
    (nn.Tanh, "forward", "the model's own layers"),
    (Graph, "_place_vertices", "recording: longest paths of the graph"),
    (relaxation.RelaxationPhase, "apply", "the autograd node"),
    (solvers, "_horner", "Horner's rule: its sums"),
    (Graph, "_arriving", "Horner's rule: products with A, each a call of PyTorch's engine"),
    (Update, "__call__", "the weight update, a call of PyTorch's engine"),
    (wrapper, "check_finite", "whether all states are finite"),
)
REST = "the rest: loss, optimiser, PyTorch's own call of the backward pass, the wrapper"


class Stopwatch:
    """The time that each part takes itself, within one step."""

    def __init__(self) -> None:
        self.own: dict[str, float] = {}
        self._within = [0.0]  # of each part that runs, the time of those that it has called

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self._within.append(0.0)
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.own[name] = self.own.get(name, 0) + took - self._within.pop()
            self._within[-1] += took

    def around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed


@contextmanager
def timed_parts(watch: Stopwatch) -> Iterator[None]:
    """Within it, the watch times all parts."""
    kept = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in PARTS]
    for owner, name, what in PARTS:
        timed = watch.around(getattr(owner, name), what)
        setattr(owner, name, staticmethod(timed) if name == "apply" else timed)
    try:
        yield
    finally:
        for owner, name, own in kept:
            delattr(owner, name) if own is None else setattr(owner, name, own)


def training_steps() -> tuple[Callable[[], None], Callable[[], None]]:
    """One of backpropagation and one of `PAPER`, on random images."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(64, 1, 28, 28, generator=generator), torch.arange(64) % 10
    split = Split(images, labels)
    dataset = Dataset("random", tuple("0123456789"), split, split)
    targets = nn.functional.one_hot(labels, 10).float()

    def step_of(network: nn.Module, model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)

        def step() -> None:
            loss = squared_error(model(images), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return step

    plain, relaxed = (models.build("mlp", dataset, seed=0) for _ in range(2))
    return step_of(plain, plain), step_of(relaxed, ActivationRelaxation(relaxed, solver=PAPER))


@expected_transients()
def measure(rounds: int) -> dict[str, Any]:
    """Milliseconds by part, medians over the rounds."""
    plain, relaxed = training_steps()
    for _ in range(10):
        plain()
        relaxed()
    least: list[dict[str, float]] = []
    parts: list[dict[str, float]] = []
    untouched: list[tuple[float, float]] = []
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        took = []
        for step in (plain, relaxed):
            start = time.perf_counter()
            step()
            took.append(time.perf_counter() - start)
        untouched.append((took[0], took[1]))
        for step, found in ((plain, least), (relaxed, parts)):
            watch = Stopwatch()
            with timed_parts(watch), watch.part(REST):
                step()
            found.append(watch.own)
    gc.enable()
    names = list(dict.fromkeys([*[what for _, _, what in PARTS], REST]))

    def medians(found: list[dict[str, float]]) -> dict[str, float]:
        return {name: 1e3 * statistics.median(own.get(name, 0.0) for own in found) for name in names}

    return {
        "backpropagation": medians(least),
        "PAPER": medians(parts),
        "step": {
            "backpropagation": 1e3 * statistics.median(a for a, _ in untouched),
            "PAPER": 1e3 * statistics.median(b for _, b in untouched),
            "ratio": statistics.median(b / a for a, b in untouched),
        },
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", "results/step-profile/measure.py", *sys.argv[1:]]),
        "environment": environment(),
    }


def table(outcome: dict[str, Any]) -> str:
    """The document's table."""
    plain, relaxed, step = outcome["backpropagation"], outcome["PAPER"], outcome["step"]
    times = {name: (plain[name], relaxed[name]) for name in plain}
    times["**a step, not timed from within**"] = step["backpropagation"], step["PAPER"]
    rows = [(name, f"{a:.2f}", f"{b:.2f}", f"{b - a:.2f}") for name, (a, b) in times.items()]
    where = ", ".join(f"{name} {value}" for name, value in outcome["environment"].items() if value is not None)
    head = ("part (ms)", "backpropagation", "`PAPER`", "more")
    return (
        f"{markdown_table(head, rows)}\n`{outcome['command']}`: medians of {outcome['rounds']} rounds, "
        f"{outcome['threads']} threads, ratio of the steps {step['ratio']:.2f}; {where}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=HERE)
    chosen = parser.parse_args()
    if chosen.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {chosen.rounds}")
    outcome = measure(chosen.rounds)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(chosen.folder / "outcome.json", json.dumps(outcome, indent=2) + "\n")
    write_atomically(chosen.folder / "table.md", table(outcome))
    print(table(outcome))


if __name__ == "__main__":
    main()
