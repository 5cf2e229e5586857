"""What holds on complete real data only; it runs where RELAXPROP_DATA names a folder."""

from __future__ import annotations

import pytest
import torch

from relaxprop.lab import data
from relaxprop.lab.config import RunConfig
from relaxprop.lab.training import train

pytestmark = pytest.mark.real_data


@pytest.mark.parametrize(("name", "mean", "std"), [("mnist", 33.318, 78.567), ("fashion_mnist", 72.940, 90.021)])
def test_the_complete_data(name: str, mean: float, std: float) -> None:
    """Sizes and moments as published with the data (pixels 0 to 255)."""
    loaded = data.load(name)
    assert loaded.train.images.shape == (60_000, 1, 28, 28)
    assert loaded.test.images.shape == (10_000, 1, 28, 28)
    pixels = loaded.train.images.double() * 255
    assert float(pixels.mean()) == pytest.approx(mean, abs=1e-3)
    assert float(pixels.std()) == pytest.approx(std, abs=1e-3)
    assert loaded.test.labels.bincount().sum() == 10_000


def test_one_epoch_of_mnist_as_in_the_paper() -> None:
    torch.set_num_threads(2)
    mnist = data.load("mnist")
    (relaxed,) = train(RunConfig(dataset="mnist", rule="ar", epochs=1), mnist)
    (exact,) = train(RunConfig(dataset="mnist", rule="backprop", epochs=1), mnist)
    assert relaxed.test_accuracy >= 0.885
    assert abs(relaxed.test_accuracy - exact.test_accuracy) <= 0.005
