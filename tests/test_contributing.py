"""What CONTRIBUTING.md shows: a new thing of each kind is a small change, applied here and tried."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import relaxprop

REPOSITORY = Path(__file__).parents[1]
CONTRIBUTING = REPOSITORY / "CONTRIBUTING.md"
pytestmark = pytest.mark.skipif(not (REPOSITORY / "docs").is_dir(), reason="it is about the repository")


def hunks() -> list[tuple[str, str]]:
    """With the file that each changes."""
    shown = re.findall(r"^```diff\n--- (\S+)\n@@\n(.*?)^```$", CONTRIBUTING.read_text(encoding="utf-8"), re.M | re.S)
    return [(path, hunk) for path, diff in shown for hunk in diff.split("@@\n")]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, with all diffs applied."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(Path(relaxprop.__file__).parent, folder / "relaxprop")
    for path, hunk in hunks():
        (folder / path).touch()  # a diff may show a new file
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        text = (folder / path).read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{path}: the diff's context is not there once"
        (folder / path).write_text(text.replace(before, after), encoding="utf-8")
    return folder


def run(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(package), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=package, env=environment, check=False
    )


TRIAL = """
import torch
from torch import nn
from relaxprop import ActivationRelaxation, ClosedForm, use_feedback
from relaxprop.feedback import Gain
from relaxprop.solvers import Neumann

torch.manual_seed(0)
network = nn.Sequential(nn.Linear(4, 5), Gain(5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).double()
x = torch.randn(3, 4).double()

def gradient(model):
    network.zero_grad()
    (model(x) ** 2).sum().backward()
    return network[0].weight.grad.clone()

exact = gradient(network)
assert torch.allclose(gradient(ActivationRelaxation(network, solver=Neumann(2))), exact, rtol=1e-12, atol=0)
assert not torch.allclose(gradient(ActivationRelaxation(network, solver=Neumann(1))), exact, rtol=1e-2)

use_feedback(network, "random")
other = gradient(ActivationRelaxation(network, solver=Neumann(2)))
assert not torch.allclose(other, exact, rtol=1e-2)
for layer in (network[0], network[1], network[3], network[5]):  # random feedback that is set to W is W^T
    layer.feedback.copy_(layer.weight.detach())
assert torch.allclose(gradient(ActivationRelaxation(network, solver=Neumann(2))), exact, rtol=1e-12, atol=0)
try:
    ActivationRelaxation(network, solver="neumann")
except TypeError as error:
    print(error)
"""


def test_the_diffs_are_shown() -> None:
    data = {f"lab/data/{name}.py" for name in ("embedded", "sources", "dataset")}
    lab = {"lab/rules.py", "lab/experiments/paper.py", "lab/engines/serial.py", "lab/cli/engines.py"} | data
    changed = {"solvers.py", "feedback.py", "rules/signed.py"} | lab
    assert {path for path, _ in hunks()} == {f"relaxprop/{path}" for path in changed}


def test_every_file_that_is_named_is_there() -> None:
    named = re.findall(
        r"`((?:relaxprop|tests|docs|results)/[^`]*|[\w-]+\.(?:toml|txt))`", CONTRIBUTING.read_text("utf-8")
    )
    assert len(named) > 50
    for path in named:
        assert (REPOSITORY / path).exists(), path


def test_the_workflow_runs_what_there_is() -> None:
    jobs = yaml.safe_load((REPOSITORY / ".github/workflows/tests.yml").read_text(encoding="utf-8"))["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    goals = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.M)
    assert {run.split()[1] for run in runs} == {"test", "test-torch", "docs"} <= set(goals)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = jobs["torch"]["strategy"]["matrix"]["torch"][0]
    assert f"torch>={oldest.removesuffix('.0')}" in project["dependencies"]
    assert f">={jobs['tests']['strategy']['matrix']['python'][0]}" == project["requires-python"]


def test_a_new_solver_and_a_new_layer_work_and_the_messages_name_them(package: Path) -> None:
    tried = run(package, "-c", TRIAL)
    assert tried.returncode == 0, tried.stderr
    assert "Neumann(…)" in tried.stdout


def test_a_new_solver_is_on_the_command_line(package: Path) -> None:
    helped = run(package, "-m", "relaxprop", "train", "--help")
    assert "neumann" in helped.stdout
    options = ("--epochs", "1", "--solver", "neumann", "--num-steps", "3", "--runs", str(package / "runs"))
    trained = run(package, "-m", "relaxprop", "train", *options)
    assert trained.returncode == 0, trained.stderr
    assert "test accuracy" in trained.stdout


def test_a_new_rule_trains_by_its_name(package: Path) -> None:
    options = ("--rule", "signed", "--epochs", "2", "--runs", str(package / "signed"))
    trained = run(package, "-m", "relaxprop", "train", *options)
    assert trained.returncode == 0, trained.stderr
    (accuracy,) = re.findall(r"test accuracy\D*(\d+\.\d+) ?%", trained.stdout)[-1:]
    assert float(accuracy) > 30  # of ten digits
    refused = run(package, "-m", "relaxprop", "train", "--rule", "signed", "--beta", "0.1")
    assert refused.returncode == 2
    assert "--beta" in refused.stderr


def test_a_new_experiment_on_a_new_data_set_by_a_new_engine(package: Path) -> None:
    options = ("--dataset", "bars", "--seeds", "2", "--epochs", "2", "--engine", "last-first")
    folders = ("--runs", str(package / "runs"), "--out", str(package / "figure"))
    done = run(package, "-m", "relaxprop", "reproduce", "feedback", *options, *folders)
    assert done.returncode == 0, done.stderr
    assert "the weights' signs" in done.stdout
    table = (package / "figure" / "table.md").read_text(encoding="utf-8")
    assert all(
        name in table for name in ("Backpropagation", "signs: the weights' signs", "random: fixed random feedback")
    )
