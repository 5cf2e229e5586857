"""An engine: one run after the other, in this process.

May import: lab.data, lab.engines.work.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from relaxprop.lab.data import Dataset
from relaxprop.lab.engines.work import Event, Job, compute


def serial(jobs: Sequence[Job], dataset: Dataset) -> Generator[Event]:
    """The events of all jobs, in their order."""
    for job in jobs:
        yield from compute(job, dataset)
