"""The command line: its commands, and how errors end it.

May import: public names, lab.cli.bench, lab.cli.claims, lab.cli.figures, lab.cli.measure, lab.cli.options,
lab.cli.records, lab.cli.report, lab.cli.reproduce, lab.cli.runs, lab.cli.train, lab.data, lab.engines.grid, lab.files,
lab.models.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable
from importlib import resources
from types import ModuleType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from relaxprop import __version__
from relaxprop.lab.cli.options import app, console, errors
from relaxprop.lab.files import OutputError

__all__ = ["COMMANDS", "app", "function", "main"]

COMMANDS = {  # in the order of the help, each with the file that holds it
    "train": "train",
    "reproduce": "reproduce",
    "convergence": "measure",
    "gradients": "measure",
    "depth": "measure",
    "defaults": "measure",
    "report": "report",
    "take_over": "runs",
    "show": "runs",
    "runs": "records",
    "export": "records",
    "compare": "records",
    "power": "figures",
    "table": "figures",
    "bench": "bench",
    "collect": "claims",
    "claims": "claims",
}


def function(name: str) -> Callable[..., None]:
    """A command's, with all that it imports."""
    found: Callable[..., None] = getattr(_room(COMMANDS[name]), name)
    return found


def _room(name: str) -> ModuleType:
    """A file of commands, imported now: most of them need PyTorch, which takes seconds."""
    if name == "bench":
        from relaxprop.lab.cli import bench

        return bench
    if name == "claims":
        from relaxprop.lab.cli import claims

        return claims
    if name == "figures":
        from relaxprop.lab.cli import figures

        return figures
    if name == "measure":
        from relaxprop.lab.cli import measure

        return measure
    if name == "records":
        from relaxprop.lab.cli import records

        return records
    if name == "report":
        from relaxprop.lab.cli import report

        return report
    if name == "reproduce":
        from relaxprop.lab.cli import reproduce

        return reproduce
    if name == "runs":
        from relaxprop.lab.cli import runs

        return runs
    from relaxprop.lab.cli import train

    return train


class _OnDemand(TyperGroup):
    """Lists the commands without importing them, and imports the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            alone = typer.Typer(add_completion=False)
            alone.command(command.name)(function(str(command.name).replace("-", "_")))
            command = typer.main.get_command(alone)
        return name, command, rest


def _documentation(name: str) -> str | None:
    """A command's, from the source text alone."""
    source = resources.files("relaxprop.lab.cli").joinpath(f"{COMMANDS[name]}.py").read_text(encoding="utf-8")
    functions = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    return next(ast.get_docstring(node) for node in functions if node.name == name)


for command in COMMANDS:
    app.command(command.replace("_", "-"), help=_documentation(command))(lambda: None)


def _version(requested: bool) -> None:
    if requested:
        console.print(f"relaxprop {__version__}", highlight=False)
        raise typer.Exit


@app.callback(cls=_OnDemand)
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
    except OutputError as error:
        _end(error, 1)
    except (
        Exception
    ) as error:  # their classes are imported here only, as most of them bring PyTorch; others are raised on
        from relaxprop import NonFiniteStateError
        from relaxprop.lab.data import DataError
        from relaxprop.lab.engines.grid import GridError
        from relaxprop.lab.models import ModelError

        if isinstance(error, ModelError):
            _end(error, 2)
        if isinstance(error, (DataError, GridError, NonFiniteStateError)):
            _end(error, 1)
        raise
    finally:
        logger.removeHandler(told)


def _end(error: Exception, status: int) -> NoReturn:
    errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(status) from None


class _Told(logging.Handler):
    """Prints what is logged, beside a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        errors.print(self.format(record), markup=False, highlight=False, soft_wrap=True)
