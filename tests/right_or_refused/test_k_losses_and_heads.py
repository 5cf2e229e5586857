"""Losses that are written in place, scaled or set anew, several heads under direct feedback, whole scripted modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from relaxprop import (
    ActivationRelaxation,
    ClosedForm,
    DirectFeedback,
    DivergedError,
    EquilibriumPropagation,
    PredictiveCoding,
)
from tests.compare import assert_same, assert_same_gradients, backward, of_parameters, refuses
from tests.problems import mlp
from tests.right_or_refused.run_again import data, loss_of

# --------------------------------------------------------------------------------------------- the loss, and the result


@pytest.mark.parametrize("kind", [PredictiveCoding, EquilibriumPropagation])
def test_the_loss_may_be_written_in_place(kind: Any) -> None:
    (x, target), network = data(), mlp(4, 5, 3)
    model = kind(network, loss_of, num_steps=6)
    backward(model(x, target=target) / 4)
    expected = of_parameters(network)
    network.zero_grad()
    loss = model(x, target=target)
    loss /= 4
    backward(loss)
    assert_same_gradients(of_parameters(network), expected)


def test_a_write_into_the_loss_hides_no_phase_that_runs_away() -> None:
    (x, target), network = data(), mlp(4, 5, 5, 3)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(4)
    model = PredictiveCoding(network, lambda y, t: 3 * (y - t).square().sum(), step_size=0.9, num_steps=5)
    for penalty in (0.0, 1e6):
        loss = model(x, target=target)
        loss += penalty
        with pytest.raises(DivergedError):
            backward(loss)


@pytest.mark.parametrize("factor", [-1.0, 3.0, -0.2])
@pytest.mark.parametrize("centred", [True, False])
def test_a_factor_outside_scales_the_gradient_of_equilibrium_propagation_alone(factor: float, centred: bool) -> None:
    (x, target), network = data(), mlp(4, 5, 3).double()
    x, target = x.double(), target.double()
    model = EquilibriumPropagation(network, loss_of, beta=0.5, centred=centred, num_steps=6)
    backward(model(x, target=target))
    expected = {name: None if g is None else g * factor for name, g in of_parameters(network).items()}
    network.zero_grad()
    backward(factor * model(x, target=target))
    assert_same_gradients(of_parameters(network), expected)


@pytest.mark.parametrize("kind", [PredictiveCoding, EquilibriumPropagation])
def test_another_loss_may_be_set(kind: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = mlp(4, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.network(x)
            return y

    x, target = data()
    for module in (Net(), mlp(4, 5, 3)):
        parts = len(list(module.modules()))
        model = kind(module, nn.MSELoss(), num_steps=3)
        backward(model(x, target=target))
        for loss_fn in (nn.L1Loss(), functional.l1_loss):
            model.loss_fn = loss_fn
            assert model.loss_fn is loss_fn
            loss = model(x, target=target)
            assert_same(loss.detach(), functional.l1_loss(module(x), target).detach())
            module.zero_grad()
            backward(loss)
            fresh = copy.deepcopy(module)
            fresh.zero_grad()
            backward(kind(fresh, functional.l1_loss, num_steps=3)(x, target=target))
            assert_same_gradients(of_parameters(module), of_parameters(fresh))
        with refuses(TypeError, "loss_fn must map", "got 3"):
            model.loss_fn = 3
        assert model.loss_fn is functional.l1_loss
        assert len(list(module.modules())) == parts


def test_an_input_that_is_handed_back_without_a_target_stays_the_callers() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = mlp(4, 5, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.network(x), x

    x, _ = data()
    mine = nn.Linear(4, 4)(x)
    output, back = PredictiveCoding(Both(), lambda y, t: loss_of(y[0], t))(mine)
    assert back is mine
    backward(mine.sum())
    with refuses(RuntimeError, "PredictiveCoding needs the loss"):
        backward(output.sum())


# ------------------------------------------------------------------------------------------------------ direct feedback


class Heads(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(5, size) for size in sizes])

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.body(x)
        return [head(h) for head in self.heads]


def state_of(model: DirectFeedback) -> Tensor:
    assert model.last_phase is not None
    assert model.last_phase.states is not None
    return model.last_phase.states["body.1"]


@pytest.mark.parametrize("sizes", [(3, 3), (3, 4)])
def test_heads_that_are_trained_in_turn_do_not_share_a_matrix(sizes: tuple[int, int]) -> None:
    x, _ = data()
    model = DirectFeedback(Heads(*sizes), keep_states=True)
    backward(model(x)[0].sum())
    with refuses(ValueError, "reads the outputs (1,)", "for the errors of (0,)", "0 * other_output.sum()"):
        backward(model(x)[1].sum())
    model = DirectFeedback(Heads(*sizes), keep_states=True)
    states = []
    for trained in (0, 1):  # as the message says
        outputs = model(x)
        backward(outputs[trained].sum() + 0 * outputs[1 - trained].sum())
        states.append(state_of(model))
    joint = model(x)
    backward(joint[0].sum() + joint[1].sum())
    assert_same(state_of(model), states[0] + states[1])
    assert not torch.allclose(states[0], states[1])


def test_a_head_may_be_frozen_or_left_out_between_two_passes() -> None:
    (x, _), heads = data(), Heads(3, 3)
    model = DirectFeedback(heads, keep_states=True)
    backward(model(x)[1].sum())
    first = state_of(model)
    heads.heads[0].requires_grad_(False)
    heads.heads[1].requires_grad_(True)
    backward(model(x)[1].sum())
    assert_same(state_of(model), first)


def test_the_matrices_keep_their_numbers_whatever_a_pass_is_computed_in() -> None:
    x, _ = data()
    model = DirectFeedback(mlp(4, 5, 3))
    backward(model(x).sum())
    B = model.feedback["1"].clone()
    with torch.autocast("cpu", torch.bfloat16):
        backward(model(x).float().sum())
    assert torch.equal(model.feedback["1"], B)
    double = DirectFeedback(mlp(4, 5, 3).double())
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        backward(double(x.double()).sum())
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(double.feedback["1"], B.double())


@pytest.mark.parametrize("error", ["output", "target"])
def test_a_minibatch_may_be_empty(error: Any) -> None:
    x, target = data()
    model = DirectFeedback(mlp(4, 5, 3), error=error)
    more = {"target": target[:0]} if error == "target" else {}
    backward(model(x[:0], **more).sum())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    both = DirectFeedback(Heads(3, 2))
    backward(sum(y.sum() for y in both(x[:0])))
    assert all(p.grad is not None and not p.grad.any() for p in both.parameters())


# -------------------------------------------------------------------------------------------------------- whole scripts


@pytest.mark.filterwarnings("ignore:.*torch.jit.(script|trace)")
@pytest.mark.parametrize("make", [torch.jit.script, partial(torch.jit.trace, example_inputs=torch.ones(2, 4))])
def test_a_whole_scripted_module_is_one_vertex(make: Callable[..., Any]) -> None:
    (x, target), plain = data(), mlp(4, 5, 3)
    backward(loss_of(plain(x), target))
    expected = of_parameters(plain)
    plain.zero_grad()
    scripted = make(plain)
    with refuses(ValueError, "finds no vertex", "vertices='modules'"):
        ActivationRelaxation(scripted)
    for model in (
        ActivationRelaxation(scripted, vertices="modules"),
        ActivationRelaxation(scripted, vertices="modules", solver=ClosedForm(0.5, 50)),
        DirectFeedback(scripted, vertices="modules"),
    ):
        scripted.zero_grad()
        backward(loss_of(model(x), target))
        assert_same_gradients(of_parameters(scripted), expected)
