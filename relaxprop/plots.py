"""Plots of what the library measures. Each draws into ``ax``, or into a figure of its own, and returns the Axes.

Not imported by ``import relaxprop``: ``from relaxprop import plots``. Matplotlib is needed (``relaxprop[plots]``), and
imported where something is drawn.

May import: inspect.alignment, inspect.convergence, solvers, transients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from relaxprop.inspect.alignment import Alignment
from relaxprop.inspect.convergence import Convergence
from relaxprop.solvers import ClosedForm, Euler, Relaxation, Solver
from relaxprop.transients import check_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["alignment_over_training", "convergence_curves", "hop_distribution", "states_over_steps"]

ROUNDING = float(np.finfo(np.float64).eps)
MAX_HOPS = 1 << 10  # that are looked at, if the graph is not deeper
Weights = NDArray[np.float64]


def convergence_curves(result: Convergence, *, ax: Axes | None = None) -> Axes:
    """The distance of every weight's gradient to backpropagation's over the steps of a relaxation, on a log scale.

    Lines are measured, circles are what the hop distribution predicts without taking a step.

    Args:
        result: what `convergence` returns.
        ax: the Axes to draw into; by default those of a new figure.

    Returns:
        The Axes.

    Raises:
        ModuleNotFoundError: if Matplotlib is not installed.
        TypeError: if ``result`` is no `Convergence`.
    """
    if not isinstance(result, Convergence):
        raise TypeError(f"result must be what relaxprop.convergence returns, got {type(result).__name__}")
    ax = _axes(ax)
    for name, measured in result.measured.items():
        if _is_bias(name):
            continue
        steps = np.arange(len(measured))
        (line,) = ax.plot(steps, measured, label=name if measured.any() else f"{name} (exact from the start)")
        some = slice(None, None, max(1, len(steps) // 20))
        ax.plot(steps[some], result.predicted[name][some], "o", color=line.get_color(), markersize=4, fillstyle="none")
    ax.plot([], [], "o", color="grey", markersize=4, fillstyle="none", label="predicted")
    ax.axhline(ROUNDING, color="grey", linewidth=0.8, linestyle=":", label="rounding")
    ax.set(
        yscale="log",
        ylim=(ROUNDING / 30, None),
        xlabel="relaxation steps",
        ylabel="distance to backpropagation's gradient\n(relative to its norm)",
        title=f"{result.solver.order} relaxation, step size {result.solver.step_size:g}, depth {result.depth}",
    )
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    return ax


def alignment_over_training(
    measurements: Sequence[Mapping[str, Alignment]], at: Sequence[float] | None = None, *, ax: Axes | None = None
) -> Axes:
    """The cosine of every weight's gradient to backpropagation's over training, or of backwards weights to weights.

    Args:
        measurements: what `alignment` or `feedback_alignment` returned, one after the other.
        at: where each was made, in minibatches or epochs; by default 0, 1, 2, …
        ax: the Axes to draw into; by default those of a new figure.

    Returns:
        The Axes.

    Raises:
        ModuleNotFoundError: if Matplotlib is not installed.
        TypeError: if ``measurements`` is one measurement and no list of them.
        ValueError: if ``measurements`` is empty, or ``at`` has another number of places.
    """
    if isinstance(measurements, Mapping):
        raise TypeError("measurements must be a list of what alignment or feedback_alignment returned, got one of them")
    places = list(range(len(measurements))) if at is None else list(at)
    if not measurements or len(places) != len(measurements):
        raise ValueError(
            f"measurements must be one for each place in at, and at least one, got {len(measurements)} measurements "
            f"and {len(places)} places"
        )
    ax = _axes(ax)
    # A layer may be frozen, or thawed, on the way.
    names = dict.fromkeys(name for found in measurements for name in found if not _is_bias(name))
    for name in names:
        cosines = [found[name].cosine if name in found else np.nan for found in measurements]
        ax.plot(places, cosines, marker=".", label=name)
    ax.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    ax.set(ylim=(-1.05, 1.05), xlabel="minibatches" if at is None else "training", ylabel="cosine")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    return ax


def _is_bias(parameter: str) -> bool:
    """Whether a parameter of this name is a bias, as of a recurrent layer (``bias_ih_l0``) or of attention
    (``in_proj_bias``) too.
    """
    name = parameter.rpartition(".")[2]
    return name.startswith("bias") or name.endswith("bias")


def hop_distribution(solver: Solver, depth: int, *, ax: Axes | None = None) -> Axes:
    """What a relaxation phase leaves of its initial state, by hops from the output: the weights c_k of ``A^k x̄``.

    c_k is the probability that a random walk from child to parent has made exactly k hops. A walk of as many hops as
    the graph is deep has left the graph at the input: what is left of the initial state are the filled bars, k < depth.

    Args:
        solver: `Euler`, `ClosedForm` or `Continuous`.
        depth: D, the number of vertices on the longest path, ≥ 1.
        ax: the Axes to draw into; by default those of a new figure.

    Returns:
        The Axes.

    Raises:
        ModuleNotFoundError: if Matplotlib is not installed.
        TypeError: if ``solver`` is no solver, or ``depth`` no integer.
        ValueError: if the solver has no initial state, as `Equilibrium`, or ``depth`` is below 1.
    """
    check_count("depth", depth)
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a solver, for instance ClosedForm(0.1, 100), got {solver!r}")
    weights = _until_vanished(_with_steps(solver, depth), depth)
    if not weights.any():
        raise ValueError(f"{solver} leaves nothing of any initial state, so that there is no distribution to draw")
    ax = _axes(ax)
    k, inside = np.arange(len(weights)), np.arange(len(weights)) < depth
    left = np.abs(weights[inside]).sum()
    ax.bar(k[inside], weights[inside], color="C0", label=f"k < {depth}: what is left, {left:.2g} in all")
    ax.bar(k[~inside], weights[~inside], fill=False, edgecolor="C0", label=f"k ≥ {depth}: has left the graph")
    ax.set(xlabel="hops k from the output", ylabel="weight $c_k$ of the initial state", title=_short(solver))
    ax.margins(y=0.3)  # room for the legend above the bars
    ax.legend(fontsize="small", loc="upper right")
    return ax


def _short(solver: Solver) -> str:
    """``ClosedForm(0.1, 100)``: the name and what is set, as a title has room for."""
    values = [getattr(solver, field.name) for field in fields(solver)]
    return f"{type(solver).__name__}({', '.join(str(v) for v in values if v not in (None, 'simultaneous'))})"


def _with_steps(solver: Solver, depth: int) -> Solver:
    """The same with the number of steps that a graph of this depth gets, whatever graph it is asked about."""
    if isinstance(solver, Euler | ClosedForm):
        return Euler(solver.step_size, solver.steps(depth), order=solver.order)
    return solver


def _until_vanished(solver: Solver, depth: int) -> Weights:
    """c_0, c_1, … to the last that can be seen beside the largest, and to the depth at least."""
    weights = np.asarray(solver.hops(max(MAX_HOPS, depth)).initial, dtype=np.float64)
    seen = np.flatnonzero(np.abs(weights) > 1e-3 * np.abs(weights).max())
    return weights[: max(depth, seen.max(initial=0) + 1)]


def states_over_steps(
    records: Sequence[Relaxation],
    vertex: str,
    *,
    sample: int = 0,
    units: int = 8,
    at: Sequence[float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The states of some units of a vertex over the steps of a relaxation, a line for each unit.

    The records come from passes over the same input that stop after more and more steps, each of
    ``ActivationRelaxation(…, keep_states=True).last_relaxation``.

    Args:
        records: one for each number of steps.
        vertex: its name, a key of ``record.states``.
        sample: which sample of the minibatch, ≥ 0.
        units: how many units to draw at most, ≥ 1: the first ones of the vertex.
        at: the number of steps, or the time, of each record; by default its ``num_steps``.
        ax: the Axes to draw into; by default those of a new figure.

    Returns:
        The Axes.

    Raises:
        ModuleNotFoundError: if Matplotlib is not installed.
        TypeError: if ``records`` is one record and no list of them, a record is None, or ``sample`` no integer.
        ValueError: if there is no record, a record has no states or no such vertex or sample, its states are complex,
            or no number of steps is known.
    """
    check_count("units", units)
    if isinstance(records, Relaxation):
        raise TypeError("records must be a list of records, one for each number of steps, got one of them")
    if isinstance(sample, bool) or not isinstance(sample, SupportsIndex):
        raise TypeError(f"sample must be an integer, got {sample!r}")
    if None in records:
        raise TypeError("a record is None, as model.last_relaxation is before the first backward pass")
    places = [record.num_steps for record in records] if at is None else list(at)
    if not records or len(places) != len(records) or None in places:
        raise ValueError(
            "records must be at least one, and each needs its place: pass at=, as many numbers as records, where the "
            f"solver has no number of steps; got {len(records)} records and the places {places}"
        )
    lines = []
    for record in records:
        if record.states is None:
            raise ValueError("a record has no states: pass keep_states=True to ActivationRelaxation")
        if vertex not in record.states:
            raise ValueError(f"vertex must be one of {', '.join(map(repr, record.states))}, got {vertex!r}")
        state = record.states[vertex]
        if not 0 <= sample < len(state):
            raise ValueError(f"sample must be at least 0 and below {len(state)}, got {sample!r}")
        if state.is_complex():
            raise ValueError(
                f"the states of vertex {vertex!r} are complex, and a line shows real numbers: draw the vertices before "
                "the complex part of the model"
            )
        lines.append(state[sample].detach().double().flatten()[:units].cpu().numpy())
    ax = _axes(ax)
    ax.plot(np.array(places, dtype=np.float64), np.stack(lines))
    ax.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    ax.set(xlabel="relaxation steps", ylabel="state", title=vertex)
    ax.grid(alpha=0.3)
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        error.add_note("plots need Matplotlib: pip install 'relaxprop[plots]'")
        raise
    return plt.subplots(layout="constrained")[1]
