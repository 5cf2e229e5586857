"""A data set in memory, each split as one tensor, and the data sets that are known by name.

May import: nothing of this project.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Source(NamedTuple):
    """Where a data set is at home, how many images are the whole of it, and its column of classes if it has several."""

    repository: str
    configuration: str | None
    sizes: tuple[int, int]
    label_column: str | None = None


HUB = {
    "mnist": Source("ylecun/mnist", None, (60_000, 10_000)),
    "fashion_mnist": Source("zalando-datasets/fashion_mnist", None, (60_000, 10_000)),
    "cifar10": Source("uoft-cs/cifar10", None, (50_000, 10_000)),
    "cifar100": Source("uoft-cs/cifar100", None, (50_000, 10_000), "fine_label"),
    "svhn": Source("ufldl-stanford/svhn", "cropped_digits", (73_257, 26_032)),
}
EMBEDDED = ("digits", "docstrings")
DATASETS = (*EMBEDDED, *HUB)
DATA_VARIABLE = "RELAXPROP_DATA"


class DataError(Exception):
    """A data set is missing or cannot be read; the message says which file, which column and what to do."""


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
    colour: str | None = field(default=None, kw_only=True)  # that all images were given

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
        """The name, with the sizes where this is a part of the published data, and the colour that all were given."""
        if self.name == "docstrings":
            return f"docstrings of Python {platform.python_version()}'s standard library"
        title = title_of(self.name, (len(self.train), len(self.test)))
        return title if self.colour is None else f"{title}, all {'grey' if self.colour == 'L' else self.colour}"

    @property
    def chance(self) -> float:
        """Test accuracy of naming the most frequent class, in [0, 1]."""
        labels = self.test.labels.flatten()
        return float(labels.bincount().max()) / len(labels)

    @cached_property
    def digest(self) -> str:
        """Tells data sets of the same name apart: a subset from the whole, say."""
        content = hashlib.sha256()
        for split in (self.train, self.test):
            for tensor in (split.images, split.labels):
                content.update(str(tuple(tensor.shape)).encode())
                content.update(tensor.cpu().numpy().tobytes())
        return content.hexdigest()[:10]

    def held_out(self, count: int) -> Dataset:
        """So many of the training images, always the same ones, in the test images' place, and the others to train on.

        Raises:
            DataError: if none would be left to train on.
        """
        if not 0 < count < len(self.train):
            raise DataError(f"{count} of {len(self.train)} training images of {self.name} cannot be held out")
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))
        train, test = (
            Split(self.train.images[rows], self.train.labels[rows]) for rows in (order[count:], order[:count])
        )
        return Dataset(self.name, self.classes, train, test)

    def enlarged(self, factor: int) -> Dataset:
        """The same with every pixel repeated so many times in height and in width.

        Raises:
            DataError: if it is a text.
        """
        if not self.is_images:
            raise DataError(f"{self.name} is a text, which has no pixels to repeat")
        train, test = (
            Split(split.images.repeat_interleave(factor, -1).repeat_interleave(factor, -2), split.labels)
            for split in (self.train, self.test)
        )
        return Dataset(self.name, self.classes, train, test)

    def signed(self) -> Dataset:
        """The same with inputs in [−1, 1], as the authors' code has them for its CNN."""
        train, test = (Split(2 * split.images - 1, split.labels) for split in (self.train, self.test))
        return replace(self, train=train, test=test)

    def to(self, device: torch.device | str, memory_format: torch.memory_format = torch.contiguous_format) -> Dataset:
        """The same on another device, the images in a memory format."""
        train, test = (split.to(device, memory_format) for split in (self.train, self.test))
        return replace(self, train=train, test=test)


def title_of(name: str, sizes: tuple[int, int]) -> str:
    """The name of images, with the sizes of the splits where they are not those of the published data."""
    if name not in HUB or sizes == HUB[name].sizes:
        return name
    return f"{name} (subset: {sizes[0]:,} / {sizes[1]:,} images)"
