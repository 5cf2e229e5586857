"""How long the package and its command line take to start, beside PyTorch.

May import: lab.bench.measuring, lab.bench.records.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from relaxprop.lab.bench.measuring import interleaved, quartiles
from relaxprop.lab.bench.records import Start

EMPTY, TORCH, PACKAGE, HELP = "an empty Python program", "import torch", "from relaxprop import *", "relaxprop --help"
PROGRAMS: dict[str, tuple[str, ...]] = {
    EMPTY: ("-c", "pass"),
    TORCH: ("-c", TORCH),
    PACKAGE: ("-c", PACKAGE),  # all public names, which brings PyTorch
    HELP: ("-m", "relaxprop", "--help"),
}
AIMS = {PACKAGE: 0.1, HELP: 0.4}  # seconds beyond `import torch`, at most


def times(rounds: int, on_round: Callable[[], None] = lambda: None) -> dict[str, list[float]]:
    """Seconds of each program, in turn, once before that is not counted: files are in memory then."""
    steps = {name: partial(run_python, *arguments) for name, arguments in PROGRAMS.items()}
    for step in steps.values():
        step()
    return interleaved(steps, rounds=rounds, on_round=on_round)


def run_python(*arguments: str) -> None:
    """A Python process, without what it prints. It keeps compiled modules, as a user's does, if this one does not.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    command = [sys.executable, *arguments]
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(command, check=True, env=usual, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def starts(seconds: Mapping[str, Sequence[float]]) -> list[Start]:
    """Medians of what `times` has measured, and what is beyond `import torch` in the same round."""
    return [
        Start(
            program=name,
            seconds=statistics.median(own),
            quartiles=quartiles(own),
            beyond=beyond(seconds, name) if name in AIMS else None,
            aim=AIMS.get(name),
        )
        for name, own in seconds.items()
    ]


def beyond(seconds: Mapping[str, Sequence[float]], name: str) -> float:
    """Median of the differences to `import torch`, round by round."""
    return statistics.median(a - b for a, b in zip(seconds[name], seconds[TORCH], strict=True))
