"""The runs that a command of the lab computes, from the command itself.

May import: recording, lab.config, lab.experiments.conditions, lab.experiments.paper.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn, get_args

from relaxprop.lab.config import RunConfig
from relaxprop.lab.experiments.conditions import Experiment, condition_runs, in_version
from relaxprop.lab.experiments.paper import EXPERIMENTS, FigureName
from relaxprop.recording import InitialState

COMMAND = ("relaxprop", "reproduce")


@dataclass(frozen=True)
class Plan:
    """What ``relaxprop reproduce`` computes, as its options say it."""

    figure: FigureName
    datasets: tuple[str, ...]
    seeds: int
    epochs: int
    only: tuple[str, ...] = ()
    as_coded: bool = False
    initial: InitialState = "feedforward"
    beside: bool = False
    alignment_every: int = 0
    threads: int = 1

    @cached_property
    def experiment(self) -> Experiment:
        """In the version that is asked for."""
        return in_version(EXPERIMENTS[self.figure], as_coded=self.as_coded, initial=self.initial, beside=self.beside)

    def runs(self, dataset: str, data: str | None = None) -> list[tuple[str, RunConfig]]:
        """The runs on a data set, of which ``data`` is the digest, with the names of their conditions."""
        planned = condition_runs(
            self.experiment,
            dataset,
            seeds=self.seeds,
            epochs=self.epochs,
            data=data,
            only=self.only,
            alignment_every=self.alignment_every,
        )
        return [(name, config.model_copy(update={"threads": self.threads})) for name, config in planned]


def same_results(config: RunConfig) -> str:
    """A name that is the same for runs whose results are: however often alignment is measured, whatever the digest."""
    return config.model_copy(update={"data": None, "alignment_every": 0}).id


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("figure", choices=get_args(FigureName))
    for option in ("--seeds", "--epochs"):
        parser.add_argument(option, type=int)
    for option, default in (("--alignment-every", 0), ("--threads", 1)):
        parser.add_argument(option, type=int, default=default)
    parser.add_argument("--dataset")
    parser.add_argument("--condition", dest="only", action="append", default=[])
    parser.add_argument("--initial", choices=get_args(InitialState), default="feedforward")
    for option in ("--as-coded", "--beside"):
        parser.add_argument(option, action="store_true")
    return parser


def plan_of(command: str) -> Plan:
    """What a command computes. Options that do not change its runs (where they are, by what) are not looked at.

    Raises:
        ValueError: it is no ``relaxprop reproduce``, or an option of it has a value that it cannot have.
    """
    words = shlex.split(command)
    if tuple(words[:2]) != COMMAND:
        raise ValueError(f"must be `{' '.join(COMMAND)} FIGURE …`, got {command!r}")
    try:
        given, _ = _parser().parse_known_args(words[2:])
        experiment = EXPERIMENTS[given.figure]
        plan = Plan(
            figure=given.figure,
            datasets=tuple(experiment.conditions) if given.dataset is None else (given.dataset,),
            seeds=given.seeds or experiment.seeds,
            epochs=given.epochs or experiment.epochs,
            only=tuple(given.only),
            as_coded=given.as_coded,
            initial=given.initial,
            beside=given.beside,
            alignment_every=given.alignment_every,
            threads=given.threads,
        )
        for dataset in plan.datasets:
            condition_runs(plan.experiment, dataset, seeds=1, epochs=1, only=plan.only)
    except ValueError as error:
        raise ValueError(f"{command!r}: {error}") from error
    return plan
