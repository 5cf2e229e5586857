"""The kept check of condition c: its equations, beside the library and beside autograd."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from relaxprop import ActivationRelaxation, Euler
from relaxprop.lab.training import squared_error
from tests.compare import backward
from tests.problems import C, mlp
from tests.scripts import RESULTS, load

pytestmark = pytest.mark.skipif(not RESULTS.is_dir(), reason="it is about the repository")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("condition-c/by_hand.py")


@pytest.mark.parametrize("what", ["update", "gradient"])
def test_what_is_computed_by_hand_is_what_the_library_and_autograd_compute(script: ModuleType, what: str) -> None:
    network = mlp(7, 6, 5, 4, 3).double()
    images, targets = torch.randn(9, 7).double(), torch.randn(9, 3).double()
    of = script.Network.of(network)
    if what == "update":
        found = script.update(of, images, targets, 0.1, 30)
        backward(squared_error(ActivationRelaxation(network, solver=Euler(0.1, 30), frozen=C)(images), targets))
    else:
        found = script.gradient(of, images, targets)
        backward(squared_error(network(images), targets))
    expected = [p.grad for p in network.parameters()]
    for ours, theirs in zip([x for pair in found for x in pair], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_the_table_is_made_of_the_outcome(script: ModuleType) -> None:
    network = mlp(7, 6, 5, 4, 3).double()
    of, images, targets = script.Network.of(network), torch.randn(9, 7).double(), torch.randn(9, 3).double()
    measured = script.measured(of, images, targets, 0.1, 30)
    assert all(abs(cosine) < 1 + 1e-12 for cosine in measured["cosine"])
    assert measured["cosine"][-1] == pytest.approx(1)  # the output layer's is the gradient
    assert measured["size"][-1] == pytest.approx(1)
    row = {"epoch": 1, "accuracy": 0.5, "loss": 1.25, "kept_accuracy": 0.25, "kept_loss": 1.5} | measured
    outcome = {"seed": 3, "command": "python by_hand.py", "environment": {"torch": "2", "gpu": None}, "epochs": [row]}
    text = script.table(outcome)
    assert "| 1 | 50.00 | 25.00 | 1.2500 | 1.5000 |" in text
    assert text.endswith("seed 3, `python by_hand.py`: torch 2\n")
