"""Data sets by name: embedded ones, a folder's, the Hub's.

The Hugging Face Hub or, offline, a folder with ``<name>/train.parquet`` and ``<name>/test.parquet`` holds a column of
images and one of classes. Any data set of that kind in such a folder will do.

May import: lab.data.dataset, lab.data.embedded, lab.data.images, lab.data.tables.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from relaxprop.lab.data.dataset import DATA_VARIABLE, DATASETS, EMBEDDED, HUB, DataError, Dataset
from relaxprop.lab.data.embedded import digits, docstrings
from relaxprop.lab.data.images import COLOURS, Colour
from relaxprop.lab.data.tables import Reading, Table, assemble

SPLITS = ("train", "test")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    colour: Colour | None = None,
) -> Dataset:
    """Loads a data set into memory.

    Args:
        name: one of ``DATASETS``, or a folder of your own within ``data_dir``.
        data_dir: folder that holds ``<name>/{train,test}.parquet``; by default what the environment variable
            RELAXPROP_DATA names, and without it the Hub.
        image_column: the column of the images; by default the only one, or that called image or img.
        label_column: the column of the classes; by default the only one, or that called label. Integers and strings
            without a description become the sorted classes of the training data.
        colour: "L" makes all images grey, "RGB" gives all three channels; by default they stay as they are.

    Raises:
        ValueError: if there is no data set of this name, or an option has no effect with it.
        DataError: if the data are missing, cannot be read, or the two splits do not agree.
    """
    check_name(name, data_dir)
    reading = check_reading(name, image_column, label_column, colour)
    if name in EMBEDDED:
        return {"digits": digits, "docstrings": docstrings}[name]()
    folder = _folder(data_dir)
    if folder is None:
        return _from_hub(name, reading)
    return _from_folder(name, folder, reading, tuple(_stamp(folder / name / f"{split}.parquet") for split in SPLITS))


def check_name(name: str, data_dir: str | Path | None = None) -> None:
    """Refuse a name that is none of ``DATASETS`` and no folder within ``data_dir``, as `load` takes it.

    Raises:
        ValueError: if so; it lists what there is.
    """
    folder = _folder(data_dir)
    if name not in DATASETS and not (folder and (folder / name).is_dir()):
        raise ValueError(
            f"dataset must be one of {', '.join(DATASETS)}, or the name of a folder with train.parquet and "
            f"test.parquet within the folder that --data-dir or {DATA_VARIABLE} names, got {name!r}"
        )
    try:
        check_spelling(name)
    except ValueError as error:
        raise ValueError(f"{error}, got {name!r}") from error


def check_spelling(name: str) -> str:
    """The name, if a data set can be called so: run directories and figures carry it.

    Raises:
        ValueError: if not.
    """
    if not re.fullmatch(r"(?!\.+$)[\w.-]+( [\w.-]+)*", name):
        raise ValueError(
            "a data set's name must be of letters, digits, dots, hyphens and single spaces: rename its folder"
        )
    return name


def check_reading(
    name: str, image_column: str | None = None, label_column: str | None = None, colour: str | None = None
) -> Reading:
    """The options of `load` as one.

    Raises:
        ValueError: if the colour is not known, or one of them is given for a data set that is no table.
    """
    matched = next((known for known in COLOURS if known == colour), None)
    if colour is not None and matched is None:
        raise ValueError(f"colour must be one of {', '.join(COLOURS)}, got {colour!r}")
    reading = Reading(image_column, label_column, matched)
    if name in EMBEDDED and (given := [field for field, value in reading._asdict().items() if value is not None]):
        raise ValueError(f"{given[0]} has no effect with the data set {name}, leave it out")
    return reading


def _folder(data_dir: str | Path | None) -> Path | None:
    folder = data_dir or os.environ.get(DATA_VARIABLE)
    return Path(folder).resolve() if folder else None


def _stamp(path: Path) -> tuple[int, int] | None:
    """Tells a file from what it was when it was read."""
    try:
        return path.stat().st_mtime_ns, path.stat().st_size
    except OSError:
        return None


@lru_cache(maxsize=2)
def _from_folder(name: str, folder: Path, reading: Reading, stamps: tuple[tuple[int, int] | None, ...]) -> Dataset:
    train, test = (_read(name, folder, folder / name / f"{split}.parquet") for split in SPLITS)
    return assemble(name, train, test, _with_known_label(name, train, reading))


def _read(name: str, folder: Path, path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise DataError(
            f"{path} does not exist: the folder given by --data-dir or {DATA_VARIABLE} must hold "
            f"{name}/train.parquet and {name}/test.parquet, each with a column of images and one of classes"
            + (f"; without a folder the data come from {_page(name)}" if name in HUB else "")
        )
    try:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise DataError(
                    f"{path} is a Git LFS pointer and not the data: run `git lfs pull` in its repository, or fetch the "
                    "file itself"
                )
        with pyarrow.parquet.ParquetFile(path) as parquet:
            rows = parquet.read()
        rows.validate(full=True)
    except PermissionError as error:
        raise DataError(f"{path} must not be read by you ({error.strerror}): change its permissions") from error
    except (OSError, ValueError, TypeError, NotImplementedError, MemoryError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read, it is damaged or incomplete or no Parquet file: "
            f"{type(error).__name__}: {str(error).rstrip('.')}. Fetch the file again"
        ) from error
    return Table(rows, str(path), path.parent)


@lru_cache(maxsize=2)
def _from_hub(name: str, reading: Reading) -> Dataset:
    import datasets

    try:
        loaded = datasets.load_dataset(HUB[name].repository, HUB[name].configuration)
        train, test = (Table(loaded[s].with_format("arrow")[:], f"{s} of {_page(name)}") for s in SPLITS)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name} could not be loaded from {_page(name)} ({type(error).__name__}: {error}). "
            f"Offline, pass --data-dir or set {DATA_VARIABLE} to a folder with {name}/train.parquet and "
            f"{name}/test.parquet, or use --dataset digits, which needs no download"
        ) from error
    return assemble(name, train, test, _with_known_label(name, train, reading))


def _with_known_label(name: str, table: Table, reading: Reading) -> Reading:
    """Where a published data set has several columns of classes, the one that its name stands for."""
    known = HUB[name].label_column if name in HUB else None
    if reading.label_column is None and known in table.rows.schema.names:
        return reading._replace(label_column=known)
    return reading


def _page(name: str) -> str:
    return f"huggingface.co/datasets/{HUB[name].repository}"
