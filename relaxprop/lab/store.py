"""Runs on disk: what was asked for, where it ran, what came out.

    <root>/<run id>/config.json            the description
                    environment.json       hardware and versions
                    locality.json          what every update reads, where the rule is Activation Relaxation
                    certificate.json       what the relaxation phase leaves of the initial state, by vertex
                    metrics.jsonl          a line per epoch
                    checkpoint….safetensors  the state after the last epochs (`checkpoint`)
                    lock                   while a process computes the run: which one

A run whose epochs are all there is finished, with or without its weights. So the records of many runs can be kept as
one file, a line for each, without weights; `take_over` makes run directories of it again.

May import: public names, lab.checkpoint, lab.config, lab.environment, lab.files, lab.results.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import nn

from relaxprop import (
    Locality,
    __version__,
)
from relaxprop.lab.checkpoint import (
    Checkpoint,
    finished_by,
    kept_checkpoint,
    metrics_lines,
    read_metrics,
    save_checkpoint,
)
from relaxprop.lab.config import RunConfig
from relaxprop.lab.environment import environment
from relaxprop.lab.files import LATEST, OutputError, check_writable, remove_partial, write_atomically
from relaxprop.lab.results import BATCHED, EpochMetrics, FinishedRun, Head, RunLine

_LOCALITY = TypeAdapter(Locality)
_CERTIFICATE = TypeAdapter(dict[str, float])
_ENVIRONMENT = TypeAdapter(dict[str, Any])
_log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """A run that this process computes: the epochs that are finished, and the state after them."""

    metrics: list[EpochMetrics]
    checkpoint: Checkpoint | None


class Record:
    """A run's directory."""

    def __init__(self, config: RunConfig, root: Path) -> None:
        self.config = config
        self.path = root / config.id

    @contextmanager
    def opened(self) -> Iterator[Opened]:
        """Creates or continues the directory, which is this process's own meanwhile: another one that computes the same
        run is waited for, and that is logged.

        Raises:
            OutputError: if it cannot be written, or holds something else.
        """
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(self._locked())
                remove_partial(self.path)
                found = kept_checkpoint(self.path)
                metrics = self._metrics(found and found.epoch, found and found.metrics, mend=True)
                if len(metrics) < self.config.epochs:
                    write_atomically(self.path / "config.json", self.config.model_dump_json(indent=2) + "\n")
                if not (self.path / "environment.json").exists():
                    write_atomically(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")
            except OSError as error:
                raise OutputError(f"cannot write the run's folder {self.path}: {error.strerror or error}") from error
            yield Opened(metrics, found)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.path / "lock"
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _log.warning("run %s is computed by %s: waiting for it", self.config.id, _holder(path))
            lock.acquire(poll_interval=0.2)
        try:
            path.write_text(f"process {os.getpid()} on {platform.node()} since {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
            yield
        finally:
            with suppress(OSError):  # the folder may be gone
                path.unlink()  # before it is released: whoever waits for it sees that it is another file's
            lock.release()

    def tidy(self) -> None:
        """Removes what a process that was killed after the last epoch has left of a finished run."""
        if (self.path / "lock").exists() or any(self.path.glob(".*")):
            with suppress(OSError), FileLock(self.path / "lock", timeout=0):  # else another process is there just now
                remove_partial(self.path)
                (self.path / "lock").unlink()

    def finished_epochs(self, *, verify: bool = True) -> list[EpochMetrics]:
        """The metrics of the epochs that are done: all of a finished run, else those whose weights are kept.

        Args:
            verify: whether to read the weights too, and go by the checkpoint before where they are damaged.

        Raises:
            OutputError: if the run is damaged or cannot be read.
        """
        latest = self.path / LATEST
        try:
            if not verify and latest.exists():
                return self._metrics(*finished_by(latest))
            found = kept_checkpoint(self.path)
            return self._metrics(found and found.epoch, found and found.metrics)
        except OSError as error:
            raise OutputError(f"cannot read the run in {self.path}: {error.strerror or error}") from error
        except (ValueError, KeyError, SafetensorError) as error:
            raise OutputError(f"the run in {self.path} is damaged ({str(error).splitlines()[0]})") from error

    def _metrics(
        self, epoch: int | None, checked: list[EpochMetrics] | None, *, mend: bool = False
    ) -> list[EpochMetrics]:
        """Those of the finished epochs, by the checkpoint where there is one, and else by the run's own file."""
        path = self.path / "metrics.jsonl"
        try:
            lines = read_metrics(path.read_text(encoding="utf-8")) if path.exists() else []
            if epoch is not None and len(lines) < epoch:
                raise ValueError(f"the checkpoint is of epoch {epoch}, and the last line of epoch {len(lines)}")
        except ValueError as error:
            if checked is None:
                raise OutputError(
                    f"{path} is damaged ({str(error).splitlines()[0]}): delete the folder {self.path} to compute the "
                    "run again"
                ) from error
            lines = []
        if epoch is None:
            # A run that is finished, as it is taken over, has no weights; one that was stopped in its first checkpoint
            # is not finished, and begins anew.
            if mend and 0 < self._epochs_kept() <= len(lines) < self.config.epochs:
                raise OutputError(
                    f"{self.path} holds a run of {len(lines)} epochs without its weights, from which it cannot go on, "
                    f"and computing {self.config.epochs} would write over it: name another folder by --runs"
                )
            return lines if len(lines) >= self.config.epochs else []
        if checked is None:
            return lines[:epoch]
        if metrics_lines(lines[:epoch]) != metrics_lines(checked):
            _log.warning("%s is damaged, or was edited: the metrics in the run's checkpoint hold", path)
            if mend:
                write_atomically(path, metrics_lines(checked))
        return checked

    def _epochs_kept(self) -> int:
        """How many epochs the run was to have when it was last computed or taken over; 0 where nothing says so."""
        try:
            return RunConfig.model_validate_json((self.path / "config.json").read_text(encoding="utf-8")).epochs
        except (FileNotFoundError, ValueError):
            return 0

    def environment(self) -> dict[str, Any]:
        """Where the run was computed.

        Raises:
            OutputError: if it is not there.
        """
        try:
            found: dict[str, Any] = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"the run in {self.path} is damaged: {error}") from error
        return found

    def note_batched(self, seeds: int) -> None:
        """Keeps that epochs of the run are computed together with those of other seeds; the most of them counts."""
        where = self.environment()
        if where.get(BATCHED, 1) < seeds:
            write_atomically(self.path / "environment.json", json.dumps(where | {BATCHED: seeds}, indent=2) + "\n")

    def save_reports(self, locality: Locality | None, certificate: dict[str, float] | None) -> None:
        """Keeps what the run's updates read, and what its relaxation phase leaves of the initial state."""
        if locality is not None:
            write_atomically(self.path / "locality.json", _LOCALITY.dump_json(locality, indent=2).decode() + "\n")
        if certificate is not None:
            text = _CERTIFICATE.dump_json(certificate, indent=2).decode() + "\n"
            write_atomically(self.path / "certificate.json", text)

    def save(self, metrics: list[EpochMetrics], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keeps a finished epoch.

        Raises:
            OutputError: if it cannot be written.
        """
        write_atomically(self.path / "metrics.jsonl", metrics_lines(metrics))
        # Last: an epoch counts as finished only once its weights are there.
        save_checkpoint(self.path, metrics, model, optimizer)

    def keep_finished(self, where: Mapping[str, Any], metrics: Sequence[EpochMetrics]) -> None:
        """Keeps a finished run that was computed elsewhere, without weights.

        Raises:
            OutputError: if it cannot be written.
        """
        check_writable(self.path)
        write_atomically(self.path / "config.json", self.config.model_dump_json(indent=2) + "\n")
        write_atomically(self.path / "environment.json", json.dumps(dict(where), indent=2) + "\n")
        write_atomically(self.path / "metrics.jsonl", metrics_lines(metrics))


def _holder(lock: Path) -> str:
    try:
        return lock.read_text() or "another process"
    except OSError:
        return "another process"


def write_lines(path: Path, head: Head, lines: Sequence[RunLine]) -> None:
    """Writes a file of records: its first line says what the others are."""
    first = json.dumps(head.model_dump(mode="json", exclude_unset=True), ensure_ascii=False)
    texts = [first, *(line.model_dump_json(exclude_defaults=True) for line in lines)]
    write_atomically(path, "".join(f"{text}\n" for text in texts))


class Records(NamedTuple):
    """A file of records, read."""

    head: Head
    conditions: list[str | None]  # of the runs
    runs: list[FinishedRun]


def read_lines(path: Path) -> Records:
    """Reads a file of records.

    Raises:
        OutputError: the file cannot be read, a line is no finished run or one of another format, its id is not that of
            its description, or lines are missing.
    """
    try:
        if not (texts := path.read_text(encoding="utf-8").splitlines()):
            raise ValueError("it is empty")
        head = Head.model_validate_json(texts.pop(0))
    except OSError as error:
        raise OutputError(f"{path} is no file of records: {error.strerror or error}") from error
    except ValueError as error:  # of a first line that is missing or another
        raise OutputError(f"{path} is no file of records: {first_reason(error)}") from error
    conditions, runs = [], []
    for number, text in enumerate(texts, 2):
        try:
            line = RunLine.model_validate_json(text)
            config = RunConfig.model_validate(line.config)
        except ValueError as error:
            raise OutputError(
                f"{path}, line {number} is no run, or one of another format than relaxprop {__version__}'s: "
                f"{first_reason(error)}"
            ) from error
        if config.id != line.id:
            raise OutputError(f"{path}, line {number}: the description's id is {config.id}, not {line.id}")
        if [m.epoch for m in line.metrics] != list(range(1, config.epochs + 1)):
            raise OutputError(f"{path}, line {number}: {line.id} has not all of its {config.epochs} epochs")
        conditions.append(line.condition)
        runs.append(FinishedRun(config, list(line.metrics), line.environment))
    if len(runs) != head.runs:
        raise OutputError(f"{path} has {len(runs)} runs, and its first line says {head.runs}: fetch the file again")
    return Records(head, conditions, runs)


def refuse_to_discard(path: Path, makes: Callable[[str | None, RunConfig], int]) -> None:
    """Refuse a command, before it computes anything, whose records would take the place of others.

    Args:
        path: of the file of records that it will write.
        makes: how many epochs the command makes of a run of a condition; 0 where it does not make it.

    Raises:
        OutputError: if the file holds runs that the command does not make, or more of their epochs, or cannot be read.
    """
    if not path.exists():
        return
    way_out = "move that file away, or name another folder by --out"
    try:
        kept = read_lines(path)
    except OutputError as error:
        raise OutputError(f"{error}; this command would write over it: {way_out}") from error
    pairs = zip(kept.conditions, kept.runs, strict=True)
    if others := [run for name, run in pairs if makes(name, run.config) < run.config.epochs]:
        raise OutputError(
            f"{path} holds {len(kept.runs)} runs of {kept.head.command!r}. This command would write over it, and does "
            f"not make {len(others)} of them, or not for as many epochs: {way_out}"
        )


def first_reason(error: ValueError) -> str:
    """Of a description that is refused: which field, why, and the value."""
    if not isinstance(error, ValidationError):
        return str(error).splitlines()[0]
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    field = ".".join(map(str, first["loc"]))
    given = f", got {first['input']!r}" if field and first["type"] != "missing" else ""
    return f"{field}: {message}{given}" if field else message


def take_over(path: Path, root: Path) -> list[str]:
    """Makes run directories of a file of records; the ids of those that were not there yet.

    Raises:
        OutputError: as `read_lines`, or nothing can be written.
    """
    taken = []
    for config, metrics, where in read_lines(path).runs:
        record = Record(config, root)
        if len(record.finished_epochs()) >= config.epochs:
            continue
        if (record.path / LATEST).exists():
            raise OutputError(f"{record.path} holds an unfinished run with weights: name another folder by --runs")
        record.keep_finished(where, metrics)
        taken.append(config.id)
    return taken


class KeptRun(NamedTuple):
    """What a run's directory tells."""

    config: RunConfig
    environment: dict[str, Any]
    metrics: list[EpochMetrics]
    locality: Locality | None
    certificate: dict[str, float] | None


def read_run(path: Path) -> KeptRun:
    """Reads a run's directory.

    Raises:
        OutputError: there is none, or it is damaged.
    """
    try:
        config = RunConfig.model_validate_json((path / "config.json").read_text())
        record = Record(config, path.parent)
        record.path = path  # the folder may have been renamed
        return KeptRun(
            config,
            _ENVIRONMENT.validate_json((path / "environment.json").read_text()),
            record.finished_epochs(verify=False),
            _LOCALITY.validate_json(kept.read_text()) if (kept := path / "locality.json").exists() else None,
            _CERTIFICATE.validate_json(kept.read_text()) if (kept := path / "certificate.json").exists() else None,
        )
    except FileNotFoundError as error:
        known = sorted(folder.parent.name for folder in path.parent.glob("*/config.json"))
        others = f"; in {path.parent} are {', '.join(known[:5])}{', …' if len(known) > 5 else ''}" if known else ""
        raise OutputError(f"no run in {path}: {Path(error.filename).name} is missing{others}") from error
    except OSError as error:
        raise OutputError(f"cannot read the run in {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise OutputError(f"the run in {path} is damaged, or of another format ({first_reason(error)})") from error
