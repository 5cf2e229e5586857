"""Keep the records of runs as they finish, and say what all that is kept tells of the paper's claims.

May import: lab.cli.figures, lab.cli.options, lab.cli.settings, lab.experiments.claims, lab.experiments.evidence,
lab.experiments.queue, lab.experiments.records, lab.files, lab.records, lab.report.figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relaxprop.lab.cli.figures import print_figure
from relaxprop.lab.cli.options import RunsOption, console, print_paths
from relaxprop.lab.cli.settings import DataDirOption, load_dataset
from relaxprop.lab.experiments import records
from relaxprop.lab.experiments.claims import page, short_table
from relaxprop.lab.experiments.evidence import sources
from relaxprop.lab.experiments.queue import QUEUE, read_queue
from relaxprop.lab.files import check_writable, write_atomically
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


def claims(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="The folder of kept results.")] = Path("results"),
    out: Annotated[Path | None, typer.Option(help="The file to write. (default: to the terminal)")] = None,
    short: Annotated[bool, typer.Option("--short", help="Only tables of differences and verdicts.")] = False,
) -> None:
    """Say what is kept on each of the paper's claims, and what is still to be computed, as a Markdown document.

    What is to be computed stands in RESULTS/queue.toml, where there is one.
    """
    found = sources(results)
    if short:
        text = short_table(found)
    else:
        queue = read_queue(results / QUEUE) if (results / QUEUE).exists() else None
        command = f"relaxprop claims {results.resolve().name}"
        shown = "" if out is None else (Path(out.absolute().parent.name) / out.name).as_posix()
        text = page(found, queue, f"{command} --out {shown}" if shown else command)
    if out is None:
        typer.echo(text, nl=False)
        return
    check_writable(out.parent)
    write_atomically(out, text)
    print_paths([out])
