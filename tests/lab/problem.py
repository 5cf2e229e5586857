"""A small data set and what of a run's metrics is the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence

from relaxprop.lab import data
from relaxprop.lab.data import Dataset, Split
from relaxprop.lab.results import EpochMetrics


def few_digits() -> Dataset:
    """320 of scikit-learn's digits to train on."""
    whole = data.load("digits")
    train = Split(whole.train.images[:320], whole.train.labels[:320])
    return Dataset("digits", whole.classes, train, whole.test)


def learning(metrics: Sequence[EpochMetrics]) -> list[tuple[float, float]]:
    """Training losses and test accuracies, without the times."""
    return [(m.train_loss, m.test_accuracy) for m in metrics]
