"""What CONTRIBUTING.md shows: a new thing of each kind is a small change, applied here and tried."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

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
COMMANDS = {
    "help": ("train", "--help"),
    "solver": ("train", "--epochs", "1", "--solver", "neumann", "--num-steps", "3", "--runs", "runs"),
    "rule": ("train", "--rule", "signed", "--epochs", "2", "--runs", "signed"),
    "beta": ("train", "--rule", "signed", "--beta", "0.1"),
    "experiment": (
        "reproduce", "feedback", "--dataset", "bars", "--seeds", "2", "--epochs", "2", "--engine", "last-first",
        "--runs", "runs", "--out", "figure",
    ),
}  # fmt: skip
# The commands one after the other in one process, as each of its own would take seconds to import PyTorch.
DRIVER = f"""
import contextlib, io, json, traceback
from typer.testing import CliRunner
from relaxprop.lab.cli.main import app

told = {{}}
for name, arguments in {COMMANDS!r}.items():
    done = CliRunner().invoke(app, arguments)
    crash = "".join(traceback.format_exception(done.exception)) if done.exit_code == 1 else ""
    told[name] = (done.exit_code, done.stdout, done.stderr + crash)
with contextlib.redirect_stdout(io.StringIO()) as out:
    try:
        exec({TRIAL!r}, {{}})
        told["trial"] = (0, out.getvalue(), "")
    except Exception:
        told["trial"] = (1, out.getvalue(), traceback.format_exc())
print(json.dumps(told))
"""


class Told(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def told(package: Path) -> dict[str, Told]:
    """What the commands and the trial say, with the changed package."""
    environment = os.environ | {"PYTHONPATH": str(package), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], capture_output=True, text=True, cwd=package, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name: Told(*each) for name, each in json.loads(done.stdout).items()}


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


def test_a_new_solver_and_a_new_layer_work_and_the_messages_name_them(told: dict[str, Told]) -> None:
    tried = told["trial"]
    assert tried.status == 0, tried.err
    assert "Neumann(…)" in tried.out


def test_a_new_solver_is_on_the_command_line(told: dict[str, Told]) -> None:
    assert "neumann" in told["help"].out
    trained = told["solver"]
    assert trained.status == 0, trained.err
    assert "test accuracy" in trained.out


def test_a_new_rule_trains_by_its_name(told: dict[str, Told]) -> None:
    trained = told["rule"]
    assert trained.status == 0, trained.err
    (accuracy,) = re.findall(r"test accuracy\D*(\d+\.\d+) ?%", trained.out)[-1:]
    assert float(accuracy) > 30  # of ten digits
    refused = told["beta"]
    assert refused.status == 2
    assert "--beta" in refused.err


def test_a_new_experiment_on_a_new_data_set_by_a_new_engine(package: Path, told: dict[str, Told]) -> None:
    done = told["experiment"]
    assert done.status == 0, done.err
    assert "the weights' signs" in done.out
    table = (package / "figure" / "table.md").read_text(encoding="utf-8")
    assert all(
        name in table for name in ("Backpropagation", "signs: the weights' signs", "random: fixed random feedback")
    )
