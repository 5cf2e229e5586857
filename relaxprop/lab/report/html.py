"""The report: records as one HTML file that needs nothing else, no network and no folder beside it.

Whatever comes from records is escaped: in the page by Jinja, in the charts' data as JSON without ``<``, ``>`` and
``&``, in the charts by the script. A content security policy lets no other script run and nothing be fetched.

May import: inspect.walk, public names, lab.config, lab.files, lab.results, lab.stats.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from relaxprop import (
    Locality,
    __version__,
)
from relaxprop.inspect.walk import KINDS
from relaxprop.lab.config import RunConfig
from relaxprop.lab.files import OutputError, write_atomically
from relaxprop.lab.results import AlignmentCurves, EpochMetrics
from relaxprop.lab.stats import CONFIDENCE, MARGIN, Claim, Mean, mean_over_seeds


@dataclass(frozen=True)
class RunRecord:
    """A run as it is kept.

    Attributes:
        files: where, each with the number of the line where it holds other runs too.
    """

    config: RunConfig
    environment: Mapping[str, Any]
    metrics: tuple[EpochMetrics, ...]
    files: tuple[tuple[Path, int | None], ...]
    locality: Locality | None = None
    certificate: Mapping[str, float] | None = None

    @property
    def is_finished(self) -> bool:
        return len(self.metrics) >= self.config.epochs

    @property
    def num_samples(self) -> int:
        """Measurements of alignment."""
        return sum(len(epoch.alignment) for epoch in self.metrics)


@dataclass(frozen=True)
class ConditionResults:
    """One condition of a figure.

    Attributes:
        runs: finished, one for each seed.
        is_reference: whether it is backpropagation, to which costs are relative.
        versus: the label of the condition that it is compared with; None where that is not among the records.
        claim: the paper's; None where it makes none, or nothing is there to compare with.
        difference: of the final test accuracies, over the seeds that both have.
        verdict: on the claim.
    """

    label: str
    runs: tuple[RunRecord, ...]
    is_reference: bool
    versus: str | None
    claim: Claim | None
    difference: Mean | None
    verdict: str
    alignment: AlignmentCurves | None

    @property
    def final(self) -> Mean:
        """Test accuracy after the last epoch."""
        return mean_over_seeds([run.metrics[-1].test_accuracy for run in self.runs])

    @property
    def epoch_seconds(self) -> float:
        """Of training in an epoch, median."""
        return statistics.median(epoch.seconds for run in self.runs for epoch in run.metrics)


@dataclass(frozen=True)
class FigureResults:
    """Conditions side by side.

    Attributes:
        experiment: the paper's figure; None where the runs belong to none.
        settings: what all of the runs share.
        records: every run with the label of its condition, and whether it counts in the numbers.
    """

    experiment: str | None
    title: str
    settings: Mapping[str, Any]
    conditions: tuple[ConditionResults, ...]
    records: tuple[tuple[str, RunRecord, bool], ...]


class LayerConvergence(NamedTuple):
    """The distance to backpropagation's gradient after 0, 1, 2, … relaxation steps, of one parameter."""

    name: str
    measured: tuple[float, ...]
    predicted: tuple[float, ...]


@dataclass(frozen=True)
class ConvergenceResults:
    """Convergence of the relaxation phase, by step size and order."""

    title: str
    command: str
    environment: Mapping[str, Any]
    layers: Mapping[str, tuple[LayerConvergence, ...]]
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Report:
    """What a report shows.

    Attributes:
        commands: that made the records, each with the file that says so.
    """

    figures: tuple[FigureResults, ...]
    convergence: tuple[ConvergenceResults, ...]
    commands: tuple[tuple[str, Path], ...]


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


def write_report(report: Report, out: Path) -> Path:
    """Writes the page, in one step.

    Raises:
        OutputError: it cannot be written.
    """
    if out.is_dir():
        raise OutputError(f"{out} is a folder: name a file for the report, as in {out / 'report.html'}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
    write_atomically(out, page(report, out.parent))
    return out


def page(report: Report, folder: Path) -> str:
    """The page, of which links go to the records as seen from a folder. The same records give the same page."""
    import jinja2
    from plotly.offline import get_plotlyjs  # both take a while

    charts: list[Chart] = []
    figures = [_figure(figure, folder, charts) for figure in report.figures]
    convergence = [_convergence(results, folder, charts) for results in report.convergence]
    environments = [record.environment for figure in report.figures for _, record, _ in figure.records]
    environments += [results.environment for results in report.convergence]
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("relaxprop.lab.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False, "ensure_ascii": False}
    source = templates.loader.get_source if templates.loader else None
    assert source is not None
    style, script = (source(templates, name)[0] for name in ("report.css", "report.js"))
    plotly = get_plotlyjs()
    return templates.get_template("report.html").render(
        figures=figures,
        convergence=convergence,
        commands=[(command, _link(path, folder)) for command, path in report.commands],
        environments=_environments(environments),
        charts=charts,
        data={"charts": [chart.data for chart in charts]},
        style=style,
        scripts=[plotly, script],
        hashes=[_hash(plotly), _hash(script)],
        notes=NOTES,
        kinds=KINDS,
        version=__version__,
    )


NOTES = (
    "Numbers are means over seeds ± the standard error of the mean. A band around a curve is one standard error to "
    "either side.",
    "The difference is that of the final test accuracies, seed by seed, to the condition it is compared with. Its "
    f"interval is the {100 * CONFIDENCE:g} % confidence interval of Student's t distribution.",
    f"“As accurate as” holds where the interval lies within ±{100 * MARGIN:g} point; “less accurate than” where it "
    "lies below that; “no longer learns” where it lies below minus half of what the other condition has learned beyond "
    "guessing. Where the interval reaches to both sides, the claim is left open.",
    "Cost is the median time of an epoch of training over that of backpropagation in the same runs.",
)
CLAIMS: dict[Claim, str] = {
    "equivalent": "as accurate as {}",
    "worse": "less accurate than {}",
    "destroyed": "no longer learns, unlike {}",
}
MARKS = {"holds": "✓", "does not hold": "✗", "open": "?"}


def _figure(figure: FigureResults, folder: Path, charts: list[Chart]) -> dict[str, Any]:
    """What the template shows of a figure; its charts are added to those of the page."""
    conditions = figure.conditions
    own = [_learning_curves(conditions)] if conditions else []
    alignment = _alignment(conditions)
    own += [alignment] if alignment else []
    numbers = range(len(charts), len(charts) + len(own))
    charts += own
    claims = [_claim(condition) for condition in conditions]
    verdicts = [claim["kind"] for claim in claims if claim["kind"]]
    return {
        "title": figure.title[:1].upper() + figure.title[1:],
        "settings": {name: json.dumps(value, ensure_ascii=False) for name, value in figure.settings.items()},
        "claims": claims,
        "counts": [(MARKS[kind], kind, verdicts.count(kind)) for kind in MARKS if verdicts],
        "charts": list(zip(numbers, own, strict=True)),
        "has_alignment": alignment is not None,
        "costs": _costs(conditions),
        "machines": sorted({str(r.environment.get("processor")) for c in conditions for r in c.runs}),
        "localities": [
            {
                "label": c.label,
                "locality": run.locality,
                "counts": _non_local(run.locality),
                "certificate": _certificate(run),
            }
            for c in conditions
            for run in [next((r for r in c.runs if r.locality or r.certificate), None)]
            if run is not None
        ],
        "records": [_record(label, record, counts, folder) for label, record, counts in figure.records],
        "unfinished": sum(not record.is_finished for _, record, _ in figure.records),
    }


def _claim(condition: ConditionResults) -> dict[str, Any]:
    difference = condition.difference
    low, high = difference.interval if difference else (math.nan, math.nan)
    return {
        "label": condition.label,
        "claim": CLAIMS[condition.claim].format(condition.versus) if condition.claim else "",
        "accuracy": str(condition.final),
        "n": condition.final.n,
        "versus": condition.versus or "",
        "difference": str(difference or ""),
        "interval": f"{100 * low:.2f} to {100 * high:.2f}" if math.isfinite(low) and math.isfinite(high) else "",
        "kind": (kind := condition.verdict.partition(":")[0]),
        "mark": MARKS.get(kind, ""),
        "verdict": condition.verdict,
    }


def _learning_curves(conditions: Sequence[ConditionResults]) -> Chart:
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


def _alignment(conditions: Sequence[ConditionResults]) -> Chart | None:
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


def _convergence(results: ConvergenceResults, folder: Path, charts: list[Chart]) -> dict[str, Any]:
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
    charts.append(
        Chart(
            "Distance to backpropagation's gradient", "Layers (a layer by its weights)", views, points_title="predicted"
        )
    )
    return {
        "title": results.title,
        "chart": (len(charts) - 1, charts[-1]),
        "links": [(path.name, _link(path, folder)) for path in results.files],
    }


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


def _costs(conditions: Sequence[ConditionResults]) -> list[dict[str, Any]]:
    """Seconds of an epoch, and relative to backpropagation's where that is there."""
    reference = next((c.epoch_seconds for c in conditions if c.is_reference), None)
    longest = max((c.epoch_seconds for c in conditions), default=0.0)
    return [
        {
            "label": c.label,
            "seconds": f"{c.epoch_seconds:.2f}",
            "ratio": f"{c.epoch_seconds / reference:.2f}×" if reference else "",
            "percent": f"{100 * c.epoch_seconds / longest:.1f}" if longest else "0",
        }
        for c in conditions
    ]


def _non_local(locality: Locality | None) -> dict[str, int]:
    """How many updates read what is not local, by kind."""
    found = [{entry.partition(":")[0] for entry in row.non_local} for row in (locality.rows if locality else ())]
    return {kind: sum(kind in kinds for kinds in found) for kind in KINDS}


def _certificate(run: RunRecord) -> list[tuple[str, str]]:
    """What is left of the initial state, by vertex from the input to the output."""
    return [(vertex, f"{100 * left:.3g} %") for vertex, left in reversed(list((run.certificate or {}).items()))]


def _record(label: str, record: RunRecord, counts: bool, folder: Path) -> dict[str, Any]:
    config = record.config
    if not record.is_finished:
        state = f"unfinished: {len(record.metrics)} of {config.epochs} epochs, not in the numbers"
    else:
        state = "counted" if counts else "the same seed again, not in the numbers"
    return {
        "label": label,
        "seed": config.seed,
        "id": config.id,
        "accuracy": f"{100 * record.metrics[-1].test_accuracy:.2f}" if record.metrics else "",
        "state": state,
        "date": record.environment.get("date", ""),
        "links": [
            (path.name if line is None else f"{path.name}, line {line}", _link(path, folder))
            for path, line in record.files
        ],
    }


def _environments(environments: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Column titles and rows: the places that the records come from, with how many come from each."""
    names = list(dict.fromkeys(name for environment in environments for name in environment))
    counts: dict[tuple[str, ...], int] = {}
    for environment in environments:
        row = tuple("" if environment.get(name) is None else str(environment[name]) for name in names)
        counts[row] = counts.get(row, 0) + 1
    kept = [i for i in range(len(names)) if any(row[i] for row in counts)]
    rows = [[str(count), *(row[i] for i in kept)] for row, count in sorted(counts.items())]
    return ["records", *(names[i] for i in kept)], rows


def _link(path: Path, folder: Path) -> str:
    """An address of a file as seen from a folder."""
    try:
        return quote(Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix())
    except ValueError:  # on another drive
        return path.resolve().as_uri()


def _hash(script: str) -> str:
    """As a content security policy names a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
