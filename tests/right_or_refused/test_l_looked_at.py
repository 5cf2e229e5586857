"""Diagnostics of models that do unusual things: the right value or a refusal by name, and the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from relaxprop import (
    ActivationRelaxation,
    ClosedForm,
    Euler,
    alignment,
    certificate,
    convergence,
    describe_locality,
    drop_derivatives,
    mirror_weights,
    use_feedback,
)
from tests.compare import backward, refuses, squares
from tests.problems import mlp

Look = Callable[[ActivationRelaxation, Tensor], Any]
LOOKS: dict[str, Look] = {
    "certificate": certificate,
    "describe_locality": describe_locality,
    "alignment": lambda model, x: alignment(model, squares, x),
    "convergence": lambda model, x: convergence(model, squares, x, solver=Euler(0.3, 5)),
}
every_look = pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())


# ------------------------------------------------------------------------------------------------- what is predicted


@pytest.mark.parametrize(
    "changed", ["learned", "mirror", "random", "sign", "fixed-sign", "batch-sign", "dropped", "dropped in relaxation"]
)
@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_convergence_is_predicted_where_errors_go_back_otherwise(changed: Any, order: Any) -> None:
    """The limit is another one than backpropagation's gradient, so the distance does not go to zero."""
    network, x = mlp(4, 5, 5, 3).double(), torch.rand(6, 4).double()
    if changed.startswith("dropped"):
        drop_derivatives(network, update=changed == "dropped")
    else:
        use_feedback(network, changed)
    found = convergence(ActivationRelaxation(network), squares, x, solver=Euler(0.3, 100, order=order))
    for name, measured in found.measured.items():
        np.testing.assert_allclose(found.predicted[name], measured, rtol=1e-6, atol=1e-9, err_msg=name)
    assert found.measured["0.weight"][-1] > 1e-3


# -------------------------------------------------------------------------------------------------- the model as it was


@every_look
def test_lazy_modules_take_shape_in_a_pass_of_the_users(look: Look) -> None:
    network, x = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(3)), torch.randn(2, 4)
    model = ActivationRelaxation(network)
    with refuses(ValueError, "lazy modules", "torch.no_grad()"):
        look(model, x)
    with torch.no_grad():  # as the message says
        assert model(x).shape == (2, 3)
    look(model, x)


class MaxNorm(nn.Module):
    """Writes into its weights, by PyTorch's own way and by that of EEGNet."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.embed = nn.Embedding(10, 4, max_norm=0.5 if way == "embedding" else None)
        self.act, self.read = nn.Tanh(), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.way == "data":
            self.read.weight.data = torch.renorm(self.read.weight.data, 2, 0, 0.1)
        if self.way == "in place":
            with torch.no_grad():
                self.read.weight.clamp_(-0.05, 0.05)
        read: Tensor = self.read(self.act(self.embed(tokens)))
        return read


@every_look
@pytest.mark.parametrize("way", ["embedding", "data", "in place"])
def test_parameters_that_a_model_writes_into_get_their_numbers_back(look: Look, way: str) -> None:
    network, tokens = MaxNorm(way), torch.arange(6)
    before, places = copy.deepcopy(network.state_dict()), [p.data_ptr() for p in network.parameters()]
    look(ActivationRelaxation(network), tokens)
    for name, p in network.named_parameters():
        assert torch.equal(p, before[name]), name
    assert [p.data_ptr() for p in network.parameters()] == places
    with torch.no_grad():
        network(tokens)
    assert any(not torch.equal(p, before[name]) for name, p in network.named_parameters())  # as ever


@every_look
def test_no_gradient_is_looked_at_in_inference_mode(look: Look) -> None:
    model, x = ActivationRelaxation(mlp(4, 5, 3)), torch.randn(2, 4)
    with torch.inference_mode(), refuses(RuntimeError, "torch.inference_mode()", "outside of it"):
        look(model, x)
    with torch.no_grad():
        assert look(model, x)


def test_where_no_parameter_is_trained_there_is_nothing_to_compare() -> None:
    model, x = ActivationRelaxation(mlp(4, 5, 3).requires_grad_(False)), torch.randn(2, 4)
    assert alignment(model, squares, x) == {}
    with refuses(ValueError, "no parameter of the model requires a gradient"):
        convergence(model, squares, x, solver=Euler(0.3, 5))


@every_look
def test_parameters_that_were_made_in_inference_mode_are_looked_at(look: Look) -> None:
    with torch.inference_mode():
        embed = nn.Embedding(6, 4).requires_grad_(False)
    network = nn.Sequential(embed, mlp(4, 5, 3))
    assert look(ActivationRelaxation(network), torch.arange(6))


def test_sparse_gradients_are_compared_as_dense_ones() -> None:
    tokens, found = torch.tensor([[0, 2, 2], [1, 0, 3]]), []
    embedding = nn.Embedding(5, 4)
    dense = nn.Sequential(embedding, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    embedding.sparse = True
    sparse = copy.deepcopy(dense)
    embedding.sparse = False
    for network in (dense, sparse):
        use_feedback(network, "sign")
        model = ActivationRelaxation(network)
        found.append((alignment(model, squares, tokens), LOOKS["convergence"](model, tokens)))
    assert found[0][0] == found[1][0]
    for name, measured in found[0][1].measured.items():
        np.testing.assert_allclose(found[1][1].measured[name], measured, rtol=1e-6)
        np.testing.assert_allclose(found[1][1].predicted[name], found[0][1].predicted[name], rtol=1e-6)


def test_mirrors_of_many_samples_stay_in_the_range_of_float16() -> None:
    layer = nn.Conv2d(2, 3, 3).half()
    network = use_feedback(nn.Sequential(layer, nn.Tanh()), "mirror")
    mirror_weights(network, samples=8000, rate=1.0)
    assert float((network.get_buffer("0.feedback") - layer.weight.detach()).abs().max()) < 0.05


# --------------------------------------------------------------------------------------------------- what updates read


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.first, self.f = nn.Linear(4, 4), nn.Tanh()
        self.layer, self.g, self.read = kind(4, 3), nn.Tanh(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.f(self.first(x))
        if isinstance(self.layer, nn.RNNCellBase):
            h = None
            for moment in x:
                h = self.layer(moment, h)
                state = h[0] if isinstance(h, tuple) else h
        else:
            state = self.layer(x)[0][-1]
        read: Tensor = self.read(self.g(state))
        return read


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_a_recurrent_layer_transports_its_weights_through_time(kind: Any) -> None:
    network, x = Recurrent(kind), torch.rand(5, 2, 4)
    use_feedback(network, "random", skip=[network.layer])
    rows = describe_locality(ActivationRelaxation(network), x).rows
    (update,) = (row for row in rows if row.update.startswith("layer."))
    assert any("weight transport: layer.weight_hh" in what for what in update.non_local), update
    assert not any("weight_ih" in what for what in update.non_local), update
    (state,) = (row for row in rows if row.update == "x of f")
    assert any("weight transport: layer.weight_ih" in what for what in state.non_local), state
    for row in rows:
        assert not any("transport: layer.bias" in what for what in row.non_local), row


class Computes(nn.Module):
    """What it computes between its layers is given."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.first, self.f, self.gain, self.read = (
            nn.Linear(4, 4),
            nn.Tanh(),
            nn.Parameter(torch.rand(4)),
            nn.Linear(4, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        read: Tensor = self.read(self.between(self.f(self.first(x)), self.gain))
        return read


def spectrum(h: Tensor) -> Tensor:
    return torch.view_as_real(torch.fft.fft(h)).sum(-1)


LINEAR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lerp": lambda h, gain: torch.lerp(h, torch.ones_like(h), gain),
    "fft": lambda h, gain: spectrum(h),
    "complex": lambda h, gain: torch.complex(h, 2 * h).imag,
    "rot90": lambda h, gain: torch.rot90(h, 2),
    "index_fill": lambda h, gain: h.index_fill(1, torch.tensor([0]), 0.0),
    "take": lambda h, gain: h.take(torch.arange(h.numel())).view_as(h),
    "diag_embed": lambda h, gain: torch.diag_embed(h).sum(-1),
    "addcmul": lambda h, gain: torch.addcmul(h, torch.ones_like(h), gain),
    "product of two": lambda h, gain: h * gain,
    "gate": lambda h, gain: torch.cat([h[:, :2] * gain[:2], h[:, 2:]], 1),
    "packed": lambda h, gain: torch.mul(*h.chunk(2, 1)).repeat(1, 2),
}
NONLINEAR: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[str, ...]]] = {
    "square": (lambda h, gain: h * h, ("mul",)),
    "square of a view": (lambda h, gain: h * h.view(-1).view_as(h), ("mul",)),
    "Gram matrix": (lambda h, gain: h @ h.T @ torch.ones_like(h), ("mm",)),
    "power": (lambda h, gain: h**2, ("pow",)),
    "sine": (lambda h, gain: h.sin(), ("sin",)),
}


def unrelaxed(between: Callable[[Tensor, Tensor], Tensor]) -> tuple[str, ...] | None:
    model = ActivationRelaxation(Computes(between), solver=ClosedForm(0.5, 60), report_unrelaxed=True)
    backward(squares(model(torch.randn(3, 4))))
    assert model.last_relaxation is not None
    return model.last_relaxation.unrelaxed


@pytest.mark.parametrize("between", LINEAR.values(), ids=LINEAR.keys())
def test_linear_operations_need_no_vertex(between: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert unrelaxed(between) == ()


@pytest.mark.parametrize(("between", "names"), NONLINEAR.values(), ids=NONLINEAR.keys())
def test_a_tensor_times_itself_is_not_linear(
    between: Callable[[Tensor, Tensor], Tensor], names: tuple[str, ...]
) -> None:
    assert unrelaxed(between) == names


def test_a_mixture_is_described_as_what_it_is_composed_of() -> None:
    """``lerp(h, 1, g)`` is ``h (1 − g) + g``: linear in h, and g is a gain and no weight matrix."""
    rows = []
    for between in (LINEAR["lerp"], lambda h, gain: h * (1 - gain) + gain):
        model = ActivationRelaxation(Computes(between))
        (state,) = (row for row in describe_locality(model, torch.randn(3, 4)).rows if row.update == "x of f")
        rows.append((state.weights, state.non_local))
    assert rows[0] == rows[1] == (("read.weight, transposed", "gain, a gain"), ("weight transport: read.weight",))
