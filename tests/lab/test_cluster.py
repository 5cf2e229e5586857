"""The engine on a Ray cluster: a real one of this machine, for as long as these tests run (`make test-cluster`)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'relaxprop[cluster]'")

from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import Dataset
from relaxprop.lab.engines import ray as engine
from relaxprop.lab.engines.grid import run_all
from relaxprop.lab.engines.ray import ClusterError, connect, on_ray
from relaxprop.lab.engines.work import EpochDone, Event
from relaxprop.lab.files import OutputError
from relaxprop.lab.results import BATCHED
from tests.lab.problem import few_digits, learning

# Ray's own: it opens files and sockets that it leaves to the garbage collector, and warns of future versions.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
GRID = [RunConfig(epochs=3, seed=seed, rule=rule) for seed in range(2) for rule in ("ar", "backprop")]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    import ray

    command = Path(sys.executable).with_name("ray")
    port = _free_port()
    subprocess.run(
        [command, "start", "--head", "--num-cpus=2", f"--port={port}", "--include-dashboard=false"],
        check=True, capture_output=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    address = f"127.0.0.1:{port}"
    connect(address)
    yield address
    ray.shutdown()
    subprocess.run([command, "stop", "--force"], check=True, capture_output=True)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return few_digits()


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "not-kept"])
def test_a_cluster_gives_what_one_process_gives(kept: bool, cluster: str, digits: Dataset, tmp_path: Path) -> None:
    found = run_all(GRID, digits, root=tmp_path if kept else None, engine=on_ray)
    expected = run_all(GRID, digits, root=None)
    assert [learning(run.metrics) for run in found] == [learning(run.metrics) for run in expected]
    assert all(run.environment["threads"] == 1 for run in found)
    if kept:
        again: list[Event] = []
        run_all(GRID, digits, root=tmp_path, engine=on_ray, on_event=again.append)
        assert not any(e.computed for e in again if isinstance(e, EpochDone))


def test_a_cluster_trains_many_seeds_as_one_network(cluster: str, digits: Dataset, tmp_path: Path) -> None:
    found = run_all(GRID, digits, root=tmp_path, engine=on_ray, batched_seeds=True)
    expected = run_all(GRID, digits, root=None, batched_seeds=True)
    assert [learning(run.metrics) for run in found] == [learning(run.metrics) for run in expected]
    assert all(run.environment[BATCHED] == 2 for run in found)


def test_a_killed_workers_run_is_taken_up_again(
    cluster: str, digits: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The process that holds a run's lock is a worker's."""
    config = RunConfig(epochs=40, seed=5)
    killed: list[int] = []

    def kill(event: Event) -> None:
        if isinstance(event, EpochDone) and event.metrics.epoch == 3 and not killed:
            holder = (tmp_path / config.id / "lock").read_text()
            killed.append(int(holder.split()[1]))
            assert killed[0] != os.getpid()
            os.kill(killed[0], signal.SIGKILL)

    (found,) = run_all([config], digits, root=tmp_path, engine=on_ray, on_event=kill)
    (expected,) = run_all([config], digits, root=None)
    assert killed
    assert learning(found.metrics) == learning(expected.metrics)
    assert "has died (" in caplog.text
    assert "the run is taken up again from its checkpoint" in caplog.text
    assert not (tmp_path / config.id / "lock").exists()


def test_what_a_run_refuses_ends_the_grid(cluster: str, digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the run's folder"):
        run_all(GRID, digits, root=tmp_path / "file", engine=on_ray)


def test_on_the_command_line(cluster: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "relaxprop", "reproduce", "demo", "--epochs", "1", "--seeds", "2", "--engine", "ray",
            "--address", cluster, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--condition", "b",
        ],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "6 of 6 runs done" in done.stderr
    assert (tmp_path / "out" / "table.md").exists()


# ----------------------------------------------------------------------------------------------------------- no cluster


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:port", ":6379", "127.0.0.1:99999999"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match=r"HOST:PORT|no Ray cluster answers"):
        connect(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1", "no-such-host.invalid"])
def test_an_address_that_does_not_answer_is_refused_in_seconds(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PATIENCE", 1.0)
    began = time.monotonic()
    with pytest.raises(ClusterError, match=rf"no Ray cluster answers at {host}:.*start one by ray start --head"):
        connect(f"{host}:{_free_port()}")
    assert time.monotonic() - began < 60
