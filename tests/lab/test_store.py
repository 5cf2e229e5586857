"""A run's directory: what damage is noticed, whose it is meanwhile, and what is left when writing fails."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch

from relaxprop.lab import checkpoint, store
from relaxprop.lab.checkpoint import PREVIOUS, kept_checkpoint
from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import Dataset
from relaxprop.lab.engines.processes import prepare
from relaxprop.lab.files import LATEST, OutputError, check_writable, write_atomically
from relaxprop.lab.results import EpochMetrics
from relaxprop.lab.store import Record, read_run
from relaxprop.lab.training import train
from tests.lab.problem import few_digits, learning

CONFIG = RunConfig(epochs=3, optimizer="adam", learning_rate=1e-3)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return few_digits()


@pytest.fixture(scope="module")
def kept(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[EpochMetrics]]:
    root = tmp_path_factory.mktemp("whole")
    return root, train(CONFIG, digits, root=root)


@pytest.fixture
def run(kept: tuple[Path, list[EpochMetrics]], tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(kept[0] / CONFIG.id, tmp_path / CONFIG.id))


def again(run: Path, digits: Dataset) -> tuple[list[EpochMetrics], list[int]]:
    """The metrics of the run in this folder, and which epochs are computed for them."""
    computed: list[int] = []
    found = train(CONFIG, digits, root=run.parent, on_epoch=lambda m: computed.append(m.epoch))
    return found, computed


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# -------------------------------------------------------------------------------------------------------------- damage

DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped-weight": lambda path: flip(path, -5),
    "flipped-number-in-the-middle": lambda path: flip(path, path.stat().st_size // 2),
    "flipped-header": lambda path: flip(path, 12),
    "flipped-metric": lambda path: flip(path, path.read_bytes().index(b"test_accuracy") + 22),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut-to-its-header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "emptied": lambda path: path.write_bytes(b""),
    "zeros-at-the-end": lambda path: path.write_bytes(path.read_bytes()[:-64] + bytes(64)),
    "another-file": lambda path: path.write_bytes(b"PK\x03\x04" * 50),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(
    damage: str,
    run: Path,
    kept: tuple[Path, list[EpochMetrics]],
    digits: Dataset,
    caplog: pytest.LogCaptureFixture,
) -> None:
    DAMAGE[damage](run / LATEST)
    found, computed = again(run, digits)
    assert computed == [3]
    assert learning(found) == learning(kept[1])
    (message,) = {record.getMessage() for record in caplog.records}
    assert f"{run / LATEST} is damaged" in message
    assert "going on from the one before, after epoch 2" in message
    caplog.clear()
    assert again(run, digits) == (found, [])  # and is whole again
    assert not caplog.records


def test_where_both_checkpoints_are_damaged_both_are_named(run: Path, digits: Dataset) -> None:
    for name in (LATEST, PREVIOUS):
        flip(run / name, -5)
    with pytest.raises(OutputError, match=rf"{LATEST} is damaged .*{PREVIOUS} is damaged .* delete the folder"):
        again(run, digits)


def test_the_previous_checkpoint_may_be_damaged_unseen(run: Path, digits: Dataset) -> None:
    flip(run / PREVIOUS, -5)
    assert again(run, digits)[1] == []


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"test_accuracy":0.', '"test_accuracy":0.9', 1),
        lambda text: text[:-30],
        lambda text: "".join(text.splitlines(keepends=True)[1:]),
        lambda text: "".join(reversed(text.splitlines(keepends=True))),
        lambda text: "",
        lambda text: text.replace('"epoch":2', '"epoch":"two"'),
        lambda text: "\x00" * len(text),
    ],
    ids=["edited", "truncated", "first-line-gone", "reordered", "emptied", "no-number", "zeros"],
)
def test_edited_metrics_are_named_and_put_back(
    edit: Callable[[str], str],
    run: Path,
    kept: tuple[Path, list[EpochMetrics]],
    digits: Dataset,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = run / "metrics.jsonl"
    path.write_text(edit(path.read_text()))
    found, computed = again(run, digits)
    assert (found, computed) == (kept[1], [])
    assert f"{path} is damaged, or was edited" in caplog.text
    caplog.clear()
    assert read_run(run).metrics == kept[1]
    longer = CONFIG.model_copy(update={"epochs": 4})
    train(longer, digits, root=run.parent)  # which writes there, and so mends the file
    caplog.clear()
    assert read_run(run).metrics[:3] == kept[1]
    assert not caplog.records


def test_a_finished_record_without_weights_counts_as_finished(
    run: Path, kept: tuple[Path, list[EpochMetrics]], digits: Dataset
) -> None:
    for name in (LATEST, PREVIOUS):
        (run / name).unlink()
    assert again(run, digits) == (kept[1], [])


def test_checkpoints_from_before_there_were_checksums_are_read(
    run: Path, kept: tuple[Path, list[EpochMetrics]], digits: Dataset
) -> None:
    """They hold the number of the epoch and no more."""
    from safetensors.torch import load_file, save_file

    save_file(load_file(run / PREVIOUS), run / LATEST, metadata={"epoch": "2"})
    (run / PREVIOUS).unlink()
    found, computed = again(run, digits)
    assert computed == [3]
    assert learning(found) == learning(kept[1])


def test_no_pickle_is_loaded(run: Path, digits: Dataset) -> None:
    (run / PREVIOUS).unlink()
    torch.save({"weights": torch.zeros(3)}, run / LATEST)
    with pytest.raises(OutputError, match="is damaged"):
        again(run, digits)


# --------------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("place", ["before the metrics", "before the checkpoint", "between two checkpoints"])
def test_a_run_that_is_stopped_while_it_writes_goes_on_to_the_same(
    place: str,
    tmp_path: Path,
    kept: tuple[Path, list[EpochMetrics]],
    digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class StopError(Exception):
        pass

    calls = dict.fromkeys(("metrics.jsonl", LATEST, "save"), 0)

    def stopped(what: str, path: Path) -> None:
        calls[what] += 1
        if calls[what] == 2:
            (path / f".{what}.half.partial").write_bytes(b"half")
            raise StopError

    def write(path: Path, content: str | bytes) -> None:
        if path.name == {"before the metrics": "metrics.jsonl", "between two checkpoints": LATEST}.get(place):
            stopped(path.name, path.parent)
        write_atomically(path, content)

    def save(folder: Path, *given: Any) -> None:
        if place == "before the checkpoint":
            stopped("save", folder)
        checkpoint.save_checkpoint(folder, *given)

    monkeypatch.setattr(store, "write_atomically", write)
    monkeypatch.setattr(checkpoint, "write_atomically", write)
    monkeypatch.setattr(store, "save_checkpoint", save)
    with pytest.raises(StopError):
        train(CONFIG, digits, root=tmp_path)
    monkeypatch.undo()
    assert list((tmp_path / CONFIG.id).glob(".*.partial"))
    assert learning(train(CONFIG, digits, root=tmp_path)) == learning(kept[1])
    left = {p.name for p in (tmp_path / CONFIG.id).iterdir()}
    assert left == {p.name for p in (kept[0] / CONFIG.id).iterdir()}


def test_a_full_disk_is_named_and_loses_nothing(
    tmp_path: Path, kept: tuple[Path, list[EpochMetrics]], digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "checkpoint" in path.name and (tmp_path / CONFIG.id / PREVIOUS).exists():
            real(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"cannot write .*checkpoint.safetensors: No space left on device"):
        train(CONFIG, digits, root=tmp_path)
    monkeypatch.undo()
    assert not list((tmp_path / CONFIG.id).glob(".*"))
    assert learning(Record(CONFIG, tmp_path).finished_epochs()) == learning(kept[1][:1])
    assert learning(train(CONFIG, digits, root=tmp_path)) == learning(kept[1])


def test_a_vanished_folder_is_named(tmp_path: Path, digits: Dataset) -> None:
    def vanish(metrics: EpochMetrics) -> None:
        shutil.rmtree(tmp_path / CONFIG.id)

    with pytest.raises(OutputError, match=rf"cannot write .*{CONFIG.id}.*: No such file or directory"):
        train(CONFIG, digits, root=tmp_path, on_epoch=vanish)


def test_a_folder_that_cannot_be_read_is_named(run: Path, digits: Dataset) -> None:
    (run / LATEST).unlink()
    (run / LATEST).mkdir()
    with pytest.raises(OutputError, match=LATEST):
        again(run, digits)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.md"
    write_atomically(path, "before")

    def fail(*given: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError, match=r"cannot write .*table.md: Input/output error"):
        write_atomically(path, "after")
    assert [p.name for p in tmp_path.iterdir()] == ["table.md"]
    assert path.read_text() == "before"


def test_a_look_whether_a_folder_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write to the folder .*file"):
        check_writable(tmp_path / "file" / "within")


# ---------------------------------------------------------------------------------------------------------- two at once


def _hold(root: Path, began: Event, enough: Event) -> None:
    with Record(CONFIG, root).opened():
        began.set()
        enough.wait(60)


class Elsewhere(logging.Handler):
    """Another process that computes the run, until it is said here that it is waited for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        forked = sys.platform == "linux"
        context = multiprocessing.get_context("forkserver") if forked else multiprocessing.get_context("spawn")
        began, self.enough = context.Event(), context.Event()
        self.process = context.Process(target=_hold, args=(root, began, self.enough))
        self.process.start()
        assert began.wait(60)

    def emit(self, record: logging.LogRecord) -> None:
        if "waiting for it" in record.getMessage():
            self.enough.set()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Elsewhere]:
    prepare()
    other = Elsewhere(tmp_path)
    logging.getLogger("relaxprop").addHandler(other)
    yield other
    logging.getLogger("relaxprop").removeHandler(other)
    other.process.kill()
    other.process.join()


def test_a_second_process_waits_and_says_for_whom(
    elsewhere: Elsewhere,
    tmp_path: Path,
    kept: tuple[Path, list[EpochMetrics]],
    digits: Dataset,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = train(CONFIG, digits, root=tmp_path)
    elsewhere.process.join(10)
    assert not elsewhere.process.is_alive()
    assert learning(found) == learning(kept[1])
    assert f"run {CONFIG.id} is computed by process {elsewhere.process.pid} on " in caplog.text
    assert "waiting for it" in caplog.text
    assert not (tmp_path / CONFIG.id / "lock").exists()


def test_what_a_killed_process_held_is_free(
    elsewhere: Elsewhere, tmp_path: Path, digits: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere.process.kill()
    elsewhere.process.join()
    caplog.set_level(logging.WARNING)
    train(CONFIG, digits, root=tmp_path)
    assert not caplog.records
    assert not (tmp_path / CONFIG.id / "lock").exists()


def test_a_checkpoint_is_the_state_to_the_last_bit(kept: tuple[Path, list[EpochMetrics]]) -> None:
    found = kept_checkpoint(kept[0] / CONFIG.id)
    assert found is not None
    assert (found.epoch, found.metrics) == (3, kept[1])
    steps = [x for name, x in found.tensors.items() if name.endswith(".step")]
    assert steps
    assert all(x.shape == () for x in steps)
