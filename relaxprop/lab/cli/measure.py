"""Measure convergence, gradients, and what depth and defaults cost.

May import: transients, lab.architectures, lab.cli.options, lab.cli.settings,
lab.experiments.convergence, lab.experiments.defaults, lab.experiments.depth, lab.experiments.gradients, lab.files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from relaxprop.lab.architectures import ARCHITECTURES
from relaxprop.lab.cli.options import (
    console,
    print_paths,
    print_table,
    progress_bar,
    says_what_is_kept,
    this_command,
    usage_errors,
)
from relaxprop.lab.cli.settings import (
    ColourOption,
    DataDirOption,
    DatasetOption,
    ImageColumnOption,
    LabelColumnOption,
    PapersModelOption,
    load_dataset,
)
from relaxprop.lab.experiments import defaults as default_training
from relaxprop.lab.experiments.convergence import STEP_SIZES, convergence_by_step_size, write_convergence
from relaxprop.lab.experiments.depth import DEPTHS, cost_by_depth, write_depths
from relaxprop.lab.experiments.gradients import (
    STEP_SIZE,
    asynchronous,
    compare,
    notes,
    planned,
    tables,
    write_asynchronous,
    write_comparisons,
)
from relaxprop.lab.files import check_writable
from relaxprop.transients import Order, check_step_size


def convergence(
    dataset: DatasetOption = "digits",
    model: PapersModelOption = "mlp",
    step_size: Annotated[
        list[float] | None, typer.Option(help="η in (0, 2); repeat it for several. (default: 0.05 0.1 0.2 0.5)")
    ] = None,
    num_steps: Annotated[int, typer.Option(min=1, help="Relaxation steps to follow.")] = 100,
    order: Annotated[Order, typer.Option(help="Order of updates.")] = "simultaneous",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Fixes the initial weights.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in the minibatch.")] = 64,
    data_dir: DataDirOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    colour: ColourOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the figure. (default: figures/convergence-DATASET)")
    ] = None,
) -> None:
    """Distance to backpropagation's gradient per layer and relaxation step, measured and predicted."""
    with usage_errors("--step-size"):
        for eta in step_size or ():
            check_step_size(eta)
    folder = out or Path("figures") / f"convergence-{dataset}"
    loaded = load_dataset(
        dataset, data_dir, folder, image_column=image_column, label_column=label_column, colour=colour
    )
    torch.manual_seed(seed)
    curves = convergence_by_step_size(
        loaded,
        model=model,
        step_sizes=step_size or STEP_SIZES,
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
    print_paths(write_convergence(curves, loaded.title, folder, this_command()))


def gradients(
    architecture: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(ARCHITECTURES)}; repeat it for several. (default: all)"),
    ] = None,
    step_size: Annotated[float, typer.Option(help="η in (0, 2).")] = STEP_SIZE,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved measurements of time.")] = 5,
    small: Annotated[bool, typer.Option("--small", help="Small models, which take seconds.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the table and the figure.")] = Path("figures/gradients"),
) -> None:
    """Compare the gradients of many architectures with backpropagation's, every operation a vertex that relaxes."""
    with usage_errors("--step-size"):
        planned(depth=1, step_size=step_size)
    names = architecture or list(ARCHITECTURES)
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        raise typer.BadParameter(
            f"{unknown[0]!r} is not one of {', '.join(ARCHITECTURES)}", param_hint="--architecture"
        )
    check_writable(out)
    comparisons, curves = [], []
    with says_what_is_kept("nothing was measured to the end"), progress_bar() as progress:
        task = progress.add_task("", total=2 * len(names))
        for name in names:
            progress.update(task, description=f"{name}: gradients")
            comparisons.append(compare(name, step_size=step_size, rounds=rounds, small=small))
            progress.advance(task)
            progress.update(task, description=f"{name}: asynchronous")
            curves.append(asynchronous(name, step_size=step_size))
            progress.advance(task)
    for title, columns, rows in tables(comparisons):
        print_table(title, columns, [(name, *row[1:]) for name, row in zip(names, rows, strict=True)])
    for note in notes(step_size):
        console.print(note, soft_wrap=True, highlight=False)
    paths = write_comparisons(comparisons, step_size, out, this_command())
    print_paths(paths + write_asynchronous(curves, step_size, out, this_command()))


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
    check_writable(out)
    depths = sorted(set(layers or DEPTHS))
    with says_what_is_kept("nothing was measured to the end"), progress_bar() as progress:
        task = progress.add_task("depths", total=len(depths))
        costs = cost_by_depth(
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
    print_paths(write_depths(costs, about, out, this_command()))


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
    check_writable(out)
    chosen = list(default_training.settings(depth or default_training.DEPTHS))
    with says_what_is_kept("nothing was measured to the end"), progress_bar() as progress:
        task = progress.add_task("runs", total=len(chosen) * seeds * len(default_training.RULES))
        found = default_training.measure(
            chosen, seeds=seeds, minibatches=minibatches, on_run=lambda: progress.advance(task)
        )
    print_table("training loss after training", *default_training.table(found))
    print_paths(default_training.write(found, minibatches, out, this_command()))
