"""Runs as data: found in folders and files, filtered by what they are.

Tens of thousands are read in a second: as plain JSON, each run's epochs and environment only when they are asked for.
What stands in a description is not checked here; `store` does that.

May import: lab.files.
"""

from __future__ import annotations

import json
import operator
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from relaxprop.lab.files import LATEST, OutputError

RECORDS = "runs.jsonl"
_LINE = {"id", "condition", "config", "environment", "metrics"}


@dataclass(frozen=True)
class Run:
    """A run as its directory or its line of a file of records tells it.

    Attributes:
        place: its directory, or the file and the line.
        condition: its name in an experiment, where that was kept.
        config: its description.
        epochs: how many are done.
        last: what was measured after the last of them.
        chance: accuracy of naming the most frequent class, where that was kept.
    """

    id: str
    place: str
    condition: str | None
    config: Mapping[str, Any]
    epochs: int
    last: Mapping[str, Any] | None
    _metrics: Callable[[], list[dict[str, Any]]] = field(repr=False)
    _environment: Callable[[], dict[str, Any]] = field(repr=False)
    chance: float | None = None

    @property
    def is_finished(self) -> bool:
        """Whether all epochs of its description are done."""
        return self.epochs >= int(self.config["epochs"])

    @property
    def accuracy(self) -> float | None:
        """Test accuracy after the last epoch that is done, in [0, 1]."""
        return None if self.last is None else float(self.last["test_accuracy"])

    def metrics(self) -> list[dict[str, Any]]:
        """What was measured, by epoch."""
        return self._metrics()

    def environment(self) -> dict[str, Any]:
        """Where it was computed; empty where that was not kept."""
        return self._environment()

    @cached_property
    def described(self) -> dict[str, Any]:
        """The description's fields by their dotted names."""
        return flattened(self.config)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """What it can be chosen by: the description's fields, and what became of it."""
        return {
            "id": self.id,
            "condition": self.condition,
            "place": self.place,
            "finished": self.is_finished,
            "epochs_done": self.epochs,
            "test_accuracy": self.accuracy,
            **self.described,
        }


def flattened(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level, with dotted names; what is nested is a dict, as JSON gives it."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


class Found(NamedTuple):
    """What was found at some paths."""

    runs: list[Run]
    unreadable: list[str]  # what in a folder is no run that can be read, and why


def find(paths: Sequence[Path]) -> Found:
    """The runs in run directories, files of records, and folders of both.

    Raises:
        OutputError: a path is not there or holds no run, or a file or directory that was named itself cannot be read.
    """
    found = Found([], [])
    for path in paths:
        before = len(found.runs) + len(found.unreadable)
        if path.is_file():
            found.runs.extend(_from_file(str(path)))
        elif (path / "config.json").exists():
            found.runs.append(_from_directory(str(path)))
        elif path.is_dir():
            for read, place in _within(path):
                try:
                    found.runs.extend(read(place))
                except OutputError as error:
                    found.unreadable.append(str(error))
        else:
            known = f": in {path.parent} are {_few(sorted(os.listdir(path.parent)))}" if path.parent.is_dir() else ""
            raise OutputError(f"there is no run and no folder {path}{known}")
        if len(found.runs) + len(found.unreadable) == before:
            raise OutputError(f"{path} holds no runs: name a run's folder, a folder of them, or a file {RECORDS}")
    return found


def _within(folder: Path | str) -> Iterator[tuple[Callable[[str], list[Run]], str]]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name == RECORDS:
            yield _from_file, entry.path
        elif entry.is_dir(follow_symlinks=False):
            if os.path.exists(os.path.join(entry.path, "config.json")):
                yield lambda path: [_from_directory(path)], entry.path
            else:
                yield from _within(entry.path)


def _from_directory(path: str) -> Run:
    try:
        with open(os.path.join(path, "config.json"), "rb") as file:
            config = from_json(file.read())
        try:
            with open(os.path.join(path, "metrics.jsonl"), "rb") as file:
                text = file.read().rstrip()
        except FileNotFoundError:  # of a run whose first epoch is not done
            text = b""
        text = _by_checkpoint(path, text)
        last = from_json(text[text.rfind(b"\n") + 1 :]) if text else None
    except (OSError, ValueError) as error:
        raise OutputError(f"the run in {path} is damaged: {error}; `relaxprop train` mends it if it can") from error

    def metrics() -> list[dict[str, Any]]:
        try:
            return [_epoch(from_json(line), path) for line in text.splitlines()]
        except ValueError as error:
            raise OutputError(f"the run in {path} is damaged: {error}") from error

    def environment() -> dict[str, Any]:
        place = os.path.join(path, "environment.json")
        try:
            return _object(from_json(Path(place).read_bytes()), place)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise OutputError(f"the run in {path} is damaged: {error}") from error

    return _run(os.path.basename(path), path, None, config, text.count(b"\n") + bool(text), last, metrics, environment)


def _by_checkpoint(path: str, lines: bytes) -> bytes:
    """The lines of the epochs that are done: those in the checkpoint, which is written last, where there is one.

    This is what `store` says of a run. A file of safetensors begins with the length of its description, so that no
    weights have to be read.
    """
    try:
        with open(os.path.join(path, LATEST), "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > os.fstat(file.fileno()).st_size:
                raise ValueError("its checkpoint is shorter than it says")
            told = from_json(file.read(size))["__metadata__"]
    except FileNotFoundError:
        return lines
    except (KeyError, TypeError) as error:
        raise ValueError("its checkpoint does not say of which epoch it is") from error
    if "metrics" in told:
        return str(told["metrics"]).encode().rstrip()
    return b"\n".join(lines.split(b"\n")[: int(told["epoch"])])


def _from_file(path: str) -> list[Run]:
    try:
        head, *lines = Path(path).read_bytes().splitlines() or [b""]
        if not isinstance(first := from_json(head), dict) or not {"command", "runs"} <= first.keys():
            raise ValueError("its first line does not say by which command how many runs were made")
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} is no file of records of runs: {error}") from error
    if len(lines) != first["runs"]:
        raise OutputError(f"{path} has {len(lines)} runs, and its first line says {first['runs']}: fetch it again")
    chance = first.get("chance")
    return [_from_line(line, f"{path}, line {number}", chance) for number, line in enumerate(lines, 2)]


def _from_line(text: bytes, place: str, chance: Any) -> Run:
    try:
        line = _object(from_json(text), place)
    except ValueError as error:
        raise OutputError(f"{place} is no run: {error}") from error
    if missing := _LINE - {"condition"} - line.keys():
        raise OutputError(f"{place} is no run: {', '.join(sorted(missing))} is missing")
    if other := line.keys() - _LINE:
        raise OutputError(f"{place} is of another format: it has {', '.join(sorted(other))}")
    metrics, environment = line["metrics"], _object(line["environment"], place)
    if not isinstance(metrics, list):
        raise OutputError(f"{place} is of another format: its metrics are no list")
    last = metrics[-1] if metrics else None
    return _run(
        line["id"],
        place,
        line.get("condition"),
        line["config"],
        len(metrics),
        last,
        lambda: [_epoch(epoch, place) for epoch in metrics],
        lambda: environment,
        chance,
    )


def _run(
    id: Any,
    place: str,
    condition: Any,
    config: Any,
    epochs: int,
    last: Any,
    metrics: Callable[[], list[dict[str, Any]]],
    environment: Callable[[], dict[str, Any]],
    chance: Any = None,
) -> Run:
    config = _object(config, place)
    for name, kind in (("dataset", str), ("model", str), ("rule", str), ("seed", int), ("epochs", int)):
        if not isinstance(value := config.get(name), kind):
            raise OutputError(f"{place} is of another format: {name} must be of type {kind.__name__}, got {value!r}")
    last = None if last is None else _epoch(last, place)
    return Run(str(id), place, condition, config, epochs, last, metrics, environment, chance)


def _epoch(metrics: Any, place: str) -> dict[str, Any]:
    epoch = _object(metrics, place)
    for name in ("epoch", "train_loss", "test_accuracy", "seconds"):
        if not isinstance(value := epoch.get(name), int | float):
            raise OutputError(f"{place} is of another format: an epoch's {name} must be a number, got {value!r}")
    return epoch


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise OutputError(f"{place} is of another format: {value!r} stands where an object has to")
    return value


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {  # the longer first, as they are looked for in this order
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}


def where(runs: Sequence[Run], condition: str) -> list[Run]:
    """The runs of which a condition is true.

    Args:
        runs: of which some are chosen.
        condition: ``FIELD=VALUE``, with a field's dotted name and a value as JSON has it, or a word; also ``!=``, and
            ``<``, ``<=``, ``>``, ``>=`` for numbers. A field that some run has is null in those that do not have it.

    Raises:
        ValueError: there is no such field in any of the runs, or the condition is none.
    """
    sign = next((s for s in _OPERATORS if s in condition), None)
    name, _, text = condition.partition(sign or "=")
    name, text = name.strip(), text.strip()
    if sign is None or not name or not text:
        raise ValueError(f"must be FIELD=VALUE (or !=, <, <=, >, >=), got {condition!r}")
    if runs and not any(name in run.fields for run in runs):
        names = dict.fromkeys(n for run in runs for n in run.fields)
        raise ValueError(f"field must be one of {', '.join(names)}, got {name!r}")
    try:
        wanted = json.loads(text)
    except ValueError:
        wanted = text
    if sign in ("=", "!="):
        return [run for run in runs if _is(run.fields.get(name), wanted, text) == (sign == "=")]
    if isinstance(wanted, bool) or not isinstance(wanted, int | float):
        raise ValueError(f"{sign} needs a number, got {text!r}")
    compare = _OPERATORS[sign]
    values = ((run, run.fields.get(name)) for run in runs)
    return [
        run
        for run, value in values
        if isinstance(value, int | float) and not isinstance(value, bool) and compare(value, wanted)
    ]


def _is(value: Any, wanted: Any, text: str) -> bool:
    if isinstance(value, str):
        return value in (wanted, text)
    return bool(value == wanted) and isinstance(value, bool) == isinstance(wanted, bool)


def sort(runs: Sequence[Run], name: str, *, descending: bool = False) -> list[Run]:
    """By a field; runs without it come last.

    Raises:
        ValueError: there is no such field in any of the runs.
    """
    if runs and not any(name in run.fields for run in runs):
        names = dict.fromkeys(n for run in runs for n in run.fields)
        raise ValueError(f"field must be one of {', '.join(names)}, got {name!r}")
    if name == "id":  # the usual case, without the price of looking for it in every description
        return sorted(runs, key=lambda run: run.id, reverse=descending)
    with_it = [run for run in runs if run.fields.get(name) is not None]
    numbers = all(isinstance(run.fields[name], int | float) for run in with_it)
    with_it.sort(key=lambda run: run.fields[name] if numbers else str(run.fields[name]), reverse=descending)
    return [*with_it, *(run for run in runs if run.fields.get(name) is None)]


def differing(runs: Sequence[Run]) -> list[str]:
    """What of each run's description is not as in most of the runs, of the fields that its name does not tell."""
    told = {"dataset", "model", "rule", "seed", "epochs"}
    first = runs[0].described if runs else {}
    # Most are like the first, and to write down the value of each would take most of the time.
    alike: Counter[str] = Counter()
    counts = defaultdict(Counter[str], {name: Counter({repr(value): 0}) for name, value in first.items()})
    for run in runs:
        for name, value in run.described.items():
            if name in first and type(value) is type(first[name]) and value == first[name]:
                alike[name] += 1
            else:
                counts[name][repr(value)] += 1
    for name, many in alike.items():
        counts[name][repr(first[name])] += many
    usual = {
        # What less than half of them have at all is usually not there.
        name: counted.most_common(1)[0][0] if 2 * counted.total() > len(runs) else None
        for name, counted in counts.items()
        if name not in told and (len(counted) > 1 or counted.total() < len(runs))
    }
    return [
        " ".join(
            f"{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, most in usual.items()
            if name in run.described and repr(value := run.described[name]) != most
        )
        for run in runs
    ]
