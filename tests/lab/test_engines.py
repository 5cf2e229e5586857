"""Engines: whatever computes a grid of runs, and whatever happens to it meanwhile, the results are the same."""

from __future__ import annotations

import io
import logging
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from relaxprop.lab.cli.main import app
from relaxprop.lab.cli.progress import GridProgress
from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import DataError, Dataset, Split
from relaxprop.lab.engines import work
from relaxprop.lab.engines.grid import GridError, run_all
from relaxprop.lab.engines.processes import cores, default_workers, processes
from relaxprop.lab.engines.serial import serial
from relaxprop.lab.engines.work import Engine, EpochDone, Event, Failed, Finished, Job, Said, Started
from relaxprop.lab.files import OutputError
from relaxprop.lab.results import EpochMetrics, FinishedRun
from tests.lab.problem import few_digits, learning

TWO = partial(processes, workers=2)
GRID = [
    RunConfig(epochs=2, seed=seed, **values)
    for seed in range(2)
    for values in ({}, {"rule": "backprop"}, {"feedback": {"all": "learned"}, "alignment_every": 3})
]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return few_digits()


@pytest.fixture(scope="module")
def expected(digits: Dataset) -> list[FinishedRun]:
    return run_all(GRID, digits, root=None)


def results(runs: Sequence[FinishedRun]) -> list[object]:
    """All that has to be the same to the last bit: times differ."""
    cosines = [[(s.gradients, s.feedback) for m in run.metrics for s in m.alignment] for run in runs]
    return [(run.config.id, learning(run.metrics), c) for run, c in zip(runs, cosines, strict=True)]


def left(root: Path) -> set[str]:
    return {path.name for folder in root.iterdir() for path in folder.iterdir()}


FILES = {
    "certificate.json", "checkpoint.previous.safetensors", "checkpoint.safetensors", "config.json",
    "environment.json", "locality.json", "metrics.jsonl",
}  # fmt: skip


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "not-kept"])
def test_two_workers_give_what_one_process_gives(
    kept: bool, digits: Dataset, expected: list[FinishedRun], tmp_path: Path
) -> None:
    told: list[Event] = []
    found = run_all(GRID, digits, root=tmp_path if kept else None, engine=TWO, on_event=told.append)
    assert results(found) == results(expected)
    assert all(run.environment["threads"] == 1 for run in found)
    for config in GRID:
        own = [type(e) for e in told if getattr(e, "run", None) == config.id]
        assert own == [Started, EpochDone, EpochDone, Finished]
    if kept:
        assert left(tmp_path) == FILES
        again: list[Event] = []
        assert results(run_all(GRID, digits, root=tmp_path, engine=TWO, on_event=again.append)) == results(expected)
        assert not any(e.computed for e in again if isinstance(e, EpochDone))


def test_the_machines_threads_do_not_matter(digits: Dataset, expected: list[FinishedRun]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = run_all(GRID[:2], digits, root=None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert results(found) == results(expected[:2])
    assert RunConfig(threads=2).id != RunConfig().id


def _killing(target: Callable[[Event], bool]) -> Callable[[Event], None]:
    """Kills a worker, once, when the event is told."""
    killed: list[int] = []

    def on_event(event: Event) -> None:
        if not killed and target(event):
            child = multiprocessing.active_children()[0]
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            killed.append(child.pid)

    return on_event


@pytest.mark.parametrize("after", [Started, EpochDone, Finished])
def test_a_killed_workers_run_is_taken_up_again(
    after: type[Event], digits: Dataset, expected: list[FinishedRun], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kill = _killing(lambda event: isinstance(event, after))
    found = run_all(GRID, digits, root=tmp_path, engine=TWO, on_event=kill)
    assert results(found) == results(expected)
    assert left(tmp_path) == FILES
    if after is not Finished:
        assert "was killed by SIGKILL: the run is taken up again from its checkpoint" in caplog.text


def test_what_was_left_of_a_finished_run_is_removed(digits: Dataset, tmp_path: Path) -> None:
    """As by a worker that was killed between the last epoch and the end of its run."""
    found = run_all(GRID[:1], digits, root=tmp_path)
    (tmp_path / GRID[0].id / "lock").write_text("process 1 on a machine")
    (tmp_path / GRID[0].id / ".metrics.jsonl.1.partial").touch()
    assert results(run_all(GRID[:1], digits, root=tmp_path)) == results(found)
    assert left(tmp_path) == FILES


def _die(job: Job, dataset: Dataset) -> Iterator[Event]:
    (run,) = job.runs
    yield Started(run)
    if job.configs[0].seed == 1:
        os._exit(7)
    yield Finished(run, {})


def test_a_run_whose_worker_always_dies_fails_and_the_others_go_on(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from relaxprop.lab.engines import processes as room

    fork = torch.multiprocessing.get_context("fork")  # so that the worker has the replacement
    monkeypatch.setattr(room, "_CONTEXT", fork)
    monkeypatch.setattr(room, "compute", _die)
    configs = [RunConfig(seed=seed, epochs=1) for seed in range(3)]
    told: list[Event] = []
    with pytest.raises(GridError, match=rf"1 of 3 runs have failed.*{configs[1].id}.*ended with status 7"):
        run_all(configs, digits, root=None, engine=TWO, on_event=told.append)
    assert {e.run for e in told if isinstance(e, Finished)} == {configs[0].id, configs[2].id}
    assert sum(isinstance(e, Said) for e in told) == work.ATTEMPTS - 1
    assert [e.run for e in told if isinstance(e, Failed)] == [configs[1].id]


@pytest.mark.parametrize("engine", [serial, TWO], ids=["serial", "processes"])
def test_a_run_that_fails_is_named_and_the_others_go_on(
    engine: Engine, digits: Dataset, expected: list[FinishedRun], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The environment's file is damaged: read where the run is finished, it is no defect of the folder as a whole."""
    configs = [GRID[0], RunConfig(epochs=1, optimizer="adam", learning_rate=1e30), GRID[1]]
    run_all(configs[:1], digits, root=tmp_path)
    broken = Dataset(digits.name, digits.classes, digits.train, Split(digits.test.images[:, :0], digits.test.labels))
    with pytest.raises(GridError, match=rf"2 of 3 runs have failed.*{GRID[1].id} \(RuntimeError: .*same command"):
        run_all(configs, broken, root=tmp_path, engine=engine)
    assert "Traceback" in caplog.text
    found = run_all(configs, digits, root=tmp_path, engine=engine)
    assert results([found[0], found[2]]) == results(expected[:2])


@pytest.mark.parametrize("engine", [serial, TWO], ids=["serial", "processes"])
def test_a_folder_that_cannot_be_written_ends_the_grid(engine: Engine, digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the run's folder"):
        run_all(GRID, digits, root=tmp_path / "file", engine=engine)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("engine", [serial, TWO], ids=["serial", "processes"])
def test_data_that_do_not_fit_end_the_grid(engine: Engine, digits: Dataset) -> None:
    with pytest.raises(DataError, match="left_out=9 minibatches"):
        run_all([RunConfig(left_out=9)], digits, root=None, engine=engine)


def test_a_run_that_diverges_is_recorded_and_the_grid_goes_on(digits: Dataset, tmp_path: Path) -> None:
    configs = [RunConfig(epochs=2, learning_rate=10.0, rule=rule) for rule in ("ar", "backprop")]
    progress = GridProgress(configs, {c.id: c.rule for c in configs}, Console(file=io.StringIO()))
    found = run_all([*configs, GRID[0]], digits, root=tmp_path)
    assert results(found[2:]) == results(run_all(GRID[:1], digits, root=None))
    for run in found[:2]:
        assert math.isnan(run.metrics[-1].train_loss)
        for metrics in run.metrics:
            progress(EpochDone(run.config.id, metrics, True))
        progress(Finished(run.config.id, {}))
    assert progress.diverged == {c.id for c in configs}
    assert "2 of 2 runs done, 2 diverged" in progress.summary()


def test_who_stops_looking_ends_the_workers(digits: Dataset, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, EpochDone):
            raise StopError

    with pytest.raises(StopError):
        run_all(GRID, digits, root=tmp_path, engine=TWO, on_event=stop)
    assert not multiprocessing.active_children()


# ------------------------------------------------------------------------------------------------- on the command line


def arguments(folder: Path, *options: str) -> list[str]:
    return [
        "reproduce", "demo", "--epochs", "2", "--seeds", "2", "--condition", "b",
        "--runs", str(folder / "runs"), "--out", str(folder / "figure"), *options,
    ]  # fmt: skip


def reproduce(folder: Path, *options: str) -> list[str]:
    """What it says of its progress. In this process: a new one takes seconds to import PyTorch."""
    done = CliRunner().invoke(app, arguments(folder, *options), env={"COLUMNS": "300"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stderr.splitlines()


def started(folder: Path, output: int) -> subprocess.Popen[str]:
    """The command on two workers, in a process and a group of its own: a terminal's signal goes to the whole group."""
    return subprocess.Popen(
        [sys.executable, "-m", "relaxprop", *arguments(folder, "--workers", "2")],
        stdout=output, stderr=output, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def _records(folder: Path) -> dict[str, list[tuple[float, float]]]:
    return {
        path.parent.name: learning([EpochMetrics.model_validate_json(line) for line in path.read_text().splitlines()])
        for path in (folder / "runs").glob("*/metrics.jsonl")
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[float, float]]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    reproduce(folder, "--workers", "1")
    return _records(folder)


def test_ctrl_c_stops_all_workers_and_keeps_what_is_finished(
    tmp_path: Path, uninterrupted: dict[str, list[tuple[float, float]]]
) -> None:
    process = started(tmp_path, subprocess.PIPE)
    assert process.stderr is not None
    assert "1 of 6 runs done" in process.stderr.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
    with suppress(ProcessLookupError):  # until nobody of the group is left
        while True:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    finished = reproduce(tmp_path, "--workers", "2")
    assert [line.split("; ")[1].split(",")[0] for line in finished[:-1]] == [f"{i} of 6 runs done" for i in range(1, 7)]
    assert _records(tmp_path) == uninterrupted


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_grid_goes_on_to_the_same(
    seed: int, tmp_path: Path, uninterrupted: dict[str, list[tuple[float, float]]]
) -> None:
    """SIGKILL to the whole group at some time; `make test-crash` does that 50 times."""
    delay = 4.0 * torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    process = started(tmp_path, subprocess.DEVNULL)
    while not list((tmp_path / "runs").glob("*/config.json")):
        assert process.poll() is None, "the grid ended before it began"
        time.sleep(0.01)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reproduce(tmp_path, "--workers", "2")
    assert _records(tmp_path) == uninterrupted
    assert left(tmp_path / "runs") == FILES


def test_progress_goes_into_a_file_line_by_line(tmp_path: Path) -> None:
    lines = reproduce(tmp_path)
    assert not any("\x1b" in line for line in lines)
    assert len(lines) == 7
    assert all("test accuracy" in line and "runs done" in line for line in lines[:-1])
    assert lines[-1].startswith("6 of 6 runs done, after 0:00:")


def test_the_live_table_shows_what_runs(digits: Dataset) -> None:
    configs = [RunConfig(epochs=4, seed=seed) for seed in range(3)]
    progress = GridProgress(configs, {c.id: f"b, seed {c.seed}" for c in configs}, Console(width=100))
    first, second = configs[0].id, configs[1].id
    metrics = [EpochMetrics(epoch=i, train_loss=1.0, test_accuracy=0.5, seconds=1.0) for i in range(1, 5)]
    progress(Started(first))
    progress(EpochDone(first, metrics[0], False))
    progress(Started(second))
    assert progress.left is None  # nothing was computed yet
    for m in metrics[1:]:
        progress(EpochDone(first, m, True))
    progress(Finished(first, {}))
    progress(EpochDone(second, metrics[0], True))
    progress(EpochDone(second, metrics[0], True))  # as after a worker's death
    assert progress.left is not None
    with progress.console.capture() as shown:
        progress.console.print(progress.table())
    text = shown.get()
    assert "b, seed 1" in text
    assert "epoch 1/4" in text
    assert "5/12 epochs" in text
    assert "1 of 3 runs done, 1 running" in text
    progress(Failed(second, ValueError("no")))
    assert "1 of 3 runs done, 1 failed" in progress.summary()


def test_the_live_table_fits_the_terminal() -> None:
    configs = [RunConfig(epochs=4, seed=seed) for seed in range(30)]
    labels = {c.id: f"ψ-conv, seed {c.seed}" for c in configs}
    progress = GridProgress(configs, labels, Console(width=80, height=10, force_terminal=True))
    for config in configs:
        progress(Started(config.id))
    with progress.console.capture() as shown:
        progress.console.print(progress.table())
    lines = shown.get().splitlines()
    assert len(lines) <= 10
    assert "and 24 more" in lines[-3]
    assert "0/120 epochs" in lines[-2]
    assert "0 of 30 runs done, 30 running" in lines[-1]


def test_what_an_interrupted_grid_says_is_no_forecast() -> None:
    out = io.StringIO()
    configs = [RunConfig(epochs=2, seed=seed) for seed in range(2)]
    labels = {c.id: c.id for c in configs}
    with suppress(KeyboardInterrupt), GridProgress(configs, labels, Console(file=out, width=80)) as progress:
        progress(Started(configs[0].id))
        metrics = EpochMetrics(epoch=1, train_loss=1.0, test_accuracy=0.5, seconds=1.0)
        progress(EpochDone(configs[0].id, metrics, True))
        raise KeyboardInterrupt
    assert out.getvalue().startswith("0 of 2 runs done, 1 interrupted, after 0:00:0")
    assert "left" not in out.getvalue()


def test_the_default_is_a_worker_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    from relaxprop.lab.engines import processes as room

    assert 1 <= cores() <= len(os.sched_getaffinity(0))
    for number, threads, expected in ((1, 1, 1), (2, 1, 2), (3, 2, 1), (4, 1, 4), (16, 4, 4), (2, 8, 1)):
        monkeypatch.setattr(room, "cores", lambda number=number: number)
        assert default_workers(threads) == expected


def test_a_message_of_a_worker_arrives(digits: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (config, other) = GRID[:2]
    run_all([config, other], digits, root=tmp_path)
    path = tmp_path / config.id / "metrics.jsonl"
    path.write_text(path.read_text().replace('"epoch":2', '"epoch":3'))
    caplog.set_level(logging.WARNING)
    run_all([config, other], digits, root=tmp_path, engine=TWO)
    assert f"{path} is damaged, or was edited" in caplog.text
