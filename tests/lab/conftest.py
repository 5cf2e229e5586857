"""Small data sets in the Hub's schema."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest


def write_split(path: Path, images: Sequence[np.ndarray] | np.ndarray, labels: list[int]) -> None:
    """Images of shape (height, width) or (height, width, 3) as a Parquet file, as the Hub has them."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"image": list(images), "label": labels}, features=features).to_parquet(path)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A folder with a data set that is called mnist and has 50 training and 20 test images of 6×6 pixels."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 50), ("test", 20)):
        images = rng.integers(0, 256, (n, 6, 6), dtype=np.uint8)
        write_split(tmp_path / "data" / "mnist" / f"{split}.parquet", images, [i % 10 for i in range(n)])
    return tmp_path / "data"
