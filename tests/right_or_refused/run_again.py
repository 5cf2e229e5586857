"""What runs a model again in its backward pass: each rule and condition as a function of input and target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from relaxprop import ActivationRelaxation, EquilibriumPropagation, Euler, Frozen, PredictiveCoding

Wrap = Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(output, target)


def energy(kind: Any, **options: Any) -> Wrap:
    def wrap(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        model = kind(module, loss_of, num_steps=6, **options)
        return lambda x, target: model(x, target=target)

    return wrap


def relaxed(**options: Any) -> Wrap:
    def wrap(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        model = ActivationRelaxation(module, solver=Euler(0.2, 5), **options)
        return lambda x, target: loss_of(model(x), target)

    return wrap


RUN_AGAIN: dict[str, Wrap] = {
    "predictive coding": energy(PredictiveCoding),
    "equilibrium propagation": energy(EquilibriumPropagation, beta=0.1),
    "unfrozen derivative": relaxed(frozen=Frozen(relaxation_derivative=False)),
    "unfrozen update": relaxed(frozen=Frozen(update_derivative=False, update_activity=False)),
    "unfrozen activity": relaxed(frozen=Frozen(update_activity=False)),
}
run_again = pytest.mark.parametrize("wrap", RUN_AGAIN.values(), ids=RUN_AGAIN.keys())


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4), torch.randn(6, 3)
