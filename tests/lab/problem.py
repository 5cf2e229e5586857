"""A small data set, what of a run's metrics is the same on every machine, and what a command says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from typer.testing import CliRunner

from relaxprop.lab import data
from relaxprop.lab.cli.main import app
from relaxprop.lab.data import Dataset, Split
from relaxprop.lab.files import OutputError
from relaxprop.lab.results import EpochMetrics


def few_digits() -> Dataset:
    """320 of scikit-learn's digits to train on."""
    whole = data.load("digits")
    train = Split(whole.train.images[:320], whole.train.labels[:320])
    return Dataset("digits", whole.classes, train, whole.test)


def learning(metrics: Sequence[EpochMetrics]) -> list[tuple[float, float]]:
    """Training losses and test accuracies, without the times."""
    return [(m.train_loss, m.test_accuracy) for m in metrics]


def invoke(*args: str | Path) -> tuple[int, str]:
    """A command's status and what it says, in one line and as wide as it likes."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "300"})
    if isinstance(result.exception, OutputError):
        return 1, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, re.sub(r"[│┃╭╮╰╯─\s]+", " ", result.output)
