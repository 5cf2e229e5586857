"""The runs that are still to be computed, as data: which are there, and what the others cost.

May import: lab.config, lab.experiments.evidence, lab.experiments.plan, lab.files, lab.results, lab.store.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from relaxprop.lab.config import RunConfig
from relaxprop.lab.experiments.evidence import Source
from relaxprop.lab.experiments.plan import Plan, plan_of, same_results
from relaxprop.lab.files import OutputError
from relaxprop.lab.results import Compared
from relaxprop.lab.store import first_reason

QUEUE = "queue.toml"


class Item(BaseModel):
    """What is to be computed for one purpose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    runs: int = Field(ge=1)
    commands: tuple[str, ...] = Field(min_length=1)


class Queue(BaseModel):
    """All of it, in the order in which it is computed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    items: tuple[Item, ...] = Field(min_length=1)


class State(NamedTuple):
    """How far one command is.

    Attributes:
        item: its number, from 1.
        there: how many of its runs are among the kept records, of as many epochs or more.
        hours: of one core, which the others are estimated to take; without those that an earlier command computes.
        unknown: of how many of the others no kept run tells what they take.
    """

    item: int
    command: str
    plan: Plan
    runs: int
    there: int
    hours: float
    unknown: int


def read_queue(path: Path) -> Queue:
    """Reads the file.

    Raises:
        OutputError: it cannot be read, a command in it is none, or has another number of runs than it says.
    """
    try:
        queue = Queue.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise OutputError(f"{path} is no queue of runs: {first_reason(error)}") from error
    for item in queue.items:
        try:
            plans = [plan_of(command) for command in item.commands]
        except ValueError as error:
            raise OutputError(f"{path}: {error}") from error
        runs = sum(len(plan.runs(dataset)) for plan in plans for dataset in plan.datasets)
        if runs != item.runs:
            raise OutputError(f"{path}: {item.what!r} has {runs} runs, and says {item.runs}")
    return queue


def states(queue: Queue, found: Sequence[Source]) -> list[State]:
    """How far each command is, by the kept records alone."""
    kept: dict[str, int] = {}  # epochs
    for source in found:
        for run in source.figure.runs:
            key = same_results(run.config)
            kept[key] = max(kept.get(key, 0), run.config.epochs)
    costs = Costs(found)
    earlier: dict[str, int] = {}
    result = []
    for number, item in enumerate(queue.items, 1):
        for command in item.commands:
            plan = plan_of(command)
            runs = there = unknown = 0
            seconds = 0.0
            for dataset in plan.datasets:
                conditions = plan.experiment.of(dataset)
                for name, config in plan.runs(dataset):
                    key = same_results(config)
                    runs += 1
                    if kept.get(key, 0) >= config.epochs:
                        there += 1
                    elif earlier.get(key, 0) < config.epochs:
                        taken = costs.of(name, conditions[name], config)
                        unknown += taken is None
                        seconds += taken or 0
                        earlier[key] = config.epochs
            result.append(State(number, command, plan, runs, there, seconds / 3600, unknown))
    return result


class Costs:
    """What runs take, by what kept ones have taken.

    Of the same network, data set and condition; else of the condition as written, whatever its network. Of several
    sources it is that of the most runs.
    """

    def __init__(self, found: Sequence[Source]) -> None:
        self._exact: dict[tuple[str, str, str], float] = {}
        self._near: dict[tuple[str, str], float] = {}
        for source in sorted(found, key=lambda source: -source.runs):
            for (model, name), taken in source.seconds.items():
                self._exact.setdefault((model, source.dataset, name), taken)
                self._near.setdefault((source.dataset, name), taken)

    def of(self, name: str, condition: Compared, config: RunConfig) -> float | None:
        """Seconds of training of a run; None where no kept run tells."""
        taken = self._exact.get((config.model, config.dataset, name))
        if taken is None:
            taken = self._near.get((config.dataset, condition.beside or name))
        return None if taken is None else taken * config.epochs
