"""Keeps the runs of an experiment as one file, from which alone its tables and figures are made.

May import: lab.config, lab.data, lab.experiments.conditions, lab.experiments.paper, lab.files, lab.records,
lab.report.figures, lab.results, lab.store.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import Dataset
from relaxprop.lab.experiments.conditions import Experiment, condition_of
from relaxprop.lab.experiments.paper import EXPERIMENTS
from relaxprop.lab.files import OutputError
from relaxprop.lab.records import RECORDS, Run
from relaxprop.lab.report.figures import Figure, is_complete, write_figure
from relaxprop.lab.results import Compared, FinishedRun, Head, RunLine
from relaxprop.lab.store import first_reason, read_lines, write_lines


def write_conditions(
    experiment: Experiment,
    names: Sequence[str],
    runs: Sequence[FinishedRun],
    dataset: Dataset,
    folder: Path,
    command: str,
) -> tuple[Figure, list[Path]]:
    """Keeps the runs, of which ``names`` are the conditions, and makes their figure; gives it and its files."""
    _keep(experiment, names, runs, dataset, folder / RECORDS, command)
    return write_figure(folder)


def _keep(
    experiment: Experiment,
    names: Sequence[str],
    runs: Sequence[FinishedRun],
    dataset: Dataset,
    path: Path,
    command: str,
) -> None:
    conditions = experiment.of(dataset.name)
    head = Head(
        command=command,
        runs=len(runs),
        experiment=experiment.title,
        dataset=dataset.title,
        chance=dataset.chance,
        conditions={
            name: Compared(conditions[name].title, conditions[name].claim, conditions[name].versus)
            for name in dict.fromkeys(names)
        },
    )
    write_lines(path, head, [RunLine.of(run, name) for run, name in zip(runs, names, strict=True)])


def complete(path: Path, load: Callable[[str], Dataset]) -> bool:
    """Adds to a file of records what an older one does not say; whether anything was missing.

    Args:
        path: of the file.
        load: gives a data set by its name.

    Raises:
        OutputError: the file cannot be read, its command is no figure's, a run belongs to none of the figure's
            conditions, or the data are not those that the runs were trained on.
    """
    records = read_lines(path)
    if is_complete(records):
        return False
    head, _, runs = records
    words = shlex.split(head.command)
    by_command = {f"relaxprop reproduce {name}": experiment for name, experiment in EXPERIMENTS.items()}
    experiment = by_command.get(" ".join(words[:3]))
    if experiment is None:
        raise OutputError(f"{path} was made by {head.command!r}, which is none of {', '.join(by_command)}")
    if "--as-coded" in words:
        experiment = as_coded_title(experiment)
    if len(kinds := sorted({(run.config.dataset, run.config.data or "") for run in runs})) != 1:
        raise OutputError(f"{path} holds runs on {len(kinds)} data sets: {', '.join(map(' '.join, kinds))}")
    ((name, digest),) = kinds
    dataset = load(name)
    if dataset.digest != digest:
        raise OutputError(
            f"the runs in {path} were trained on other data of the name {name} ({digest}) than these "
            f"({dataset.digest}): name their folder by --data-dir"
        )
    names = []
    for run in runs:
        condition = condition_of(run.config, experiment.of(name))
        if condition is None:
            raise OutputError(f"{path}: {run.config.id} belongs to none of {', '.join(experiment.of(name))}")
        names.append(condition)
    _keep(experiment, names, runs, dataset, path, head.command)
    return True


def as_coded_title(experiment: Experiment) -> Experiment:
    """The same under the title that it has as the authors' code has it."""
    return replace(experiment, title=f"{experiment.title}, as coded")


def with_conditions(runs: Sequence[Run]) -> list[Run]:
    """The same runs; those whose condition was not kept get the one that their description tells.

    Raises:
        OutputError: a run is of another format.
    """
    known = {
        name: condition
        for e in EXPERIMENTS.values()
        for own in e.conditions.values()
        for name, condition in own.items()
    }
    found = []
    for run in runs:
        if run.condition is None:
            try:
                config = RunConfig.model_validate(run.config)
            except ValueError as error:
                raise OutputError(f"{run.place} is of another format: {first_reason(error)}") from error
            run = replace(run, condition=condition_of(config, known))
        found.append(run)
    return found
