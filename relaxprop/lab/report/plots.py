"""Figures, drawn from numbers alone.

Matplotlib is imported where a figure is drawn: it takes longer than the commands that draw none.

May import: public names, lab.results, lab.stats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relaxprop import (
    Convergence,
)
from relaxprop.lab.results import AlignmentCurves, Asynchronous, DepthCost
from relaxprop.lab.stats import Mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

DPI = 150
ROUNDING = float(np.finfo(np.float64).eps)
# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def learning_curves(
    panels: Mapping[str, Sequence[Sequence[Mean] | None]], lines: Sequence[str], title: str, path: Path
) -> Path:
    """Test accuracy over epochs, mean over seeds with standard errors.

    Args:
        panels: the curves of each, by its title, in the order of ``lines``; None where it has no such curve.
        lines: what the curves are, three at most.
    """
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(_width(columns), 3 * rows + 1)
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    # Equal curves lie on one another: the later ones are dashed and their marks are smaller, so that all show.
    styles = [(COLOURS[0], "-", 6), (COLOURS[1], "--", 3), (COLOURS[2], ":", 1.5)]
    for axes, (name, curves) in zip(all_axes, panels.items(), strict=False):
        for means, (colour, line, size) in zip(curves, styles, strict=False):
            if means is None:
                continue
            mean = 100 * np.array([m.mean for m in means])
            error = 100 * np.nan_to_num([m.standard_error for m in means])
            epochs = np.arange(1, len(means) + 1)
            axes.errorbar(epochs, mean, error, color=colour, linestyle=line, marker="o", markersize=size, capsize=2)
        axes.set_title(name, fontsize="medium")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.set(xlabel="epoch", ylabel="test accuracy (%)")
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    drawn = [i for i in range(len(lines)) if any(curves[i] is not None for curves in panels.values())]
    handles = [
        _line(color=colour, linestyle=line, marker="o", markersize=size)
        for colour, line, size in (styles[i] for i in drawn)
    ]
    figure.legend(
        handles, [lines[i] for i in drawn], loc="outside lower center", ncols=len(drawn),
        title="mean over seeds, bars: standard error",
    )  # fmt: skip
    figure.suptitle(title, fontsize="medium")
    return _save(figure, path)


def alignment_curves(curves: Mapping[str, AlignmentCurves], about: str, path: Path) -> Path:
    """Cosines to backpropagation's gradient and of backwards weights to weights; a panel for each condition."""
    from matplotlib import colormaps

    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = _figure(_width(columns), 2.8 * rows + 1.2)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    layers = list(dict.fromkeys(_layer(n) for c in curves.values() for n in c.gradients if n.endswith(".weight")))
    few = len(layers) <= len(COLOURS)
    shades = COLOURS if few else colormaps["viridis"](np.linspace(0, 0.95, len(layers)))
    colours = dict(zip(layers, shades, strict=False))
    for axes, (title, (gradients, feedback)) in zip(panels, curves.items(), strict=False):
        for style, by_name in (("-", gradients), ("--", feedback)):
            for name, curve in by_name.items():
                if _layer(name) in colours:
                    mean = np.array([m.mean for m in curve.cosines])
                    error = np.nan_to_num([m.standard_error for m in curve.cosines])
                    colour = colours[_layer(name)]
                    axes.plot(curve.epochs, mean, style, color=colour, linewidth=1.2)
                    axes.fill_between(curve.epochs, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
        axes.axhline(0, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    for axes in panels[: len(curves)]:
        axes.set(xlabel="epochs", ylabel="cosine")
        axes.label_outer()
    # Many layers have shades from the first to the last.
    lines = [_line(color=colours[layer], label=layer) for layer in (layers if few else layers[:: len(layers) - 1])]
    lines += [_line(color="black", label="gradient to backpropagation's")]
    if any(c.feedback for c in curves.values()):
        lines += [_line(color="black", linestyle="--", label="backwards weights to weights")]
    figure.legend(
        handles=lines,
        loc="outside lower center",
        ncols=min(3, len(lines)),
        title="mean over seeds, band: standard error",
    )
    figure.suptitle("alignment with backpropagation\n" + about, fontsize="medium")
    return _save(figure, path)


def convergence_curves(curves: Sequence[Convergence], title: str, path: Path) -> Path:
    """Distance to backpropagation's gradient per layer over relaxation steps; a panel per step size."""
    figure = _figure(3 * len(curves) + 1, 4.8)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    weights = [name for name in curves[0].measured if name.endswith("weight")]
    exact = [name for name in weights if all(c.measured[name].max() == 0 for c in curves)]
    drawn = [name for name in weights if name not in exact]
    for axes, curve in zip(panels, curves, strict=True):
        steps = np.arange(len(next(iter(curve.measured.values()))))
        dots = slice(None, None, max(1, len(steps) // 20))
        for i, name in enumerate(drawn):
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(steps, curve.measured[name], color=colour, label=f"{_layer(name)}, measured")
            predicted = curve.predicted[name]
            axes.plot(steps[dots], predicted[dots], "o", color=colour, markersize=3.5, fillstyle="none",
                      label=f"{_layer(name)}, predicted")  # fmt: skip
        axes.axhline(ROUNDING, color="grey", linewidth=0.8, linestyle=":")
        axes.set(
            yscale="log",
            ylim=(ROUNDING / 30, None),
            xlabel="relaxation steps",
            title=f"step size {curve.solver.step_size:g}",
        )
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("distance to backpropagation's gradient\n(relative to its norm)")
    figure.suptitle(f"{title}: {curves[0].solver.order} relaxation, depth {curves[0].depth}")
    panels[0].annotate("rounding", (0.03, ROUNDING), xycoords=("axes fraction", "data"), va="bottom", color="grey")
    note = f" ({', '.join(map(_layer, exact))}: exact from the start, as the output is held)" if exact else ""
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(drawn), title=f"gradient of the weights{note}")
    return _save(figure, path)


def asynchronous_curves(curves: Sequence[Asynchronous], title: str, path: Path) -> Path:
    """Error against expected updates per vertex; a panel for each architecture, a line for each seed."""
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = _figure(_width(columns), 2.6 * rows + 0.9)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for place, (axes, curve) in enumerate(zip(panels, curves, strict=False)):
        for i, errors in enumerate(curve.errors):
            axes.plot(curve.updates, errors, color=COLOURS[i % len(COLOURS)], linewidth=1, label=f"seed {i}")
        axes.axvline(curve.depth, color="grey", linewidth=0.8, linestyle="--")
        axes.axhline(ROUNDING, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(f"{curve.architecture} (depth {curve.depth})", fontsize="medium")
        axes.set(yscale="log", xlabel="expected updates per vertex", ylabel="" if place % columns else "error")
        axes.grid(alpha=0.3)
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    handles += [_line(color="grey", linestyle=style) for style in ("--", ":")]
    labels += ["updates = vertices on the longest path", "rounding"]
    about = "error: largest distance of a parameter's gradient to backpropagation's, over its norm"
    figure.legend(handles, labels, loc="outside lower center", ncols=3, title=about)
    figure.suptitle(title, fontsize="medium")
    return _save(figure, path)


def cost_curves(costs: Sequence[DepthCost], title: str, path: Path) -> Path:
    """Time relative to backpropagation against depth, by solver; filled where nothing of the initial state is left."""
    figure = _figure(8, 5)
    axes = figure.subplots()
    for i, solver in enumerate(dict.fromkeys(c.solver for c in costs)):
        own = [c for c in costs if c.solver == solver]
        colour = COLOURS[i % len(COLOURS)]
        axes.plot([c.depth for c in own], [c.ratio for c in own], color=colour, label=solver)
        for c in own:
            axes.plot(c.depth, c.ratio, "o", color=colour, fillstyle="full" if c.converged else "none")
    axes.set(xscale="log", yscale="log", xlabel="depth (layers)", ylabel="time relative to backpropagation")
    depths = sorted({c.depth for c in costs})
    axes.set_xticks(depths, [str(d) for d in depths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    handles += [_line(color="black", marker="o", fillstyle=f, linestyle="") for f in ("full", "none")]
    labels += ["nothing of the initial state left", "something left"]
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    axes.set_title(title, fontsize="medium")
    return _save(figure, path)


def step_costs(panels: Mapping[str, Mapping[str, tuple[float, float, float | None]]], path: Path) -> Path:
    """What training steps cost relative to backpropagation's; a panel for each network, a line for each rule.

    Args:
        panels: by its title, each rule's ratio of time, of memory, and of operations where they are counted.
    """
    rows = [max(1, len(rules)) for rules in panels.values()]
    figure = _figure(9, 0.3 * sum(rows) + 0.8 * len(rows) + 0.8)
    all_axes = figure.subplots(len(rows), 1, squeeze=False, sharex=True, height_ratios=rows).flatten()
    kinds = (
        (COLOURS[0], "o", "time"),
        (COLOURS[1], "s", "memory"),
        (COLOURS[2], "|", "operations (floor)"),
    )
    for axes, (name, rules) in zip(all_axes, panels.items(), strict=True):
        for place, ratios in enumerate(rules.values()):
            for ratio, (colour, marker, _) in zip(ratios, kinds, strict=True):
                if ratio is not None:
                    axes.plot(ratio, place, marker, color=colour, markersize=12 if marker == "|" else 5)
        axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(rules)), list(rules), fontsize="small")
        axes.set(xscale="log", ylim=(len(rules) - 0.5, -0.5))
        axes.set_title(name, fontsize="medium")
        axes.grid(alpha=0.3)
    all_axes[-1].set_xlabel("relative to backpropagation's step")
    handles = [_line(color=colour, marker=marker, linestyle="") for colour, marker, _ in kinds]
    figure.legend(handles, [name for *_, name in kinds], loc="outside lower center", ncols=3)
    return _save(figure, path)


def power_laws(panels: Mapping[tuple[str, str], Mapping[str, Sequence[tuple[float, float]]]], path: Path) -> Path:
    """Amounts against sizes, both logarithmic; a panel for each quantity and size, a line for each rule."""
    quantities, sizes = (list(dict.fromkeys(key[i] for key in panels)) for i in (0, 1))
    units = {"time": "time (ms)", "memory": "memory (bytes)"}
    figure = _figure(_width(len(sizes)), 2.6 * len(quantities) + 0.9)
    all_axes = figure.subplots(len(quantities), len(sizes), squeeze=False, sharex="col", sharey="row")
    for i, quantity in enumerate(quantities):
        for axes, size in zip(all_axes[i], sizes, strict=True):
            for k, points in enumerate(panels[quantity, size].values()):
                axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[k % len(COLOURS)], markersize=3)
            axes.set(xscale="log", yscale="log", xlabel=size, ylabel=units.get(quantity, quantity))
            axes.label_outer()
            axes.grid(alpha=0.3)
    rules = list(next(iter(panels.values())))
    handles = [_line(color=COLOURS[k % len(COLOURS)], marker="o") for k in range(len(rules))]
    figure.legend(handles, rules, loc="outside lower center", ncols=3)
    return _save(figure, path)


def accuracy_by_cost(points: Mapping[str, tuple[float, Mean]], title: str, path: Path) -> Path:
    """Test accuracy, mean over seeds with its standard error, against the time of a step over backpropagation's."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = _figure(8, 5.5)
    axes = figure.subplots()
    markers = "osD^v<>P"
    for i, (label, (cost, accuracy)) in enumerate(points.items()):
        error = 100 * accuracy.standard_error if accuracy.n > 1 else None
        axes.errorbar(
            cost, 100 * accuracy.mean, yerr=error, fmt=markers[i // len(COLOURS) % len(markers)],
            color=COLOURS[i % len(COLOURS)], label=label, capsize=3,
        )  # fmt: skip
    axes.set(xscale="log", xlabel="time of a training step over backpropagation's", ylabel="test accuracy (%)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _line(**style: Any) -> Line2D:
    """For a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def _width(columns: int) -> float:
    """In inches, of a figure with so many panels beside each other: wide enough for its title."""
    return max(8.0, 3.6 * columns)


def _layer(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def _save(figure: Figure, path: Path) -> Path:
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    figure.savefig(partial, dpi=DPI)
    return partial.replace(path)
