"""What is measured, in the files and services of other tools."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from relaxprop.lab.cli.options import app
from relaxprop.lab.report.logs import FOLDER, scalars
from relaxprop.lab.results import AlignmentSample, EpochMetrics
from relaxprop.lab.store import read_run

TRAIN = ("train", "--epochs", "3", "--alignment-every", "10", "--feedback", "learned")


def invoke(*arguments: str) -> tuple[int, str]:
    import relaxprop.lab.cli.main  # noqa: F401 (the commands)

    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"[│╭╮╰╯─\s]+", " ", result.output)


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def test_event_files_hold_the_records_numbers(tmp_path: Path) -> None:
    assert invoke(*TRAIN, "--runs", str(tmp_path), "--log", "tensorboard")[0] == 0
    (run,) = tmp_path.iterdir()
    metrics = read_run(run).metrics
    found = read(run / FOLDER)
    expected = [scalars(m) for m in metrics]
    assert found.keys() == expected[0].keys()
    assert {name.partition("/")[0] for name in found} == {
        "training loss", "test accuracy", "seconds", "cosine to backpropagation's gradient",
        "cosine of backwards weights to weights",
    }  # fmt: skip
    for name, values in found.items():
        assert [step for step, _ in values] == [1, 2, 3]
        assert [value for _, value in values] == pytest.approx([e[name] for e in expected], rel=1e-6)


def test_a_run_that_goes_on_adds_to_its_files(tmp_path: Path) -> None:
    invoke(*TRAIN, "--runs", str(tmp_path), "--log", "tensorboard")
    invoke(*TRAIN, "--epochs", "5", "--runs", str(tmp_path), "--log", "tensorboard")
    (run,) = tmp_path.iterdir()
    assert [step for step, _ in read(run / FOLDER)["test accuracy"]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_every_run_of_a_grid_has_its_files(workers: str, tmp_path: Path) -> None:
    status, _ = invoke(
        "reproduce", "demo", "--epochs", "1", "--seeds", "1", "--condition", "b", "--runs", str(tmp_path / "runs"),
        "--out", str(tmp_path / "out"), "--log", "tensorboard", "--workers", workers,
    )  # fmt: skip
    assert status == 0
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 3
    for run in runs:
        ((step, accuracy),) = read(run / FOLDER)["test accuracy"]
        assert step == 1
        assert accuracy == pytest.approx(read_run(run).metrics[0].test_accuracy)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tool_that_is_missing_is_named_with_how_to_get_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in (TRAIN, ("reproduce", "demo")):
        status, text = invoke(*command, "--runs", str(tmp_path), "--log", name)
        assert status == 2
        assert f"{name} is not installed: pip install {name}" in text
    assert not list(tmp_path.iterdir())


def test_weights_and_biases_get_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its service cannot be reached here: a stand-in takes its calls."""
    told: list[Any] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            told.append((step, values))

        def finish(self) -> None:
            told.append("finished")

    def init(**options: Any) -> Run:
        told.append((options["id"], options["config"]["epochs"], options["resume"]))
        return Run()

    stand_in = types.ModuleType("wandb")
    stand_in.init = init  # type: ignore[attr-defined]
    stand_in.__spec__ = types.SimpleNamespace(name="wandb")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    assert invoke(*TRAIN, "--runs", str(tmp_path), "--log", "wandb")[0] == 0
    (run,) = tmp_path.iterdir()
    metrics = read_run(run).metrics
    assert told == [(run.name, 3, "allow"), *[(m.epoch, scalars(m)) for m in metrics], "finished"]


def test_alignment_is_averaged_over_the_epoch() -> None:
    samples = [
        AlignmentSample(epochs=e, gradients={"1.weight": c}, feedback={}, seconds=0.0) for e, c in ((0, 0.5), (0.5, 1))
    ]
    metrics = EpochMetrics(epoch=1, train_loss=1.0, test_accuracy=0.5, seconds=2.0, alignment=tuple(samples))
    assert scalars(metrics)["cosine to backpropagation's gradient/1.weight"] == 0.75
