"""Look at many runs at once: list, export, compare; make tables again from kept records.

May import: lab.cli.options, lab.experiments.records, lab.experiments.rules, lab.files, lab.records,
lab.report.claims, lab.report.compare, lab.report.export, lab.report.figures, lab.stats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from relaxprop.lab import records
from relaxprop.lab.cli.options import (
    DataDirOption,
    console,
    errors,
    load_dataset,
    print_paths,
    print_table,
    usage_errors,
)
from relaxprop.lab.experiments import rules
from relaxprop.lab.experiments.records import complete, with_conditions
from relaxprop.lab.files import OutputError, check_writable
from relaxprop.lab.records import RECORDS, Run
from relaxprop.lab.report.claims import CLAIM, RESULT, notes, would
from relaxprop.lab.report.claims import table as cells_of
from relaxprop.lab.report.compare import pair as pair_by_seed
from relaxprop.lab.report.export import Format, alignment_table, epochs_table, write_table
from relaxprop.lab.report.figures import Figure, read_figure, write_figure
from relaxprop.lab.stats import MARGIN, PROBABILITY, is_tested, region, seeds_to_decide, verdict

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
    with usage_errors("--sort"):
        chosen = records.sort(chosen, sort, descending=descending)
    rows = [("run", "condition", "epochs", "accuracy", "where it differs")]
    for run, differs in zip(chosen, records.differing(chosen), strict=True):
        reached = "" if run.accuracy is None else f"{100 * run.accuracy:.2f} %"
        rows.append((run.id, run.condition or "", f"{run.epochs}/{run.config['epochs']}", reached, differs))
    # Lines of their own, as a table that is fitted to the terminal takes seconds for thousands.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    kept = [i for i, width in enumerate(widths) if i != 1 or width > len(rows[0][1]) or any(r[1] for r in rows[1:])]
    lines = ["  ".join(row[i].ljust(widths[i]) for i in kept).rstrip() for row in rows]
    typer.echo("\n".join([*lines, f"{len(chosen):,} runs"]))


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
    chosen = with_conditions(_chosen(paths, where, strict=True))
    path = out or Path(f"runs.{kind}")
    check_writable(path.parent)
    table = epochs_table(chosen)
    write_table(table, path, kind)
    console.print(f"{path}: {table.num_rows:,} epochs of {len(chosen):,} runs", soft_wrap=True, highlight=False)
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
    _check_fraction("--margin", margin)
    chosen = with_conditions(_chosen(paths, where, strict=True))
    sides = []
    for what, wanted in (("A", first), ("B", second)):
        filters = wanted.split(",") if "=" in wanted else [f"condition={json.dumps(wanted, ensure_ascii=False)}"]
        with usage_errors(what):
            side = chosen
            for condition in filters:
                side = records.where(side, condition)
            if not side:
                known = sorted({run.condition for run in chosen if run.condition is not None})
                raise ValueError(f"no run is {wanted!r}; conditions here are {', '.join(known)}")
            sides.append(side)
    try:
        paired = pair_by_seed(*sides)
    except ValueError as error:
        raise OutputError(str(error)) from error
    chance = -math.inf if paired.chance is None else paired.chance
    claimed = region("equivalent", paired.second.mean, chance, margin)
    said = verdict("equivalent", paired.difference, paired.second.mean, chance, margin)
    if said.startswith("open") and is_tested(paired.difference, paired.second.mean, chance, margin):
        said += would(seeds_to_decide(paired.difference, claimed), paired.difference)
    low, high = paired.difference.interval
    interval = f"{100 * low:.2f} to {100 * high:.2f}" if paired.difference.n > 1 else ""
    print_table(
        "final test accuracy (%), seed by seed",
        ("A", "B", "n", "A reaches", "B reaches", "difference (points)", "95 % interval", f"within ±{100 * margin:g}"),
        [(first, second, str(paired.difference.n), *map(str, paired[1:4]), interval, said)],
    )
    console.print(f"seeds: {', '.join(map(str, paired.seeds))}", soft_wrap=True, highlight=False)
    for name, (one, other) in paired.fields.items():
        console.print(f"{name}: {json.dumps(one)} in A, {json.dumps(other)} in B", soft_wrap=True, highlight=False)
    chance_level = "not known here, so not looked at" if paired.chance is None else f"{100 * paired.chance:.2f} %"
    console.print(f"chance: {chance_level}", soft_wrap=True, highlight=False)


def power(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS...", help=f"Figures' folders, or their files {RECORDS}.")
    ],
    margin: MarginOption = MARGIN,
    probability: Annotated[float, typer.Option(help="With which so many seeds decide, in (0, 1).")] = PROBABILITY,
) -> None:
    """Say how many seeds each claim of a figure takes, if the mean and the spread so far are the truth."""
    _check_fraction("--margin", margin)
    _check_fraction("--probability", probability)
    for path in results:
        figure = read_figure(_with_records(path), margin=margin, probability=probability)
        cells = []
        for row in figure.rows:
            if (difference := row.difference) is None:
                continue
            seeds = "" if row.p is None else f"{row.seeds:,}" if row.seeds else would(None, difference).strip(", ")
            deviation = "" if difference.n == 1 else f"{100 * difference.deviation:.2f}"
            cells.append(
                (row.name, str(difference.n), str(difference), deviation, row.condition.claim, row.verdict, seeds)
            )
        print_table(
            f"{figure.about}: seeds that decide with a probability of {100 * probability:g} % at a margin of "
            f"{100 * margin:g} points",
            ("condition", "n", "difference (points)", "deviation", "paper", "verdict", "seeds"),
            cells,
        )


def table(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help=f"Figures' folders, each with its {RECORDS}.")
    ],
    data_dir: DataDirOption = None,
) -> None:
    """Make a figure's tables and plots again from its records alone.

    Records older than this command lack the accuracy at chance: they are completed once, from the data set.
    """
    for folder in folders:
        if rules.is_of_rivals(folder):
            rivals, paths = rules.write_rivals(folder)
            print_rivals(rivals)
            print_paths(paths)
            continue
        complete(_with_records(folder), lambda name: load_dataset(name, data_dir))
        figure, paths = write_figure(folder)
        print_figure(figure)
        print_paths(paths)


def print_figure(figure: Figure) -> None:
    """A figure's table in two, as a terminal is narrow, and what they mean."""
    cells, width = cells_of(figure.rows), len(RESULT)
    print_table(f"{figure.about}: mean ± standard error over seeds", RESULT, [cell[:width] for cell in cells])
    compared = [
        (row.name, *cell[width:]) for row, cell in zip(figure.rows, cells, strict=True) if row.difference is not None
    ]
    print_table("the paper's claims", ("condition", *CLAIM), compared)
    for note in notes(figure.rows, figure.chance):
        console.print(note, soft_wrap=True, highlight=False)


def print_rivals(found: rules.Rivals) -> None:
    """The table of the learning rules in two, as a terminal is narrow."""
    shown, width = rules.cells(found.rows), 6
    print_table(f"{rules.TITLE}: {found.about}", rules.COLUMNS[:width], [cell[:width] for cell in shown])
    rest = [(cell[0], *cell[width:]) for cell in shown]
    print_table("what it takes", (rules.COLUMNS[0], *rules.COLUMNS[width:]), rest)
    for note in found.notes:
        console.print(note, soft_wrap=True, highlight=False)


def _chosen(paths: Sequence[Path], conditions: Sequence[str] | None, *, strict: bool = False) -> list[Run]:
    """The runs that the conditions are true of; what cannot be read is told, or refused."""
    found = records.find(paths)
    if strict and found.unreadable:
        raise OutputError(found.unreadable[0])
    for message in found.unreadable:
        errors.print(f"left out: {message}", soft_wrap=True, highlight=False, markup=False)
    chosen = found.runs
    if any(condition.startswith("condition") for condition in conditions or ()):
        chosen = with_conditions(chosen)
    for condition in conditions or ():
        with usage_errors("--where"):
            chosen = records.where(chosen, condition)
    return chosen


def _with_records(path: Path) -> Path:
    """A figure's file of records."""
    file = path / RECORDS if path.is_dir() else path
    if file.exists():
        return file
    summary = path / "summary.json"
    try:
        command = json.loads(summary.read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError):
        raise OutputError(f"{file} does not exist: `relaxprop reproduce` keeps a figure's runs in it") from None
    raise OutputError(f"{file} does not exist, as its records were not kept; computes them again: {command}")


def _check_fraction(flag: str, value: float) -> None:
    if not 0 < value < 1:
        raise typer.BadParameter(f"must be in (0, 1), got {value}", param_hint=flag)
