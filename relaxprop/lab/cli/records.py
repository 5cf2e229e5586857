"""Look at many runs at once: list, export, compare.

What needs PyTorch is imported where it is used: it takes longer than the rest.

May import: lab.cli.options, lab.experiments.records, lab.files, lab.records, lab.report.compare, lab.report.export,
lab.stats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from relaxprop.lab import records
from relaxprop.lab.cli.options import console, errors, print_table, usage_errors
from relaxprop.lab.files import OutputError, check_writable
from relaxprop.lab.records import RECORDS, Run
from relaxprop.lab.report.compare import pair as pair_by_seed
from relaxprop.lab.report.export import Format, alignment_table, epochs_table, write_table
from relaxprop.lab.stats import MARGIN, Comparison, judge

PathsArgument = Annotated[
    list[Path],
    typer.Argument(metavar="PATH...", help=f"Run directories, files of records ({RECORDS}), or folders of these."),
]
WhereOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FIELD=VALUE",
        help="Only runs of which this is true, as in frozen.update_derivative=false; also !=, <, <=, >, >=. Fields are "
        "those of the description by dotted names, id, condition, place, finished, epochs_done and test_accuracy; "
        "repeat it for several.",
    ),
]
MarginOption = Annotated[
    float, typer.Option(help="Differences of the test accuracy below it are none, in (0, 1); 0.01 is a point.")
]


def runs(
    paths: PathsArgument,
    where: WhereOption = None,
    dataset: Annotated[str | None, typer.Option(help="Only runs on this data set.")] = None,
    model: Annotated[str | None, typer.Option(help="Only runs of this network.")] = None,
    rule: Annotated[str | None, typer.Option(help="Only runs by this learning rule.")] = None,
    finished: Annotated[
        bool | None, typer.Option("--finished/--unfinished", help="Only runs whose epochs are all done, or not.")
    ] = None,
    sort: Annotated[str, typer.Option(metavar="FIELD", help="By which they are sorted.")] = "id",
    descending: Annotated[bool, typer.Option("--descending", help="From the largest on.")] = False,
) -> None:
    """List runs: their epochs, what they reached, and what of their description is not as in most of them."""
    named = {"dataset": dataset, "model": model, "rule": rule}
    chosen = _chosen(paths, where)
    for name, value in named.items():
        chosen = chosen if value is None else [run for run in chosen if run.config[name] == value]
    if finished is not None:
        chosen = [run for run in chosen if run.is_finished == finished]
    with usage_errors("--sort", of_fields=True):
        chosen = records.sort(chosen, sort, descending=descending)
    rows = [("run", "condition", "epochs", "accuracy", "where it differs")]
    for run, differs in zip(chosen, records.differing(chosen), strict=True):
        reached = "" if run.accuracy is None else f"{100 * run.accuracy:.2f} %"
        rows.append((run.id, run.condition or "", f"{run.epochs}/{run.config['epochs']}", reached, differs))
    # Lines of their own, as a table that is fitted to the terminal takes seconds for thousands.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    kept = [i for i, width in enumerate(widths) if i != 1 or width > len(rows[0][1]) or any(r[1] for r in rows[1:])]
    lines = ["  ".join(row[i].ljust(widths[i]) for i in kept).rstrip() for row in rows]
    typer.echo("\n".join([*lines, f"{len(chosen):,} run{'s' * (len(chosen) != 1)}"]))


def export(
    paths: PathsArgument,
    kind: Annotated[Format, typer.Option("--format", help="Of the file.")] = "parquet",
    out: Annotated[Path | None, typer.Option(help="The file. (default: runs.FORMAT)")] = None,
    alignment: Annotated[
        bool, typer.Option("--alignment", help="Also a table of the measured alignment, in NAME-alignment.FORMAT.")
    ] = False,
    where: WhereOption = None,
) -> None:
    """Make one tidy table of runs: a row for each run and epoch, its description and its environment."""
    chosen = _with_conditions(_chosen(paths, where, strict=True))
    path = out or Path(f"runs.{kind}")
    check_writable(path.parent)
    table = epochs_table(chosen)
    write_table(table, path, kind)
    console.print(
        f"{path}: {table.num_rows:,} epochs of {len(chosen):,} run{'s' * (len(chosen) != 1)}",
        soft_wrap=True,
        highlight=False,
    )
    if alignment:
        measured = alignment_table(chosen)
        beside = path.with_name(f"{path.stem}-alignment{path.suffix}")
        write_table(measured, beside, kind)
        console.print(f"{beside}: {measured.num_rows:,} cosines", soft_wrap=True, highlight=False)


def compare(
    first: Annotated[
        str, typer.Argument(metavar="A", help="A condition's name, or FIELD=VALUE, several with commas between.")
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="The same, of what A is compared with.")],
    paths: PathsArgument,
    where: WhereOption = None,
    margin: MarginOption = MARGIN,
) -> None:
    """Compare two conditions by their final test accuracy, seed by seed."""
    check_fraction("--margin", margin)
    chosen = _with_conditions(_chosen(paths, where, strict=True))
    sides = []
    for what, wanted in (("A", first), ("B", second)):
        filters = wanted.split(",") if "=" in wanted else [f"condition={json.dumps(wanted, ensure_ascii=False)}"]
        with usage_errors(what, of_fields=True):
            side = chosen
            for condition in filters:
                side = records.where(side, condition)
            if not side:
                known = sorted({run.condition for run in chosen if run.condition is not None})
                if any(run.id == wanted for run in chosen):
                    raise ValueError(f"{wanted!r} is the name of a run, and {what} is a condition or FIELD=VALUE")
                raise ValueError(f"no run is {wanted!r}; conditions here are {', '.join(known)}")
            sides.append(side)
    try:
        paired = pair_by_seed(*sides)
    except ValueError as error:
        raise OutputError(str(error)) from error
    chance = -math.inf if paired.chance is None else paired.chance
    said = str(judge(Comparison("equivalent", paired.difference, paired.second.mean, chance, margin)))
    print_table(
        "final test accuracy (%), seed by seed",
        ("A", "B", "n", "A reaches", "B reaches", "difference (points)", "95 % interval", f"within ±{100 * margin:g}"),
        [(first, second, str(paired.difference.n), *map(str, paired[1:4]), paired.difference.limits, said)],
    )
    console.print(f"seeds: {', '.join(map(str, paired.seeds))}", soft_wrap=True, highlight=False)
    for name, (one, other) in paired.fields.items():
        console.print(f"{name}: {json.dumps(one)} in A, {json.dumps(other)} in B", soft_wrap=True, highlight=False)
    chance_level = "not known here, so not looked at" if paired.chance is None else f"{100 * paired.chance:.2f} %"
    console.print(f"chance: {chance_level}", soft_wrap=True, highlight=False)


def _chosen(paths: Sequence[Path], conditions: Sequence[str] | None, *, strict: bool = False) -> list[Run]:
    """The runs that the conditions are true of; what cannot be read is told, or refused."""
    found = records.find(paths)
    if strict and found.unreadable:
        raise OutputError(found.unreadable[0])
    for message in found.unreadable:
        errors.print(f"left out: {message}", soft_wrap=True, highlight=False, markup=False)
    chosen = found.runs
    if any(condition.startswith("condition") for condition in conditions or ()):
        chosen = _with_conditions(chosen)
    for condition in conditions or ():
        with usage_errors("--where", of_fields=True):
            chosen = records.where(chosen, condition)
    return chosen


def _with_conditions(runs: list[Run]) -> list[Run]:
    """The same runs, each with the condition that was kept or that its description tells."""
    if all(run.condition is not None for run in runs):
        return runs
    from relaxprop.lab.experiments.records import with_conditions

    return with_conditions(runs)


def check_fraction(flag: str, value: float) -> None:
    """Refuses a number that is not within (0, 1)."""
    if not 0 < value < 1:
        raise typer.BadParameter(f"must be in (0, 1), got {value}", param_hint=flag)
