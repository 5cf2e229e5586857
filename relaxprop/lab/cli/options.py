"""What all commands share: how they print, and how they refuse.

The commands that only read records start without PyTorch: what needs it is in `settings`.

May import: public names, solvers.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Annotated

import typer
from pydantic_core import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(
    help="Train networks by Activation Relaxation, and see it beside backpropagation (arXiv 2010.06219).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True)
RunsOption = Annotated[
    Path, typer.Option(help="Folder of run directories; finished runs there are not computed again.")
]


@contextmanager
def usage_errors(option: str, *, of_fields: bool = False) -> Iterator[None]:
    """Turns what an object of the library refuses into a usage error, in the words of the command line or, where the
    option takes fields of a run's description, in those of the description."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        message = spoken(first["msg"].removeprefix("Value error, "))
        if not first["loc"]:
            raise typer.BadParameter(message, param_hint=option) from error
        name = str(first["loc"][0])
        flag = {"dropped": "--drop-derivatives"}.get(name, f"--{name.replace('_', '-')}")
        raise typer.BadParameter(f"{message}, got {first['input']!r}", param_hint=flag) from error
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error) if of_fields else spoken(str(error)), param_hint=option) from error


def spoken(message: str) -> str:
    """A message of the library in the words of the command line: options in place of arguments."""
    quantities, solvers, settings = _names()
    unfrozen = rf"\b({quantities})=False"

    def unfreeze(found: re.Match[str]) -> str:
        return " ".join(f"--unfreeze {name}" for name in re.findall(unfrozen, found[0])) or "everything frozen"

    message = re.sub(r"frozen=Frozen\([^)]*\)", unfreeze, message)
    message = re.sub(unfrozen, r"--unfreeze \1", message)
    classes = rf"\b(?:solver=)?({'|'.join(solvers)})\([^)]*\)"
    message = re.sub(classes, lambda found: f"--solver {solvers[found[1]]}", message)
    message = re.sub(rf"\b({settings})=\(?'?([\w.-]+)'?\)?", r"--\1 \2", message)
    message = re.sub(rf"^({settings})(?= (must|has|may)|:)", r"--\1", message)
    return re.sub(rf"\b({quantities}|{settings})\b", lambda found: found[0].replace("_", "-"), message)


@cache
def _names() -> tuple[str, dict[str, str], str]:
    """Of the library: quantities that may be unfrozen, solvers by class, settings."""
    from relaxprop import Frozen  # here, as PyTorch takes seconds to import
    from relaxprop.solvers import SOLVERS

    settings = {
        **dict.fromkeys(("solver", "vertices", "initial", "loss", "dataset", "condition")),
        **{field.name: None for kind in SOLVERS.values() for field in fields(kind)},
    }
    quantities = "|".join(field.name for field in fields(Frozen))
    return quantities, {kind.__name__: name for name, kind in SOLVERS.items()}, "|".join(settings)


def this_command() -> str:
    return shlex.join(["relaxprop", *sys.argv[1:]])


def progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=errors)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="right" if i and rows[0][i][:1].isdigit() else "left")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def print_paths(paths: list[Path]) -> None:
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True)


@contextmanager
def says_what_is_kept(what: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"stopped: {what}", soft_wrap=True)
        raise SystemExit(130) from None
