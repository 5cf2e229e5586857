"""Runs a list of run descriptions, one after the other; what is finished on disk is not computed again.

May import: lab.config, lab.data, lab.environment, lab.results, lab.store, lab.training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import Dataset
from relaxprop.lab.environment import environment
from relaxprop.lab.results import EpochMetrics, FinishedRun
from relaxprop.lab.store import Record
from relaxprop.lab.training import train


def run_all(
    configs: Sequence[RunConfig],
    dataset: Dataset,
    *,
    root: Path | None,
    device: torch.device | str = "cpu",
    on_start: Callable[[RunConfig], None] = lambda config: None,
    on_epoch: Callable[[int], None] = lambda epochs: None,
) -> list[FinishedRun]:
    """The metrics of every run.

    Args:
        root: folder of run directories; None keeps nothing.
        on_start: called before each run.
        on_epoch: called with the number of epochs that have come to be finished since the last call.
    """
    finished = []
    for config in configs:
        on_start(config)
        computed: list[EpochMetrics] = []

        def epoch_done(metrics: EpochMetrics, computed: list[EpochMetrics] = computed) -> None:
            computed.append(metrics)
            on_epoch(1)

        # A condition that diverges is a result like any other.
        metrics = train(config, dataset, root=root, device=device, check_finite=False, on_epoch=epoch_done)
        where = environment() if root is None else Record(config, root).environment()
        finished.append(FinishedRun(config, metrics, where))
        on_epoch(config.epochs - len(computed))  # those that were finished before
    return finished
