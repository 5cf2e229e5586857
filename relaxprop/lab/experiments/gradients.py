"""Appendix A on real models: the gradients of every architecture, without a global clock too.

May import: public names, recording, solvers, transients, lab.architectures, lab.bench.measuring, lab.environment,
lab.report.plots, lab.report.tables, lab.results, lab.files.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from relaxprop import (
    ActivationRelaxation,
    ClosedForm,
    Equilibrium,
    Euler,
    alignment,
    convergence,
    steps_to_converge,
)
from relaxprop.lab.architectures import ARCHITECTURES, Problem, build
from relaxprop.lab.bench.measuring import BASELINE, Step, interleaved, ratio
from relaxprop.lab.environment import environment
from relaxprop.lab.files import write_atomically
from relaxprop.lab.report import plots
from relaxprop.lab.report.tables import NamedTable, markdown_table
from relaxprop.lab.results import Asynchronous, Comparison
from relaxprop.recording import record
from relaxprop.solvers import Solver
from relaxprop.transients import UPDATE_PROBABILITY

STEP_SIZE = 0.5
TOLERANCE = 1e-14  # weight of the initial state; gradients can be many orders of magnitude smaller than activities
BOUND = 1e-10  # error in float64 at convergence


def compare(name: str, *, step_size: float = STEP_SIZE, rounds: int = 5, small: bool = False) -> Comparison:
    """Gradients and costs of one architecture.

    Raises:
        ValueError: an unknown architecture, or a step size outside (0, 2).
    """
    exact = build(name, small=small).to(torch.float64)
    depth, vertices = _depth(exact)
    steps = steps_to_converge(depth, step_size, TOLERANCE)
    solvers = planned(depth, step_size)
    return Comparison(
        architecture=name,
        title=ARCHITECTURES[name].title,
        parameters=sum(p.numel() for p in exact.model.parameters()),
        vertices=vertices,
        depth=depth,
        steps=steps,
        errors={label: error(exact, solver) for label, solver in solvers.items()},
        **_costs(build(name, small=small), solvers, rounds),
    )


def planned(depth: int, step_size: float = STEP_SIZE) -> dict[str, Solver]:
    """Every way to the gradient, each with as many steps as the depth needs."""
    steps = steps_to_converge(depth, step_size, TOLERANCE)
    asynchronous = steps_to_converge(depth, step_size, TOLERANCE, order="asynchronous")
    return {
        "Equilibrium": Equilibrium(),
        "ClosedForm": ClosedForm(step_size, steps),
        "Euler": Euler(step_size, steps),
        "asynchronous": Euler(step_size, 2 * asynchronous, order="asynchronous"),  # its weight is a mean over chance
    }


def error(problem: Problem, solver: Solver) -> float:
    """Largest distance of a parameter's gradient to backpropagation's, relative to its norm."""
    # Equilibrium is measured on the cut graph, vertex by vertex; as its user has it, it is PyTorch's own sweep.
    cut = isinstance(solver, Equilibrium)
    model = ActivationRelaxation(problem.model, solver=solver, vertices="operations", measure_residual=cut)
    torch.manual_seed(0)  # of an asynchronous order
    return max(a.distance for a in alignment(model, problem.loss, *problem.inputs).values())


def _depth(problem: Problem) -> tuple[int, int]:
    graph = record(problem.model, "operations", problem.inputs).graph
    return graph.depth, len(graph.vertices)


def gradient_step(model: nn.Module, problem: Problem) -> Step:
    """Forward pass, backward pass or relaxation phase, gradients."""

    def step() -> None:
        problem.loss(model(*problem.inputs)).backward()  # type: ignore[no-untyped-call]
        model.zero_grad()

    return step


def _costs(problem: Problem, solvers: Mapping[str, Solver], rounds: int) -> dict[str, Any]:
    def forward(model: nn.Module) -> Step:
        def step() -> None:
            model(*problem.inputs)

        return step

    def wrapped(solver: Solver, vertices: Any = "operations") -> ActivationRelaxation:
        return ActivationRelaxation(problem.model, solver=solver, vertices=vertices)

    timed = {name: solver for name, solver in solvers.items() if name != "asynchronous"}
    steps: dict[str, Step] = {BASELINE: gradient_step(problem.model, problem)}
    steps |= {
        name: gradient_step(wrapped(solver), problem) for name, solver in timed.items() if not isinstance(solver, Euler)
    }
    steps["forward"] = forward(problem.model)
    recorded = [v for v in ("activations", "operations") if _has_vertices(problem.model, v)]
    steps |= {vertices: forward(wrapped(ClosedForm(), vertices)) for vertices in recorded}
    slow = {
        name: gradient_step(wrapped(solver), problem) for name, solver in timed.items() if isinstance(solver, Euler)
    }
    for step in steps.values():
        step()
    times = interleaved(steps, rounds=rounds)
    costs = {name: ratio(times, name, BASELINE) for name in timed if name in steps}
    median = statistics.median(times[BASELINE])
    costs |= {name: seconds[0] / median for name, seconds in interleaved(slow, rounds=1).items()}
    return {"costs": costs, "recording": {vertices: ratio(times, vertices, "forward") for vertices in recorded}}


def _has_vertices(model: nn.Module, vertices: Any) -> bool:
    try:
        ActivationRelaxation(model, vertices=vertices)
    except ValueError:
        return False
    return True


def tables(comparisons: Sequence[Comparison]) -> list[NamedTable]:
    """Errors and times, by architecture."""
    solvers = tuple(comparisons[0].errors)
    timed = tuple(comparisons[0].costs)
    recorded = ("activations", "operations")
    return [
        NamedTable(
            "error",
            ("architecture", "parameters", "vertices", "depth", "steps", *solvers),
            [
                (
                    c.title,
                    f"{c.parameters:,}",
                    *map(str, (c.vertices, c.depth, c.steps)),
                    *(f"{c.errors[solver]:.0e}" for solver in solvers),
                )
                for c in comparisons
            ],
        ),
        NamedTable(
            "time",
            ("architecture", *timed, *(f"recording {vertices}" for vertices in recorded)),
            [
                (
                    c.title,
                    *(f"{c.costs[solver]:.3g}×" for solver in timed),
                    *(f"{c.recording[v]:.2f}×" if v in c.recording else "" for v in recorded),
                )
                for c in comparisons
            ],
        ),
    ]


def notes(step_size: float) -> tuple[str, ...]:
    """What the table's columns mean."""
    return (
        "vertices, depth: every operation of the forward pass is a vertex (vertices='operations'); depth is the number "
        "of vertices on the longest path",
        f"steps: of size {step_size:g}, planned with steps_to_converge(depth, {step_size:g}, {TOLERANCE:g}); twice as "
        "many as its own plan in the asynchronous order, where each vertex updates in a random half of the steps",
        "error: largest distance of a parameter's gradient to backpropagation's relative to its norm, in float64",
        "time: of forward pass, relaxation phase and gradients relative to backpropagation's, in float32, median "
        "of interleaved rounds (Euler: one round)",
        "recording: time of a forward pass that is recorded, the results of activation modules or of all operations as "
        "vertices, relative to a plain one's",
    )


def asynchronous(name: str, *, step_size: float = STEP_SIZE, seeds: int = 3) -> Asynchronous:
    """Follows the relaxation of a small architecture, in each step of which a random half of the vertices updates."""
    problem = build(name, small=True).to(torch.float64)
    depth, _ = _depth(problem)
    steps = int(1.5 * steps_to_converge(depth, step_size, TOLERANCE, order="asynchronous"))
    model = ActivationRelaxation(problem.model, vertices="operations")
    errors = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        solver = Euler(step_size, steps, order="asynchronous")
        curves = convergence(model, problem.loss, *problem.inputs, solver=solver).measured
        errors.append(np.max(list(curves.values()), axis=0).tolist())
    updates = [UPDATE_PROBABILITY * n for n in range(steps + 1)]
    return Asynchronous(architecture=name, depth=depth, updates=updates, errors=errors)


def write_comparisons(comparisons: Sequence[Comparison], step_size: float, folder: Path, command: str) -> list[Path]:
    """Writes the table of gradients and what it was made from."""
    text = "\n".join(markdown_table(table.columns, table.rows) for table in tables(comparisons))
    text += "\n" + "".join(f"* {note}\n" for note in notes(step_size))
    write_atomically(folder / "table.md", text)
    content = {
        "command": command,
        "environment": environment(),
        "bound": BOUND,
        "comparisons": [c.model_dump() for c in comparisons],
    }
    write_atomically(folder / "gradients.json", json.dumps(content, indent=2) + "\n")
    return [folder / "table.md", folder / "gradients.json"]


def write_asynchronous(curves: Sequence[Asynchronous], step_size: float, folder: Path, command: str) -> list[Path]:
    """Writes the figure of error against expected updates per vertex, and its numbers."""
    content = {"command": command, "environment": environment(), "curves": [c.model_dump() for c in curves]}
    write_atomically(folder / "asynchronous.json", json.dumps(content) + "\n")
    title = f"asynchronous relaxation, steps of {step_size:g}, every operation a vertex, small models in float64"
    figure = plots.asynchronous_curves(curves, title, folder / "asynchronous.png")
    return [folder / "asynchronous.json", figure]
