"""Records of finished runs as one file: written with every figure, and taken over without computing anything again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from relaxprop.lab import data
from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import Dataset, Split
from relaxprop.lab.engines.grid import run_all
from relaxprop.lab.engines.work import EpochDone, Event
from relaxprop.lab.files import OutputError
from relaxprop.lab.records import find
from relaxprop.lab.results import Head, RunLine
from relaxprop.lab.store import read_lines, read_run, refuse_to_discard, take_over, write_lines
from tests.lab.problem import invoke


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


def test_a_longer_run_does_not_write_over_one_without_weights(digits: Dataset, tmp_path: Path) -> None:
    lines_of(digits, tmp_path / "computed", tmp_path / "runs.jsonl")
    (taken, *_) = take_over(tmp_path / "runs.jsonl", tmp_path / "taken")
    kept = (tmp_path / "taken" / taken / "metrics.jsonl").read_bytes()
    config = RunConfig.model_validate_json((tmp_path / "taken" / taken / "config.json").read_text())
    longer = config.model_copy(update={"epochs": config.epochs + 1})
    with pytest.raises(OutputError, match=f"a run of {config.epochs} epochs without its weights.*by --runs"):
        run_all([longer], digits, root=tmp_path / "taken")
    assert (tmp_path / "taken" / taken / "metrics.jsonl").read_bytes() == kept
    run_all([config], digits, root=tmp_path / "taken")  # it is finished


def test_records_that_a_command_does_not_make_are_not_written_over(digits: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    lines_of(digits, tmp_path / "computed", path)
    kept = {run.config.id: run.config.epochs for run in read_lines(path).runs}
    refuse_to_discard(path, lambda _, run: kept[run.id])
    refuse_to_discard(path, lambda _, run: kept[run.id] + 1)
    refuse_to_discard(tmp_path / "none.jsonl", lambda _, run: 0)
    for makes in (lambda *_: 0, lambda *_: 1):  # none of them, or shorter ones
        with pytest.raises(OutputError, match=f"not make {len(kept)} of them.*move that file away.*--out"):
            refuse_to_discard(path, makes)
    path.write_text("")
    with pytest.raises(OutputError, match=r"it is empty.*would write over it: move that file away"):
        refuse_to_discard(path, lambda _, run: 9)


def test_a_smaller_command_does_not_write_over_a_figures_records(tmp_path: Path) -> None:
    figure: list[str | Path] = ["reproduce", "figure1", "--dataset", "digits", "--condition", "b", "--epochs", "1"]
    where: list[str | Path] = ["--runs", tmp_path / "runs", "--out", tmp_path / "out"]
    status, said = invoke(*figure, "--seeds", "2", *where)
    assert status == 0, said
    kept = (tmp_path / "out" / "runs.jsonl").read_bytes()
    for smaller in ([*figure, "--seeds", "1"], [*figure[:4], "--condition", "a", "--epochs", "1", "--seeds", "2"]):
        status, said = invoke(*smaller, *where)
        assert status == 1
        assert "holds 6 runs of 'relaxprop" in said
        assert "name another folder by --out" in said
        assert (tmp_path / "out" / "runs.jsonl").read_bytes() == kept
    status, said = invoke(*figure, "--seeds", "3", *where)  # more than there was
    assert status == 0, said
    assert len((tmp_path / "out" / "runs.jsonl").read_text().splitlines()) == 1 + 9


def test_what_cannot_be_read_or_written_is_named(digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    lines_of(digits, tmp_path / "runs", tmp_path / "kept" / "runs.jsonl")
    (run, *_) = sorted(path.name for path in (tmp_path / "runs").iterdir())
    for out in (".", "/", ""):
        status, said = invoke("export", tmp_path / "kept", "--out", out)
        assert status == 1
        assert "it is a folder, name a file" in said
    (tmp_path / "results" / "x").mkdir(parents=True)
    (tmp_path / "results" / "x" / "runs.jsonl").write_bytes(b"\xff\xfe\x00")
    status, said = invoke("claims", tmp_path / "results")
    assert status == 1
    assert f"{tmp_path / 'results' / 'x' / 'runs.jsonl'} is no file of records" in said
    (tmp_path / "runs" / run / "environment.json").write_text("[]")
    status, said = invoke("show", run, "--runs", tmp_path / "runs")
    assert status == 1
    assert "is damaged, or of another format" in said
    (tmp_path / "runs" / run / "config.json").unlink()
    (tmp_path / "runs" / run / "config.json").mkdir()
    status, said = invoke("show", run, "--runs", tmp_path / "runs")
    assert status == 1
    assert f"cannot read the run in {tmp_path / 'runs' / run}" in said


def test_a_run_in_a_list_is_what_its_checkpoint_says(digits: Dataset, tmp_path: Path) -> None:
    """As `relaxprop show` has it, where the metrics were edited, are gone, or are of an epoch that was not finished."""
    (run,) = run_all([RunConfig(epochs=2, seed=0)], digits, root=tmp_path)
    folder = tmp_path / run.config.id
    lines = (folder / "metrics.jsonl").read_text()
    first, second = lines.splitlines()
    third = json.dumps(json.loads(second) | {"epoch": 3})
    edited = json.dumps(json.loads(second) | {"test_accuracy": 0.99})
    for text in (lines, f"{first}\n{edited}\n", f"{lines}{third}\n", f"{first}\n", None):
        if text is None:
            (folder / "metrics.jsonl").unlink()
        else:
            (folder / "metrics.jsonl").write_text(text)
        (found,) = find([tmp_path]).runs
        assert (found.epochs, found.last) == (2, json.loads(second))
        assert [epoch["test_accuracy"] for epoch in found.metrics()] == [m.test_accuracy for m in run.metrics]
    for damaged, message in (
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", "does not say of which epoch it is"),
        (b"\x00\x00\x00\x00\x00\x00\x00\x40", "shorter than it says"),
        (b"\xff" * 8, "shorter than it says"),
        (b"", "does not|EOF|expected"),
    ):
        (folder / "checkpoint.safetensors").write_bytes(damaged)
        (said,) = find([tmp_path]).unreadable
        assert re.search(message, said)


def test_a_run_that_was_stopped_in_its_first_checkpoint_begins_anew(digits: Dataset, tmp_path: Path) -> None:
    """The metrics are written before the checkpoint: an epoch counts once its weights are there."""
    config = RunConfig(epochs=2, seed=0)
    (whole,) = run_all([config], digits, root=tmp_path)
    folder = tmp_path / config.id
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    for checkpoint in folder.glob("checkpoint*"):
        checkpoint.unlink()
    (again,) = run_all([config], digits, root=tmp_path)
    assert [m.test_accuracy for m in again.metrics] == [m.test_accuracy for m in whole.metrics]


def test_every_folder_is_looked_at_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "out" / "cnn").mkdir(parents=True)
    (tmp_path / "out" / "cnn" / "runs.jsonl").write_text("something else\n")
    status, said = invoke(
        "reproduce", "rules", "--dataset", "digits", "--seeds", "1", "--search-seeds", "1", "--epochs", "1",
        "--condition", "dfa", "--runs", tmp_path / "runs", "--out", tmp_path / "out",
    )  # fmt: skip
    assert status == 1
    assert "is no file of records" in said
    assert "name another folder by --out" in said
    assert not (tmp_path / "out" / "mlp" / "runs.jsonl").exists()
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
