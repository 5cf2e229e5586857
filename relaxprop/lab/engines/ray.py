"""An engine: runs as tasks of a Ray cluster.

Ray places a run wherever the processors that it asks for, or the part of a GPU, are free. A worker that dies is
noticed, and its run goes on from its checkpoint, where the folder of runs is the same for all machines; else it begins
anew, and the folder here gets the record without weights.

May import: lab.data, lab.engines.work.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Generator, Sequence
from typing import Any

from relaxprop.lab.data import Dataset
from relaxprop.lab.engines.work import Event, Job, Said, compute, died

PATIENCE = 5.0  # seconds until an address counts as one that does not answer


class ClusterError(Exception):
    """There is no cluster to compute on."""


def connect(address: str | None = None) -> None:
    """Joins a Ray cluster that is running.

    Args:
        address: HOST:PORT of its head; None for the one that this machine belongs to.

    Raises:
        ClusterError: if Ray is not installed, or no cluster answers there.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ClusterError("Ray is not installed: pip install 'relaxprop[cluster]'") from error
    if address is not None:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if not host or not port.isdecimal():
            raise ClusterError(f"{address!r} is not HOST:PORT")
        try:
            socket.create_connection((host, int(port)), timeout=PATIENCE).close()
        except (OSError, OverflowError) as error:
            raise ClusterError(
                f"no Ray cluster answers at {address} ({error}): start one by ray start --head"
            ) from None
    try:
        ray.init(
            address=address or "auto", logging_level=logging.WARNING, log_to_driver=False, ignore_reinit_error=True
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        where = "here" if address is None else f"at {address}"
        raise ClusterError(
            f"no Ray cluster answers {where} ({reason}): start one by ray start --head, or name one by "
            "--address HOST:PORT"
        ) from error


def on_ray(jobs: Sequence[Job], dataset: Dataset, *, gpus: float = 0.0) -> Generator[Event]:
    """The events of all jobs, as they happen; `connect` has to be called before.

    Args:
        gpus: of each run, ≥ 0; a part of one lets runs share it.
    """
    import ray
    from ray.exceptions import RayError

    def remote(job: Job, shared: Dataset) -> Generator[Event]:
        yield from compute(job, shared)

    # A run that is begun again has to go on from its own checkpoint, which Ray's own retries know nothing of.
    task: Any = ray.remote(num_returns="streaming", max_retries=0)(remote)
    shared = ray.put(dataset)
    attempts = dict.fromkeys([job.name for job in jobs], 0)

    def submit(job: Job) -> Any:
        return task.options(num_cpus=job.threads, num_gpus=gpus, name=job.name).remote(job, shared)

    running: dict[Any, Job] = {submit(job): job for job in jobs}
    try:
        while running:
            ready: list[Any] = ray.wait(list(running), num_returns=1, fetch_local=False)[0]
            for stream in ready:
                job = running[stream]
                try:
                    events: list[Event] = [ray.get(next(stream))]
                except StopIteration:
                    del running[stream]
                    continue
                except RayError as error:
                    del running[stream]
                    attempts[job.name] += 1
                    events = died(attempts[job.name], job, f"has died ({type(error).__name__})")
                    if any(isinstance(event, Said) for event in events):
                        running[submit(job)] = job
                yield from events
    finally:
        for stream in running:
            ray.cancel(stream, force=True)
