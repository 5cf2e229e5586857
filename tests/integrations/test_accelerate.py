"""Accelerate: prepared, accumulated, clipped, kept and taken apart again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from relaxprop import ActivationRelaxation
from relaxprop.solvers import Solver
from tests.compare import backward
from tests.integrations.problem import EQUAL, OTHER, ROUNDING, distance, mlp, samples, weights, wrapped

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore:.*'pin_memory' argument is set as true:UserWarning")


@pytest.fixture(autouse=True)
def _of_a_process_of_its_own() -> None:
    """Accelerate keeps the first precision that a process has asked for."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def prepared(solver: Solver | None, precision: str = "no") -> tuple[Any, Any, Any, Any]:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model: nn.Module = mlp() if solver is None else wrapped(mlp(), solver)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    data = DataLoader(TensorDataset(*samples(16)), batch_size=4)
    return accelerator, *accelerator.prepare(model, optimizer, data)


def train(accelerator: Any, model: Any, optimizer: Any, data: Any) -> None:
    for x, labels in data:
        with accelerator.accumulate(model):
            accelerator.backward(functional.cross_entropy(model(x), labels))
            accelerator.clip_grad_norm_(model.parameters(), 0.2)
            optimizer.step()
            optimizer.zero_grad()


def trained(solver: Solver | None, precision: str = "no") -> dict[str, Tensor]:
    accelerator, model, optimizer, data = prepared(solver, precision)
    train(accelerator, model, optimizer, data)
    return weights(accelerator.unwrap_model(model))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_it_trains_as_it_trains_the_plain_model(precision: str) -> None:
    expected, allowed = trained(None, precision), 1e-3 if precision == "bf16" else ROUNDING
    for solver in EQUAL.values():
        assert distance(trained(solver, precision), expected) < allowed
    assert distance(trained(OTHER, precision), expected) > 5 * allowed


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("keep", [True, False], ids=["with its autocast", "without its autocast"])
def test_what_is_unwrapped_is_the_wrapper_and_relaxes(keep: bool, precision: str) -> None:
    accelerator, prepared_model, _, _ = prepared(EQUAL["cut"], precision)
    model = accelerator.unwrap_model(prepared_model, keep_fp32_wrapper=keep)
    assert isinstance(model, ActivationRelaxation)
    x, labels = samples(4)
    backward(functional.cross_entropy(model(x), labels))
    assert model.last_relaxation is not None
    assert model.last_relaxation.vertices == 2
    assert model.module(x).dtype == torch.float32  # the plain module is still plain


@pytest.mark.parametrize("solver", [EQUAL["default"], OTHER], ids=str)
def test_a_kept_state_goes_on_as_if_nothing_had_happened(solver: Solver, tmp_path: Path) -> None:
    accelerator, model, optimizer, data = prepared(solver)
    train(accelerator, model, optimizer, data)
    accelerator.save_state(str(tmp_path))
    train(accelerator, model, optimizer, data)
    expected = weights(model)
    accelerator, model, optimizer, data = prepared(solver)
    accelerator.load_state(str(tmp_path))
    train(accelerator, model, optimizer, data)
    assert distance(weights(model), expected) == 0


def test_the_state_has_the_plain_names(tmp_path: Path) -> None:
    accelerator, model, _, _ = prepared(EQUAL["default"])
    assert list(accelerator.get_state_dict(model)) == list(mlp().state_dict())
    accelerator.save_model(model, str(tmp_path))
    read = pytest.importorskip("safetensors.torch").load_file(tmp_path / "model.safetensors")
    assert distance(dict(sorted(read.items())), dict(sorted(mlp().state_dict().items()))) == 0
