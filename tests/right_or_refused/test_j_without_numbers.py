"""Shapes without numbers, on the device meta and within FakeTensorMode, as one plans memory or counts operations.

Where nothing is cut, the gradients have their shapes, as without the wrapper. A phase that looks at numbers says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from relaxprop import (
    ActivationRelaxation,
    ClosedForm,
    Continuous,
    DirectFeedback,
    Equilibrium,
    EquilibriumPropagation,
    Euler,
    Frozen,
    PredictiveCoding,
    use_feedback,
)
from tests.compare import assert_same_gradients, backward, gradients, refuses
from tests.problems import mlp


@contextmanager
def on_meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


@contextmanager
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


everywhere = pytest.mark.parametrize("without_numbers", [on_meta, fake])


@everywhere
@pytest.mark.parametrize(
    "setting", [{}, {"initial": "zero"}, {"solver": Equilibrium()}, {"solver": Equilibrium(), "vertices": "modules"}]
)
def test_what_needs_no_cut_gives_gradients_their_shapes(
    without_numbers: Callable[[], Any], setting: dict[str, Any]
) -> None:
    with without_numbers():
        network = mlp(4, 5, 3)
        model = ActivationRelaxation(network, **setting)
        for _ in range(2):
            backward(cross_entropy(model(torch.zeros(6, 4)), torch.zeros(6, dtype=torch.long)))
    for p in network.parameters():
        assert isinstance(p.grad, Tensor)
        assert (p.grad.shape, p.grad.device) == (p.shape, p.device)


@everywhere
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda network: ActivationRelaxation(network, solver=ClosedForm(0.1, 10)),
        lambda network: ActivationRelaxation(network, solver=Euler(0.1, 10)),
        lambda network: ActivationRelaxation(network, solver=Euler(tolerance=1e-3)),
        lambda network: ActivationRelaxation(network, solver=Continuous(5.0)),
        lambda network: ActivationRelaxation(network, keep_states=True),
        lambda network: ActivationRelaxation(network, measure_residual=True),
        lambda network: ActivationRelaxation(network, frozen=Frozen(update_activity=False)),
        lambda network: ActivationRelaxation(
            network, solver=Euler(0.1, 10), frozen=Frozen(relaxation_derivative=False)
        ),
        DirectFeedback,
        lambda network: PredictiveCoding(network, cross_entropy, num_steps=3),
        lambda network: EquilibriumPropagation(network, cross_entropy, num_steps=3),
    ],
)
def test_a_phase_that_looks_at_numbers_says_so(
    without_numbers: Callable[[], Any], wrapped: Callable[[nn.Module], nn.Module]
) -> None:
    with without_numbers():
        model, labels = wrapped(mlp(4, 5, 3)), torch.zeros(6, dtype=torch.long)
        more = {"target": labels} if isinstance(model, PredictiveCoding | EquilibriumPropagation) else {}
        with refuses(ValueError, "computes shapes without numbers", "a real device", "wrapper.module", "needs no cut"):
            model(torch.zeros(6, 4), **more)


def test_a_model_that_is_made_on_meta_trains_once_it_has_weights() -> None:
    plain, x = mlp(4, 5, 3), torch.randn(6, 4)
    expected = gradients(plain, [x])
    for setting in ({}, {"solver": ClosedForm(0.5, 100)}, {"solver": Euler(0.5, 100)}):
        with torch.device("meta"):
            model = ActivationRelaxation(mlp(4, 5, 3), **setting)
        model.to_empty(device="cpu")
        model.load_state_dict(plain.state_dict())
        assert_same_gradients(gradients(model, [x]), expected, 1e-6)


def test_operations_are_counted_as_without_the_wrapper() -> None:
    with torch.device("meta"):
        network, x = mlp(4, 5, 3), torch.zeros(6, 4)
        counts = []
        for model in (network, ActivationRelaxation(network)):
            with FlopCounterMode(display=False) as counter:
                backward(model(x).sum())
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@everywhere
@pytest.mark.parametrize("rule", ["learned", "mirror", "random", "fixed-sign"])
def test_backwards_weights_begin_as_large_as_weights_that_are_there(
    without_numbers: Callable[[], Any], rule: Any
) -> None:
    with without_numbers():
        network = mlp(4, 5, 3)
        with refuses(ValueError, "module '0'", "no numbers yet", "skip=(Linear,)"):
            use_feedback(network, rule)
        assert type(network[0]) is nn.Linear


@everywhere
@pytest.mark.parametrize("rule", ["sign", "batch-sign"])
def test_backwards_weights_that_follow_the_weights_need_none(without_numbers: Callable[[], Any], rule: Any) -> None:
    with without_numbers():
        network = use_feedback(mlp(4, 5, 3), rule)
        backward(ActivationRelaxation(network)(torch.zeros(6, 4)).sum())
    assert network[0].weight.grad is not None
