"""Backwards weights that share the signs of the weights, or mirror them by noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relaxprop import (
    ActivationRelaxation,
    Equilibrium,
    alignment,
    feedback,
    feedback_alignment,
    mirror_weights,
    use_feedback,
)
from relaxprop.feedback import Synapses
from tests.compare import assert_same, assert_same_gradients, backward, gradients, of_parameters, refuses, squares
from tests.problems import mlp

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 4),
    "conv1d": lambda: nn.Conv1d(2, 4, 3, padding=1),
    "conv2d, strided": lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
    "conv2d, dilated": lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=2),
    "conv2d, wide padding": lambda: nn.Conv2d(2, 3, 2, stride=3, padding=2, bias=False),
    "conv3d": lambda: nn.Conv3d(1, 2, (1, 2, 3)),
    "transposed": lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2),
    "transposed 1d": lambda: nn.ConvTranspose1d(2, 3, 4, dilation=2, padding=3),
}


def test_signs_follow_the_weights_and_fixed_magnitudes_stay() -> None:
    layer: Any = use_feedback(nn.Linear(30, 20).double(), "fixed-sign")
    magnitudes = layer.feedback.clone()
    assert bool((magnitudes > 0).all())
    # |N(0, s²)| of the weights' own deviation.
    assert float(magnitudes.mean()) == pytest.approx(
        float(layer.weight.detach().std()) * math.sqrt(2 / math.pi), rel=0.1
    )
    for _ in range(2):
        with torch.no_grad():
            layer.weight.normal_()
        assert torch.equal(layer.backwards_weight().sign(), layer.weight.sign())
        assert torch.equal(layer.backwards_weight().abs(), magnitudes)
    again: Any = use_feedback(nn.Linear(30, 20).double(), "fixed-sign")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.feedback, magnitudes)


def test_magnitudes_drawn_anew_are_the_rule_sign_on_average() -> None:
    torch.manual_seed(0)
    layer: Any = use_feedback(nn.Linear(30, 20).double(), "batch-sign")
    assert layer.state_dict().keys() == nn.Linear(30, 20).state_dict().keys()
    draws = torch.stack([layer._backwards_weight(layer.weight) for _ in range(400)])
    assert torch.equal(draws[0].sign(), layer.weight.sign())
    assert not torch.equal(draws[0], draws[1])
    expected = layer.weight.detach().sign() * layer.weight.detach().abs().mean()
    # Of one mean of 400 draws of |N|, the relative deviation is √(π/2 − 1) / 20 = 0.038.
    assert float((draws.mean(0) / expected - 1).abs().max()) < 5 * 0.038
    before = torch.get_rng_state()
    feedback_alignment(layer)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pass_with_drawn_magnitudes_is_one_with_these_backwards_weights() -> None:
    """By the two networks' gradients, the second with fixed backwards weights that are set to the draws."""
    torch.manual_seed(0)
    network, x = mlp(4, 6, 5, 3).double(), torch.randn(3, 4).double()
    drawn, fixed = use_feedback(copy.deepcopy(network), "batch-sign"), use_feedback(network, "random")
    torch.manual_seed(5)
    y = ActivationRelaxation(drawn, keep_states=True)(x)
    torch.manual_seed(5)
    for place in (2, 4):  # nothing is drawn for the first layer, whose input needs no error
        layer: Any = drawn[place]
        held: Any = fixed[place]
        held.feedback.copy_(layer._backwards_weight(layer.weight))
    backward(squares(y))
    backward(squares(ActivationRelaxation(fixed, solver=Equilibrium())(x)))
    assert_same_gradients(of_parameters(drawn), of_parameters(fixed))


@pytest.mark.parametrize("rule", ["fixed-sign", "batch-sign", "mirror"])
def test_every_new_rule_trains(rule: Any) -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(60, 4), torch.arange(60) % 3
    x[torch.arange(60), labels] += 2
    model = ActivationRelaxation(use_feedback(mlp(4, 16, 16, 3), rule))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(60):
        if rule == "mirror":
            mirror_weights(model)
        loss = nn.functional.cross_entropy(model(x), labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    aligned = alignment(model, lambda y: nn.functional.cross_entropy(y, labels), x)
    assert aligned["4.weight"].cosine == pytest.approx(1)
    assert aligned["0.weight"].cosine > 0.2


# ------------------------------------------------------------------------------------------------------------- mirror


@pytest.mark.parametrize("name", LAYERS)
def test_noise_mirrors_the_weights_of_every_layer(name: str) -> None:
    """The mean of y ξ^T is W: with 40,000 samples the rest is small. The bias is left out."""
    torch.manual_seed(0)
    layer: Any = use_feedback(LAYERS[name]().double(), "mirror")
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.fill_(50.0)
    mirror_weights(layer, samples=40_000, rate=1.0)
    assert_same(layer.feedback, layer.weight.detach(), tolerance=0.05)


def test_the_mirrors_formula_on_a_linear_layer() -> None:
    """One phase by a literal loop over the samples: B ← (1 − r) B + r mean(y ξ^T)."""
    layer: Any = use_feedback(nn.Linear(4, 3).double(), "mirror")
    start, W = layer.feedback.clone(), layer.weight.detach()
    torch.manual_seed(7)
    mirror_weights(layer, samples=5, rate=0.3)
    torch.manual_seed(7)
    total = torch.zeros_like(W)
    for xi in torch.randn(5, 4, dtype=torch.float64):
        total += torch.outer(W @ xi, xi)
    assert_same(layer.feedback, 0.7 * start + 0.3 * total / 5)


def test_the_distance_to_the_weights_decays_by_one_minus_the_rate() -> None:
    """E[B_n] − W = (1 − r)^n (B_0 − W), and what is left is the noise of the last 1 / r phases."""
    torch.manual_seed(1)
    layer: Any = use_feedback(nn.Linear(10, 8).double(), "mirror")
    away = layer.feedback - layer.weight.detach()
    for n in range(1, 9):
        mirror_weights(layer, samples=20_000, rate=0.3)
        assert_same(layer.feedback - layer.weight.detach(), 0.7**n * away, tolerance=0.05 / 0.7**n)
    for _ in range(30):
        mirror_weights(layer, samples=2000, rate=0.3)
    (found,) = feedback_alignment(layer).values()
    assert found.cosine > 0.99


def test_the_phase_of_noise_changes_the_mirrors_alone() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(use_feedback(nn.Linear(3, 4), "mirror"), nn.Tanh(), use_feedback(nn.Linear(4, 2), "random"))
    before = {name: x.clone() for name, x in network.state_dict().items()}
    mirror_weights(ActivationRelaxation(network))
    changed = {name for name, x in network.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {"0.feedback"}
    assert all(p.grad is None for p in network.parameters())


def test_arguments_are_refused_by_name() -> None:
    network = use_feedback(mlp(3, 4, 2), "mirror")
    with refuses(TypeError, "module must be a torch.nn.Module, got int"):
        mirror_weights(3)  # type: ignore[arg-type]
    with refuses(ValueError, "samples must be at least 1, got 0"):
        mirror_weights(network, samples=0)
    with refuses(TypeError, "samples must be a whole number, got 1.5"):
        mirror_weights(network, samples=1.5)  # type: ignore[arg-type]
    for rate in (0.0, -0.1, 1.5, math.nan):
        with refuses(ValueError, "rate must be in (0, 1]"):
            mirror_weights(network, rate=rate)
    with refuses(ValueError, "no layer of Sequential has the rule 'mirror'", "use_feedback(module, 'mirror')"):
        mirror_weights(use_feedback(network, "random"))


def test_a_layer_without_known_noise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T

    own = Synapses(forward, lambda layer, weight, gradient, shape: gradient @ weight)
    monkeypatch.setitem(feedback.LAYERS, nn.Linear, own)
    use_feedback(mlp(3, 4, 2), "random")
    with refuses(ValueError, "module '0'", "no noise is known that reaches every weight of Linear"):
        use_feedback(mlp(3, 4, 2), "mirror")


def test_gradients_by_a_perfect_mirror_are_backpropagations() -> None:
    network, x = mlp(4, 6, 5, 3).double(), torch.randn(3, 4).double()
    exact = gradients(network, (x,))
    use_feedback(network, "mirror")
    for layer in network:
        if isinstance(layer, nn.Linear):
            held: Any = layer
            held.feedback.copy_(layer.weight.detach())
    assert_same_gradients(gradients(ActivationRelaxation(network), (x,)), exact)
