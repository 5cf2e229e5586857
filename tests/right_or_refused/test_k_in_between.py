"""What is given or changed between the forward pass and the backward, and a path that no earlier pass has taken."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from relaxprop import (
    EquilibriumPropagation,
    PredictiveCoding,
)
from tests.compare import assert_same_gradients, backward, of_parameters, refuses
from tests.problems import mlp
from tests.right_or_refused.run_again import RUN_AGAIN, Wrap, data, run_again

# ------------------------------------------------------------------------------------------ weights of the forward pass


@run_again
def test_weights_that_are_given_for_one_pass_are_those_of_its_steps(wrap: Wrap) -> None:
    (x, target), network, other = data(), mlp(4, 5, 5, 3), mlp(4, 5, 5, 3)
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    train, expected = wrap(network), wrap(other)

    class Trains(nn.Module):
        """So that `functional_call` reaches the network's weights in whatever trains it."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return train(x, target)

    for _ in range(2):
        backward(expected(x, target))
        backward(functional_call(Trains(), {f"network.{n}": p for n, p in given.items()}, (x, target)))
    assert_same_gradients({name: p.grad for name, p in given.items()}, of_parameters(other))
    assert all(p.grad is None for p in network.parameters())


@run_again
def test_a_parameter_that_is_replaced_in_between_has_no_part_in_the_pass(wrap: Wrap) -> None:
    (x, target), network = data(), mlp(4, 5, 5, 3)
    twin = copy.deepcopy(network)
    backward(wrap(twin)(x, target))
    then = dict(network.named_parameters())
    loss = wrap(network)(x, target)
    for layer in network:
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(torch.rand_like(layer.weight))
    now = dict(network.named_parameters())
    backward(loss)
    assert_same_gradients({name: p.grad for name, p in then.items()}, of_parameters(twin))
    assert {name: id(p) for name, p in network.named_parameters()} == {name: id(p) for name, p in now.items()}


@run_again
def test_numbers_that_take_the_place_of_a_parameters_are_seen(wrap: Wrap) -> None:
    (x, target), network = data(), mlp(4, 5, 5, 3)
    loss = wrap(network)(x, target)
    network[2].weight.data = torch.rand(5, 5)
    with refuses(RuntimeError, "2.weight' was changed in place since the forward pass"):
        backward(loss)


@run_again
def test_a_backward_pass_in_inference_mode_is_refused(wrap: Wrap) -> None:
    (x, target), network = data(), mlp(4, 5, 5, 3)
    loss = wrap(network)(x, target)
    with torch.inference_mode(), refuses(RuntimeError, "within torch.inference_mode()", "outside of it"):
        backward(loss)


@pytest.mark.parametrize("kind", [PredictiveCoding, EquilibriumPropagation])
def test_an_array_may_be_filled_again_after_the_forward_pass(kind: Any) -> None:
    (x, target), network = data(), mlp(4, 5, 3)
    # The backward of this loss reads nothing that is in the array's own memory.
    model = kind(network, lambda y, t: (y - torch.as_tensor(t["of"][0])).square().mean(), num_steps=5)
    array = target.numpy().copy()
    backward(model(x, target={"of": [array]}))
    expected = of_parameters(network)
    network.zero_grad()
    loss = model(x, target={"of": [array]})
    array[:] = 7
    backward(loss)
    assert_same_gradients(of_parameters(network), expected)
    assert (array == 7).all()


# ------------------------------------------------------------------------------- a path that no earlier pass has taken


class Later(nn.Module):
    """In training, computes by means that no operation shows; before, by a harmless one."""

    mean: Tensor
    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.f, self.g, self.read = nn.Linear(4, 5), nn.Tanh(), nn.Tanh(), nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("variance", torch.ones(5))

    def between(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(self.enter(x))
        read: Tensor = self.read(self.g(self.between(h) if self.training else h * 2))
        return read


class NormOfBuffers(Later):
    """Batch norm writes its statistics, and its schema does not say so."""

    def between(self, h: Tensor) -> Tensor:
        return functional.batch_norm(h, self.mean, self.variance, training=True, momentum=0.3) - self.mean


class Norm(Later):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5, momentum=0.3)
        self.norm.num_batches_tracked = None

    def between(self, h: Tensor) -> Tensor:
        normed: Tensor = self.norm(h)
        assert self.norm.running_mean is not None
        return normed - self.norm.running_mean


class DeepCopies(Later):
    def between(self, h: Tensor) -> Tensor:
        return h * copy.deepcopy(h.detach())


class InAnotherThread(Later):
    def between(self, h: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return h * pool.submit(lambda: float(h.detach().abs().mean())).result()


class ByAnArray(Later):
    def between(self, h: Tensor) -> Tensor:
        return h * torch.as_tensor(np.abs(h.detach().numpy()).mean(0))


@pytest.mark.parametrize("kind", [NormOfBuffers, Norm, DeepCopies, InAnotherThread, ByAnArray])
@pytest.mark.parametrize("rule", ["predictive coding", "unfrozen derivative"])
def test_each_path_is_compared_before_its_operations_are_done_alone(kind: type[Later], rule: str) -> None:
    (x, target), first = data(), kind()
    second = copy.deepcopy(first)
    for module in (first, second):
        train = RUN_AGAIN[rule](module)
        if module is second:  # whose first passes take the harmless path
            module.eval()
            for _ in range(2):
                backward(train(x, target))
            module.zero_grad()
            module.train()
        for _ in range(2):
            backward(train(x, target))
    assert_same_gradients(of_parameters(second), of_parameters(first))
    for name, buffer in first.named_buffers():
        assert torch.equal(buffer, second.get_buffer(name))


class ReadsStatistics(nn.Module):
    """A norm before every vertex, whose statistics are read after it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.network = nn.BatchNorm1d(4), mlp(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(self.norm(x))
        assert self.norm.running_var is not None
        return y * self.norm.running_var.mean()


@run_again
def test_what_a_norm_notes_may_be_read_later(wrap: Wrap) -> None:
    class Given(nn.Module):
        """The same with the mean of the statistics as they are after the norm."""

        def __init__(self, plain: ReadsStatistics) -> None:
            super().__init__()
            self.norm, self.network = plain.norm, plain.network
            self.read = (0.9 + 0.1 * x.var(0)).mean()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.network(self.norm(x))
            return y * self.read

    x, target = data()
    module = ReadsStatistics()
    given = Given(copy.deepcopy(module))
    for plain in (module, given):
        backward(wrap(plain)(x, target))
    assert_same_gradients(of_parameters(module), of_parameters(given))
