"""The kept measurements of the lab: their command works, and what it calls an error is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from tests.scripts import RESULTS, load

MEASURE = RESULTS / "lab-speed" / "measure.py"
pytestmark = pytest.mark.skipif(
    not MEASURE.exists(), reason="the kept results are in the repository, and not in a source distribution"
)


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    return load("lab-speed/measure.py")


def test_parts_are_measured_one_by_one(measure: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(part: str) -> dict[str, object]:
        monkeypatch.setattr(sys, "argv", [str(MEASURE), "--small", "--only", part, "--folder", str(tmp_path)])
        measure.main()
        found: dict[str, object] = json.loads((tmp_path / "outcome.json").read_text())
        return found

    first = run("d")
    assert first.keys() == {"d"}
    second = run("b")
    assert second["d"] == first["d"]
    table = (tmp_path / "table.md").read_text()
    assert "## b. What an engine adds" in table
    assert "| relaxprop runs on 100 runs |" in table
    assert f"PyTorch {torch.__version__}" in table


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    """By the command itself, in a process of its own."""
    command = [sys.executable, str(MEASURE), "--only", "a,z", "--folder", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "must be of a, b, c, d, e, f, got 'z'" in process.stderr


@pytest.mark.parametrize(
    ("values", "met"), [((1.5, 1.9, 1.8), True), ((1.5, 1.6, 1.8), False)], ids=["reached", "missed"]
)
def test_an_aim_is_met_by_the_median(measure: ModuleType, values: tuple[float, ...], met: bool) -> None:
    row = measure.spread("ratio", values, "×", least=1.7)
    assert (row.met, row.low, row.high, row.n, row.aim) == (met, min(values), max(values), 3, "≥ 1.7×")
    assert measure.spread("ratio", values, "×", most=1.7).met is not met


@pytest.mark.parametrize("rule", ["backpropagation", "PAPER"])
def test_gradients_under_bf16_differ_by_its_rounding(measure: ModuleType, rule: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))
    errors = measure.gradient_errors(network, rule, torch.randn(32, 16), torch.randn(32, 4))
    assert errors.keys() == {"0.weight", "2.weight"}
    rounding = 2.0**-9  # of a number to bfloat16's 8 bits, relative, at most
    for error in errors.values():
        assert 0.1 * rounding < error < 20 * rounding


def test_what_bf16_represents_is_exact(measure: ModuleType) -> None:
    """Of small whole numbers every product and sum has at most 8 bits."""
    network = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        for layer in (network[0], network[2]):
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(torch.arange(layer.weight.numel()).reshape(layer.weight.shape) % 3 - 1)
    inputs, targets = torch.tensor([[1.0, 2, 0], [0, 1, 1]]), torch.tensor([[1.0, 0], [0, 1]])
    errors = measure.gradient_errors(network, "backpropagation", inputs, targets)
    assert errors == {"0.weight": 0, "2.weight": 0}
