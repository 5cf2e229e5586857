"""What experiments measure, as plain data.

May import: lab.config, lab.stats.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field

from relaxprop.lab.config import OptimizerName, RunConfig
from relaxprop.lab.stats import Claim, Mean

Reduction = Literal["mean", "sum"]


class AlignmentSample(BaseModel):
    """How a network's learning compares with backpropagation's on one minibatch, before its update.

    Cosines, in [−1, 1]; not a number where one side is zero or not finite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    epochs: float  # passes over the training data so far
    gradients: dict[str, float]  # to backpropagation's gradient, by parameter
    feedback: dict[str, float]  # of the backwards weights to the weights, by layer
    seconds: float  # that the measurement took


class EpochMetrics(BaseModel):
    """What is measured after an epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")  # a loss may diverge

    epoch: int
    train_loss: float  # per label: summed over outputs, averaged over the epoch
    test_accuracy: float  # in [0, 1]
    seconds: float  # of training, without the evaluation and the measurement of alignment
    alignment: tuple[AlignmentSample, ...] = ()


BATCHED = "batched_seeds"
"""In a run's environment: how many seeds were trained as one network, of which its results and times are a part."""

_PLACE = ("processor", "gpu", "threads", BATCHED)


class Timed(Protocol):
    """A run that says where it was computed, wherever it is kept."""

    @property
    def environment(self) -> Mapping[str, Any]: ...

    @property
    def metrics(self) -> Sequence[EpochMetrics]: ...


def relative_cost(own: Mapping[int, Timed], reference: Mapping[int, Timed]) -> float | None:
    """Median seconds of an epoch over the reference's.

    Only seeds count that both have computed in the same kind of place, as seconds of another say nothing; None where
    there is no such seed.

    Args:
        own: runs by their seeds.
        reference: likewise.
    """
    seeds = [seed for seed in own.keys() & reference.keys() if _place(own[seed]) == _place(reference[seed])]
    if not seeds:
        return None
    seconds, least = (
        statistics.median(m.seconds for seed in seeds for m in runs[seed].metrics) for runs in (own, reference)
    )
    return seconds / least


def _place(run: Timed) -> list[Any]:
    return [run.environment.get(name) for name in _PLACE]


BASELINE, REFERENCE = "baseline", "backprop"  # the conditions that others are compared with


@dataclass(frozen=True)
class Compared:
    """A condition of an experiment, as its results name it.

    Attributes:
        title: what is changed.
        claim: the paper's, of its final accuracy beside that of ``versus``.
        versus: the condition that it is compared with.
        beside: the same condition as the paper's text has it, where this one is another version of it.
    """

    title: str
    claim: Claim = "equivalent"
    versus: str = BASELINE
    beside: str | None = None


class Head(BaseModel):
    """The first line of a file of records. What an older file does not have is None, or empty."""

    model_config = ConfigDict(frozen=True, extra="allow")

    command: str  # that made them
    runs: int = Field(ge=0)  # lines that follow
    planned: int | None = Field(default=None, ge=1)  # runs of the command, where not all of them are there yet
    experiment: str | None = None  # its title
    dataset: str | None = None  # its title, with the sizes where it is a part
    chance: float | None = Field(default=None, ge=0, le=1)  # test accuracy of naming the most frequent class
    conditions: dict[str, Compared] = Field(default_factory=dict)  # by name, in the table's order
    not_local: dict[str, list[str]] | None = None  # by name, the kinds of what is not local in the updates
    costs: dict[str, float] | None = None  # by name, the time of a training step over backpropagation's


class RunLine(BaseModel):
    """A finished run as a line of a file of records."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    id: str
    condition: str | None = None  # its name in the experiment, where it has been computed for one
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: tuple[EpochMetrics, ...]

    @classmethod
    def of(cls, run: FinishedRun, condition: str | None = None) -> RunLine:
        """The line of a run."""
        config, metrics, environment = run
        return cls(
            id=config.id,
            condition=condition,
            config=config.model_dump(mode="json"),
            environment=dict(environment),
            metrics=tuple(metrics),
        )


class FinishedRun(NamedTuple):
    """A run, the metrics of its epochs, and where it was computed."""

    config: RunConfig
    metrics: list[EpochMetrics]
    environment: Mapping[str, Any]


class AlignmentCurve(NamedTuple):
    """A cosine over training."""

    epochs: tuple[float, ...]
    cosines: tuple[Mean, ...]


class AlignmentCurves(NamedTuple):
    """A condition's: to backpropagation's gradient by parameter, and of backwards weights to weights by layer."""

    gradients: dict[str, AlignmentCurve]
    feedback: dict[str, AlignmentCurve]


class Comparison(BaseModel):
    """One architecture, every operation of it a vertex.

    Errors are distances to backpropagation's gradient relative to its norm, the largest over all parameters, in
    float64; costs are times of a forward pass, relaxation phase and gradients relative to backpropagation's, in
    float32, both by solver.
    """

    architecture: str
    title: str
    parameters: int
    vertices: int
    depth: int
    steps: int  # planned: the initial state weighs at most `TOLERANCE` then
    errors: dict[str, float]
    costs: dict[str, float]
    recording: dict[str, float]  # time of a recorded forward pass over a plain one's, by the choice of vertices


class Asynchronous(BaseModel):
    """Error over the course of an asynchronous relaxation of one architecture (small), in float64."""

    architecture: str
    depth: int
    updates: list[float]  # expected, per vertex
    errors: list[list[float]]  # by seed: the largest over all parameters


class DepthCost(BaseModel):
    """What one solver costs on a chain of one depth: forward pass, relaxation phase, gradients."""

    depth: int
    solver: str
    num_steps: int | None
    milliseconds: float  # median
    ratio: float  # to backpropagation, median
    transports: int
    remaining: float  # weight of the initial state that is left in the layer next to the input
    converged: bool  # whether that is below rounding, so that Equilibrium gives the same


class LastLoss(BaseModel):
    """One run: the training loss in nats per label, averaged over the last minibatches."""

    network: str
    reduction: Reduction
    optimizer: OptimizerName
    rule: str
    seed: int
    loss: float
