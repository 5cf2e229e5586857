"""Feedback and dropped derivatives among PyTorch's own ways of changing and calling a module: parametrizations and
pruning, put on and taken off in any order, and keyword arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from relaxprop import ActivationRelaxation, ClosedForm, Equilibrium, drop_derivatives, feedback_alignment, use_feedback
from tests.right_or_refused.verdicts import assert_same, gradients, named_gradients, squares

SETTINGS: dict[str, dict[str, Any]] = {
    "activations": {"solver": ClosedForm(0.5, 300)},
    "modules": {"solver": ClosedForm(0.5, 300), "vertices": "modules"},
    "operations": {"solver": ClosedForm(0.5, 300), "vertices": "operations"},
    "Equilibrium": {"solver": Equilibrium()},
}
every_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())


def batch(rows: int = 3) -> Tensor:
    return torch.linspace(-2, 2, 4 * rows).view(rows, 4).double().sin()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.retina, self.relay, self.readout = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.cortex, self.motor = nn.Tanh(), nn.Tanh()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.readout(self.motor(self.relay(self.cortex(self.retina(x)))))
        return y


# --------------------------------------------------------------------------------- parametrizations and use_feedback


def _on(name: str, layer: nn.Module) -> None:
    torch.manual_seed(5)
    if name == "feedback":
        use_feedback(layer, "random")
    elif name == "weight_norm":
        parametrizations.weight_norm(layer)
    elif name == "spectral_norm":
        parametrizations.spectral_norm(layer, n_power_iterations=20)
        layer.eval()
    elif name == "orthogonal":
        parametrizations.orthogonal(layer)
    else:
        prune.random_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call]


def _off(name: str, layer: nn.Module) -> None:
    if name == "feedback":
        use_feedback(layer, "symmetric")
    elif name == "pruning":
        prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
    else:
        parametrize.remove_parametrizations(layer, "weight")


OTHERS = ("weight_norm", "spectral_norm", "orthogonal", "pruning")


def _input_gradient(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y: Tensor = layer(x)
    (gradient,) = torch.autograd.grad(squares(y), x)
    return y.detach(), gradient


@pytest.mark.parametrize("kind", ["Linear", "Conv1d"])
@pytest.mark.parametrize("feedback_first", [False, True], ids=["norm first", "feedback first"])
@pytest.mark.parametrize("other", OTHERS)
def test_feedback_and_a_parametrization_in_any_order(other: str, feedback_first: bool, kind: str) -> None:
    """Put on in either order: the layer computes what the other alone makes it compute, the error goes through B, and
    the gradients of the parametrization's own parameters are autograd's."""
    torch.manual_seed(1)
    layer: nn.Module = nn.Linear(4, 4).double() if kind == "Linear" else nn.Conv1d(4, 4, 1).double()
    x = batch() if kind == "Linear" else batch().unsqueeze(2)
    plain = copy.deepcopy(layer)
    _on(other, plain)
    for name in ("feedback", other) if feedback_first else (other, "feedback"):
        _on(name, layer)
    # The other's own parameters may start from random numbers.
    held = dict(plain.state_dict())
    layer.load_state_dict({**layer.state_dict(), **held}, strict=False)
    exact, found = gradients(plain, x), gradients(layer, x)
    assert_same({name: found.get(name) for name in exact}, exact)
    y_plain, _ = _input_gradient(plain, x)
    y, arrived = _input_gradient(layer, x)
    torch.testing.assert_close(y, y_plain, rtol=1e-12, atol=1e-12)
    B: Any = layer.feedback
    error = 2 * (y - 0.3)
    through_b = error @ B if kind == "Linear" else torch.einsum("boi,oc->bci", error, B.squeeze(2))
    torch.testing.assert_close(arrived, through_b, rtol=1e-11, atol=1e-12)
    assert list(feedback_alignment(nn.ModuleDict({"layer": layer}))) == ["layer"]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("feedback_first_on", [False, True])
@pytest.mark.parametrize("feedback_first_off", [False, True])
def test_feedback_and_a_parametrization_taken_off_in_any_order(
    other: str, feedback_first_on: bool, feedback_first_off: bool
) -> None:
    """Half of the way the one that is left works; at the end the layer is a plain one."""
    torch.manual_seed(1)
    layer: Any = nn.Linear(4, 4).double()
    for name in ("feedback", other) if feedback_first_on else (other, "feedback"):
        _on(name, layer)
    y, _ = _input_gradient(layer, batch())
    first, second = ("feedback", other) if feedback_first_off else (other, "feedback")
    _off(first, layer)
    half, arrived = _input_gradient(layer, batch())
    torch.testing.assert_close(half, y, rtol=1e-11, atol=1e-12)
    B = layer.weight.detach() if feedback_first_off else layer.feedback
    torch.testing.assert_close(arrived, 2 * (half - 0.3) @ B, rtol=1e-11, atol=1e-12)
    _off(second, layer)
    after, arrived = _input_gradient(layer, batch())
    torch.testing.assert_close(after, y, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(arrived, 2 * (after - 0.3) @ layer.weight.detach(), rtol=1e-11, atol=1e-12)
    assert type(layer) is nn.Linear
    assert sorted(layer.state_dict()) == ["bias", "weight"]


@pytest.mark.parametrize("feedback_first", [False, True])
def test_a_parametrized_layer_with_feedback_is_copied(feedback_first: bool) -> None:
    torch.manual_seed(1)
    layer: nn.Module = nn.Linear(4, 4).double()
    for name in ("feedback", "weight_norm") if feedback_first else ("weight_norm", "feedback"):
        _on(name, layer)
    other = copy.deepcopy(layer)
    assert all(map(torch.equal, _input_gradient(other, batch()), _input_gradient(layer, batch())))


@pytest.mark.parametrize("feedback_first", [False, True])
def test_learned_feedback_of_a_parametrized_layer(feedback_first: bool) -> None:
    """ψ gets the gradient by the weight that the parametrization makes."""
    torch.manual_seed(1)
    layer: Any = nn.Linear(4, 4).double()
    steps: list[Callable[[], Any]] = [
        lambda: use_feedback(layer, "learned"),
        lambda: parametrizations.weight_norm(layer),
    ]
    for step in steps if feedback_first else reversed(steps):
        step()
    x = batch()
    y = layer(x)
    squares(y).backward()  # type: ignore[no-untyped-call]
    expected = (2 * (y - 0.3)).T @ x
    torch.testing.assert_close(layer.feedback.grad, expected.detach(), rtol=1e-11, atol=1e-12)


def test_a_parametrized_activation_drops_its_derivative_and_takes_it_back() -> None:
    """Both change a module's class: neither may lose the other."""

    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    tanh: Any = nn.Tanh()
    tanh.register_buffer("offset", torch.zeros(4).double())
    drop_derivatives(tanh)
    parametrize.register_parametrization(tanh, "offset", Shift())
    x = batch().requires_grad_()
    assert torch.equal(torch.autograd.grad(tanh(x).sum(), x)[0], torch.ones_like(x))
    drop_derivatives(tanh, relaxation=False, update=False)
    torch.testing.assert_close(torch.autograd.grad(tanh(x).sum(), x)[0], 1 - torch.tanh(x.detach()) ** 2)
    assert torch.equal(tanh.offset, torch.ones(4).double())


# -------------------------------------------------------------------------------------------------- keyword arguments

LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "Linear": (lambda: nn.Linear(4, 4), batch()),
    "Conv1d": (lambda: nn.Conv1d(4, 4, 1), batch().unsqueeze(2)),
    "Conv2d": (lambda: nn.Conv2d(4, 4, 1), batch()[:, :, None, None]),
    "Conv3d": (lambda: nn.Conv3d(4, 4, 1), batch()[:, :, None, None, None]),
}


@pytest.mark.parametrize("rule", ["learned", "random", "sign"])
@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())
def test_a_layer_with_feedback_is_called_with_a_keyword(
    case: tuple[Callable[[], nn.Module], Tensor], rule: Any
) -> None:
    build, x = case
    torch.manual_seed(1)
    layer = use_feedback(build().double(), rule)
    by_place = gradients(layer, x)
    layer.zero_grad()
    squares(layer(input=x)).backward()  # type: ignore[no-untyped-call]
    assert_same(named_gradients(layer), by_place)


class OwnName(nn.Tanh):
    """An activation whose argument has another name."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(hidden)


def _gelu_of_transformers() -> nn.Module:
    from transformers.activations import ACT2FN

    module: nn.Module = ACT2FN["gelu_new"]
    return copy.deepcopy(module)


ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Tanh": (nn.Tanh, "input"),
    "ReLU": (nn.ReLU, "input"),
    "GELU": (nn.GELU, "input"),
    "LeakyReLU in place": (lambda: nn.LeakyReLU(0.1, inplace=True), "input"),
    "own name": (OwnName, "hidden"),
    "transformers": (_gelu_of_transformers, "input"),
}


@pytest.mark.parametrize("case", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_an_activation_without_derivative_is_called_with_a_keyword(case: tuple[Callable[[], nn.Module], str]) -> None:
    build, name = case
    activation = drop_derivatives(build())
    x = batch().requires_grad_()
    y = activation(**{name: x * 1})
    torch.testing.assert_close(y.detach(), build()(batch()))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x))


class ByKeyword(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.cortex(input=self.retina(input=x))
        y: Tensor = self.readout(input=self.motor(input=self.relay(input=h)))
        return y


@every_setting
def test_a_model_that_calls_its_variants_by_keyword_trains(setting: dict[str, Any]) -> None:
    def changed(model: nn.Module) -> nn.Module:
        torch.manual_seed(5)
        return drop_derivatives(use_feedback(model, "random"))

    exact = gradients(changed(Net()), batch())
    assert_same(gradients(ActivationRelaxation(changed(ByKeyword()), **setting), batch()), exact)
