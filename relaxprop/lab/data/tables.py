"""A split's table as images and classes: which columns they are, and whether the two splits agree.

May import: lab.data.dataset, lab.data.images.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relaxprop.lab.data.dataset import DataError, Dataset, Split
from relaxprop.lab.data.images import Colour, Images, decode

SHOWN = 8  # names in a message


class Table(NamedTuple):
    """A split as it is stored: a pyarrow table, what messages call it, and where relative paths start."""

    rows: Any
    name: str
    folder: Path | None = None


class Reading(NamedTuple):
    """What of a table is read, where it does not say so itself."""

    image_column: str | None = None
    label_column: str | None = None
    colour: Colour | None = None


class Labels(NamedTuple):
    """A column of classes: what they are stored as, each row's, and the names of ClassLabel."""

    kind: str
    values: list[Any]
    names: tuple[str, ...]


def assemble(name: str, train: Table, test: Table, reading: Reading) -> Dataset:
    """A data set of two tables.

    Raises:
        DataError: a table is no set of images and classes, or the two do not agree.
    """
    for table in (train, test):
        if not len(table.rows):
            raise DataError(f"{table.name} has no rows, and both splits need some")
    image_column = _image_column(train, reading.image_column)
    label_column = _label_column(train, reading.label_column, image_column)
    _check_columns(test, train, image_column, label_column)
    # What takes no time is looked at first: one image of each split, and all classes.
    _check_alike(image_column, train, test, [_images(table, image_column, reading, 1) for table in (train, test)])
    classes, numbers = _classes(label_column, train, test)
    images = [_images(table, image_column, reading) for table in (train, test)]
    _check_alike(image_column, train, test, images)
    splits = [Split(own.pixels, labels) for own, labels in zip(images, numbers, strict=True)]
    return Dataset(name, classes, *splits, colour=reading.colour)


def _images(table: Table, column: str, reading: Reading, rows: int | None = None) -> Images:
    """The first rows' images, or all."""
    import datasets

    feature = _features(table).get(column)
    declared = feature.mode if isinstance(feature, datasets.Image) else None
    cells = itertools.islice(_cells(table.rows.column(column)), rows)
    where = f"{table.name} cannot be read: column {column!r}"
    return decode(cells, where, table.folder, reading.colour, declared)


def _check_alike(column: str, train: Table, test: Table, images: Sequence[Images]) -> None:
    found = [(own.pixels.shape[2:], own.mode) for own in images]
    if found[0] != found[1]:
        described = [f"{mode} images of {height}×{width} pixels" for (height, width), mode in found]
        out = "resize them to one size" if found[0][0] != found[1][0] else "pass --colour L (grey) or --colour RGB"
        raise DataError(
            f"column {column!r} has {described[0]} (height × width) in {train.name} and {described[1]} in "
            f"{test.name}: {out}"
        )


def _classes(column: str, train: Table, test: Table) -> tuple[tuple[str, ...], list[Tensor]]:
    """The training data's classes, and each split's rows as their numbers."""
    labels, others = (_labels(table, column) for table in (train, test))
    if labels.kind != others.kind:
        raise DataError(
            f"column {column!r} has {labels.kind} in {train.name} and {others.kind} in {test.name}: write both alike"
        )
    classes = labels.names or tuple(str(value) for value in sorted(set(labels.values)))
    at_home = f"{_where(train, column)} ({_listed(classes)})"
    pairs = ((labels, train), (others, test))
    return classes, [_numbers(found, classes, _where(table, column), at_home) for found, table in pairs]


def _where(table: Table, column: str) -> str:
    return f"{table.name}, column {column!r}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (f", … ({len(names)})" if len(names) > SHOWN else "")


def _features(table: Table) -> dict[str, Any]:
    """What Hugging Face's library noted of the columns when it wrote them."""
    import datasets

    noted = (table.rows.schema.metadata or {}).get(b"huggingface")
    if noted is None:
        return {}
    try:
        return dict(datasets.Features.from_dict(json.loads(noted)["info"]["features"] or {}))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{table.name}: the description of its columns (the schema's metadata 'huggingface') cannot be read "
            f"({type(error).__name__}: {error}). Fetch the file again or write it without this description"
        ) from error


def _encoded(kind: Any) -> bool:
    """Whether an Arrow type holds encoded images: bytes, or a structure with bytes."""
    from pyarrow import types

    if types.is_struct(kind):
        kind = {field.name: field.type for field in kind}.get("bytes")
    tests = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return kind is not None and any(test(kind) for test in tests)


def _stored_as(kind: Any) -> str | None:
    """What an Arrow type can say of classes."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_integer(kind):
        return "integers"
    if types.is_boolean(kind):
        return "booleans"
    if any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view)):
        return "strings"
    return None


def _kinds(table: Table) -> dict[str, Any]:
    return {field.name: field.type for field in table.rows.schema if not field.name.startswith("__index_level_")}


def _described(table: Table) -> str:
    features = _features(table)
    return ", ".join(
        f"{name!r} ({type(features[name]).__name__ if name in features else kind})"
        for name, kind in _kinds(table).items()
    )


def _image_column(table: Table, chosen: str | None) -> str:
    import datasets

    kinds = _kinds(table)
    if chosen is not None:
        return _check_kind(table, chosen, "--image-column", "images (bytes of PNG or JPEG files, say)")
    fit = [name for name, kind in kinds.items() if _encoded(kind)]
    described = [name for name in fit if isinstance(_features(table).get(name), datasets.Image)]
    usual = [name for name in fit if name in ("image", "img")]
    return _only(table, "an Image column", "--image-column", fit, usual or described)


def _label_column(table: Table, chosen: str | None, image_column: str) -> str:
    import datasets

    kinds = _kinds(table)
    if chosen is not None:
        return _check_kind(table, chosen, "--label-column", "classes (integers or strings)")
    fit = [name for name, kind in kinds.items() if _stored_as(kind)]
    described = [name for name in fit if isinstance(_features(table).get(name), datasets.ClassLabel)]
    usual = [name for name in described or fit if name == "label"]
    return _only(table, "a ClassLabel column, or one of integers or strings", "--label-column", fit, usual or described)


def _only(table: Table, what: str, option: str, fit: list[str], first: list[str]) -> str:
    """The one column that fits, or the one of them that comes first."""
    candidates = fit if len(fit) == 1 or not first else first
    if len(candidates) == 1:
        return candidates[0]
    if not fit:
        raise DataError(
            f"{table.name} cannot be read as images and classes (an Image and a ClassLabel column): it needs {what}, "
            f"and has {_described(table) or 'no columns'}"
        )
    raise DataError(
        f"{table.name} has several columns that could be meant, {_listed(candidates)}: name {what} by {option}"
    )


def _check_kind(table: Table, column: str, option: str, what: str) -> str:
    kinds = _kinds(table)
    fits = _encoded if option == "--image-column" else _stored_as
    if column not in kinds or not fits(kinds[column]):
        state = "is not of that kind" if column in kinds else "is not there"
        raise DataError(
            f"{table.name}: {option} must name a column of {what}, and {column!r} {state}. It has {_described(table)}"
        )
    return column


def _check_columns(table: Table, train: Table, image_column: str, label_column: str) -> None:
    """The test's table must have the columns of the training data."""
    kinds = _kinds(table)
    for column, fits, what in ((image_column, _encoded, "images"), (label_column, _stored_as, "classes")):
        if column not in kinds or not fits(kinds[column]):
            raise DataError(
                f"{table.name} needs a column {column!r} of {what}, as {train.name} has, and has {_described(table)}"
            )
    for each in (train, table):
        for column in (image_column, label_column):
            if each.rows.schema.names.count(column) > 1:
                raise DataError(f"{each.name} has two columns that are called {column!r}: rename one")


def _cells(column: Any) -> Iterator[tuple[bytes | None, str | None]]:
    import pyarrow
    from pyarrow import compute

    for chunk in column.chunks:
        if not pyarrow.types.is_struct(chunk.type):
            yield from ((encoded, None) for encoded in chunk.to_pylist())
            continue
        names = [field.name for field in chunk.type]
        encoded = compute.struct_field(chunk, "bytes").to_pylist()
        paths = compute.struct_field(chunk, "path").to_pylist() if "path" in names else [None] * len(encoded)
        yield from ((b, None if p is None else str(p)) for b, p in zip(encoded, paths, strict=True))


def _labels(table: Table, column: str) -> Labels:
    import datasets

    where, feature = _where(table, column), _features(table).get(column)
    values: list[Any] = table.rows.column(column).to_pylist()
    stored = _stored_as(table.rows.schema.field(column).type) or ""
    names: tuple[str, ...] = ()
    if isinstance(feature, datasets.ClassLabel) and stored == "integers":
        names = tuple(feature.names)
    for row, value in enumerate(values):
        if value is None or value == "":
            raise DataError(f"{where}, row {row} (the first is 0): there is no class ({value!r}). Leave such rows out")
        if stored == "integers" and value < 0:
            raise DataError(
                f"{where}, row {row} (the first is 0): the class is {value}, and a class is 0 or more. Where this "
                "hides the classes of a test split, take a split that has them"
            )
        if names and value >= len(names):
            raise DataError(
                f"{where}, row {row} (the first is 0): the class is {value}, and the column's description names the "
                f"classes 0 to {len(names) - 1} ({_listed(names)}). Name all of them"
            )
    return Labels("ClassLabel" if names else f"plain {stored}", values, names)


def _numbers(labels: Labels, classes: tuple[str, ...], where: str, at_home: str) -> Tensor:
    """Each row's place among the training data's classes, found by the class's name."""
    if labels.names == classes:
        return torch.tensor(labels.values, dtype=torch.int64)
    place = {name: number for number, name in enumerate(classes)}
    numbers = []
    for row, value in enumerate(labels.values):
        name = labels.names[value] if labels.names else str(value)
        if name not in place:
            raise DataError(
                f"{where}, row {row} (the first is 0): the class {name!r} is none of those of {at_home}. Give both "
                "splits the same names, or leave such rows out"
            )
        numbers.append(place[name])
    return torch.tensor(numbers, dtype=torch.int64)
