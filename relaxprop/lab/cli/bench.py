"""Measure what training steps cost.

May import: vertices, lab.bench.against, lab.bench.document, lab.bench.problems, lab.bench.records, lab.bench.scaling,
lab.bench.startup, lab.bench.steps, lab.bench.suite, lab.cli.options, lab.cli.settings, lab.environment, lab.files.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from relaxprop.lab.bench import against as others
from relaxprop.lab.bench import document, problems, scaling, startup, suite
from relaxprop.lab.bench.records import Suite
from relaxprop.lab.bench.steps import OWN, RULES, SOLVERS, USUAL, check_names
from relaxprop.lab.cli.options import (
    console,
    print_paths,
    print_table,
    progress_bar,
    says_what_is_kept,
    this_command,
    usage_errors,
)
from relaxprop.lab.cli.settings import find_device
from relaxprop.lab.environment import environment
from relaxprop.lab.files import check_writable
from relaxprop.vertices import Granularity


class What(StrEnum):
    """A part of the benchmark."""

    STEPS = "steps"
    SCALING = "scaling"
    START_UP = "start-up"


ROUNDS = {What.STEPS: 200, What.SCALING: 10, What.START_UP: 15}


def bench(
    what: Annotated[
        list[What] | None,
        typer.Option(
            help="steps: training steps beside backpropagation's; scaling: exponents in depth, width and batch; "
            "start-up: of the package and the command line. Repeat it for several. (default: steps)"
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"One of {', '.join(problems.NAMES)}; repeat it for several. (default: mlp)"),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Samples in a minibatch; repeat it for several. (default: 64)"),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar=f"[{'|'.join(RULES)}]",
            help="Learning rule beside backpropagation; repeat it for several. (default: all on the paper's networks, "
            "ar on the others)",
        ),
    ] = None,
    solver: Annotated[
        list[str] | None,
        typer.Option(
            metavar=f"[{'|'.join(SOLVERS)}]",
            help=f"Of the rule ar; repeat it for several. (default: {', '.join(USUAL)})",
        ),
    ] = None,
    vertices: Annotated[
        Granularity | None, typer.Option(help="What relaxes in training steps. (default: activations)")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=32, help=f"Height and width of {problems.RESNET}'s images. (default: {problems.IMAGE_SIZES[0]})"
        ),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="PyTorch device, as cpu or cuda; repeat it for several. (default: cpu)"),
    ] = None,
    cuda_graphs: Annotated[
        bool,
        typer.Option(
            "--cuda-graphs",
            help="On a CUDA device: launch each training step as one CUDA graph, which looks at no value "
            "(check_finite=False).",
        ),
    ] = False,
    compile_steps: Annotated[
        bool,
        typer.Option(
            "--compile-steps",
            help="On the paper's networks: measure a step whose derivative is not frozen by torch.compile too.",
        ),
    ] = False,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER",
            help=f"Others' code that trains the same network: {others.TORCH2PC} where it can be imported, or the "
            "folder of its repository or of the paper's authors'; repeat it for several.",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="In each of which everything is done once. (default: "
            f"{', '.join(f'{name} {number}' for name, number in ROUNDS.items())})",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the measurements, their tables and figures.")] = Path(
        "figures/bench"
    ),
) -> None:
    """Measure training steps beside backpropagation: time, memory, operations, and how they grow with the network."""
    chosen = list(dict.fromkeys(what or [What.STEPS]))
    of_steps = {
        "--model": model, "--batch-size": batch_size, "--rule": rule, "--vertices": vertices, "--against": against,
        "--cuda-graphs": cuda_graphs or None, "--compile-steps": compile_steps or None,
    }  # fmt: skip
    if What.STEPS not in chosen:
        _refuse_given(of_steps, "without --what steps")
    if chosen == [What.START_UP]:
        _refuse_given({"--solver": solver, "--device": device}, "with --what start-up alone")
    with usage_errors("--rule"):
        check_names(rule or (), ())
    with usage_errors("--solver"):
        check_names((), solver or ())
    if solver and rule and OWN not in rule:
        raise typer.BadParameter(f"it has no effect with --rule {rule[0]}, only with --rule ar", param_hint="--solver")
    models = list(dict.fromkeys(model or ["mlp"]))
    with usage_errors("--model"):
        for name in models:
            problems.check_name(name)
    if image_size is not None and problems.RESNET not in models:
        raise typer.BadParameter(f"it has no effect without --model {problems.RESNET}", param_hint="--image-size")
    devices = [find_device(name) for name in dict.fromkeys(device or ["cpu"])]
    if cuda_graphs and (elsewhere := [where for where in devices if where.type != "cuda"]):
        raise typer.BadParameter(f"there are none on {elsewhere[0]}: name --device cuda", param_hint="--cuda-graphs")
    with usage_errors("--against"):
        rivals = [others.find(name) for name in against or ()]
    check_writable(out)
    solvers = list(dict.fromkeys(solver or USUAL))
    measured = Suite(command=this_command(), environment=environment())
    planned = [
        suite.Plan(
            name,
            rules=rule,
            solvers=solvers,
            vertices=vertices or "activations",
            batch_size=size,
            device=where,
            image_size=image_size or problems.IMAGE_SIZES[0],
            against=rivals,
            cuda_graphs=cuda_graphs,
            compile_steps=compile_steps,
        )
        for name, size, where in product(models, dict.fromkeys(batch_size or [64]), devices)
        if What.STEPS in chosen
    ]
    if compile_steps and not any(plan.has_parts for plan in planned):
        raise typer.BadParameter(
            f"it has no effect without --model {' or '.join(problems.PAPERS)}, the solvers paper and euler, and "
            "activations as vertices, without --cuda-graphs",
            param_hint="--compile-steps",
        )
    for plan in planned:
        with usage_errors(f"--model {plan.model}"):
            plan.prepare()  # so that what cannot be trained is refused before anything is measured

    def number(part: What) -> int:
        return rounds or ROUNDS[part]

    total = number(What.STEPS) * len(planned)
    if What.SCALING in chosen:
        total += number(What.SCALING) * sum(map(len, scaling.CHANGED.values())) * len(devices)
    total += number(What.START_UP) * (What.START_UP in chosen)
    paths: list[Path] = []
    kept = f"only what was measured to the end is written to {out}"
    with says_what_is_kept(kept), progress_bar() as progress:
        task = progress.add_task("interleaved rounds", total=total)

        def on_round() -> None:
            progress.advance(task)

        for plan in planned:
            progress.update(task, description=f"{plan.model}, batch {plan.batch_size}, {plan.device}")
            measured.benchmarks.append(suite.run(plan, rounds=number(What.STEPS), on_round=on_round))
            paths = document.write(measured, out)
        for where in devices if What.SCALING in chosen else ():
            progress.update(task, description=f"scaling, {where}")
            measured.scaling.append(
                scaling.measure(solvers=solvers, device=where, rounds=number(What.SCALING), on_round=on_round)
            )
            paths = document.write(measured, out)
        if What.START_UP in chosen:
            progress.update(task, description="start-up")
            measured.starts = startup.starts(startup.times(number(What.START_UP), on_round))
            paths = document.write(measured, out)
    print_suite(measured)
    print_paths(paths)


def _refuse_given(options: Mapping[str, object], when: str) -> None:
    for name, given in options.items():
        if given is not None:
            raise typer.BadParameter(f"it has no effect {when}", param_hint=name)


def print_suite(measured: Suite) -> None:
    """The tables, and what their columns are."""
    for benchmark in measured.benchmarks:
        for table in document.cost_tables(benchmark):
            print_table(*table)
    told = document.notes(measured.benchmarks) if measured.benchmarks else []
    for found in measured.scaling:
        console.print(document.scaling_title(found), soft_wrap=True, highlight=False)
        for table, reasons in document.scaling_tables(found):
            print_table(*table)
            told += reasons
    if measured.starts:
        print_table(*document.start_table(measured.starts))
    for note in told:
        console.print(note, soft_wrap=True, highlight=False)
