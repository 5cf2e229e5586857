"""The report: records as one HTML file that needs nothing else, no network and no folder beside it.

Whatever comes from records is escaped: in the page by Jinja, in the charts' data as JSON without ``<``, ``>`` and
``&``, in the charts by the script. A content security policy lets no other script run and nothing be fetched.

May import: inspect.walk, public names, lab.files, lab.report.charts, lab.report.findings, lab.results, lab.stats.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from relaxprop import (
    Locality,
    __version__,
)
from relaxprop.inspect.walk import KINDS
from relaxprop.lab.files import OutputError, write_atomically
from relaxprop.lab.report.charts import Chart, alignment, convergence, learning_curves
from relaxprop.lab.report.findings import ConditionResults, ConvergenceResults, FigureResults, Report, RunRecord
from relaxprop.lab.results import relative_cost
from relaxprop.lab.stats import CONFIDENCE, MARGIN, Claim


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
    phases = [_convergence(results, folder, charts) for results in report.convergence]
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
        convergence=phases,
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
    own = [learning_curves(conditions)] if conditions else []
    aligned = alignment(conditions)
    own += [aligned] if aligned else []
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
        "has_alignment": aligned is not None,
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


def _convergence(results: ConvergenceResults, folder: Path, charts: list[Chart]) -> dict[str, Any]:
    """What the template shows of a relaxation phase; its chart is added to those of the page."""
    charts.append(convergence(results))
    return {
        "title": results.title,
        "chart": (len(charts) - 1, charts[-1]),
        "links": [(path.name, _link(path, folder)) for path in results.files],
    }


def _costs(conditions: Sequence[ConditionResults]) -> list[dict[str, Any]]:
    """Seconds of an epoch, and relative to backpropagation's where that is there."""
    reference = next((c for c in conditions if c.is_reference), None)
    ratios = [relative_cost(c.by_seed, reference.by_seed) if reference else None for c in conditions]
    longest = max((c.epoch_seconds for c in conditions), default=0.0)
    return [
        {
            "label": c.label,
            "seconds": f"{c.epoch_seconds:.2f}",
            "ratio": "" if ratio is None else f"{ratio:.2f}×",
            "percent": f"{100 * c.epoch_seconds / longest:.1f}" if longest else "0",
        }
        for c, ratio in zip(conditions, ratios, strict=True)
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
