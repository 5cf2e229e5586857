"""A run's state after an epoch: weights, the optimiser's state and all metrics so far, in one file with a checksum.

    checkpoint.safetensors            the latest
    checkpoint.previous.safetensors   the one before, for where the latest turns out to be damaged

The checksum is over everything that the file holds. What was written before there were checksums is read without.

May import: lab.files, lab.results.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from relaxprop.lab.files import LATEST, OutputError, write_atomically
from relaxprop.lab.results import EpochMetrics

PREVIOUS = "checkpoint.previous.safetensors"
_OPTIMIZER = "optimizer state: "  # before the names of the optimiser's tensors
_log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A checkpoint as it was read.

    Attributes:
        epoch: how many epochs are finished.
        metrics: of these; None in a file from before the metrics stood in it.
        tensors: by their names in the file.
    """

    epoch: int
    metrics: list[EpochMetrics] | None
    tensors: Mapping[str, Tensor]

    def load_into(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Puts the weights and the optimiser's state back."""
        weights: dict[str, Tensor] = {}
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            if key.startswith(_OPTIMIZER):
                index, name = key.removeprefix(_OPTIMIZER).split(".")
                state.setdefault(int(index), {})[name] = tensor
            else:
                weights[key] = tensor
        model.load_state_dict(weights)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def save_checkpoint(
    folder: Path, metrics: Sequence[EpochMetrics], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Keeps the state after the last of the epochs; the checkpoint before becomes the previous one.

    Raises:
        OutputError: if it cannot be written.
    """
    state = optimizer.state_dict()["state"]
    tensors = model.state_dict() | {
        f"{_OPTIMIZER}{index}.{name}": x for index, own in state.items() for name, x in own.items()
    }
    # Copies, since safetensors refuses what shares memory, as tied weights do.
    copies = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    told = {"epoch": str(len(metrics)), "metrics": metrics_lines(metrics)}
    content = save(copies, metadata=told | {"sha256": _digest(told, copies)})
    latest = folder / LATEST
    try:
        if latest.exists():
            latest.replace(folder / PREVIOUS)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from error
    write_atomically(latest, content)


def kept_checkpoint(folder: Path) -> Checkpoint | None:
    """The latest checkpoint that is whole; None where there is none. That another was damaged is logged.

    Raises:
        OutputError: if all that are there are damaged, or cannot be read.
    """
    damaged = []
    for name in (LATEST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            found = _read(path)
        except OSError as error:
            raise OutputError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, SafetensorError) as error:
            damaged.append(f"{path} is damaged ({str(error).splitlines()[0]})")
            continue
        for what in damaged:
            _log.warning("%s: going on from the one before, after epoch %d", what, found.epoch)
        return found
    if damaged:
        raise OutputError(f"{', and '.join(damaged)}: delete the folder {folder} to compute the run again")
    return None


def finished_by(path: Path) -> tuple[int, list[EpochMetrics] | None]:
    """How many epochs are finished by a checkpoint, and their metrics if it holds them, without a look at the tensors.

    Raises:
        OSError: if it cannot be read.
        SafetensorError, ValueError, KeyError: if it is damaged.
    """
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
    return int(told["epoch"]), read_metrics(told["metrics"]) if "metrics" in told else None


def metrics_lines(metrics: Sequence[EpochMetrics]) -> str:
    """A line for every epoch."""
    return "".join(line.model_dump_json(exclude_defaults=True) + "\n" for line in metrics)


def read_metrics(text: str) -> list[EpochMetrics]:
    """The epochs of such lines.

    Raises:
        ValueError: if a line is none, or an epoch is missing.
    """
    found = [EpochMetrics.model_validate_json(line) for line in text.splitlines()]
    for expected, metrics in enumerate(found, 1):
        if metrics.epoch != expected:
            raise ValueError(f"line {expected} is of epoch {metrics.epoch}")
    return found


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        told = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    expected = told.pop("sha256", None)
    if expected is not None and expected != _digest(told, tensors):
        raise ValueError("its checksum is not that of its content")
    return Checkpoint(int(told["epoch"]), read_metrics(told["metrics"]) if "metrics" in told else None, tensors)


def _digest(told: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    content = hashlib.sha256(repr(sorted(told.items())).encode())
    for name, x in sorted(tensors.items()):
        content.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        content.update(x.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
