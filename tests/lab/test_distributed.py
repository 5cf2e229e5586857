"""A run on two processes: the same global minibatches give what one process gives, up to the order of the sums."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from relaxprop.lab.checkpoint import kept_checkpoint
from relaxprop.lab.config import RunConfig
from relaxprop.lab.distributed import Group, joined
from relaxprop.lab.files import OutputError
from relaxprop.lab.models import ModelError
from relaxprop.lab.results import EpochMetrics
from relaxprop.lab.training import train
from tests.lab.problem import few_digits, invoke, learning
from tests.two_processes import as_two

RELATIVE = 1e-6


def described(**values: object) -> RunConfig:
    return RunConfig.model_validate({"epochs": 2, "alignment_every": 3} | values)


CONFIGS = {
    "backprop": RunConfig(epochs=2, rule="backprop"),
    "paper": described(),
    "three-steps": described(solver="euler", solver_options={"num_steps": 3}),
    "adam": described(optimizer="adam", learning_rate=1e-3, loss="cross-entropy"),
    "learned-feedback": described(feedback={"all": "learned"}),
    "random-feedback": described(feedback={"all": "random"}, dropped={"all": "both"}),
    "a": described(frozen={"relaxation_derivative": False}, solver_options={"num_steps": 20}),
    "b": described(frozen={"update_derivative": False}),
    "d": described(frozen={"update_activity": False}),
    "input": described(frozen={"update_activity": False, "input": False}),
    "operations": described(vertices="operations", initial="zero"),
    "odd-minibatches": described(batch_size=23, left_out=1),
    "fewer-samples-than-processes": RunConfig(epochs=1, batch_size=319),
}


INTERRUPTED = "adam"


def _run(rank: int, folder: Path) -> None:
    digits = few_digits()
    with joined(torch.device("cpu")) as group:
        assert group == Group(rank, 2)
        for name, config in CONFIGS.items():
            train(config, digits, root=folder / name)
        for _ in range(2):  # the second time it is finished: both processes are done with it at once
            train(CONFIGS[INTERRUPTED], digits, root=folder / "interrupted")
    # No model has outlived the group. What lets go of a group last joins its threads, and only the group's own Python
    # object gives Python's lock free meanwhile, for which they may wait.
    assert not [path for path in Path("/proc/self/task").glob("*/comm") if "gloo_run" in path.read_text()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, each by two processes."""
    folder = tmp_path_factory.mktemp("two")
    train(CONFIGS[INTERRUPTED].model_copy(update={"epochs": 1}), few_digits(), root=folder / "interrupted")
    as_two(_run, folder)
    return folder


def numbers(metrics: Sequence[EpochMetrics]) -> list[float]:
    samples = [sample for m in metrics for sample in m.alignment]
    cosines = [c for s in samples for c in (*s.gradients.values(), *s.feedback.values())]
    return [x for m in metrics for x in (m.train_loss, m.test_accuracy)] + cosines


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_learn_what_one_does(name: str, folder: Path, tmp_path: Path) -> None:
    config = CONFIGS[name]
    expected = train(config, few_digits(), root=tmp_path)
    (run,) = (folder / name).iterdir()
    found, exact = kept_checkpoint(run), kept_checkpoint(tmp_path / config.id)
    assert found is not None
    assert found.metrics is not None
    assert exact is not None
    assert numbers(found.metrics) == pytest.approx(numbers(expected), rel=RELATIVE, abs=RELATIVE)
    assert found.tensors.keys() == exact.tensors.keys()
    for key, x in exact.tensors.items():
        distance = float((found.tensors[key] - x).norm()) / (float(x.norm()) or 1.0)
        assert distance <= 10 * RELATIVE, f"{key} is {distance:.1e} off"  # after many updates
    assert not (run / "lock").exists()


def test_an_interrupted_run_goes_on(folder: Path) -> None:
    (found,) = (kept_checkpoint(run) for run in (folder / "interrupted").iterdir())
    expected = train(CONFIGS[INTERRUPTED], few_digits())
    assert found is not None
    assert found.metrics is not None
    assert numbers(found.metrics) == pytest.approx(numbers(expected), rel=RELATIVE, abs=RELATIVE)


@pytest.mark.parametrize(
    "options", [{"order": "asynchronous", "num_steps": 5}, {"tolerance": 1e-3, "num_steps": 5}], ids=str
)
def test_what_depends_on_the_whole_minibatch_is_refused(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from relaxprop.lab import training

    monkeypatch.setattr(training, "this_group", lambda: Group(0, 2))
    with pytest.raises(ModelError, match=r"(order asynchronous|tolerance 0.001): .*compute the run in one process"):
        train(RunConfig.model_validate({"solver": "euler", "solver_options": options}), few_digits())


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from relaxprop.lab import training

    class Second(Group):
        def agreed(self, number: int) -> int:
            return 1  # epochs, as the first process finds them

    monkeypatch.setattr(training, "this_group", lambda: Second(1, 2))
    with pytest.raises(OutputError, match="not the same for all processes: name one by --runs"):
        train(RunConfig(epochs=2), few_digits(), root=tmp_path)


def torchrun(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "relaxprop",
    ]
    return subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_on_the_command_line(tmp_path: Path) -> None:
    done = torchrun("train", "--epochs", "2", "--runs", "two", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   1/2") == 1  # the first process alone speaks
    assert invoke("train", "--epochs", "2", "--runs", tmp_path / "one")[0] == 0
    (one,), (two,) = (list((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert one.name == two.name
    found, expected = kept_checkpoint(two), kept_checkpoint(one)
    assert found is not None
    assert expected is not None
    assert found.metrics is not None
    assert expected.metrics is not None
    assert [x for pair in learning(found.metrics) for x in pair] == pytest.approx(
        [x for pair in learning(expected.metrics) for x in pair], rel=RELATIVE
    )


def test_a_grid_is_refused_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}.items():  # as torchrun sets them
        monkeypatch.setenv(name, value)
    status, text = invoke("reproduce", "demo", "--runs", tmp_path / "runs", "--out", tmp_path / "figure")
    assert status == 2
    assert "use it with relaxprop train" in text
    assert not list(tmp_path.iterdir())


def test_one_process_is_a_group_of_its_own() -> None:
    rows = torch.arange(5)
    with joined(torch.device("cpu")) as group:
        assert (group, group.is_first) == (Group(), True)
    assert torch.equal(group.share(rows), rows)
    assert [Group(rank, 2).share(rows).tolist() for rank in range(2)] == [[0, 2, 4], [1, 3]]
