"""The command line: its commands, and how errors end it.

May import: public names, lab.cli.claims, lab.cli.measure, lab.cli.options, lab.cli.records, lab.cli.report,
lab.cli.reproduce, lab.cli.runs, lab.cli.train, lab.data, lab.engines.grid, lab.files, lab.models.
"""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from relaxprop import (
    NonFiniteStateError,
    __version__,
)
from relaxprop.lab.cli.claims import claims, collect
from relaxprop.lab.cli.measure import bench, convergence, defaults, depth, gradients
from relaxprop.lab.cli.options import app, console, errors
from relaxprop.lab.cli.records import compare, export, power, runs, table
from relaxprop.lab.cli.report import report
from relaxprop.lab.cli.reproduce import reproduce
from relaxprop.lab.cli.runs import show, take_over
from relaxprop.lab.cli.train import train
from relaxprop.lab.data import DataError
from relaxprop.lab.engines.grid import GridError
from relaxprop.lab.files import OutputError
from relaxprop.lab.models import ModelError

__all__ = ["COMMANDS", "app", "main"]

COMMANDS = (
    train, reproduce, convergence, gradients, depth, defaults, report, take_over, show, runs, export, compare, power,
    table, bench, collect, claims,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)


def _version(requested: bool) -> None:
    if requested:
        console.print(f"relaxprop {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line.

    Errors of data and results end it with one line and status 1, a network that does not fit the data with status 2, as
    wrong options do.
    """
    logger = logging.getLogger("relaxprop")
    told = _Told()
    logger.addHandler(told)
    try:
        app()
    except (DataError, GridError, ModelError, OutputError, NonFiniteStateError) as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2 if isinstance(error, ModelError) else 1) from None
    finally:
        logger.removeHandler(told)


class _Told(logging.Handler):
    """Prints what is logged, beside a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        errors.print(self.format(record), markup=False, highlight=False, soft_wrap=True)
