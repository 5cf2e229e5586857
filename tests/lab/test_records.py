"""Records of finished runs as one file: written with every figure, and taken over without computing anything again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relaxprop.lab import data
from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import Dataset, Split
from relaxprop.lab.engines.grid import run_all
from relaxprop.lab.engines.work import EpochDone, Event
from relaxprop.lab.files import OutputError
from relaxprop.lab.results import Head, RunLine
from relaxprop.lab.store import read_run, take_over, write_lines


@pytest.fixture(scope="module")
def digits() -> Dataset:
    whole = data.load("digits")
    few = Split(whole.train.images[:128], whole.train.labels[:128])
    return Dataset(whole.name, whole.classes, few, few)


def lines_of(digits: Dataset, root: Path, path: Path) -> list[str]:
    """Two finished runs, kept as a file; its lines."""
    configs = [RunConfig(epochs=2, seed=0), RunConfig(epochs=2, seed=0, rule="backprop")]
    runs = run_all(configs, digits, root=root)
    write_lines(path, Head(command="relaxprop reproduce demo", runs=2), [RunLine.of(run) for run in runs])
    return path.read_text().splitlines()


def test_runs_are_taken_over_and_not_computed_again(digits: Dataset, tmp_path: Path) -> None:
    head, *lines = lines_of(digits, tmp_path / "computed", tmp_path / "runs.jsonl")
    assert json.loads(head) == {"command": "relaxprop reproduce demo", "runs": 2}
    assert len(lines) == 2
    there = tmp_path / "taken"
    taken = take_over(tmp_path / "runs.jsonl", there)
    assert sorted(taken) == sorted(path.name for path in (tmp_path / "computed").iterdir())
    assert take_over(tmp_path / "runs.jsonl", there) == []
    told: list[Event] = []
    configs = [read_run(tmp_path / "computed" / id).config for id in taken]
    again = run_all(configs, digits, root=there, on_event=told.append)
    assert [event.computed for event in told if isinstance(event, EpochDone)] == [False] * 4
    for run in again:
        kept = read_run(tmp_path / "computed" / run.config.id)
        assert (run.metrics, run.environment) == (kept.metrics, kept.environment)
        assert not (there / run.config.id / "checkpoint.safetensors").exists()


def test_what_is_no_whole_record_is_refused_by_its_line(digits: Dataset, tmp_path: Path) -> None:
    head, first, second = lines_of(digits, tmp_path / "computed", tmp_path / "runs.jsonl")
    edited = json.loads(second)
    edited["config"]["seed"] = 7
    cases = {
        "line 2 is no run": "{",
        "line 2: the description's id is": json.dumps(edited),
        "has not all of its 2 epochs": json.dumps(json.loads(first) | {"metrics": json.loads(first)["metrics"][:1]}),
    }
    for message, line in cases.items():
        (tmp_path / "wrong.jsonl").write_text(f"{head}\n{line}\n")
        with pytest.raises(OutputError, match=message):
            take_over(tmp_path / "wrong.jsonl", tmp_path / "taken")
    with pytest.raises(OutputError, match=r"missing\.jsonl is no file of records"):
        take_over(tmp_path / "missing.jsonl", tmp_path / "taken")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(OutputError, match=r"empty\.jsonl is no file of records"):
        take_over(tmp_path / "empty.jsonl", tmp_path / "taken")


def test_an_unfinished_run_is_not_written_over(digits: Dataset, tmp_path: Path) -> None:
    lines_of(digits, tmp_path / "computed", tmp_path / "runs.jsonl")
    run_all([RunConfig(epochs=1, seed=0)], digits, root=tmp_path / "begun")
    with pytest.raises(OutputError, match="unfinished run with weights"):
        take_over(tmp_path / "runs.jsonl", tmp_path / "begun")
