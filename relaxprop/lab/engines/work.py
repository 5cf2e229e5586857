"""What every engine does and tells: a job is a run's description and where it is kept; computing it yields events.

May import: lab.config, lab.data, lab.environment, lab.results, lab.store, lab.training.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import Dataset
from relaxprop.lab.environment import environment
from relaxprop.lab.results import EpochMetrics
from relaxprop.lab.store import Record
from relaxprop.lab.training import epochs

ATTEMPTS = 3  # at a run whose worker died


class Job(NamedTuple):
    """A run to be computed.

    Attributes:
        config: its description.
        root: the folder of run directories; None keeps nothing.
        device: of PyTorch.
    """

    config: RunConfig
    root: Path | None = None
    device: str = "cpu"


class Started(NamedTuple):
    """A worker has begun with a run."""

    run: str


class EpochDone(NamedTuple):
    """An epoch of a run is there; it was computed now, or before."""

    run: str
    metrics: EpochMetrics
    computed: bool


class Finished(NamedTuple):
    """A run is complete."""

    run: str
    environment: dict[str, Any]


class Failed(NamedTuple):
    """A run has ended by an error; the epochs before it are kept."""

    run: str
    error: Exception


class Said(NamedTuple):
    """A worker has something to tell."""

    message: str


Event = Started | EpochDone | Finished | Failed | Said
Engine = Callable[[Sequence[Job], Dataset], Generator[Event]]


def compute(job: Job, dataset: Dataset) -> Generator[Event]:
    """The events of one run."""
    run = job.config.id
    yield Started(run)
    try:
        # A condition that diverges is a result like any other.
        options: dict[str, Any] = {"root": job.root, "device": job.device, "check_finite": False}
        with closing(epochs(job.config, dataset, **options)) as running:
            for metrics, computed in running:
                yield EpochDone(run, metrics, computed)
        if job.root is None:
            where = environment() | {"threads": job.config.threads}
        else:
            where = Record(job.config, job.root).environment()
    except Exception as error:
        yield Failed(run, _portable(error))
        return
    yield Finished(run, where)


def died(attempts: int, job: Job, how: str) -> Event:
    """What is told where a worker died while it computed a run for the ``attempts``-th time."""
    run = job.config.id
    if attempts < ATTEMPTS:
        return Said(f"the worker of run {run} {how}: the run is taken up again from its checkpoint")
    reason = f"its worker {how}, in each of {ATTEMPTS} attempts: is there enough memory for so many workers?"
    return Failed(run, RuntimeError(reason))


def _portable(error: Exception) -> Exception:
    """The error as it can be sent to another process, with its traceback as a note."""
    error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        plain.add_note(error.__notes__[-1])
        return plain
    return error
