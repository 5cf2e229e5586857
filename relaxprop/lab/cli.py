"""The command line: strings become objects here.

May import: public names, recording, solvers, transients, vertices, lab.architectures, lab.bench, lab.data,
lab.defaults, lab.engine, lab.figures, lab.graphs, lab.models, lab.records, lab.training.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from relaxprop import Frozen, NonFiniteStateError, __version__
from relaxprop.lab import bench as benchmark
from relaxprop.lab import data, figures, graphs, records
from relaxprop.lab import defaults as default_training
from relaxprop.lab.architectures import ARCHITECTURES
from relaxprop.lab.data import DATA_VARIABLE, DATASETS, DataError, Dataset
from relaxprop.lab.engine import run_all
from relaxprop.lab.figures import FigureName
from relaxprop.lab.models import ModelError, ModelName, PapersModel
from relaxprop.lab.records import EpochMetrics, Loss, OptimizerName, OutputError, Rule, RunConfig
from relaxprop.lab.training import train as train_network
from relaxprop.recording import InitialState
from relaxprop.solvers import SOLVERS
from relaxprop.transients import Order, check_step_size
from relaxprop.vertices import Granularity

app = typer.Typer(
    help="Train networks by Activation Relaxation, and see it beside backpropagation (arXiv 2010.06219).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True)


class Quantity(StrEnum):  # Typer knows lists of an enumeration, not of literals
    """A field of `Frozen`, as options spell it."""

    relaxation_derivative = "relaxation-derivative"
    update_derivative = "update-derivative"
    update_activity = "update-activity"
    input = "input"


DATA_HELP = f"{', '.join(DATASETS)}, or the name of your own folder in --data-dir."
DatasetOption = Annotated[str, typer.Option(metavar="NAME", help=DATA_HELP)]
ModelOption = Annotated[ModelName, typer.Option(help="The network: the paper's, or a small one of another kind.")]
PapersModelOption = Annotated[PapersModel, typer.Option(help="The paper's network.")]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder with NAME/train.parquet and NAME/test.parquet; without it the Hugging Face Hub.",
        envvar=DATA_VARIABLE,
    ),
]
RunsOption = Annotated[
    Path, typer.Option(help="Folder of run directories; finished runs there are not computed again.")
]
DeviceOption = Annotated[str, typer.Option(help="PyTorch device, for instance cpu or cuda.")]
AlignmentOption = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="MINIBATCHES",
        help="Measure, once in so many minibatches, the cosine of every gradient to backpropagation's and of backwards "
        "weights to weights. Each time costs about two training steps. 0: never.",
    ),
]
EpochsOption = Annotated[int, typer.Option(help="Passes over the training data.")]


def _known_solver(name: str | None) -> str | None:
    if name is not None and name not in SOLVERS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, SOLVERS))}.")
    return name


def _solver_option(field: str, what: str) -> Any:
    """An option of those solvers that have it, with their default."""
    takers = {
        name: kind.__dataclass_fields__[field] for name, kind in SOLVERS.items() if field in kind.__dataclass_fields__
    }
    default = next(iter(takers.values())).default
    shown = "" if default is None else f" (default: {default})"
    return typer.Option(help=f"{what}; {', '.join(takers)}.{shown}")


@app.command()
def train(
    dataset: DatasetOption = "digits",
    model: ModelOption = "mlp",
    rule: Annotated[Rule, typer.Option(help="Activation Relaxation, or the same loop without it.")] = "ar",
    solver: Annotated[
        str | None,
        typer.Option(
            metavar=f"[{'|'.join(SOLVERS)}]",
            callback=_known_solver,
            help="How the relaxation phase is integrated. (default: closed-form, or euler where the relaxation's "
            "derivative is unfrozen)",
        ),
    ] = None,
    step_size: Annotated[float | None, _solver_option("step_size", "η in (0, 2)")] = None,
    num_steps: Annotated[int | None, _solver_option("num_steps", "Relaxation steps")] = None,
    order: Annotated[Order | None, _solver_option("order", "Order of updates; asynchronous: euler only")] = None,
    tolerance: Annotated[float | None, _solver_option("tolerance", "Stop early at this residual")] = None,
    duration: Annotated[float | None, _solver_option("duration", "Time T")] = None,
    unfreeze: Annotated[
        list[Quantity] | None,
        typer.Option(help="Take it at the current states, not from the feedforward pass; repeat it for several."),
    ] = None,
    feedback: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[PART=]RULE",
            help="Backwards weights: learned, random or sign; of a part (convolutional, fully_connected) or of all.",
        ),
    ] = None,
    drop_derivatives: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[PART=]PLACE", help="f' → 1 in relaxation, update or both; in a part of the network or in all."
        ),
    ] = None,
    vertices: Annotated[
        Granularity, typer.Option(help="What relaxes: outputs of activation modules, of all modules, all operations.")
    ] = "activations",
    initial: Annotated[
        InitialState, typer.Option(help="Where the states start: at the feedforward activities, or at zero.")
    ] = "feedforward",
    seed: Annotated[int, typer.Option(help="Fixes initial weights and minibatches.")] = 0,
    epochs: EpochsOption = 30,
    batch_size: Annotated[int, typer.Option(help="Samples in a minibatch.")] = 64,
    loss: Annotated[Loss, typer.Option(help="Summed over minibatch and outputs; a text needs cross-entropy.")] = (
        "squared-error"
    ),
    optimizer: Annotated[OptimizerName, typer.Option(help="Of the weights.")] = "sgd",
    learning_rate: Annotated[float, typer.Option(help="Of the optimiser, on the summed loss.")] = 0.0005,
    alignment_every: AlignmentOption = 0,
    data_dir: DataDirOption = None,
    runs: RunsOption = Path("runs"),
    device: DeviceOption = "cpu",
) -> None:
    """Train one network. The defaults are the paper's settings."""
    options = {
        "step_size": step_size,
        "num_steps": num_steps,
        "order": order,
        "tolerance": tolerance,
        "duration": duration,
    }
    config = _run_config(
        {name: value for name, value in options.items() if value is not None},
        dataset=dataset,
        model=model,
        rule=rule,
        solver=solver,
        unfreeze=unfreeze or (),
        feedback=_by_part(feedback, "--feedback"),
        dropped=_by_part(drop_derivatives, "--drop-derivatives"),
        seed=seed,
        epochs=epochs,
        batch_size=batch_size,
        vertices=vertices,
        initial=initial,
        loss=loss,
        optimizer=optimizer,
        learning_rate=learning_rate,
        alignment_every=alignment_every,
    )
    loaded = _load(dataset, data_dir, runs)
    config = config.model_copy(update={"data": loaded.digest})

    def show(metrics: EpochMetrics) -> None:
        console.print(
            f"epoch {metrics.epoch:>3}/{epochs}   test accuracy {100 * metrics.test_accuracy:6.2f} %   "
            f"training loss {metrics.train_loss:8.4f}   {metrics.seconds:6.1f} s",
            highlight=False,
        )

    path = runs / config.id
    with _kept(f"the finished epochs are in {path}"):
        metrics = train_network(config, loaded, root=runs, device=_device(device), on_epoch=show)
    accuracy = 100 * metrics[-1].test_accuracy
    console.print(f"test accuracy {accuracy:.2f} % after {epochs} epochs; the run is in {path}", soft_wrap=True)


def _defaults(field: str) -> str:
    """Of the experiments, for a help text."""
    return ", ".join(f"{name}: {getattr(e, field)}" for name, e in figures.EXPERIMENTS.items())


@app.command()
def reproduce(
    figure: Annotated[
        FigureName, typer.Argument(help="; ".join(f"{name}: {e.title}" for name, e in figures.EXPERIMENTS.items()))
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
    experiment = figures.EXPERIMENTS[figure]
    names = [dataset] if dataset else list(experiment.conditions)
    for name in names:
        with _usage_errors("reproduce"):
            figures.condition_runs(experiment, name, seeds=1, epochs=1, only=condition or ())
    folders = {name: out or Path("figures") / f"{figure}-{name}{'-as-coded' if as_coded else ''}" for name in names}
    if out and not dataset and len(experiment.conditions) > 1:
        folders = {name: out / name for name in names}
    # All, before anything is computed.
    loaded = {name: _load(name, data_dir, runs, folder) for name, folder in folders.items()}
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
    experiment = figures.EXPERIMENTS[figure]
    if as_coded:
        experiment = replace(experiment, title=f"{experiment.title}, as coded")
    epochs, on_device = epochs or experiment.epochs, _device(device)
    planned = figures.condition_runs(
        experiment,
        loaded.name,
        seeds=seeds or experiment.seeds,
        epochs=epochs,
        data=loaded.digest,
        as_coded=as_coded,
        only=only,
        alignment_every=alignment_every,
    )
    conditions, configs = zip(*planned, strict=True)
    labels = {config.id: condition for condition, config in planned}
    kept = f"finished epochs are in {runs}, and the same command goes on from there"
    with _kept(kept), _progress() as progress:
        task = progress.add_task("", total=epochs * len(configs))
        results = run_all(
            configs,
            loaded,
            root=runs,
            device=on_device,
            on_start=lambda c: progress.update(task, description=f"{labels[c.id]}, seed {c.seed}"),
            on_epoch=lambda n: progress.advance(task, n),
        )
    rows, paths = figures.write_conditions(experiment, conditions, results, loaded, folder, _command())
    if figure == "demo":
        curves = figures.convergence_by_step_size(loaded)
        paths += figures.write_convergence(curves, loaded.title, folder, _command())
    title = f"{loaded.title}: after {epochs} epochs, mean ± standard error over n seeds"
    cells = figures.table(rows)
    width = len(figures.RESULT)
    _print_table(title, figures.RESULT, [cell[:width] for cell in cells])
    compared = [(row.name, *cell[width:]) for row, cell in zip(rows, cells, strict=True) if row.difference is not None]
    _print_table("the paper's claims", ("condition", *figures.CLAIM), compared)
    for note in figures.NOTES:
        console.print(note, soft_wrap=True, highlight=False)
    _print_paths(paths)


@app.command()
def convergence(
    dataset: DatasetOption = "digits",
    model: PapersModelOption = "mlp",
    step_size: Annotated[
        list[float] | None, typer.Option(help="η in (0, 2); repeat it for several. (default: 0.05 0.1 0.2 0.5)")
    ] = None,
    num_steps: Annotated[int, typer.Option(min=1, help="Relaxation steps to follow.")] = 100,
    order: Annotated[Order, typer.Option(help="Order of updates.")] = "simultaneous",
    seed: Annotated[int, typer.Option(min=0, help="Fixes the initial weights.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in the minibatch.")] = 64,
    data_dir: DataDirOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the figure. (default: figures/convergence-DATASET)")
    ] = None,
) -> None:
    """Distance to backpropagation's gradient per layer and relaxation step, measured and predicted."""
    with _usage_errors("--step-size"):
        for eta in step_size or ():
            check_step_size(eta)
    folder = out or Path("figures") / f"convergence-{dataset}"
    loaded = _load(dataset, data_dir, folder)
    torch.manual_seed(seed)
    curves = figures.convergence_by_step_size(
        loaded,
        model=model,
        step_sizes=step_size or figures.STEP_SIZES,
        num_steps=num_steps,
        order=order,
        seed=seed,
        batch_size=batch_size,
    )
    shown = Table(title=f"distance to backpropagation's gradient after {num_steps} steps", title_justify="left")
    shown.add_column("weights")
    for curve in curves:
        shown.add_column(f"η = {curve.solver.step_size:g}", justify="right")
    for name in curves[0].measured:
        if name.endswith("weight"):
            shown.add_row(name, *(f"{c.measured[name][-1]:.1e}" for c in curves))
    console.print(shown)
    _print_paths(figures.write_convergence(curves, loaded.title, folder, _command()))


@app.command()
def gradients(
    architecture: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(ARCHITECTURES)}; repeat it for several. (default: all)"),
    ] = None,
    step_size: Annotated[float, typer.Option(help="η in (0, 2).")] = graphs.STEP_SIZE,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved measurements of time.")] = 5,
    small: Annotated[bool, typer.Option("--small", help="Small models, which take seconds.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the table and the figure.")] = Path("figures/gradients"),
) -> None:
    """Compare the gradients of many architectures with backpropagation's, every operation a vertex that relaxes."""
    with _usage_errors("--step-size"):
        graphs.planned(depth=1, step_size=step_size)
    names = architecture or list(ARCHITECTURES)
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        raise typer.BadParameter(
            f"{unknown[0]!r} is not one of {', '.join(ARCHITECTURES)}", param_hint="--architecture"
        )
    records.check_writable(out)
    comparisons, curves = [], []
    with _kept("nothing was measured to the end"), _progress() as progress:
        task = progress.add_task("", total=2 * len(names))
        for name in names:
            progress.update(task, description=f"{name}: gradients")
            comparisons.append(graphs.compare(name, step_size=step_size, rounds=rounds, small=small))
            progress.advance(task)
            progress.update(task, description=f"{name}: asynchronous")
            curves.append(graphs.asynchronous(name, step_size=step_size))
            progress.advance(task)
    for title, columns, rows in graphs.tables(comparisons):
        _print_table(title, columns, [(name, *row[1:]) for name, row in zip(names, rows, strict=True)])
    for note in graphs.notes(step_size):
        console.print(note, soft_wrap=True, highlight=False)
    paths = graphs.write_comparisons(comparisons, step_size, out, _command())
    _print_paths(paths + graphs.write_asynchronous(curves, step_size, out, _command()))


@app.command()
def depth(
    layers: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Depth to measure; repeat it for several. (default: 4 10 20 50 100 200)"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved measurements of time.")] = 3,
    width: Annotated[int, typer.Option(min=1, help="Units in a layer.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a minibatch.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder for the table and the figure.")] = Path("figures/depth"),
) -> None:
    """Measure what each solver costs on deeper and deeper networks."""
    records.check_writable(out)
    depths = sorted(set(layers or graphs.DEPTHS))
    with _kept("nothing was measured to the end"), _progress() as progress:
        task = progress.add_task("depths", total=len(depths))
        costs = graphs.cost_by_depth(
            depths, width=width, batch_size=batch_size, rounds=rounds, on_depth=lambda: progress.advance(task)
        )
    about = f"chains of {width} units with tanh, orthogonal weights, batch {batch_size}, median of {rounds} rounds"
    shown = Table(title=f"time relative to backpropagation: {about}", title_justify="left")
    shown.add_column("solver")
    for d in depths:
        shown.add_column(f"{d} layers", justify="right")
    for solver in dict.fromkeys(c.solver for c in costs):
        shown.add_row(solver, *(f"{c.ratio:.1f}×{' =' if c.converged else ''}" for c in costs if c.solver == solver))
    console.print(shown)
    console.print("= nothing of the initial state is left: Equilibrium gives the same", soft_wrap=True)
    _print_paths(graphs.write_depths(costs, about, out, _command()))


@app.command()
def defaults(
    depth: Annotated[
        list[int] | None,
        typer.Option(min=1, help=f"Hidden layers; repeat it for several. (default: {default_training.DEPTHS})"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    minibatches: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 100,
    out: Annotated[Path, typer.Option(help="Folder for the table and the losses.")] = Path("figures/defaults"),
) -> None:
    """Train ordinary networks by the default settings, beside backpropagation and the paper's 100 steps of 0.1."""
    records.check_writable(out)
    chosen = list(default_training.settings(depth or default_training.DEPTHS))
    with _kept("nothing was measured to the end"), _progress() as progress:
        task = progress.add_task("runs", total=len(chosen) * seeds * len(default_training.RULES))
        found = default_training.measure(
            chosen, seeds=seeds, minibatches=minibatches, on_run=lambda: progress.advance(task)
        )
    _print_table("training loss after training", *default_training.table(found))
    _print_paths(default_training.write(found, minibatches, out, _command()))


@app.command()
def take_over(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of records (runs.jsonl).")],
    runs: RunsOption = Path("runs"),
) -> None:
    """Make run directories of kept records, without weights, so that finished runs are not computed again."""
    for file in files:
        taken = records.take_over(file, runs)
        console.print(f"{file}: {len(taken)} runs taken over into {runs}", soft_wrap=True, highlight=False)


@app.command()
def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's name in --runs, or the path of its folder.")],
    runs: RunsOption = Path("runs"),
) -> None:
    """Show what a run was, what it reached, and what each of its updates reads."""
    path = runs / run if (runs / run).exists() or not Path(run).is_dir() else Path(run)
    kept = records.read_run(path)
    console.print(kept.config.model_dump_json(indent=2), highlight=False)
    where = [f"{name} {value}" for name, value in kept.environment.items() if value is not None]
    console.print(", ".join(where), soft_wrap=True, highlight=False)
    for metrics in kept.metrics[-1:]:
        console.print(
            f"epoch {metrics.epoch}: test accuracy {100 * metrics.test_accuracy:.2f} %, training loss "
            f"{metrics.train_loss:.4f}",
            highlight=False,
        )
    if kept.certificate is not None:
        shown = Table(title="weight of the initial state after the relaxation phase", title_justify="left")
        shown.add_column("vertex")
        shown.add_column("left", justify="right")
        for vertex, left in reversed(kept.certificate.items()):
            shown.add_row(vertex, f"{100 * left:.3g} %")
        console.print()
        console.print(shown)
    if kept.locality is not None:
        console.print()
        console.print(str(kept.locality), soft_wrap=True, highlight=False, markup=False)


@app.command()
def bench(
    model: PapersModelOption = "mlp",
    rounds: Annotated[int, typer.Option(min=2, help="Training steps of each rule.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a minibatch.")] = 64,
    device: DeviceOption = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write the measurements to this file.")] = None,
) -> None:
    """Measure a training step: time and peak memory relative to backpropagation."""
    if json is not None:
        if json.is_dir():
            raise typer.BadParameter(f"{json} is a folder, name a file", param_hint="--json")
        records.check_writable(json.parent)
    on_device = _device(device)
    with _kept("nothing was measured to the end"), _progress() as progress:
        task = progress.add_task("interleaved steps", total=rounds)
        measured = benchmark.run(
            model,
            rounds=rounds,
            batch_size=batch_size,
            device=on_device,
            command=_command(),
            on_round=lambda: progress.advance(task),
        )
    title = f"{model}, batch {batch_size}, {measured.device}: {rounds} interleaved training steps"
    shown = Table(title=title, title_justify="left")
    shown.add_column("rule", no_wrap=True)
    for column in ("median ms", "quartiles", "time", "peak KiB", "memory"):
        shown.add_column(column, justify="right", no_wrap=True)
    for cost in measured.costs:
        low, high = cost.quartiles
        shown.add_row(
            cost.rule,
            f"{cost.milliseconds:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{cost.time_ratio:.2f}×",
            f"{cost.peak_bytes / 1024:.0f}",
            f"{cost.memory_ratio:.2f}×",
        )
    console.print(shown)
    console.print(
        "time: median over the rounds of the ratio to backpropagation's step in the same round", soft_wrap=True
    )
    console.print(
        "memory: most that is allocated at one time in a step, its ratio to backpropagation's", soft_wrap=True
    )
    for ratio in measured.ratios:
        console.print(f"{ratio.what}: {ratio.ratio:.2f} × {ratio.least}", soft_wrap=True, highlight=False)
    if json is not None:
        records.write_atomically(json, measured.model_dump_json(indent=2) + "\n")
        _print_paths([json])


def _version(requested: bool) -> None:
    if requested:
        console.print(f"relaxprop {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _run_config(
    solver_options: dict[str, Any], *, solver: str | None, unfreeze: Sequence[Quantity], **values: Any
) -> RunConfig:
    given_flags = {
        "--solver": solver,
        "--unfreeze": unfreeze,
        "--feedback": values["feedback"],
        "--drop-derivatives": values["dropped"],
        "--alignment-every": values["alignment_every"],
        "--vertices": values["vertices"] != "activations",
        "--initial": values["initial"] != "feedforward",
    }
    for flag, given in given_flags.items():
        if values["rule"] == "backprop" and given:
            raise typer.BadParameter("it has no effect with --rule backprop, leave it out", param_hint=flag)
    with _usage_errors("--unfreeze"):
        frozen = Frozen(**{quantity.name: False for quantity in unfreeze})
    values |= {"solver": solver or records.default_solver(frozen), "frozen": frozen}
    kind = SOLVERS[values["solver"]]
    known = kind.__dataclass_fields__
    for name in solver_options:
        flag = f"--{name.replace('_', '-')}"
        if values["rule"] == "backprop":
            raise typer.BadParameter("it has no effect with --rule backprop, leave it out", param_hint=flag)
        if name not in known:
            raise typer.BadParameter(
                f"it has no effect with --solver {values['solver']}, leave it out", param_hint=flag
            )
    try:
        kind(**solver_options)
    except (TypeError, ValueError) as error:  # its first word is the option's name
        raise typer.BadParameter(str(error), param_hint=f"--{str(error).split()[0].replace('_', '-')}") from error
    with _usage_errors("--solver or --vertices"):
        return RunConfig(solver_options=solver_options, **values)


def _by_part(options: Sequence[str] | None, flag: str) -> dict[str, str]:
    """``PART=VALUE``, or ``VALUE`` for the whole network."""
    found: dict[str, str] = {}
    for option in options or ():
        part, _, value = option.rpartition("=")
        if (part or "all") in found:
            raise typer.BadParameter(f"{option!r} names a part for the second time", param_hint=flag)
        found[part or "all"] = value
    return found


@contextmanager
def _usage_errors(option: str) -> Iterator[None]:
    """Turns what an object of the library refuses into a usage error."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise typer.BadParameter(message, param_hint=option) from error
        name = str(first["loc"][0])
        flag = {"dropped": "--drop-derivatives"}.get(name, f"--{name.replace('_', '-')}")
        raise typer.BadParameter(f"{message}, got {first['input']!r}", param_hint=flag) from error
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _load(name: str, data_dir: Path | None, *written: Path) -> Dataset:
    """A data set, whose loading may take a while: so the folders that are written to afterwards are looked at first."""
    with _usage_errors("--dataset"):
        data.check_name(name, data_dir)
    for folder in written:
        records.check_writable(folder)
    return data.load(name, data_dir)


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"PyTorch cannot use {name!r} here: {reason}", param_hint="--device") from error


def _command() -> str:
    return shlex.join(["relaxprop", *sys.argv[1:]])


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=errors)


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="right" if i and rows[0][i][:1].isdigit() else "left")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def _print_paths(paths: list[Path]) -> None:
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True)


@contextmanager
def _kept(what: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"stopped: {what}", soft_wrap=True)
        raise SystemExit(130) from None


def main() -> None:
    """Runs the command line; errors of data and results end it with status 1 and one line."""
    try:
        app()
    except (DataError, ModelError, OutputError, NonFiniteStateError) as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
