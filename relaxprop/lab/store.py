"""Runs on disk: what was asked for, where it ran, what came out.

    <root>/<run id>/config.json            the description
                    environment.json       hardware and versions
                    locality.json          what every update reads, where the rule is Activation Relaxation
                    certificate.json       what the relaxation phase leaves of the initial state, by vertex
                    metrics.jsonl          a line per epoch
                    checkpoint.safetensors the weights and the optimiser's state after the last epoch that is finished

A run whose epochs are all there is finished, with or without its weights. So the records of many runs can be kept as
one file, a line for each, without weights; `take_over` makes run directories of it again.

Every file is written under another name and then renamed, so that an interrupted run leaves whole files.

May import: public names, lab.config, lab.environment, lab.errors, lab.results.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from relaxprop import (
    Locality,
    __version__,
)
from relaxprop.lab.config import RunConfig
from relaxprop.lab.environment import environment
from relaxprop.lab.errors import OutputError as OutputError  # who catches it knows this room
from relaxprop.lab.results import EpochMetrics, FinishedRun, Head, RunLine

_LOCALITY = TypeAdapter(Locality)
_CERTIFICATE = TypeAdapter(dict[str, float])
_OPTIMIZER = "optimizer state: "  # before the names of the optimiser's tensors in a checkpoint


class Record:
    """A run's directory."""

    def __init__(self, config: RunConfig, root: Path) -> None:
        self.config = config
        self.path = root / config.id

    def open(self) -> list[EpochMetrics]:
        """Creates or continues the directory; the metrics of the epochs that are finished.

        Raises:
            OutputError: it cannot be written, or holds something else.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            finished = self.finished_epochs()
            if len(finished) < self.config.epochs:
                write_atomically(self.path / "config.json", self.config.model_dump_json(indent=2) + "\n")
            if not (self.path / "environment.json").exists():
                write_atomically(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")
            return finished
        except OSError as error:
            raise OutputError(f"cannot write the run's folder {self.path}: {error.strerror or error}") from error

    def finished_epochs(self) -> list[EpochMetrics]:
        """The metrics of the epochs that are done: all of a finished run, else those whose weights are kept.

        Raises:
            OutputError: the run is damaged.
        """
        metrics, weights = self.path / "metrics.jsonl", self.path / "checkpoint.safetensors"
        try:
            if not metrics.exists():
                return []
            lines = [EpochMetrics.model_validate_json(line) for line in metrics.read_text().splitlines()]
            if not weights.exists():
                return lines if len(lines) >= self.config.epochs else []
            return lines[: _checkpoint_epoch(weights)]
        except OSError as error:
            raise OutputError(f"cannot read the run in {self.path}: {error.strerror or error}") from error
        except (ValueError, SafetensorError) as error:
            raise OutputError(
                f"the run in {self.path} is damaged ({str(error).splitlines()[0]}): delete that folder to compute it "
                "again"
            ) from error

    def environment(self) -> dict[str, Any]:
        """Where the run was computed.

        Raises:
            OutputError: it is not there.
        """
        try:
            found: dict[str, Any] = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"the run in {self.path} is damaged: {error}") from error
        return found

    def save_reports(self, locality: Locality | None, certificate: dict[str, float] | None) -> None:
        """Keeps what the run's updates read, and what its relaxation phase leaves of the initial state."""
        if locality is not None:
            write_atomically(self.path / "locality.json", _LOCALITY.dump_json(locality, indent=2).decode() + "\n")
        if certificate is not None:
            text = _CERTIFICATE.dump_json(certificate, indent=2).decode() + "\n"
            write_atomically(self.path / "certificate.json", text)

    def load_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """The weights and the optimiser's state after the last finished epoch."""
        tensors = load_file(self.path / "checkpoint.safetensors")
        weights: dict[str, Tensor] = {}
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith(_OPTIMIZER):
                index, name = key.removeprefix(_OPTIMIZER).split(".")
                state.setdefault(int(index), {})[name] = tensor
            else:
                weights[key] = tensor
        model.load_state_dict(weights)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

    def save(self, metrics: list[EpochMetrics], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keeps a finished epoch."""
        try:
            write_atomically(self.path / "metrics.jsonl", _metrics_lines(metrics))
            # Last: an epoch counts as finished only once its weights are there.
            partial = self.path / "checkpoint.safetensors.partial"
            state = optimizer.state_dict()["state"]
            tensors = model.state_dict() | {
                f"{_OPTIMIZER}{index}.{name}": x for index, own in state.items() for name, x in own.items()
            }
            # Copies, since safetensors refuses what shares memory, as tied weights do.
            copies = {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
            save_file(copies, partial, metadata={"epoch": str(len(metrics))})
            partial.replace(self.path / "checkpoint.safetensors")
        except OSError as error:
            raise OutputError(f"cannot write to {self.path}: {error.strerror or error}") from error


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
        first, *texts = path.read_text(encoding="utf-8").splitlines()
        head = Head.model_validate_json(first)
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
        if (record.path / "checkpoint.safetensors").exists():
            raise OutputError(f"{record.path} holds an unfinished run with weights: name another folder by --runs")
        check_writable(record.path)
        write_atomically(record.path / "config.json", config.model_dump_json(indent=2) + "\n")
        write_atomically(record.path / "environment.json", json.dumps(where, indent=2) + "\n")
        write_atomically(record.path / "metrics.jsonl", _metrics_lines(metrics))
        taken.append(config.id)
    return taken


def _metrics_lines(metrics: Sequence[EpochMetrics]) -> str:
    return "".join(line.model_dump_json(exclude_defaults=True) + "\n" for line in metrics)


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
            json.loads((path / "environment.json").read_text()),
            record.finished_epochs(),
            _LOCALITY.validate_json(kept.read_text()) if (kept := path / "locality.json").exists() else None,
            _CERTIFICATE.validate_json(kept.read_text()) if (kept := path / "certificate.json").exists() else None,
        )
    except FileNotFoundError as error:
        known = sorted(folder.parent.name for folder in path.parent.glob("*/config.json"))
        others = f"; in {path.parent} are {', '.join(known[:5])}{', …' if len(known) > 5 else ''}" if known else ""
        raise OutputError(f"no run in {path}: {Path(error.filename).name} is missing{others}") from error
    except ValueError as error:
        raise OutputError(f"the run in {path} is damaged, or of another format ({first_reason(error)})") from error


def _checkpoint_epoch(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["epoch"])


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is either whole or not there.

    Raises:
        OutputError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def check_writable(folder: Path) -> None:
    """Refuse a folder for results before anything is computed.

    Raises:
        OutputError: it cannot be created or written to.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OutputError(f"cannot write to the folder {folder} ({error.strerror or error}): name another") from error
