"""How steps are measured: interleaved, warm, in one process.

The steps of all rules alternate, so that a slow spell of the machine falls on all of them alike.

May import: nothing of this project.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

BASELINE = "backpropagation"
WARMING = 3  # steps of each kind before any is measured
Step = Callable[[], object]


def training_step(network: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Forward pass, backward pass or relaxation phase, update."""
    # An update of no length costs the same, and in however many rounds no rule diverges on inputs without a pattern.
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)

    def step() -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def warm(steps: Mapping[str, Step]) -> None:
    """Runs each step a few times: the first ones learn, and allocate."""
    for step in steps.values():
        for _ in range(WARMING):
            step()


def interleaved(
    steps: Mapping[str, Step],
    *,
    rounds: int,
    device: torch.device | str = "cpu",
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds that each step takes, round by round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()  # a collection would fall on one rule's step
    try:
        for _ in range(rounds):
            for name, step in steps.items():
                times[name].append(_seconds(step, device))
            on_round()
    finally:
        gc.enable()
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third."""
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def ratio(times: Mapping[str, list[float]], what: str, *least: str, per: int = 1) -> float:
    """Median of the ratios, round by round, of a step's time to that of others together."""
    seconds = zip(times[what], *(times[name] for name in least), strict=True)
    ratios: list[float] = [row[0] / per / sum(row[1:]) for row in seconds]
    return statistics.median(ratios)


def _seconds(step: Step, device: torch.device | str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(step: Step, device: torch.device | str) -> int:
    """Most memory allocated at one time during the step, beyond what was allocated before it."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return int(torch.cuda.max_memory_allocated(device)) - before
    with (
        without_output(2),  # what the profiler's C++ side prints when it starts and stops
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        step()
    allocated = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


@contextmanager
def without_output(*descriptors: int) -> Iterator[None]:
    """Without what is written to standard output (1) or error (2), by other programs and by C++ too."""
    sys.stdout.flush()
    sys.stderr.flush()
    with ExitStack() as undone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        undone.callback(os.close, nowhere)
        for descriptor in descriptors:
            kept = os.dup(descriptor)
            undone.callback(os.close, kept)
            undone.callback(os.dup2, kept, descriptor)
            os.dup2(nowhere, descriptor)
        yield
        sys.stdout.flush()
        sys.stderr.flush()
