"""What holds on complete real data only; it runs where RELAXPROP_DATA names a folder."""

from __future__ import annotations

from functools import lru_cache

import pytest

from relaxprop.lab import data
from relaxprop.lab.config import RunConfig
from relaxprop.lab.training import train

pytestmark = pytest.mark.real_data
load = lru_cache(2)(data.load)  # which takes seconds


@pytest.mark.parametrize(("name", "mean", "std"), [("mnist", 33.318, 78.567), ("fashion_mnist", 72.940, 90.021)])
def test_the_complete_data(name: str, mean: float, std: float) -> None:
    """Sizes and moments as published with the data (pixels 0 to 255)."""
    loaded = load(name)
    assert loaded.train.images.shape == (60_000, 1, 28, 28)
    assert loaded.test.images.shape == (10_000, 1, 28, 28)
    pixels = loaded.train.images.double() * 255
    assert float(pixels.mean()) == pytest.approx(mean, abs=1e-3)
    assert float(pixels.std()) == pytest.approx(std, abs=1e-3)
    assert loaded.test.labels.bincount().sum() == 10_000


def test_one_epoch_of_mnist_as_in_the_paper() -> None:
    mnist = load("mnist")
    (relaxed,) = train(RunConfig(dataset="mnist", rule="ar", epochs=1), mnist)
    (exact,) = train(RunConfig(dataset="mnist", rule="backprop", epochs=1), mnist)
    assert relaxed.test_accuracy >= 0.885
    assert abs(relaxed.test_accuracy - exact.test_accuracy) <= 0.005


@pytest.mark.parametrize(
    ("name", "digest", "shape", "classes"),
    [
        ("mnist", "a63d816db5", (60_000, 1, 28, 28), ("0", "1", "9")),
        ("fashion_mnist", "6c0eefea18", (60_000, 1, 28, 28), ("T - shirt / top", "Trouser", "Ankle boot")),
        ("cifar10", "e6b01d8bd6", (20_000, 3, 32, 32), ("airplane", "automobile", "truck")),
        ("cifar100", "97e2d90d93", (20_000, 3, 32, 32), ("apple", "aquarium_fish", "worm")),
        ("svhn", "6447a57ab3", (5_000, 3, 32, 32), ("0", "1", "9")),
    ],
)
def test_the_data_are_those_of_the_kept_results(
    name: str, digest: str, shape: tuple[int, ...], classes: tuple[str, ...]
) -> None:
    """Runs are found by the digest of their data; other copies of a data set's part have another one."""
    loaded = load(name)
    if loaded.train.images.shape != shape:
        pytest.skip(f"another part of {name}")
    assert (loaded.digest, (*loaded.classes[:2], loaded.classes[-1])) == (digest, classes)
