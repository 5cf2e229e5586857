"""What a step does, counted: floating-point operations, and launches of kernels on a GPU.

May import: lab.bench.measuring.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from relaxprop.lab.bench.measuring import Step, without_output

# CUDA's and ROCm's calls that start a kernel, or a whole graph of them, which is one launch.
_LAUNCH = re.compile(r"(cu|cuda|hip)\w*(Launch\w*Kernel|GraphLaunch)\w*")


class _NoModules:
    """In place of what tells the modules of operations: its hooks on activities would be in the measured pass."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *args: object) -> None:
        pass


def operations(step: Step) -> int:
    """Floating-point operations of a step's matrix products, convolutions and attentions, as PyTorch counts them.

    A multiplication and an addition are two. What works element by element is not counted.
    """
    counter: Any = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    with counter:
        step()
    return int(counter.get_total_flops())


def launches(step: Step, device: torch.device | str) -> int | None:
    """Kernels that a step launches on a GPU; None elsewhere."""
    if torch.device(device).type != "cuda":
        return None
    kinds = torch.profiler.ProfilerActivity
    with without_output(2), torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        step()
        torch.cuda.synchronize(device)
    return launched(event.name() for event in profile.profiler.kineto_results.events())


def launched(events: Iterable[str]) -> int:
    """How many of a profile's events, by name, launch a kernel."""
    return sum(_LAUNCH.fullmatch(name) is not None for name in events)
