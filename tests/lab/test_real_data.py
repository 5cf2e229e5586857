"""What holds on complete real data only; it runs where RELAXPROP_DATA names a folder."""

from __future__ import annotations

import pytest

from relaxprop.lab import data
from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import Dataset
from relaxprop.lab.experiments.gathered import KNOWN
from relaxprop.lab.training import train

pytestmark = pytest.mark.real_data

MOMENTS = {"mnist": (33.318, 78.567), "fashion_mnist": (72.940, 90.021)}
KEPT = {  # digest, shape of the training images, the first two classes and the last
    "mnist": ("a63d816db5", (60_000, 1, 28, 28), ("0", "1", "9")),
    "fashion_mnist": ("6c0eefea18", (60_000, 1, 28, 28), ("T - shirt / top", "Trouser", "Ankle boot")),
    "cifar10": ("e6b01d8bd6", (20_000, 3, 32, 32), ("airplane", "automobile", "truck")),
    "cifar100": ("97e2d90d93", (20_000, 3, 32, 32), ("apple", "aquarium_fish", "worm")),
    "svhn": ("6447a57ab3", (5_000, 3, 32, 32), ("0", "1", "9")),
}


@pytest.fixture(scope="module")
def loaded(request: pytest.FixtureRequest) -> Dataset:
    """It takes seconds: all tests of a data set come one after the other."""
    return data.load(request.param)


def of(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("loaded", names, indirect=True, scope="module")


@of("mnist", "fashion_mnist")
def test_the_complete_data(loaded: Dataset) -> None:
    """Sizes and moments as published with the data (pixels 0 to 255)."""
    assert loaded.train.images.shape == (60_000, 1, 28, 28)
    assert loaded.test.images.shape == (10_000, 1, 28, 28)
    pixels = loaded.train.images.double() * 255
    mean, std = MOMENTS[loaded.name]
    assert float(pixels.mean()) == pytest.approx(mean, abs=1e-3)
    assert float(pixels.std()) == pytest.approx(std, abs=1e-3)
    assert loaded.test.labels.bincount().sum() == 10_000


@of(*KEPT)
def test_the_data_are_those_of_the_kept_results(loaded: Dataset) -> None:
    """Runs are found by the digest of their data; other copies of a data set's part have another one."""
    digest, shape, classes = KEPT[loaded.name]
    if loaded.train.images.shape != shape:
        pytest.skip(f"another part of {loaded.name}")
    assert (loaded.digest, (*loaded.classes[:2], loaded.classes[-1])) == (digest, classes)


@of(*KEPT)
def test_what_guessing_reaches_on_the_kept_data(loaded: Dataset) -> None:
    title, chance = KNOWN[loaded.digest]
    assert title == loaded.title
    assert chance == pytest.approx(float(loaded.test.labels.bincount().max()) / len(loaded.test), rel=1e-12)


@of("mnist")
def test_one_epoch_of_mnist_as_in_the_paper(loaded: Dataset) -> None:
    (relaxed,) = train(RunConfig(dataset="mnist", rule="ar", epochs=1), loaded)
    (exact,) = train(RunConfig(dataset="mnist", rule="backprop", epochs=1), loaded)
    assert relaxed.test_accuracy >= 0.885
    assert abs(relaxed.test_accuracy - exact.test_accuracy) <= 0.005
