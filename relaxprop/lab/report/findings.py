"""What a report shows, as plain data: runs put together as figures, and curves of the relaxation phase.

May import: public names, lab.config, lab.results, lab.stats.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from relaxprop import Locality
from relaxprop.lab.config import RunConfig
from relaxprop.lab.results import AlignmentCurves, EpochMetrics
from relaxprop.lab.stats import Claim, Mean, mean_over_seeds


@dataclass(frozen=True)
class RunRecord:
    """A run as it is kept.

    Attributes:
        files: where, each with the number of the line where it holds other runs too.
    """

    config: RunConfig
    environment: Mapping[str, Any]
    metrics: tuple[EpochMetrics, ...]
    files: tuple[tuple[Path, int | None], ...]
    locality: Locality | None = None
    certificate: Mapping[str, float] | None = None

    @property
    def is_finished(self) -> bool:
        return len(self.metrics) >= self.config.epochs

    @property
    def num_samples(self) -> int:
        """Measurements of alignment."""
        return sum(len(epoch.alignment) for epoch in self.metrics)


@dataclass(frozen=True)
class ConditionResults:
    """One condition of a figure.

    Attributes:
        runs: finished, one for each seed.
        is_reference: whether it is backpropagation, to which costs are relative.
        versus: the label of the condition that it is compared with; None where that is not among the records.
        claim: the paper's; None where it makes none, or nothing is there to compare with.
        difference: of the final test accuracies, over the seeds that both have.
        verdict: on the claim.
    """

    label: str
    runs: tuple[RunRecord, ...]
    is_reference: bool
    versus: str | None
    claim: Claim | None
    difference: Mean | None
    verdict: str
    alignment: AlignmentCurves | None

    @property
    def final(self) -> Mean:
        """Test accuracy after the last epoch."""
        return mean_over_seeds([run.metrics[-1].test_accuracy for run in self.runs])

    @property
    def by_seed(self) -> dict[int, RunRecord]:
        """The runs by their seeds."""
        return {run.config.seed: run for run in self.runs}

    @property
    def epoch_seconds(self) -> float:
        """Of training in an epoch, median."""
        return statistics.median(epoch.seconds for run in self.runs for epoch in run.metrics)


@dataclass(frozen=True)
class FigureResults:
    """Conditions side by side.

    Attributes:
        experiment: the paper's figure; None where the runs belong to none.
        settings: what all of the runs share.
        records: every run with the label of its condition, and whether it counts in the numbers.
    """

    experiment: str | None
    title: str
    settings: Mapping[str, Any]
    conditions: tuple[ConditionResults, ...]
    records: tuple[tuple[str, RunRecord, bool], ...]


class LayerConvergence(NamedTuple):
    """The distance to backpropagation's gradient after 0, 1, 2, … relaxation steps, of one parameter."""

    name: str
    measured: tuple[float, ...]
    predicted: tuple[float, ...]


@dataclass(frozen=True)
class ConvergenceResults:
    """Convergence of the relaxation phase, by step size and order."""

    title: str
    command: str
    environment: Mapping[str, Any]
    layers: Mapping[str, tuple[LayerConvergence, ...]]
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Report:
    """What a report shows.

    Attributes:
        commands: that made the records, each with the file that says so.
    """

    figures: tuple[FigureResults, ...]
    convergence: tuple[ConvergenceResults, ...]
    commands: tuple[tuple[str, Path], ...]
