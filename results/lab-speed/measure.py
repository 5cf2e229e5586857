"""How fast the lab is beside the training that it does, and how exact its bfloat16 is.

    python results/lab-speed/measure.py                 # everything: some 40 minutes on two idle cores
    python results/lab-speed/measure.py --only c,d      # some parts; what is kept of the others stays
    python results/lab-speed/measure.py --small --folder /tmp/lab-speed     # seconds, to see that it works

Writes outcome.json and, made of it alone, table.md. README.md says what each part is.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from relaxprop import PAPER, ActivationRelaxation
from relaxprop.lab import models
from relaxprop.lab.bench import startup
from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import load
from relaxprop.lab.engines.grid import run_all
from relaxprop.lab.engines.processes import processes
from relaxprop.lab.engines.serial import serial
from relaxprop.lab.engines.work import Engine, Event, Started
from relaxprop.lab.environment import environment
from relaxprop.lab.experiments.conditions import condition_runs
from relaxprop.lab.experiments.paper import EXPERIMENTS
from relaxprop.lab.files import write_atomically
from relaxprop.lab.report.tables import markdown_table
from relaxprop.lab.training import autocast, expected_transients, squared_error, train

HERE = Path(__file__).parent


class Sizes(NamedTuple):
    """How much is measured."""

    repeats: int = 3  # of what takes minutes
    starts: int = 15  # of a command
    seeds: int = 3
    epochs: int = 8  # of the demo's grid
    seconds: float = 30.0  # of the run that an engine's overhead is measured on
    runs: int = 10_000
    demo: tuple[str, ...] = ("--batched-seeds",)  # options of the demo, as `make demo` has them


SMALL = Sizes(1, 2, 1, 1, 1.0, 100, ("--epochs", "1", "--seeds", "1", "--condition", "b"))


class Row(NamedTuple):
    """A number of the table, and whether it is what was aimed at."""

    what: str
    value: float  # median
    low: float
    high: float
    n: int
    unit: str
    aim: str = ""
    met: bool | None = None


def spread(
    what: str, values: Sequence[float], unit: str, *, most: float | None = None, least: float | None = None
) -> Row:
    """The median, of which it is said whether it is at most, or at least, so much."""
    median = statistics.median(values)
    aim = f"≤ {most:g}{unit}" if most is not None else f"≥ {least:g}{unit}" if least is not None else ""
    met = median <= most if most is not None else median >= least if least is not None else None
    return Row(what, median, min(values), max(values), len(values), unit, aim, met)


def seconds_of(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def command_seconds(*arguments: str | Path) -> float:
    """Of a Python process."""
    return seconds_of(lambda: startup.run_python(*map(str, arguments)))


def workers(sizes: Sizes) -> list[Row]:
    """The demo's grid by one worker and by two, each of one thread, in turn."""
    digits, demo = load("digits"), EXPERIMENTS["demo"]
    planned = condition_runs(demo, "digits", seeds=sizes.seeds, epochs=sizes.epochs, data=digits.digest)
    configs = [config for _, config in planned]
    took: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(sizes.repeats):
        for number, seconds in took.items():
            with tempfile.TemporaryDirectory() as root:
                grid = partial(run_all, configs, digits, root=Path(root), engine=partial(processes, workers=number))
                seconds.append(seconds_of(grid))
    ratios = [one / two for one, two in zip(took[1], took[2], strict=True)]
    return [
        spread(f"{len(configs)} runs, one worker", took[1], " s"),
        spread(f"{len(configs)} runs, two workers", took[2], " s"),
        spread("one worker's time over that of two", ratios, "×", least=1.7),
    ]


def overhead(sizes: Sizes) -> list[Row]:
    """One run by an engine, beside the same run by the training loop alone, in turn."""
    digits = load("digits")
    config = RunConfig(epochs=5, data=digits.digest)
    train(config.model_copy(update={"epochs": 1}), digits)  # what is imported with the first optimiser
    an_epoch = seconds_of(lambda: train(config, digits)) / config.epochs
    config = config.model_copy(update={"epochs": max(1, round(sizes.seconds / an_epoch))})
    begun: list[float] = []

    def alone(root: Path) -> None:
        train(config, digits, root=root, check_finite=False)

    def by_engine(engine: Engine, root: Path) -> None:
        start = time.perf_counter()

        def on_event(event: Event) -> None:
            if isinstance(event, Started) and engine is not serial:
                begun.append(time.perf_counter() - start)

        run_all([config], digits, root=root, engine=engine, on_event=on_event)

    ways: dict[str, Callable[[Path], None]] = {
        "alone": alone,
        "serial engine": partial(by_engine, serial),
        "one process": partial(by_engine, partial(processes, workers=1)),
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(sizes.repeats):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as root:
                took[name].append(seconds_of(partial(way, Path(root))))

    def over(a: str, b: str) -> list[float]:
        return [100 * (x / y - 1) for x, y in zip(took[a], took[b], strict=True)]

    return [
        spread(f"the training loop alone, {config.epochs} epochs", took["alone"], " s"),
        spread("the serial engine, over the training loop", over("serial engine", "alone"), " %", most=5),
        spread("one worker process, over the serial engine", over("one process", "serial engine"), " %", most=5),
        spread("until a worker begins, the first time of a command", begun[:1], " s"),
        *([spread("until a worker begins, later", begun[1:], " s")] if begun[1:] else []),
    ]


def start_up(sizes: Sizes) -> list[Row]:
    """`relaxprop --help` beside `import torch`, in turn; the least of each, as nothing else is on the machine then."""
    took = startup.times(sizes.starts)
    shown = (startup.EMPTY, startup.TORCH, startup.HELP)
    beyond, aim = min(took[startup.HELP]) - min(took[startup.TORCH]), startup.AIMS[startup.HELP]
    last = Row(
        f"{startup.HELP} beyond {startup.TORCH}",
        beyond,
        beyond,
        beyond,
        sizes.starts,
        " s",
        f"≤ {aim:g} s",
        beyond <= aim,
    )
    return [*(spread(name, took[name], " s") for name in shown), last]


def listing(sizes: Sizes) -> list[Row]:
    """`relaxprop runs` on many runs of the demo's length."""
    metrics = "".join(
        json.dumps({"epoch": epoch, "train_loss": 1 / epoch, "test_accuracy": 0.9, "seconds": 1.5, "alignment": []})
        + "\n"
        for epoch in range(1, 9)
    )
    with tempfile.TemporaryDirectory() as root:
        for seed in range(sizes.runs):
            config = RunConfig(seed=seed, epochs=8, learning_rate=(0.0005, 0.001)[seed % 2])
            folder = Path(root) / config.id
            folder.mkdir()
            (folder / "config.json").write_text(config.model_dump_json(indent=2) + "\n")
            (folder / "environment.json").write_text("{}\n")
            (folder / "metrics.jsonl").write_text(metrics)
        command_seconds("-m", "relaxprop", "runs", root)
        took = [command_seconds("-m", "relaxprop", "runs", root) for _ in range(sizes.starts)]
    return [spread(f"relaxprop runs on {sizes.runs:,} runs", took, " s", most=2)]


def demo(sizes: Sizes) -> list[Row]:
    """The command of `make demo` from an empty folder to its report."""
    took = []
    for _ in range(sizes.repeats):
        with tempfile.TemporaryDirectory() as root:
            folders = ("--runs", f"{root}/runs", "--out", f"{root}/figure")
            took.append(command_seconds("-m", "relaxprop", "reproduce", "demo", *sizes.demo, *folders))
            assert (Path(root) / "figure" / "report.html").exists()
    return [spread(shlex.join(["relaxprop", "reproduce", "demo", *sizes.demo]), took, " s", most=120)]


def bfloat16(sizes: Sizes) -> list[Row]:
    """Each layer's gradient under `--precision bf16`, as a distance to that in float32 relative to its norm."""
    rows = []
    for model, name in (("mlp", "mnist"), ("cnn", "cifar10")):
        dataset = load(name)
        for rule in ("backpropagation", "PAPER"):
            errors: dict[str, list[float]] = {}
            for seed in range(sizes.seeds):
                network = models.build(model, dataset, seed=seed)
                rows_of = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(seed))[:64]
                inputs, labels = dataset.train.images[rows_of], dataset.train.labels[rows_of]
                targets = nn.functional.one_hot(labels, len(dataset.classes)).float()
                for parameter, error in gradient_errors(network, rule, inputs, targets).items():
                    errors.setdefault(parameter, []).append(100 * error)
            rows += [
                spread(f"{model} on {dataset.title}, {rule}: {parameter}", found, " %")
                for parameter, found in errors.items()
                if parameter.endswith("weight")
            ]
    return rows


def gradient_errors(network: nn.Module, rule: str, inputs: Tensor, targets: Tensor) -> dict[str, float]:
    """By parameter, ‖g − h‖ / ‖h‖ for the gradients g under bf16 and h in float32, by the same rule."""
    trained = network if rule == "backpropagation" else ActivationRelaxation(network, solver=PAPER)

    def gradients(precision: Any) -> dict[str, Tensor]:
        network.zero_grad()
        with expected_transients():
            with autocast(precision, inputs.device):
                output = trained(inputs)
            squared_error(output.float(), targets).backward()  # type: ignore[no-untyped-call]
        return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    exact, rounded = gradients("fp32"), gradients("bf16")
    return {name: float((rounded[name] - exact[name]).norm() / exact[name].norm()) for name in exact}


PARTS: dict[str, tuple[str, Callable[[Sizes], list[Row]]]] = {
    "a": ("A grid by one worker and by two", workers),
    "b": ("What an engine adds to a run", overhead),
    "c": ("Start of the command line", start_up),
    "d": ("Listing many runs", listing),
    "e": ("The demo with its report", demo),
    "f": ("Gradients under bf16", bfloat16),
}


def document(outcome: dict[str, Any]) -> str:
    """The measurements as a document."""
    text = []
    for part, (title, _) in PARTS.items():
        if part not in outcome:
            continue
        kept = outcome[part]
        where = kept["environment"]
        rows = [Row(**row) for row in kept["rows"]]
        cells = [
            (
                row.what,
                f"{row.value:.3g}{row.unit}",
                f"{row.low:.3g} to {row.high:.3g}",
                str(row.n),
                row.aim,
                "" if row.met is None else "yes" if row.met else "no",
            )
            for row in rows
        ]
        commit = f"{where['commit']}{'' if where['clean'] else ', changed'}"
        text += [
            f"## {part}. {title}\n",
            markdown_table(("what", "median", "spread", "n", "aim", "reached"), cells),
            f"`{kept['command']}`, {where['date']}: {where['processor']}, {where['cores']} cores, {where['system']}, "
            f"Python {where['python']}, PyTorch {where['torch']}, NumPy {where['numpy']}, relaxprop "
            f"{where['relaxprop']} ({commit})\n",
        ]
    return "\n".join(text)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", default=",".join(PARTS), help="parts, with commas between (default: all)")
    options.add_argument("--small", action="store_true", help="tiny settings, to see that it works")
    options.add_argument("--repeats", type=int, default=Sizes().repeats, help="of what takes minutes")
    options.add_argument("--folder", type=Path, default=HERE, help="of the files (default: this one)")
    given = options.parse_args()
    chosen = given.only.split(",")
    if unknown := [part for part in chosen if part not in PARTS]:
        options.error(f"--only must be of {', '.join(PARTS)}, got {unknown[0]!r}")
    given.folder.mkdir(parents=True, exist_ok=True)
    path = given.folder / "outcome.json"
    outcome = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    torch.set_num_threads(1)
    for part in chosen:
        title, measure = PARTS[part]
        print(f"{part}. {title}", flush=True)
        rows = measure(SMALL if given.small else Sizes(repeats=given.repeats))
        outcome[part] = {
            "command": shlex.join(["python", *sys.argv]),
            "environment": environment(),
            "rows": [row._asdict() for row in rows],
        }
        write_atomically(path, json.dumps(outcome, indent=2, ensure_ascii=False) + "\n")
        write_atomically(given.folder / "table.md", document(outcome))
        for row in rows:
            print(f"   {row.what}: {row.value:.3g}{row.unit}", flush=True)


if __name__ == "__main__":
    main()
