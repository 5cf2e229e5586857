"""What a grid of runs shows while it is computed: a live table on a terminal, lines in a file.

May import: lab.cli.options, lab.config, lab.engines.work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from relaxprop.lab.cli.options import errors
from relaxprop.lab.config import RunConfig
from relaxprop.lab.engines.work import EpochDone, Event, Failed, Finished, Started


class GridProgress:
    """Counts a grid's events and shows the counts.

    Args:
        configs: the runs.
        labels: by id, how a run is named.
        console: where it is shown.
    """

    def __init__(self, configs: Sequence[RunConfig], labels: Mapping[str, str], console: Console = errors) -> None:
        self.configs = {config.id: config for config in configs}
        self.labels = labels
        self.console = console
        self.running: dict[str, int] = {}  # epochs by run
        self.finished: dict[str, float] = {}  # test accuracy by run
        self.failed: list[str] = []
        self.diverged: set[str] = set()
        self.epochs: set[tuple[str, int]] = set()  # those that are there
        self.computed = 0  # of them, those that were not there before
        self.began = time.monotonic()
        self.ended = False
        self._live = Live(get_renderable=self.table, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> GridProgress:
        if self.console.is_terminal:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.__exit__(kind, error, where)
        self.ended = True
        self._say(self.summary())

    def __call__(self, event: Event) -> None:
        """Takes an event into account."""
        match event:
            case Started(run):
                self.running[run] = 0
            case EpochDone(run, metrics, computed):
                if (run, metrics.epoch) not in self.epochs:
                    self.epochs.add((run, metrics.epoch))
                    self.computed += computed
                self.running[run] = metrics.epoch
                self.finished[run] = metrics.test_accuracy
                if not math.isfinite(metrics.train_loss):
                    self.diverged.add(run)
            case Finished(run):
                self.running.pop(run, None)
                self._ended(f"{self.labels[run]}: test accuracy {100 * self.finished[run]:.2f} %", run)
            case Failed(run, error):
                self.running.pop(run, None)
                self.failed.append(run)
                self._ended(f"{self.labels[run]}: failed, {type(error).__name__}", run)

    def _ended(self, what: str, run: str) -> None:
        if not self.console.is_terminal:
            diverged = " (diverged)" if run in self.diverged else ""
            self._say(f"{what}{diverged}; {self.summary()}")

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    @property
    def done(self) -> int:
        """How many runs are finished."""
        return len(self.finished.keys() - self.running.keys() - set(self.failed))

    @property
    def left(self) -> float | None:
        """Seconds to go, by the pace of what was computed so far; None where nothing was."""
        missing = sum(c.epochs for c in self.configs.values()) - len(self.epochs)
        if not missing:
            return 0.0
        return (time.monotonic() - self.began) / self.computed * missing if self.computed else None

    def summary(self) -> str:
        """One line."""
        parts = [f"{self.done} of {len(self.configs)} runs done"]
        running = "interrupted" if self.ended else "running"
        parts += [f"{len(found)} {word}" for word, found in ((running, self.running), ("failed", self.failed)) if found]
        if self.diverged:
            parts.append(f"{len(self.diverged)} diverged")
        parts.append(f"after {_clock(time.monotonic() - self.began)}")
        if self.left and not self.ended:
            parts.append(f"about {_clock(self.left)} left")
        return ", ".join(parts)

    def table(self) -> RenderableType:
        """The runs that are being computed, as many as the terminal has lines for, and how far all are."""
        rows = Table.grid(padding=(0, 2))
        most = max(1, self.console.size.height - 4)
        for run, epoch in list(self.running.items())[:most]:
            total = self.configs[run].epochs
            rows.add_row(Text(self.labels[run]), ProgressBar(total, epoch, width=20), f"epoch {epoch}/{total}")
        if (others := len(self.running) - most) > 0:
            rows.add_row(Text(f"and {others} more"))
        total = sum(config.epochs for config in self.configs.values())
        whole = Table.grid(padding=(0, 2))
        whole.add_row(ProgressBar(total, len(self.epochs), width=40), f"{len(self.epochs)}/{total} epochs")
        return Group(rows, whole, Text(self.summary()))


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
