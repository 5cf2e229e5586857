"""Half precision by PyTorch's own recipes, and losses that are divided, in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from relaxprop import NonFiniteStateError
from relaxprop.solvers import Solver
from tests.compare import backward
from tests.integrations.problem import EQUAL, OTHER, distance, mlp, samples, weights, wrapped


def network(solver: Solver | None) -> nn.Module:
    return mlp() if solver is None else wrapped(mlp(), solver)


def scaled(solver: Solver | None, scale: float) -> tuple[dict[str, Tensor], float]:
    """The weights, and the scale at the end, after three steps of the recipe."""
    model, (x, labels) = network(solver), samples(16)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = functional.cross_entropy(model(x), labels)
        backward(scaler.scale(loss))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return weights(model), scaler.get_scale()


def test_a_gradient_scaler_trains_as_with_the_plain_model() -> None:
    expected, _ = scaled(None, 2.0**8)
    assert distance(expected, weights(mlp())) > 0.01
    for solver in EQUAL.values():
        found, scale = scaled(solver, 2.0**8)
        assert scale == 2.0**8
        assert distance(found, expected) < 0.01
    assert distance(scaled(OTHER, 2.0**8)[0], expected) > 0.03


@pytest.mark.parametrize("solver", [None, *EQUAL.values()], ids=str)
def test_an_overflow_is_the_scalers_business(solver: Solver | None) -> None:
    """It leaves the step out, halves the scale, and goes on."""
    found, scale = scaled(solver, 2.0**24)
    assert scale == 2.0**21
    assert distance(found, weights(mlp())) == 0


@pytest.mark.parametrize("solver", EQUAL.values(), ids=str)
def test_elsewhere_an_overflow_is_named(solver: Solver) -> None:
    model, (x, labels) = wrapped(mlp(), solver), samples(16)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = functional.cross_entropy(model(x), labels)
        with pytest.raises(NonFiniteStateError):
            backward(loss * torch.inf)


def test_bfloat16_autocast_trains_as_with_the_plain_model() -> None:
    def found(solver: Solver | None) -> dict[str, Tensor]:
        model, (x, labels) = network(solver), samples(16)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = functional.cross_entropy(model(x), labels)
            backward(loss)
            optimizer.step()
        return weights(model)

    expected = found(None)
    assert distance(found(EQUAL["default"]), expected) == 0
    assert distance(found(EQUAL["cut"]), expected) < 0.03
    assert distance(found(OTHER), expected) > 0.1


Loss = Callable[[Any, slice], Tensor]


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_accumulated_parts_of_a_loss_give_the_gradient_of_the_whole(parts: int) -> None:
    x, labels = samples(16, torch.float64)

    def gradients(solver: Solver | None, parts: int) -> dict[str, Tensor]:
        model = mlp(torch.float64) if solver is None else wrapped(mlp(torch.float64), solver)
        for mine in torch.arange(16).chunk(parts):
            loss = functional.cross_entropy(model(x[mine]), labels[mine])
            backward(loss / parts)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(None, 1)
    for solver in EQUAL.values():
        assert distance(gradients(solver, parts), expected) < 1e-12
    assert distance(gradients(OTHER, parts), expected) > 0.5
