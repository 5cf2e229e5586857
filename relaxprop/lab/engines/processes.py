"""An engine: runs side by side, in processes of this machine.

Each worker is a process with the data set in memory that all of them share, and gets one job after the other. A worker
that dies is replaced, and its run goes on from its checkpoint.

PyTorch's threads do not survive a fork. So where it is safe (on Linux), workers are forked from a server that has
imported PyTorch and computed nothing, which happens once and not in each of them; elsewhere each starts afresh.

May import: lab.data, lab.engines.work.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess

import torch.multiprocessing

from relaxprop.lab.data import Dataset
from relaxprop.lab.engines.work import Event, Job, Said, compute, died

_FORKED = sys.platform == "linux"
_CONTEXT: ForkServerContext | SpawnContext = (
    torch.multiprocessing.get_context("forkserver") if _FORKED else torch.multiprocessing.get_context("spawn")
)
# Not this project: the server may look for it elsewhere than this process does. The first optimiser imports the second.
_IMPORTED = ["torch", "torch._dynamo", "pydantic"]


def cores() -> int:
    """How many cores this process may use; a core may be two processors, which share its arithmetic."""
    import joblib

    return int(joblib.cpu_count(only_physical_cores=True))


def default_workers(threads: int = 1) -> int:
    """One for each core, or for as many cores as a run has threads."""
    return max(1, cores() // threads)


def prepare() -> None:
    """Starts the server, so that it imports PyTorch while this process does something else."""
    if _FORKED:
        _CONTEXT.set_forkserver_preload(_IMPORTED)
        resource_tracker.ensure_running()  # which the server needs, and whose start would let Ctrl-C through again
        with _deaf():
            forkserver.ensure_running()


@contextmanager
def _deaf() -> Iterator[None]:
    """Within it, processes are started that Ctrl-C does not reach.

    It goes to all processes of a terminal. Who started the workers answers it, and ends them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def processes(jobs: Sequence[Job], dataset: Dataset, *, workers: int) -> Generator[Event]:
    """The events of all jobs, as they happen.

    Args:
        workers: how many processes, ≥ 1.
    """
    prepare()
    waiting = deque(jobs)
    attempts = dict.fromkeys([job.name for job in jobs], 0)
    staff: dict[Connection, _Worker] = {}
    try:
        while waiting or staff:
            while waiting and len(staff) < workers:
                worker = _Worker(dataset)
                staff[worker.connection] = worker
                worker.give(waiting.popleft())
            ready = wait(list(staff))
            for worker in [worker for connection, worker in staff.items() if connection in ready]:
                try:
                    event: Event | None = worker.connection.recv()
                except (EOFError, OSError):
                    del staff[worker.connection]
                    job = worker.job
                    attempts[job.name] += 1
                    told = died(attempts[job.name], job, worker.end())
                    if any(isinstance(event, Said) for event in told):
                        waiting.appendleft(job)
                    yield from told
                    continue
                if event is not None:
                    yield event
                elif waiting:
                    worker.give(waiting.popleft())
                else:
                    del staff[worker.connection]
                    worker.stop()
    finally:
        for worker in staff.values():
            worker.stop(at_once=True)


class _Worker:
    """A process, seen from the one that started it."""

    def __init__(self, dataset: Dataset) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self.process: BaseProcess = _CONTEXT.Process(target=_work, args=(theirs, dataset), daemon=True)
        with _deaf():
            self.process.start()
        theirs.close()
        self.job: Job

    def give(self, job: Job) -> None:
        self.job = job
        with suppress(OSError):  # of a worker that has died, which the next look at it shows
            self.connection.send(job)

    def stop(self, *, at_once: bool = False) -> None:
        if at_once:
            self.process.terminate()
        self.connection.close()
        self.end()

    def end(self) -> str:
        """How the process has ended."""
        self.process.join(10)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        code = self.process.exitcode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _work(connection: Connection, dataset: Dataset) -> None:
    """What a worker does: jobs, until nobody is there any more. None says that one is done."""
    logger = logging.getLogger("relaxprop")
    logger.addHandler(_Teller(connection))
    logger.propagate = False
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            for event in compute(connection.recv(), dataset):
                connection.send(event)
            connection.send(None)


class _Teller(logging.Handler):
    """Sends what is logged."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        self.connection.send(Said(record.getMessage()))
