"""What every engine does and tells: a job is a run's description, or several, and where they are kept; computing it
yields events.

May import: lab.batched, lab.config, lab.data, lab.environment, lab.files, lab.results, lab.store, lab.training.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from relaxprop.lab.batched import but_for_seed, check_seeds
from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import Dataset
from relaxprop.lab.environment import environment
from relaxprop.lab.files import OutputError
from relaxprop.lab.results import BATCHED, EpochMetrics
from relaxprop.lab.store import Record
from relaxprop.lab.training import epochs_at_once

ATTEMPTS = 3  # at a run whose worker died


class Job(NamedTuple):
    """A run to be computed, or several at once.

    Attributes:
        configs: their descriptions, which differ in their seeds alone.
        root: the folder of run directories; None keeps nothing.
        device: of PyTorch.
    """

    configs: tuple[RunConfig, ...]
    root: Path | None = None
    device: str = "cpu"

    @property
    def runs(self) -> list[str]:
        """Their ids."""
        return [config.id for config in self.configs]

    @property
    def name(self) -> str:
        """The id of a run; of several, the first's, and how many there are beside it."""
        first, *others = self.runs
        return f"{first} and {len(others)} more" if others else first

    @property
    def threads(self) -> int:
        """Of the processor, that it takes."""
        return self.configs[0].threads


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


def jobs_of(configs: Sequence[RunConfig], root: Path | None, device: str, *, batched_seeds: bool = False) -> list[Job]:
    """A job for each run; with ``batched_seeds``, one for all runs that differ in their seeds alone.

    Raises:
        ModelError: if several seeds cannot be computed at once.
    """
    groups: dict[str, list[RunConfig]] = {}
    for config in configs:
        groups.setdefault(but_for_seed(config) if batched_seeds else config.id, []).append(config)
    for group in groups.values():
        if len(group) > 1:
            check_seeds(group)
    return [Job(tuple(group), root, device) for group in groups.values()]


def compute(job: Job, dataset: Dataset) -> Generator[Event]:
    """The events of one job."""
    for run in job.runs:
        yield Started(run)
    failure: Exception | None = None
    done = dict.fromkeys(job.runs, 0)
    try:
        # A condition that diverges is a result like any other.
        options: dict[str, Any] = {"root": job.root, "device": job.device, "check_finite": False}
        with closing(epochs_at_once(job.configs, dataset, **options)) as running:
            for config, metrics, computed in running:
                done[config.id] = metrics.epoch
                yield EpochDone(config.id, metrics, computed)
    except Exception as error:
        failure = _portable(error)
    for config in job.configs:
        if failure is not None and done[config.id] < config.epochs:
            yield Failed(config.id, failure)
        else:
            yield _finished(job, config)


def _finished(job: Job, config: RunConfig) -> Event:
    """The last event of a run, whose epochs are all there."""
    seeds = len(job.configs)
    if job.root is None:
        batched = {BATCHED: seeds} if seeds > 1 else {}
        return Finished(config.id, environment() | {"threads": config.threads} | batched)
    try:
        return Finished(config.id, Record(config, job.root).environment())
    except OutputError as error:
        return Failed(config.id, _portable(error))


def died(attempts: int, job: Job, how: str) -> list[Event]:
    """What is told where a worker died while it computed a job for the ``attempts``-th time."""
    if attempts < ATTEMPTS:
        return [Said(f"the worker of run {job.name} {how}: the run is taken up again from its checkpoint")]
    reason = f"its worker {how}, in each of {ATTEMPTS} attempts: is there enough memory for so many workers?"
    return [Failed(run, RuntimeError(reason)) for run in job.runs]


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
