"""What is measured, sent to the tools in which people watch training: TensorBoard's event files, Weights & Biases.

May import: lab.config, lab.results.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from relaxprop.lab.config import RunConfig
from relaxprop.lab.results import EpochMetrics


class Tool(StrEnum):  # Typer knows lists of an enumeration, not of literals
    """As its package is called."""

    tensorboard = "tensorboard"
    wandb = "wandb"


# Takes a run's id and what was measured in an epoch.
Log = Callable[[str, EpochMetrics], None]
FOLDER = "tensorboard"  # in a run's directory
_HOW = {"tensorboard": "pip install tensorboard", "wandb": "pip install wandb"}


class LogError(Exception):
    """A tool is not installed."""


def check_installed(names: list[Tool]) -> None:
    """Refuse a tool that is not there, before anything is computed.

    Raises:
        LogError: if it is missing; the error says how to get it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise LogError(f"{name} is not installed: {_HOW[name]}")


@contextmanager
def logs(names: list[Tool], configs: Mapping[str, RunConfig], root: Path) -> Iterator[Log]:
    """Within it, what is given goes to all the tools.

    Args:
        names: of the tools.
        configs: the runs' descriptions by id.
        root: folder of run directories.
    """
    with ExitStack() as stack:
        opened: list[Log] = [stack.enter_context(_LOGS[name](configs, root)) for name in dict.fromkeys(names)]

        def log(run: str, metrics: EpochMetrics) -> None:
            for tell in opened:
                tell(run, metrics)

        yield log


def scalars(metrics: EpochMetrics) -> dict[str, float]:
    """By name, what is measured once in an epoch; of alignment the mean over the epoch."""
    found = {
        "training loss": metrics.train_loss,
        "test accuracy": metrics.test_accuracy,
        "seconds": metrics.seconds,
    }
    for what, by_sample in (
        ("cosine to backpropagation's gradient", [s.gradients for s in metrics.alignment]),
        ("cosine of backwards weights to weights", [s.feedback for s in metrics.alignment]),
    ):
        for name in by_sample[0] if by_sample else ():
            found[f"{what}/{name}"] = math.fsum(sample[name] for sample in by_sample) / len(by_sample)
    return found


@contextmanager
def _tensorboard(configs: Mapping[str, RunConfig], root: Path) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    writers: dict[str, Any] = {}

    def log(run: str, metrics: EpochMetrics) -> None:
        if run not in writers:
            # Of an epoch that is computed again after an interruption, the later value is the one that is shown.
            writers[run] = SummaryWriter(str(root / run / FOLDER), purge_step=metrics.epoch)
            writers[run].add_text("description", f"```json\n{configs[run].model_dump_json(indent=2)}\n```")
        for name, value in scalars(metrics).items():
            writers[run].add_scalar(name, value, metrics.epoch)
        if metrics.epoch >= configs[run].epochs:
            writers.pop(run).close()

    try:
        yield log
    finally:
        for writer in writers.values():
            writer.close()


@contextmanager
def _wandb(configs: Mapping[str, RunConfig], root: Path) -> Iterator[Log]:
    import wandb

    opened: dict[str, Any] = {}

    def log(run: str, metrics: EpochMetrics) -> None:
        if run not in opened:
            opened[run] = wandb.init(
                project="relaxprop",
                id=run,
                resume="allow",
                config=configs[run].model_dump(mode="json"),
                dir=str(root),
                reinit="create_new",
            )
        opened[run].log(scalars(metrics), step=metrics.epoch)
        if metrics.epoch >= configs[run].epochs:
            opened.pop(run).finish()

    try:
        yield log
    finally:
        for one in opened.values():
            one.finish()


_LOGS = {"tensorboard": _tensorboard, "wandb": _wandb}
