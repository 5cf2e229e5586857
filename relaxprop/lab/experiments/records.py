"""Keeps the runs of an experiment as one file, from which alone its tables and figures are made.

May import: lab.config, lab.data, lab.experiments.conditions, lab.experiments.paper, lab.experiments.plan, lab.files,
lab.records, lab.report.figures, lab.results, lab.store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import Dataset
from relaxprop.lab.experiments.conditions import Experiment, condition_of
from relaxprop.lab.experiments.paper import EXPERIMENTS
from relaxprop.lab.experiments.plan import Plan, plan_of, same_results
from relaxprop.lab.files import OutputError
from relaxprop.lab.records import RECORDS, Run
from relaxprop.lab.report.figures import Figure, is_complete, write_figure
from relaxprop.lab.results import Compared, FinishedRun, Head, RunLine
from relaxprop.lab.store import Record, first_reason, read_lines, read_run, write_lines


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
    planned: int | None = None,
) -> None:
    """Writes a file of records; ``planned`` says how many runs there will be, where some are missing."""
    known = experiment.of(runs[0].config.dataset)
    conditions = {name: known[name] for name in known if name in names}
    head = Head(
        command=command,
        runs=len(runs),
        experiment=experiment.title,
        dataset=dataset.title,
        chance=dataset.chance,
        conditions={name: Compared(c.title, c.claim, c.versus, c.beside) for name, c in conditions.items()},
    )
    if planned not in (None, len(runs)):
        head = head.model_copy(update={"planned": planned})
    write_lines(path, head, [RunLine.of(run, name) for run, name in zip(runs, names, strict=True)])


def complete(path: Path, load: Callable[[str], Dataset]) -> bool:
    """Adds to a file of records what an older one does not say; whether anything was missing.

    Args:
        path: of the file.
        load: gives a data set by its name.

    Raises:
        OutputError: the file cannot be read, its command is no figure's, a run is none of the command's, or the data
            are not those that the runs were trained on.
    """
    records = read_lines(path)
    if is_complete(records):
        return False
    plan = _plan(path, records.head.command)
    dataset = load(_data(path, records.runs)[0])
    names = _names(path, plan, records.runs, dataset)
    planned = len(plan.runs(dataset.name))
    _keep(plan.experiment, names, records.runs, dataset, path, records.head.command, planned)
    return True


def _plan(path: Path, command: str) -> Plan:
    try:
        return plan_of(command)
    except ValueError as error:
        raise OutputError(f"{path} was made by {command!r}, of which the runs are not known: {error}") from error


def _data(path: Path, runs: Sequence[FinishedRun]) -> tuple[str, str]:
    """Name and digest of the data set, which is one."""
    if len(kinds := sorted({(run.config.dataset, run.config.data or "") for run in runs})) != 1:
        raise OutputError(f"{path} holds runs on {len(kinds)} data sets: {', '.join(map(' '.join, kinds))}")
    return kinds[0]


def _names(path: Path, plan: Plan, runs: Sequence[FinishedRun], dataset: Dataset) -> list[str]:
    """The conditions of runs that a command made on a data set."""
    known = {same_results(config): name for name, config in plan.runs(dataset.name)}
    names = []
    for run in runs:
        if run.config.data != dataset.digest:
            raise OutputError(
                f"the runs in {path} were trained on other data of the name {dataset.name} ({run.config.data}) than "
                f"these ({dataset.digest}): name their folder by --data-dir"
            )
        name = known.get(same_results(run.config))
        if name is None:
            raise OutputError(f"{path}: {run.config.id} is no run of its command")
        names.append(name)
    return names


class Collected(NamedTuple):
    """What was added to a file of records."""

    added: list[str]  # ids
    there: int  # runs in it now
    planned: int


def collect(path: Path, root: Path, load: Callable[[str], Dataset], command: str | None = None) -> Collected:
    """Adds to a file of records those runs of its command that are finished by now in a folder of run directories.

    Args:
        path: of the file, which may not exist yet.
        root: the folder. Runs of other commands in it, and unfinished ones, are left alone.
        load: gives a data set by its name.
        command: that the runs are of; None: as the file says.

    Raises:
        OutputError: the file cannot be read or written, its command is another or no figure's, one of its runs is none
            of the command's, a run in the folder is damaged, or none is finished.
    """
    kept = read_lines(path) if path.exists() else None
    if kept is not None and command not in (None, kept.head.command):
        raise OutputError(f"{path} is of {kept.head.command!r}, not of {command!r}: name another file")
    command = command if kept is None else kept.head.command
    if command is None:
        raise OutputError(f"{path} does not exist: say by --command of which command the runs are")
    plan = _plan(path, command)
    if len(plan.datasets) > 1:
        raise OutputError(f"{command!r} is of {len(plan.datasets)} data sets: name one in it by --dataset")
    dataset = load(plan.datasets[0])
    runs = {} if kept is None else {run.config.id: run for run in kept.runs}
    if kept is not None:
        _names(path, plan, kept.runs, dataset)
    planned = plan.runs(dataset.name, dataset.digest)
    added = []
    for _, config in planned:
        folder = root / config.id
        if config.id not in runs and len(Record(config, root).finished_epochs(verify=False)) >= config.epochs:
            found = read_run(folder)
            runs[config.id] = FinishedRun(config, found.metrics[: config.epochs], found.environment)
            added.append(config.id)
    if not runs:
        raise OutputError(f"in {root} is no finished run of {command!r}")
    order = {config.id: name for name, config in planned}
    if other := runs.keys() - order.keys():
        raise OutputError(f"{path}: {sorted(other)[0]} measured alignment at other times than its command does")
    if added or (kept is not None and not is_complete(kept)):
        there = [id for id in order if id in runs]
        _keep(
            plan.experiment, [order[id] for id in there], [runs[id] for id in there], dataset, path, command,
            len(planned),
        )  # fmt: skip
    return Collected(added, len(runs), len(planned))


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
