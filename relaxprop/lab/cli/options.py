"""What the commands share: options, and strings that become objects.

May import: public names, solvers, lab.data, lab.files, lab.models, lab.report.logs.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from relaxprop import Frozen
from relaxprop.lab import data
from relaxprop.lab.data import DATA_VARIABLE, DATASETS, Colour, Dataset
from relaxprop.lab.files import check_writable
from relaxprop.lab.models import ModelName, PapersModel
from relaxprop.lab.report.logs import LogError, Tool, check_installed
from relaxprop.solvers import SOLVERS

app = typer.Typer(
    help="Train networks by Activation Relaxation, and see it beside backpropagation (arXiv 2010.06219).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True)
DATA_HELP = f"{', '.join(DATASETS)}, or the name of your own folder in --data-dir."
DatasetOption = Annotated[str, typer.Option(metavar="NAME", help=DATA_HELP)]
ModelOption = Annotated[ModelName, typer.Option(help="The network: the paper's, or a small one of another kind.")]
PapersModelOption = Annotated[PapersModel, typer.Option(help="The paper's network.")]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder with NAME/train.parquet and NAME/test.parquet; without it the Hugging Face Hub.",
        envvar=DATA_VARIABLE,
    ),
]
ImageColumnOption = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="The images' column. (default: the only one, or that called image or img)"),
]
LabelColumnOption = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="The classes' column. (default: the only one, or that called label)"),
]
ColourOption = Annotated[
    Colour | None, typer.Option(help="Make all images grey (L) or of three channels (RGB). (default: as they are)")
]
RunsOption = Annotated[
    Path, typer.Option(help="Folder of run directories; finished runs there are not computed again.")
]
DeviceOption = Annotated[str, typer.Option(help="PyTorch device, for instance cpu or cuda.")]
AlignmentOption = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="MINIBATCHES",
        help="Measure, once in so many minibatches, the cosine of every gradient to backpropagation's and of backwards "
        "weights to weights. Each time costs about two training steps. 0: never.",
    ),
]
LogOption = Annotated[
    list[Tool] | None,
    typer.Option(help="Write what is measured for this tool too: event files in each run's folder, or its service."),
]
AsCodedOption = Annotated[
    bool, typer.Option("--as-coded", help="As the authors' code has it, where that differs from the paper's text.")
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Fixes initial weights and minibatches.")]
EpochsOption = Annotated[int, typer.Option(help="Passes over the training data.")]


@contextmanager
def usage_errors(option: str) -> Iterator[None]:
    """Turns what an object of the library refuses into a usage error."""
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
        raise typer.BadParameter(spoken(str(error)), param_hint=option) from error


_QUANTITIES = "|".join(field.name for field in fields(Frozen))
_SOLVERS = {kind.__name__: name for name, kind in SOLVERS.items()}
_SETTINGS = "|".join(
    {
        **dict.fromkeys(("solver", "vertices", "initial", "loss", "dataset", "condition")),
        **{field.name: None for kind in SOLVERS.values() for field in fields(kind)},
    }
)


def spoken(message: str) -> str:
    """A message of the library in the words of the command line: options in place of arguments."""
    unfrozen = rf"\b({_QUANTITIES})=False"

    def unfreeze(found: re.Match[str]) -> str:
        return " ".join(f"--unfreeze {name}" for name in re.findall(unfrozen, found[0])) or "everything frozen"

    message = re.sub(r"frozen=Frozen\([^)]*\)", unfreeze, message)
    message = re.sub(unfrozen, r"--unfreeze \1", message)
    message = re.sub(rf"\b({'|'.join(_SOLVERS)})\([^)]*\)", lambda found: f"--solver {_SOLVERS[found[1]]}", message)
    message = re.sub(rf"\b({_SETTINGS})=\(?'?([\w.-]+)'?\)?", r"--\1 \2", message)
    message = re.sub(rf"^({_SETTINGS})(?= (must|has|may)|:)", r"--\1", message)
    return re.sub(rf"\b({_QUANTITIES}|{_SETTINGS})\b", lambda found: found[0].replace("_", "-"), message)


def load_dataset(
    name: str,
    data_dir: Path | None,
    *written: Path,
    image_column: str | None = None,
    label_column: str | None = None,
    colour: Colour | None = None,
) -> Dataset:
    """A data set, whose loading may take a while: so the folders that are written to afterwards are looked at first."""
    with usage_errors("--dataset"):
        data.check_name(name, data_dir)
        data.check_reading(name, image_column, label_column, colour)
    for folder in written:
        check_writable(folder)
    return data.load(name, data_dir, image_column=image_column, label_column=label_column, colour=colour)


def find_logs(names: list[Tool] | None) -> list[Tool]:
    """The tools to write to, which are installed."""
    try:
        check_installed(names or [])
    except LogError as error:
        raise typer.BadParameter(str(error), param_hint="--log") from error
    return names or []


def find_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"PyTorch cannot use {name!r} here: {reason}", param_hint="--device") from error


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
