"""Compute an experiment of the paper.

May import: lab.cli.options, lab.cli.records, lab.data, lab.engines.serial, lab.experiments.conditions,
lab.experiments.convergence, lab.experiments.paper, lab.experiments.records.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from relaxprop.lab.cli.options import (
    DATA_HELP,
    AlignmentOption,
    DataDirOption,
    DeviceOption,
    RunsOption,
    find_device,
    load_dataset,
    print_paths,
    progress_bar,
    says_what_is_kept,
    this_command,
    usage_errors,
)
from relaxprop.lab.cli.records import print_figure
from relaxprop.lab.data import Dataset
from relaxprop.lab.engines.serial import run_all
from relaxprop.lab.experiments.conditions import condition_runs
from relaxprop.lab.experiments.convergence import convergence_by_step_size, write_convergence
from relaxprop.lab.experiments.paper import EXPERIMENTS, FigureName
from relaxprop.lab.experiments.records import as_coded_title, write_conditions


def _defaults(field: str) -> str:
    """Of the experiments, for a help text."""
    return ", ".join(f"{name}: {getattr(e, field)}" for name, e in EXPERIMENTS.items())


def reproduce(
    figure: Annotated[
        FigureName, typer.Argument(help="; ".join(f"{name}: {e.title}" for name, e in EXPERIMENTS.items()))
    ],
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help=f"{DATA_HELP} (default: the figure's)")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help=f"Number of seeds. ({_defaults('seeds')})")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help=f"Passes over the training data. ({_defaults('epochs')})")
    ] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(help="Only this one, beside backpropagation and the baseline; repeat it for several."),
    ] = None,
    as_coded: Annotated[
        bool, typer.Option("--as-coded", help="As the authors' code has it, where that differs from the paper's text.")
    ] = False,
    alignment_every: AlignmentOption = 0,
    data_dir: DataDirOption = None,
    runs: RunsOption = Path("runs"),
    out: Annotated[
        Path | None, typer.Option(help="Folder for the table and the figures. (default: figures/FIGURE-DATASET)")
    ] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Compute an experiment's runs, print its table and write its figures.

    Backpropagation, Activation Relaxation, and Activation Relaxation under each of the experiment's conditions.
    """
    experiment = EXPERIMENTS[figure]
    names = [dataset] if dataset else list(experiment.conditions)
    for name in names:
        with usage_errors("reproduce"):
            condition_runs(experiment, name, seeds=1, epochs=1, only=condition or ())
    folders = {name: out or Path("figures") / f"{figure}-{name}{'-as-coded' if as_coded else ''}" for name in names}
    if out and not dataset and len(experiment.conditions) > 1:
        folders = {name: out / name for name in names}
    # All, before anything is computed.
    loaded = {name: load_dataset(name, data_dir, runs, folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        _reproduce(
            figure, loaded[name], seeds, epochs, condition or (), as_coded, alignment_every, runs, folder, device
        )


def _reproduce(
    figure: FigureName,
    loaded: Dataset,
    seeds: int | None,
    epochs: int | None,
    only: Sequence[str],
    as_coded: bool,
    alignment_every: int,
    runs: Path,
    folder: Path,
    device: str,
) -> None:
    """A figure on one data set."""
    experiment = EXPERIMENTS[figure]
    if as_coded:
        experiment = as_coded_title(experiment)
    epochs, on_device = epochs or experiment.epochs, find_device(device)
    planned = condition_runs(
        experiment,
        loaded.name,
        seeds=seeds or experiment.seeds,
        epochs=epochs,
        data=loaded.digest,
        as_coded=as_coded,
        only=only,
        alignment_every=alignment_every,
    )
    names, configs = zip(*planned, strict=True)
    labels = {config.id: condition for condition, config in planned}
    kept = f"finished epochs are in {runs}, and the same command goes on from there"
    with says_what_is_kept(kept), progress_bar() as progress:
        task = progress.add_task("", total=epochs * len(configs))
        results = run_all(
            configs,
            loaded,
            root=runs,
            device=on_device,
            on_start=lambda c: progress.update(task, description=f"{labels[c.id]}, seed {c.seed}"),
            on_epoch=lambda n: progress.advance(task, n),
        )
    shown, paths = write_conditions(experiment, names, results, loaded, folder, this_command())
    if figure == "demo":
        curves = convergence_by_step_size(loaded)
        paths += write_convergence(curves, loaded.title, folder, this_command())
    print_figure(shown)
    print_paths(paths)
