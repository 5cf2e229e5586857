"""Keep the records of runs as they finish.

May import: lab.cli.options, lab.cli.records, lab.experiments.records, lab.files, lab.records, lab.report.figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relaxprop.lab.cli.options import DataDirOption, RunsOption, console, load_dataset, print_paths
from relaxprop.lab.cli.records import print_figure
from relaxprop.lab.experiments import records
from relaxprop.lab.files import check_writable
from relaxprop.lab.records import RECORDS
from relaxprop.lab.report.figures import write_figure


def collect(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help=f"A figure's folder, with its {RECORDS}, or a new one.")
    ],
    runs: RunsOption = Path("runs"),
    command: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND", help="Of a new folder: the relaxprop reproduce … that computes the runs, in quotes."
        ),
    ] = None,
    data_dir: DataDirOption = None,
) -> None:
    """Add to a figure's records what is finished in --runs, and make its tables and plots of what is there so far.

    Each condition counts over the seeds that are finished in it and in what it is compared with.
    """
    check_writable(folder)
    found = records.collect(folder / RECORDS, runs, lambda name: load_dataset(name, data_dir), command)
    figure, paths = write_figure(folder)
    print_figure(figure)
    print_paths(paths)
    console.print(
        f"{len(found.added)} runs added: {found.there} of {found.planned} are there", soft_wrap=True, highlight=False
    )
