"""What the benchmark measures, as plain data: one document for all that a command has measured.

May import: nothing of this project.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

Quantity = Literal["time", "memory", "operations"]
Size = Literal["depth", "width", "batch size"]


class StepCost(BaseModel):
    """Cost of one rule's training step: forward pass, relaxation phase, weight update."""

    rule: str
    milliseconds: float  # median
    quartiles: tuple[float, float]  # of the milliseconds
    time_ratio: float  # median of the ratios to backpropagation's step in the same round
    peak_bytes: int  # most memory allocated at one time in the step, beyond what was there before it
    memory_ratio: float  # to backpropagation's
    operations: int | None = None  # floating-point, counted; None in documents from before they were
    floor: float | None = None  # their ratio to backpropagation's: the time ratio if arithmetic were all
    launches: int | None = None  # of kernels, on a GPU


class Ratio(BaseModel):
    """What a part of a training step costs beside its least work."""

    what: str
    least: str
    ratio: float  # median of the ratios in the same round


class Benchmark(BaseModel):
    """All rules on one network."""

    model: str
    image_size: int = 32  # of the ResNet's images
    vertices: str = "activations"
    batch_size: int
    device: str
    cuda_graphs: bool = False  # whether each step is launched as one
    rounds: int
    parameters: int | None = None
    costs: list[StepCost]
    ratios: list[Ratio]


class Point(BaseModel):
    """One rule's training step on one chain."""

    rule: str
    size: Size  # that is changed
    value: int = Field(ge=1)  # of it
    milliseconds: float = Field(gt=0)  # median
    peak_bytes: int = Field(gt=0)
    operations: int = Field(gt=0)


class Exponent(BaseModel):
    """The power of a size with which a quantity grows."""

    rule: str
    quantity: Quantity
    size: Size
    exponent: float
    factor: float  # by which the points are off the power law at most


class Scaling(BaseModel):
    """How costs grow with the sizes of a chain, of which one is changed at a time."""

    depth: int  # where it is not changed
    width: int
    batch_size: int
    device: str
    rounds: int
    points: list[Point]
    exponents: list[Exponent]


class Start(BaseModel):
    """How long a program takes that does nothing but start."""

    program: str
    seconds: float  # median
    quartiles: tuple[float, float]
    beyond: float | None = None  # `import torch` in the same round, median; None of what does not need PyTorch
    aim: float | None = None  # at most so much


class Suite(BaseModel):
    """All that a command has measured."""

    command: str
    environment: dict[str, Any]
    benchmarks: list[Benchmark] = Field(default_factory=list)
    scaling: list[Scaling] = Field(default_factory=list)  # one for each device
    starts: list[Start] = Field(default_factory=list)
