"""Make figures' tables and plots again from kept records, and say what their claims would take.

May import: lab.bench.document, lab.cli.bench, lab.cli.options, lab.cli.records, lab.cli.settings,
lab.experiments.records, lab.experiments.rules, lab.files, lab.records, lab.report.claims, lab.report.figures,
lab.stats.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from relaxprop.lab.bench import document
from relaxprop.lab.cli.bench import print_suite
from relaxprop.lab.cli.options import console, print_paths, print_table
from relaxprop.lab.cli.records import MarginOption, check_fraction
from relaxprop.lab.cli.settings import DataDirOption, load_dataset
from relaxprop.lab.experiments import rules
from relaxprop.lab.experiments.records import complete
from relaxprop.lab.files import OutputError
from relaxprop.lab.records import RECORDS
from relaxprop.lab.report.claims import BESIDE, CLAIM, RESULT, beside_table
from relaxprop.lab.report.claims import table as cells_of
from relaxprop.lab.report.figures import Figure, read_figure, write_figure
from relaxprop.lab.stats import MARGIN, PROBABILITY


def power(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS...", help=f"Figures' folders, or their files {RECORDS}.")
    ],
    margin: MarginOption = MARGIN,
    probability: Annotated[float, typer.Option(help="With which so many seeds decide, in (0, 1).")] = PROBABILITY,
) -> None:
    """Say how many seeds each claim of a figure takes, if the mean and the spread so far are the truth."""
    check_fraction("--margin", margin)
    check_fraction("--probability", probability)
    for path in results:
        figure = read_figure(_with_records(path), margin=margin, probability=probability)
        cells = []
        for row in figure.rows:
            if (difference := row.difference) is None:
                continue
            judgement = row.judgement
            seeds = "" if judgement.p is None else judgement.would
            deviation = "" if difference.n == 1 else f"{100 * difference.deviation:.2f}"
            cells.append(
                (row.name, str(difference.n), str(difference), deviation, row.condition.claim, judgement.verdict, seeds)
            )
        print_table(
            f"{figure.about}: seeds that decide with a probability of {100 * probability:g} % at a margin of "
            f"{100 * margin:g} points",
            ("condition", "n", "difference (points)", "deviation", "paper", "verdict", "seeds"),
            cells,
        )


def table(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...", help=f"Folders of figures, with {RECORDS}, or of a benchmark, with {document.FILE}."
        ),
    ],
    data_dir: DataDirOption = None,
) -> None:
    """Make the tables and plots of a figure or a benchmark again from its records alone.

    Records older than this command lack the accuracy at chance: they are completed once, from the data set.
    """
    for folder in folders:
        if (folder / document.FILE).exists():
            measured, paths = document.make_again(folder)
            print_suite(measured)
            print_paths(paths)
            continue
        if networks := [folder] if rules.is_of_rivals(folder) else rules.networks_in(folder):
            for network in networks:
                rivals, paths = rules.write_rivals(network)
                print_rivals(rivals)
                print_paths(paths)
            if networks != [folder]:
                print_paths([rules.write_together(folder)])
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
    if beside := beside_table(figure.rows):
        print_table("beside the paper's text", BESIDE, beside)
    for note in figure.notes:
        console.print(note, soft_wrap=True, highlight=False)


def print_rivals(found: rules.Rivals) -> None:
    """The table of the learning rules in two, as a terminal is narrow."""
    shown, width = rules.cells(found.rows), 6
    print_table(f"{rules.TITLE}: {found.about}", rules.COLUMNS[:width], [cell[:width] for cell in shown])
    rest = [(cell[0], *cell[width:]) for cell in shown]
    print_table("what it takes", (rules.COLUMNS[0], *rules.COLUMNS[width:]), rest)
    for note in found.notes:
        console.print(note, soft_wrap=True, highlight=False)


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
