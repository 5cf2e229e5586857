"""Compute an experiment of the paper.

May import: recording, lab.batched, lab.cli.engines, lab.cli.figures, lab.cli.options, lab.cli.progress,
lab.cli.settings, lab.config, lab.data, lab.distributed, lab.engines.grid, lab.engines.work, lab.experiments.conditions,
lab.experiments.convergence, lab.experiments.gathered, lab.experiments.paper, lab.experiments.plan,
lab.experiments.records, lab.experiments.rules, lab.records, lab.report.html, lab.report.logs, lab.results, lab.store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from relaxprop.lab.batched import check_batched
from relaxprop.lab.cli.engines import AddressOption, EngineOption, GpusOption, ThreadsOption, WorkersOption, find_engine
from relaxprop.lab.cli.figures import print_figure, print_rivals
from relaxprop.lab.cli.options import (
    RunsOption,
    print_paths,
    says_what_is_kept,
    this_command,
    usage_errors,
)
from relaxprop.lab.cli.progress import GridProgress
from relaxprop.lab.cli.settings import (
    DATA_HELP,
    AlignmentOption,
    AsCodedOption,
    ColourOption,
    DataDirOption,
    DeviceOption,
    ImageColumnOption,
    LabelColumnOption,
    LogOption,
    find_device,
    find_logs,
    load_dataset,
)
from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import Dataset
from relaxprop.lab.distributed import is_started_by_torchrun
from relaxprop.lab.engines.grid import run_all
from relaxprop.lab.engines.work import EpochDone, Event
from relaxprop.lab.experiments import rules
from relaxprop.lab.experiments.conditions import Experiment, condition_runs, in_version
from relaxprop.lab.experiments.convergence import convergence_by_step_size, write_convergence
from relaxprop.lab.experiments.gathered import gather
from relaxprop.lab.experiments.paper import EXPERIMENTS, FigureName
from relaxprop.lab.experiments.plan import same_results
from relaxprop.lab.experiments.records import write_conditions
from relaxprop.lab.records import RECORDS
from relaxprop.lab.report.html import write_report
from relaxprop.lab.report.logs import Tool, logs
from relaxprop.lab.results import FinishedRun
from relaxprop.lab.store import refuse_to_discard
from relaxprop.recording import InitialState

Compute = Callable[..., list[FinishedRun]]  # `run_all`, told by what


def _defaults(field: str) -> str:
    """Of the experiments, for a help text."""
    known = {name: getattr(e, field) for name, e in EXPERIMENTS.items()}
    return ", ".join(f"{name}: {value}" for name, value in (known | {"rules": _OF_RULES[field]}).items())


_OF_RULES = {"seeds": rules.SEEDS, "epochs": rules.EPOCHS}


def _titles() -> dict[str, str]:
    return {name: e.title for name, e in EXPERIMENTS.items()} | {"rules": rules.TITLE}


def reproduce(
    figure: Annotated[
        Literal[FigureName, "rules"],
        typer.Argument(help="; ".join(f"{name}: {title}" for name, title in _titles().items())),
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
    as_coded: AsCodedOption = False,
    initial: Annotated[
        InitialState, typer.Option(help="Where the states start: at the feedforward activities, or at zero.")
    ] = "feedforward",
    beside: Annotated[
        bool,
        typer.Option("--beside", help="With --as-coded or --initial zero: as written too, and the paired difference."),
    ] = False,
    search_seeds: Annotated[
        int | None,
        typer.Option(min=1, help=f"Seeds by which rules chooses each learning rate. (default: {rules.SEARCH_SEEDS})"),
    ] = None,
    alignment_every: AlignmentOption = 0,
    data_dir: DataDirOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    colour: ColourOption = None,
    runs: RunsOption = Path("runs"),
    out: Annotated[
        Path | None, typer.Option(help="Folder for the table and the figures. (default: figures/FIGURE-DATASET)")
    ] = None,
    device: DeviceOption = "cpu",
    workers: WorkersOption = None,
    threads: ThreadsOption = 1,
    engine: EngineOption = "processes",
    address: AddressOption = None,
    gpus: GpusOption = None,
    batched_seeds: Annotated[
        bool,
        typer.Option(
            "--batched-seeds",
            help="Train all seeds of a condition as one network: less time on a GPU, the same results to rounding.",
        ),
    ] = False,
    log: LogOption = None,
) -> None:
    """Compute an experiment's runs, print its table and write its figures.

    Backpropagation, Activation Relaxation, and Activation Relaxation under each of the experiment's conditions.
    """
    if is_started_by_torchrun():
        raise typer.BadParameter(
            "torchrun makes several processes compute one run: use it with relaxprop train, and --workers or --engine "
            "ray here",
            param_hint="reproduce",
        )
    find_device(device)
    tools = find_logs(log)
    chosen = find_engine(engine, workers=workers, threads=threads, address=address, gpus=gpus)
    compute = partial(run_all, device=device, engine=chosen, batched_seeds=batched_seeds)
    if figure == "rules":
        unused = {
            "--as-coded": as_coded,
            "--initial": initial != "feedforward",
            "--beside": beside,
            "--alignment-every": alignment_every,
            "--batched-seeds": batched_seeds,
        }
        for flag, given in unused.items():
            if given:
                raise typer.BadParameter("it has no effect on reproduce rules, leave it out", param_hint=flag)
        with usage_errors("reproduce"):
            rules.check_names(condition or ())
        folder = out or Path("figures") / f"rules-{dataset or 'digits'}"
        data = load_dataset(
            dataset or "digits", data_dir, runs, *(folder / model for model in rules.MODELS),
            image_column=image_column, label_column=label_column, colour=colour,
        )  # fmt: skip
        _reproduce_rules(data, seeds, search_seeds, epochs, condition or (), runs, folder, threads, compute, tools)
        return
    if search_seeds is not None:
        raise typer.BadParameter("it has an effect on reproduce rules alone, leave it out", param_hint="--search-seeds")
    with usage_errors("--beside"):
        experiment = in_version(EXPERIMENTS[figure], as_coded=as_coded, initial=initial, beside=beside)
    names = [dataset] if dataset is not None else list(experiment.conditions)
    for name in names:
        with usage_errors("reproduce"):
            planned = condition_runs(
                experiment, name, seeds=1, epochs=1, only=condition or (), alignment_every=alignment_every
            )
        with usage_errors("--batched-seeds"):
            for _, config in planned if batched_seeds else ():
                check_batched(config)
    version = f"{'-as-coded' * as_coded}{'-from-zero' * (initial == 'zero')}{'-beside' * beside}"
    folders = {name: out or Path("figures") / f"{figure}-{name}{version}" for name in names}
    if out and not dataset and len(experiment.conditions) > 1:
        folders = {name: out / name for name in names}
    # All, before anything is computed.
    loaded = {
        name: load_dataset(
            name, data_dir, runs, folder, image_column=image_column, label_column=label_column, colour=colour
        )
        for name, folder in folders.items()
    }
    plans: dict[str, list[tuple[str, RunConfig]]] = {}
    for name, data in loaded.items():
        planned = condition_runs(
            experiment,
            data.name,
            seeds=seeds or experiment.seeds,
            epochs=epochs or experiment.epochs,
            data=data.digest,
            only=condition or (),
            alignment_every=alignment_every,
        )
        plans[name] = [(its, config.model_copy(update={"threads": threads})) for its, config in planned]
    made = {same_results(config): config.epochs for planned in plans.values() for _, config in planned}
    for folder in folders.values():
        refuse_to_discard(folder / RECORDS, lambda _, run: made.get(same_results(run), 0))
    for name, folder in folders.items():
        _reproduce(figure, experiment, loaded[name], plans[name], runs, folder, compute, tools)


def _reproduce(
    figure: FigureName,
    experiment: Experiment,
    loaded: Dataset,
    planned: Sequence[tuple[str, RunConfig]],
    runs: Path,
    folder: Path,
    compute: Compute,
    tools: list[Tool],
) -> None:
    """A figure on one data set, of runs with their conditions."""
    names, configs = [name for name, _ in planned], [config for _, config in planned]
    labels = {config.id: f"{name}, seed {config.seed}" for name, config in zip(names, configs, strict=True)}
    results = _computed(configs, labels, loaded, runs, compute, tools)
    shown, paths = write_conditions(experiment, names, results, loaded, folder, this_command())
    if figure == "demo":
        curves = convergence_by_step_size(loaded)
        paths += write_convergence(curves, loaded.title, folder, this_command())
        found = gather([*(runs / config.id for config in configs), folder])
        paths.append(write_report(found, folder / "report.html"))
    print_figure(shown)
    print_paths(paths)


def _reproduce_rules(
    loaded: Dataset,
    seeds: int | None,
    search_seeds: int | None,
    epochs: int | None,
    only: Sequence[str],
    runs: Path,
    folder: Path,
    threads: int,
    compute: Compute,
    tools: list[Tool],
) -> None:
    """Every learning rule on one data set, on two networks."""

    def results(names: Sequence[str], configs: Sequence[RunConfig]) -> list[FinishedRun]:
        labels = {
            config.id: f"{name}, rate {config.learning_rate:g}, {'held out' if config.validation else 'test'}, "
            f"seed {config.seed}"
            for name, config in zip(names, configs, strict=True)
        }
        return _computed(configs, labels, loaded, runs, compute, tools)

    for model in rules.MODELS:  # all, before anything is computed
        rules.refuse_to_discard_rivals(folder / model, only, seeds or rules.SEEDS, epochs or rules.EPOCHS)
    for model in rules.MODELS:
        found, paths = rules.compare_rivals(
            model,
            loaded,
            results,
            seeds=seeds or rules.SEEDS,
            search_seeds=search_seeds or rules.SEARCH_SEEDS,
            epochs=epochs or rules.EPOCHS,
            only=only,
            threads=threads,
            folder=folder / model,
            command=this_command(),
        )
        print_rivals(found)
        print_paths(paths)
    print_paths([rules.write_together(folder)])


def _computed(
    configs: Sequence[RunConfig],
    labels: dict[str, str],
    loaded: Dataset,
    runs: Path,
    compute: Compute,
    tools: list[Tool],
) -> list[FinishedRun]:
    """The runs' metrics; what is finished is in their folder."""
    kept = f"finished epochs are in {runs}, and the same command goes on from there"
    by_id = {config.id: config for config in configs}
    with says_what_is_kept(kept), GridProgress(configs, labels) as progress, logs(tools, by_id, runs) as tell:

        def on_event(event: Event) -> None:
            progress(event)
            if isinstance(event, EpochDone) and event.computed:
                tell(event.run, event.metrics)

        return compute(configs, loaded, root=runs, on_event=on_event)
