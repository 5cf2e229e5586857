"""How time, memory and operations of a training step grow with depth, width and minibatch, and why.

May import: lab.bench.counting, lab.bench.measuring, lab.bench.problems, lab.bench.records,
lab.bench.steps, lab.training.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, get_args

import numpy as np
import torch

from relaxprop.lab.bench import counting
from relaxprop.lab.bench.measuring import interleaved, peak_bytes, warm
from relaxprop.lab.bench.problems import on_chain
from relaxprop.lab.bench.records import Exponent, Point, Quantity, Scaling, Size
from relaxprop.lab.bench.steps import OWN, USUAL, all_steps
from relaxprop.lab.training import expected_transients

QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
SIZES: tuple[Size, ...] = get_args(Size)


class Chain(NamedTuple):
    """The sizes of a chain and of its minibatch."""

    depth: int = 4
    width: int = 128
    batch_size: int = 64


BASE = Chain()
CHANGED: dict[Size, Sequence[int]] = {
    "depth": (4, 8, 16, 32, 64, 128),
    "width": (64, 128, 256, 512, 1024),
    "batch size": (16, 64, 256, 1024),
}

# Of each quantity and size, why it grows so. What is counted has these exponents where the size is large; what is
# measured comes near them where arithmetic outweighs what a call of an operation costs by itself.
REASONS: dict[tuple[Quantity, Size], str] = {
    ("time", "depth"): (
        "each layer is passed as often in a deep chain as in a shallow one, which is exponent 1; but PAPER takes up to "
        "D − 1 products with A (D: the depth), which is an exponent between 1 and 2, near 2 below some 60 layers: more "
        "hops than that have no weight after 100 steps of 0.1, and no product"
    ),
    ("time", "width"): (
        "a layer's products take width² multiplications, which is exponent 2 in wide layers; in narrow ones a product "
        "costs what its call costs, which is exponent 0"
    ),
    ("time", "batch size"): (
        "every sample takes the same, which is exponent 1 in large minibatches; in small ones calls and the update of "
        "the weights outweigh it, which take the same for any minibatch"
    ),
    ("memory", "depth"): (
        "each layer's activity, its states and the gradient of its weights are kept once, however many steps there "
        "are: exponent 1"
    ),
    ("memory", "width"): (
        "the weights' gradients grow as width², activities and states as width: the exponent is between 1 and 2, and "
        "the lower the more copies of the states a solver keeps"
    ),
    ("memory", "batch size"): (
        "activities and states grow with the minibatch, the weights' gradients do not: the exponent is between 0 and "
        "1, and the higher the more copies of the states a solver keeps"
    ),
    ("operations", "depth"): (
        "each layer takes one product forward, one backward and one for its weights, Euler 100 backward: exponent 1; "
        "PAPER's is between 1 and 2, as its time's"
    ),
    ("operations", "width"): (
        "every product is with a matrix of width × width, which is exponent 2, but for the readout's of 10 outputs"
    ),
    ("operations", "batch size"): "every product is done for each sample: exponent 1",
}


@expected_transients()
def measure(
    *,
    solvers: Sequence[str] = USUAL,
    base: Chain = BASE,
    changed: Mapping[Size, Sequence[int]] = CHANGED,
    device: torch.device | str = "cpu",
    rounds: int = 10,
    on_round: Callable[[], None] = lambda: None,
) -> Scaling:
    """Measures backpropagation and the solvers on chains, of which one size at a time is changed.

    Args:
        solvers: beside backpropagation.
        base: the sizes where they are not changed.
        changed: by size, the values; at least two of each.
        device: where.
        rounds: of interleaved steps on each chain.
        on_round: called after each.
    """
    points = []
    for size, values in changed.items():
        for value in values:
            chain = base._replace(**{size.replace(" ", "_"): value})
            points += _points(size, value, chain, solvers, device, rounds, on_round)
    return Scaling(**base._asdict(), device=str(device), rounds=rounds, points=points, exponents=exponents(points))


def _points(
    size: Size,
    value: int,
    chain: Chain,
    solvers: Sequence[str],
    device: torch.device | str,
    rounds: int,
    on_round: Callable[[], None],
) -> list[Point]:
    problem = on_chain(chain.depth, width=chain.width, batch_size=chain.batch_size, device=device)
    steps = all_steps(problem, (OWN,), solvers)
    warm(steps)
    times = interleaved(steps, rounds=rounds, device=device, on_round=on_round)
    return [
        Point(
            rule=rule,
            size=size,
            value=value,
            milliseconds=1e3 * statistics.median(times[rule]),
            peak_bytes=peak_bytes(step, device),
            operations=counting.operations(step),
        )
        for rule, step in steps.items()
    ]


def exponents(points: Sequence[Point]) -> list[Exponent]:
    """The power law of each rule, quantity and size, by least squares of the logarithms."""
    found = []
    for rule in dict.fromkeys(point.rule for point in points):
        for quantity in QUANTITIES:
            for size in SIZES:
                own = [point for point in points if (point.rule, point.size) == (rule, size)]
                if own:
                    exponent, factor = power_law([p.value for p in own], [amount(p, quantity) for p in own])
                    found.append(Exponent(rule=rule, quantity=quantity, size=size, exponent=exponent, factor=factor))
    return found


def amount(point: Point, quantity: Quantity) -> float:
    """Milliseconds, bytes, or the number of operations."""
    return {"time": point.milliseconds, "memory": point.peak_bytes, "operations": point.operations}[quantity]


def power_law(sizes: Sequence[float], amounts: Sequence[float]) -> tuple[float, float]:
    """The exponent of the power law that fits best, and the factor by which a point is off it at most.

    Least squares in log-log: log(amount) = exponent · log(size) + constant.

    Raises:
        ValueError: if there are fewer than two sizes, or a size or an amount is not positive.
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"a power law takes at least two sizes, got {sorted(set(sizes))}")
    if min(*sizes, *amounts) <= 0:
        raise ValueError("a power law takes positive sizes and amounts")
    x, y = np.log(sizes), np.log(amounts)
    exponent, constant = np.polyfit(x, y, 1)
    return float(exponent), float(np.exp(np.abs(y - exponent * x - constant).max()))
