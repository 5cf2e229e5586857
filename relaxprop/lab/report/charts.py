"""A report's charts: curves to look at in several views, as data for the page's script, and as tables.

May import: lab.report.findings, lab.stats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from relaxprop.lab.report.findings import ConditionResults, ConvergenceResults
from relaxprop.lab.stats import Mean, mean_over_seeds

# Colours are classes of the style sheet, with a value on light and one on dark ground. Two curves never share both.
NUM_COLOURS = 7
DASHES = ("", "9 3", "2 3", "9 3 2 3", "16 4", "16 4 2 4")


class Style(NamedTuple):
    """Of a curve: a class of the style sheet, and lengths of dashes and gaps in pixels."""

    colour: int
    dash: str

    @classmethod
    def number(cls, i: int) -> Style:
        return cls(i % NUM_COLOURS, DASHES[i % len(DASHES)])


class Series(NamedTuple):
    """A curve: numbers that are not finite are None.

    Attributes:
        name: one of its chart's names.
        error: standard errors of y.
        seeds: y of each seed.
        points: y of what is drawn as points.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    error: Sequence[float | None] | None = None
    seeds: Mapping[int, Sequence[float | None]] | None = None
    points: Sequence[float | None] | None = None


class View(NamedTuple):
    """What a chart shows at a time.

    Attributes:
        form: of the numbers; ``%``, ``f`` or ``e``.
    """

    name: str
    x_title: str
    y_title: str
    form: str
    series: Sequence[Series]
    table_every: int = 1


@dataclass(frozen=True)
class Chart:
    """Curves to look at in several views, with the same names in all of them."""

    title: str
    names_title: str
    views: Sequence[View]
    points_title: str = ""

    @property
    def names(self) -> dict[str, Style]:
        names = dict.fromkeys(series.name for view in self.views for series in view.series)
        return {name: Style.number(i) for i, name in enumerate(names)}

    def starts_hidden(self, name: str) -> bool:
        """Biases beside weights, so that there is one curve for every layer at first."""
        return name.endswith(".bias") and not all(other.endswith(".bias") for other in self.names)

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for view in self.views for series in view.series for seed in series.seeds or ()})

    @property
    def data(self) -> dict[str, Any]:
        """For the script; what is None is left out."""
        views = [
            view._asdict() | {"series": [{k: v for k, v in s._asdict().items() if v is not None} for s in view.series]}
            for view in self.views
        ]
        return {"styles": self.names, "views": views, "points_title": self.points_title}

    def table(self, view: View) -> tuple[list[str], list[list[str]]]:
        """Column titles and rows of a view's numbers."""
        xs = sorted({x for series in view.series for x in series.x})[:: view.table_every]
        columns = [dict(zip(series.x, _cells(series, view.form), strict=True)) for series in view.series]
        rows = [[f"{x:g}", *(column.get(x, "") for column in columns)] for x in xs]
        return [view.x_title, *(series.name for series in view.series)], rows


def learning_curves(conditions: Sequence[ConditionResults]) -> Chart:
    """Test accuracy and training loss over epochs."""

    def view(name: str, title: str, field: str, form: str) -> View:
        series = []
        for condition in conditions:
            by_seed = {run.config.seed: [getattr(m, field) for m in run.metrics] for run in condition.runs}
            means = [mean_over_seeds(values) for values in zip(*by_seed.values(), strict=True)]
            seeds = {seed: [_finite(y) for y in values] for seed, values in by_seed.items()}
            series.append(_series(condition.label, range(1, len(means) + 1), means, seeds))
        return View(name, "epoch", title, form, series)

    views = [
        view("test accuracy", "test accuracy", "test_accuracy", "%"),
        view("training loss", "training loss per label", "train_loss", "f"),
    ]
    return Chart("Learning curves", "Conditions", views)


def alignment(conditions: Sequence[ConditionResults]) -> Chart | None:
    """Cosines over training, by layer; None where none were measured."""
    views = [
        View(
            f"{condition.label} – {what}",
            "epochs of training",
            "cosine",
            "f",
            [_series(name.removesuffix(".weight"), curve.epochs, curve.cosines) for name, curve in curves.items()],
        )
        for condition in conditions
        if condition.alignment
        for what, curves in (
            ("gradients to backpropagation's", condition.alignment.gradients),
            ("backwards weights to weights", condition.alignment.feedback),
        )
        if curves
    ]
    return (
        Chart("Alignment with backpropagation, by layer", "Layers (a layer by its weights)", views) if views else None
    )


def convergence(results: ConvergenceResults) -> Chart:
    """Distances to backpropagation's gradient over relaxation steps, by layer."""
    views = [
        View(
            solver,
            "relaxation steps",
            "relative distance to the gradient",
            "e",
            [
                Series(
                    layer.name.removesuffix(".weight"),
                    list(range(len(layer.measured))),
                    [_positive(y) for y in layer.measured],
                    points=[_positive(y) for y in layer.predicted],
                )
                for layer in layers
            ],
            table_every=max(1, len(layers[0].measured) // 10),
        )
        for solver, layers in results.layers.items()
    ]
    return Chart(
        "Distance to backpropagation's gradient", "Layers (a layer by its weights)", views, points_title="predicted"
    )


def _series(
    name: str, x: Sequence[float], means: Sequence[Mean], seeds: Mapping[int, Sequence[float | None]] | None = None
) -> Series:
    error = [_finite(m.standard_error) for m in means] if means[0].n > 1 else None
    return Series(name, list(x), [_finite(m.mean) for m in means], error, seeds)


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _positive(x: float) -> float | None:
    """For a logarithmic axis, on which 0 has no place."""
    return x if math.isfinite(x) and x > 0 else None


def _cells(series: Series, form: str) -> list[str]:
    def shown(y: float | None) -> str:
        if y is None:
            return "0" if form == "e" else "not finite"
        return f"{100 * y:.2f}" if form == "%" else f"{y:.1e}" if form == "e" else f"{y:.4f}"

    beside = series.error or series.points or [None] * len(series.y)
    sign = "±" if series.error else "predicted"
    return [
        f"{shown(y)} {sign} {shown(other)}" if y is not None and other is not None else shown(y)
        for y, other in zip(series.y, beside, strict=True)
    ]
