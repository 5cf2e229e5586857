"""Computes a list of run descriptions by an engine; what is finished on disk is not computed again.

May import: lab.config, lab.data, lab.engines.serial, lab.engines.work, lab.files, lab.models, lab.results, lab.store.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import DataError, Dataset
from relaxprop.lab.engines.serial import serial
from relaxprop.lab.engines.work import Engine, EpochDone, Event, Failed, Finished, Said, jobs_of
from relaxprop.lab.files import OutputError
from relaxprop.lab.models import ModelError
from relaxprop.lab.results import EpochMetrics, FinishedRun
from relaxprop.lab.store import Record

_log = logging.getLogger(__name__)


class GridError(Exception):
    """Some runs of a grid have failed, and all others are finished."""


def run_all(
    configs: Sequence[RunConfig],
    dataset: Dataset,
    *,
    root: Path | None,
    device: str = "cpu",
    engine: Engine = serial,
    on_event: Callable[[Event], None] = lambda event: None,
    batched_seeds: bool = False,
) -> list[FinishedRun]:
    """The metrics of every run, in the order of the descriptions.

    Args:
        root: folder of run directories; None keeps nothing.
        device: PyTorch's, of every run.
        engine: what computes them.
        on_event: called with everything that the engine tells.
        batched_seeds: whether runs that differ in their seeds alone are trained as one network. Their results are then
            those of single runs to rounding, and their environment says of how many seeds that is.

    Raises:
        DataError, ModelError, OutputError: if a run has met one: what stopped it would stop the others too. Or if
            several seeds cannot be trained as one network.
        GridError: if a run has failed otherwise, after all others.
    """
    by_id = {config.id: config for config in configs}
    metrics: dict[str, dict[int, EpochMetrics]] = {run: {} for run in by_id}  # an epoch may come again, see `died`
    finished: dict[str, FinishedRun] = {}
    failed: list[str] = []
    place = None if root is None else root.absolute()
    jobs = jobs_of(list(by_id.values()), place, device, batched_seeds=batched_seeds)
    with closing(engine(jobs, dataset)) as events:
        for event in events:
            match event:
                case Said(message):
                    _log.warning("%s", message)
                case EpochDone(run, epoch, _):
                    metrics[run][epoch.epoch] = epoch
                case Finished(run, where):
                    found = [epoch for _, epoch in sorted(metrics[run].items())]
                    finished[run] = FinishedRun(by_id[run], found, where)
                    if root is not None and not Record(by_id[run], root).path.exists():  # on a machine without it
                        Record(by_id[run], root).keep_finished(where, found)
                case Failed(_, error) if isinstance(error, DataError | ModelError | OutputError):
                    raise error
                case Failed(run, error):
                    notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
                    _log.error("run %s has failed: %s: %s%s", run, type(error).__name__, error, notes)
                    failed.append(f"{run} ({type(error).__name__}: {error})")
            on_event(event)
    if failed:
        raise GridError(
            f"{len(failed)} of {len(by_id)} runs have failed, and the others are finished: {'; '.join(failed)}. The "
            "same command tries those again"
        )
    return [finished[config.id] for config in configs]
