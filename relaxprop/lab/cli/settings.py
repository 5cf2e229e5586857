"""What the commands that compute share: options of data, networks and devices, and what becomes of them.

May import: lab.cli.options, lab.data, lab.files, lab.models, lab.report.logs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from relaxprop.lab import data
from relaxprop.lab.cli.options import usage_errors
from relaxprop.lab.data import DATA_VARIABLE, DATASETS, Colour, Dataset
from relaxprop.lab.files import check_writable
from relaxprop.lab.models import ModelName, PapersModel
from relaxprop.lab.report.logs import LogError, Tool, check_installed

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
