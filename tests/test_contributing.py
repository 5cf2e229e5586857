"""What CONTRIBUTING.md shows: a new solver and a new layer are one change in one place, applied here and tried."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import relaxprop

REPOSITORY = Path(__file__).parents[1]
CONTRIBUTING = REPOSITORY / "CONTRIBUTING.md"


def diffs() -> dict[str, str]:
    """By the file that it changes."""
    shown = re.findall(r"^```diff\n--- (\S+)\n@@\n(.*?)^```$", CONTRIBUTING.read_text(encoding="utf-8"), re.M | re.S)
    return dict(shown)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, with both diffs applied."""
    shutil.copytree(Path(relaxprop.__file__).parent, tmp_path / "relaxprop")
    for path, diff in diffs().items():
        lines = diff.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        text = (tmp_path / path).read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{path}: the diff's context is not there once"
        (tmp_path / path).write_text(text.replace(before, after), encoding="utf-8")
    return tmp_path


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


def test_both_diffs_are_shown() -> None:
    assert set(diffs()) == {"relaxprop/solvers.py", "relaxprop/feedback.py"}


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
