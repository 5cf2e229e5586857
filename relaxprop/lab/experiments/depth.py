"""What each solver costs on deeper and deeper networks.

May import: public names, solvers, lab.architectures, lab.bench.measuring, lab.environment, lab.experiments.gradients,
lab.report.plots, lab.report.tables, lab.results, lab.files.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from relaxprop import (
    ActivationRelaxation,
    ClosedForm,
    Equilibrium,
    Euler,
    steps_to_converge,
)
from relaxprop.lab.architectures import Problem, chain
from relaxprop.lab.bench.measuring import BASELINE, interleaved, ratio
from relaxprop.lab.environment import environment
from relaxprop.lab.experiments.gradients import STEP_SIZE, gradient_step
from relaxprop.lab.files import write_atomically
from relaxprop.lab.report import plots
from relaxprop.lab.report.tables import markdown_table
from relaxprop.lab.results import DepthCost
from relaxprop.solvers import Solver

DEPTHS = (4, 10, 20, 50, 100, 200)
PAPERS = "100 steps of 0.1"
ENOUGH = 1e-3  # weight of the initial state that may be left where the number of steps follows the depth
PLANNED = f"enough steps of {STEP_SIZE:g}"
TO_ROUNDING = f"steps of {STEP_SIZE:g} to rounding"


def cost_by_depth(
    depths: Sequence[int] = DEPTHS,
    *,
    width: int = 128,
    batch_size: int = 64,
    rounds: int = 5,
    on_depth: Callable[[], None] = lambda: None,
) -> list[DepthCost]:
    """Measures the solvers on chains of linear layers with tanh: the paper's steps, and as many as the depth needs."""
    found: list[DepthCost] = []
    for depth in depths:
        enough = steps_to_converge(depth, STEP_SIZE, ENOUGH)
        solvers: dict[str, Solver] = {
            "Equilibrium": Equilibrium(),
            f"ClosedForm, {PAPERS}": ClosedForm(0.1, 100),
            f"Euler, {PAPERS}": Euler(0.1, 100),
            f"ClosedForm, {PLANNED}": ClosedForm(STEP_SIZE, enough),
            f"Euler, {PLANNED}": Euler(STEP_SIZE, enough),
            f"ClosedForm, {TO_ROUNDING}": ClosedForm(
                STEP_SIZE, steps_to_converge(depth, STEP_SIZE, plots.ROUNDING / 2)
            ),
        }
        found += _costs_at_depth(depth, solvers, width, batch_size, rounds)
        on_depth()
    return found


def _costs_at_depth(
    depth: int, solvers: Mapping[str, Solver], width: int, batch_size: int, rounds: int
) -> list[DepthCost]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        problem = Problem(chain(depth, width), (torch.rand(batch_size, width),), lambda y: (y**2).sum())
    wrapped = {name: ActivationRelaxation(problem.model, solver=solver) for name, solver in solvers.items()}
    steps = {BASELINE: gradient_step(problem.model, problem)}
    steps |= {name: gradient_step(model, problem) for name, model in wrapped.items()}
    for step in steps.values():
        step()
    times = interleaved(steps, rounds=rounds)
    costs = []
    for name, model in wrapped.items():
        record = model.last_relaxation
        assert record is not None
        assert record.remaining is not None
        costs.append(
            DepthCost(
                depth=depth,
                solver=name,
                num_steps=record.num_steps,
                milliseconds=1e3 * statistics.median(times[name]),
                ratio=ratio(times, name, BASELINE),
                transports=record.transports,
                remaining=record.remaining,
                converged=bool(record.converged),
            )
        )
    return costs


def write_depths(costs: Sequence[DepthCost], about: str, folder: Path, command: str) -> list[Path]:
    """Writes the figure of cost against depth, and its numbers."""
    content = {"command": command, "environment": environment(), "costs": [c.model_dump() for c in costs]}
    write_atomically(folder / "depth.json", json.dumps(content, indent=2) + "\n")
    columns = ("depth", "solver", "steps", "products with A", "ms", "time", "initial state left")
    rows = [
        (
            str(c.depth),
            c.solver,
            str(c.num_steps or ""),
            str(c.transports),
            f"{c.milliseconds:.1f}",
            f"{c.ratio:.1f}×",
            "none: as Equilibrium" if c.converged else f"{100 * c.remaining:.3g} %",
        )
        for c in costs
    ]
    write_atomically(folder / "table.md", f"{markdown_table(columns, rows)}\n{about}\n")
    return [folder / "table.md", folder / "depth.json", plots.cost_curves(costs, about, folder / "depth.png")]
