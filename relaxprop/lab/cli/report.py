"""Show what was found.

May import: lab.cli.options, lab.experiments.gathered, lab.report.html.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relaxprop.lab.cli.options import print_paths
from relaxprop.lab.experiments.gathered import gather
from relaxprop.lab.report.html import write_report


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Run directories, folders of them, files of records (runs.jsonl), and folders of results.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
) -> None:
    """Write one HTML file that opens without a network: the paper's claims, our numbers, curves, costs, and records."""
    print_paths([write_report(gather(paths), out)])
