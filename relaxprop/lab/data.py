"""Image classification data and a text, each split as one tensor.

`digits` is scikit-learn's (real handwritten digits, 8×8, embedded in that library), `docstrings` the documentation of
this Python installation's own standard library. The others come from the Hugging Face Hub or, offline, from a folder
with ``<name>/train.parquet`` and ``<name>/test.parquet`` in the Hub's schema: a column of images and one of classes.
Any data set of that kind in such a folder will do.

May import: nothing of this project.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import string
import sysconfig
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Source(NamedTuple):
    """Where a data set is at home, and how many images are the whole of it."""

    repository: str
    configuration: str | None
    sizes: tuple[int, int]


HUB = {
    "mnist": Source("ylecun/mnist", None, (60_000, 10_000)),
    "fashion_mnist": Source("zalando-datasets/fashion_mnist", None, (60_000, 10_000)),
    "cifar10": Source("uoft-cs/cifar10", None, (50_000, 10_000)),
    "cifar100": Source("uoft-cs/cifar100", None, (50_000, 10_000)),
    "svhn": Source("ufldl-stanford/svhn", "cropped_digits", (73_257, 26_032)),
}
DATASETS = ("digits", "docstrings", *HUB)
DATA_VARIABLE = "RELAXPROP_DATA"


class DataError(Exception):
    """A data set is missing or cannot be read; the message says which file and what to do."""


@dataclass(frozen=True)
class Split:
    """Images in [0, 1], shape (n, channels, height, width), and their classes, shape (n,); or stretches of a text as
    the numbers of its characters, shape (n, T), and at each place the number of the character that follows."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str, memory_format: torch.memory_format = torch.contiguous_format) -> Split:
        """The same on another device, the images in a memory format."""
        images = self.images.to(device)
        images = images.contiguous(memory_format=memory_format) if images.dim() == 4 else images
        return Split(images, self.labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A data set with its two splits."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(channels, height, width)."""
        return tuple(self.train.images.shape[1:])

    @property
    def is_images(self) -> bool:
        """Whether these are images, and not text."""
        return self.train.images.is_floating_point()

    @property
    def title(self) -> str:
        """The name, with the sizes where this is a part of the published data."""
        if self.name == "docstrings":
            return f"docstrings of Python {platform.python_version()}'s standard library"
        sizes = len(self.train), len(self.test)
        if self.name not in HUB or sizes == HUB[self.name].sizes:
            return self.name
        return f"{self.name} (subset: {sizes[0]:,} / {sizes[1]:,} images)"

    @cached_property
    def digest(self) -> str:
        """Tells data sets of the same name apart: a subset from the whole, say."""
        content = hashlib.sha256()
        for split in (self.train, self.test):
            for tensor in (split.images, split.labels):
                content.update(str(tuple(tensor.shape)).encode())
                content.update(tensor.cpu().numpy().tobytes())
        return content.hexdigest()[:10]

    def signed(self) -> Dataset:
        """The same with inputs in [−1, 1], as the authors' code has them for its CNN."""
        train, test = (Split(2 * split.images - 1, split.labels) for split in (self.train, self.test))
        return Dataset(self.name, self.classes, train, test)

    def to(self, device: torch.device | str, memory_format: torch.memory_format = torch.contiguous_format) -> Dataset:
        """The same on another device, the images in a memory format."""
        train, test = (split.to(device, memory_format) for split in (self.train, self.test))
        return Dataset(self.name, self.classes, train, test)


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Loads a data set into memory.

    Args:
        name: one of ``DATASETS``, or a folder of your own within ``data_dir``.
        data_dir: folder that holds ``<name>/{train,test}.parquet``; by default what the environment variable
            RELAXPROP_DATA names, and without it the Hub.

    Raises:
        ValueError: there is no data set of this name.
        DataError: the data are missing or cannot be read.
    """
    check_name(name, data_dir)
    if name == "digits":
        return _digits()
    if name == "docstrings":
        return _docstrings()
    folder = _folder(data_dir)
    return _from_folder(name, folder) if folder else _from_hub(name)


def check_name(name: str, data_dir: str | Path | None = None) -> None:
    """Refuse a name that is none of ``DATASETS`` and no folder within ``data_dir``, as `load` takes it.

    Raises:
        ValueError: lists what there is.
    """
    folder = _folder(data_dir)
    if name not in DATASETS and not (folder and (folder / name).is_dir()):
        raise ValueError(
            f"dataset must be one of {', '.join(DATASETS)}, or the name of a folder with train.parquet and "
            f"test.parquet within the folder that --data-dir or {DATA_VARIABLE} names, got {name!r}"
        )


def _folder(data_dir: str | Path | None) -> Path | None:
    folder = data_dir or os.environ.get(DATA_VARIABLE)
    return Path(folder).resolve() if folder else None


@lru_cache(maxsize=1)
def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=digits.target)
    return Dataset(
        "digits",
        tuple(map(str, digits.target_names)),
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
    )


TEXT_LENGTH = 32  # characters that a model sees at once
TEXT_SIZE = 400_000  # characters of the text, the last tenth of them for the test


@lru_cache(maxsize=1)
def _docstrings() -> Dataset:
    """The documentation strings of the standard library's modules in alphabetical order, their printable ASCII."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = ""
    for path in sorted(library.glob("*.py")):
        tree = ast.parse(path.read_bytes())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
        text += "".join(f"{docstring}\n\n" for docstring in found if docstring)
        if len(text) >= TEXT_SIZE:
            break
    characters = sorted(set(string.printable))
    text = "".join(c for c in text[:TEXT_SIZE] if c in characters)
    if len(text) < TEXT_SIZE / 2:
        raise DataError(f"{library} holds no sources of the standard library whose documentation could be read")
    numbers = torch.tensor([characters.index(c) for c in text])
    rows = (len(numbers) - 1) // TEXT_LENGTH
    seen, following = (numbers[i : i + rows * TEXT_LENGTH].view(rows, TEXT_LENGTH) for i in (0, 1))
    test = rows // 10
    return Dataset(
        "docstrings",
        tuple(characters),
        Split(seen[:-test], following[:-test]),
        Split(seen[-test:], following[-test:]),
    )


@lru_cache(maxsize=2)
def _from_folder(name: str, folder: Path) -> Dataset:
    import datasets
    import pyarrow.parquet

    splits: dict[str, Any] = {}
    for split in ("train", "test"):
        path = folder / name / f"{split}.parquet"
        if not path.is_file():
            raise DataError(
                f"{path} does not exist: the folder given by --data-dir or {DATA_VARIABLE} must hold "
                f"{name}/train.parquet and {name}/test.parquet, each with a column of images and one of classes"
                + (f"; without a folder the data come from {_page(name)}" if name in HUB else "")
            )
        try:
            splits[split] = _decode(datasets.Dataset(pyarrow.parquet.read_table(path)))
        except (OSError, ValueError, TypeError, SyntaxError) as error:  # SyntaxError: pillow, of a broken PNG
            raise DataError(
                f"{path} cannot be read, it is damaged or incomplete or no image data set: "
                f"{type(error).__name__}: {str(error).rstrip('.')}. Fetch the file again"
            ) from error
    return _assemble(name, splits)


@lru_cache(maxsize=2)
def _from_hub(name: str) -> Dataset:
    import datasets

    try:
        loaded = datasets.load_dataset(HUB[name].repository, HUB[name].configuration)
        splits = {split: _decode(loaded[split]) for split in ("train", "test")}
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name} could not be loaded from {_page(name)} ({type(error).__name__}: {error}). "
            f"Offline, pass --data-dir or set {DATA_VARIABLE} to a folder with {name}/train.parquet and "
            f"{name}/test.parquet, or use --dataset digits, which needs no download"
        ) from error
    return _assemble(name, splits)


def _page(name: str) -> str:
    return f"huggingface.co/datasets/{HUB[name].repository}"


def _decode(rows: Any) -> tuple[Split, tuple[str, ...]]:
    """A Hugging Face `Dataset` with an Image and a ClassLabel column, as tensors."""
    import datasets

    images = [c for c, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    labels = [c for c, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    if not images or not labels:
        raise ValueError(f"it needs an Image and a ClassLabel column, and has {dict(rows.features)}")
    pictures = [np.asarray(image) for image in rows[images[0]]]
    sizes = sorted({picture.shape for picture in pictures})
    if len(sizes) > 1:
        raise ValueError(f"all images must have one size, and these have {', '.join(map(str, sizes[:3]))}, …")
    pixels = np.stack(pictures)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    split = Split(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255).contiguous(),
        torch.tensor(rows[labels[0]][:], dtype=torch.int64),
    )
    return split, tuple(rows.features[labels[0]].names)


def _assemble(name: str, splits: dict[str, tuple[Split, tuple[str, ...]]]) -> Dataset:
    (train, classes), (test, _) = splits["train"], splits["test"]
    return Dataset(name, classes, train, test)
