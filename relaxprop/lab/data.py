"""Image classification data, each split as one tensor.

`digits` is scikit-learn's (real handwritten digits, 8×8, embedded in that library). The others come from the
Hugging Face Hub or, offline, from a folder with ``<name>/train.parquet`` and ``<name>/test.parquet`` in the Hub's
schema.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

DatasetName = Literal["digits", "mnist", "fashion_mnist"]
DATASETS: tuple[DatasetName, ...] = get_args(DatasetName)
HUB = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist"}
DATA_VARIABLE = "RELAXPROP_DATA"


class DataError(Exception):
    """A data set is missing or cannot be read; the message says which file and what to do."""


@dataclass(frozen=True)
class Split:
    """Images in [0, 1], shape (n, channels, height, width), and their classes, shape (n,)."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Split:
        """The same on another device."""
        return Split(self.images.to(device), self.labels.to(device))

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

    @cached_property
    def digest(self) -> str:
        """Tells data sets of the same name apart: a subset from the whole, say."""
        content = hashlib.sha256()
        for split in (self.train, self.test):
            for tensor in (split.images, split.labels):
                content.update(str(tuple(tensor.shape)).encode())
                content.update(tensor.cpu().numpy().tobytes())
        return content.hexdigest()[:10]

    def to(self, device: torch.device | str) -> Dataset:
        """The same on another device."""
        return Dataset(self.name, self.classes, self.train.to(device), self.test.to(device))


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Loads a data set into memory.

    Args:
        name: one of ``DATASETS``.
        data_dir: folder that holds ``<name>/{train,test}.parquet``; by default what the environment variable
            RELAXPROP_DATA names, and without it the Hub.

    Raises:
        ValueError: an unknown name.
        DataError: the data are missing or cannot be read.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    if name == "digits":
        return _digits()
    folder = data_dir or os.environ.get(DATA_VARIABLE)
    return _from_folder(name, Path(folder).resolve()) if folder else _from_hub(name)


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
                f"{name}/train.parquet and {name}/test.parquet in the schema of huggingface.co/datasets/{HUB[name]}; "
                "without a folder the data are downloaded from there"
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
        loaded = datasets.load_dataset(HUB[name])
        splits = {split: _decode(loaded[split]) for split in ("train", "test")}
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name} could not be loaded from huggingface.co/datasets/{HUB[name]} ({type(error).__name__}: {error}). "
            f"Offline, pass --data-dir or set {DATA_VARIABLE} to a folder with {name}/train.parquet and "
            f"{name}/test.parquet, or use --dataset digits, which needs no download"
        ) from error
    return _assemble(name, splits)


def _decode(rows: Any) -> tuple[Split, tuple[str, ...]]:
    """A Hugging Face `Dataset` with an Image and a ClassLabel column, as tensors."""
    import datasets

    images = [c for c, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    labels = [c for c, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    if not images or not labels:
        raise ValueError(f"it needs an Image and a ClassLabel column, and has {dict(rows.features)}")
    pixels = np.stack([np.asarray(image) for image in rows[images[0]]])
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
