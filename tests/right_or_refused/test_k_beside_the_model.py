"""What a model keeps beside the module tree, and what its loss belongs to: as a pass that has it in its usual place."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relaxprop import (
    ActivationRelaxation,
    EquilibriumPropagation,
    Euler,
    Frozen,
    PredictiveCoding,
)
from tests.compare import assert_same, assert_same_gradients, backward, of_parameters
from tests.problems import mlp
from tests.right_or_refused.run_again import RUN_AGAIN, Wrap, data, run_again

# ----------------------------------------------------------------------------------- parameters beside the module tree


class Owner:
    """An object that is no module."""

    def __init__(self, layer: nn.Module, scale: Tensor) -> None:
        self.layer, self.scale = layer, scale


class Hides(nn.Module):
    """Calls a layer, and reads a parameter, that it keeps where ``parameters()`` does not find them."""

    def __init__(self, way: str, layer: nn.Module, scale: nn.Parameter) -> None:
        super().__init__()
        self.enter, self.f, self.g, self.read = nn.Linear(4, 5), nn.Tanh(), nn.Tanh(), nn.Linear(5, 3)
        if way == "registered":
            self.layer, self.scale = layer, scale
        ways: dict[str, Callable[[], Any]] = {
            "registered": lambda: None,
            "list": lambda: [layer, scale],
            "tuple": lambda: (layer, scale),
            "dict": lambda: {"layer": layer, "scale": scale},
            "nested": lambda: [{"both": [layer, scale]}],
            "object": lambda: Owner(layer, scale),
            "partial": lambda: partial(tuple, (layer, scale)),
        }
        self.kept = ways[way]()

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kept
        layer: nn.Module
        scale: Tensor
        if kept is None:
            layer, scale = self.layer, self.scale
        elif isinstance(kept, Owner):
            layer, scale = kept.layer, kept.scale
        elif isinstance(kept, partial):
            layer, scale = kept()
        else:
            kept = kept[0]["both"] if isinstance(kept, list) and len(kept) == 1 else kept
            layer, scale = kept.values() if isinstance(kept, dict) else kept
        read: Tensor = self.read(self.g(layer(self.f(self.enter(x))) * scale))
        return read


@pytest.mark.parametrize("rule", [rule for rule in RUN_AGAIN if rule != "unfrozen activity"])
@pytest.mark.parametrize("way", ["list", "tuple", "dict", "nested", "object", "partial"])
def test_a_parameter_beside_the_module_tree_has_its_gradient(rule: str, way: str) -> None:
    x, target = data()
    torch.manual_seed(1)
    registered = Hides("registered", nn.Linear(5, 5), nn.Parameter(torch.rand(5)))
    layer, scale = copy.deepcopy((registered.layer, registered.scale))
    hides = Hides(way, layer, scale)
    hides.load_state_dict({n: p for n, p in registered.state_dict().items() if not n.startswith(("layer", "scale"))})
    for module in (registered, hides):
        train = RUN_AGAIN[rule](module)
        for _ in range(2):
            backward(train(x, target))
    expected = of_parameters(registered)
    found = of_parameters(hides) | {f"layer.{n}": g for n, g in of_parameters(layer).items()} | {"scale": scale.grad}
    assert_same_gradients(found, expected)
    assert all(gradient is not None for gradient in expected.values())


@run_again
def test_a_parameter_beside_the_module_tree_is_not_changed_in_between(wrap: Wrap) -> None:
    (x, target), layer = data(), nn.Linear(5, 5)
    loss = wrap(Hides("list", layer, nn.Parameter(torch.rand(5))))(x, target)
    with torch.no_grad():
        layer.weight.add_(1)
    # PyTorch sees it where the weight was saved for a backward.
    seen = r"shape \(5, 5\) beside the modules was changed in place|modified by an inplace operation"
    with pytest.raises(RuntimeError, match=seen):
        backward(loss)


class Teaches(nn.Module):
    """Follows its own weights by a mean that is no part of what is trained, and reads what that gives."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp(4, 5, 3)
        self.mean = [copy.deepcopy(self.network).requires_grad_(False)]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for own, mean in zip(self.network.parameters(), self.mean[0].parameters(), strict=True):
                mean.lerp_(own, 0.1)
        y: Tensor = self.network(x) + self.mean[0](x)
        return y


@run_again
def test_a_mean_beside_the_module_tree_moves_once_in_a_pass(wrap: Wrap) -> None:
    (x, target), module = data(), Teaches()
    plain = copy.deepcopy(module)
    train = wrap(module)
    for _ in range(3):
        backward(train(x, target))
        plain(x)
    for found, expected in zip(module.mean[0].parameters(), plain.mean[0].parameters(), strict=True):
        assert_same(found, expected)


class Noisy(nn.Module):
    """Draws by a bound method that it keeps as an attribute, from a generator of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.network = mlp(4, 5, 3)
        generator: Any = random.Random(0) if kind == "random" else Counter()
        self.draw = generator.gauss if kind == "random" else generator.tick
        self.counts = generator

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.draw(0.0, 1.0) if isinstance(self.counts, random.Random) else self.draw()
        y: Tensor = self.network(x * (1 + 0.1 * drawn))
        return y


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def tick(self) -> int:
        self.count += 1
        return self.count


@run_again
@pytest.mark.parametrize("kind", ["random", "counter"])
def test_a_bound_method_as_an_attribute_finds_its_state_again(wrap: Wrap, kind: str) -> None:
    (x, target), module = data(), Noisy(kind)
    given = copy.deepcopy(module.network)
    train, factors = wrap(module), Noisy(kind)
    for _ in range(2):
        module.zero_grad()
        given.zero_grad()
        backward(train(x, target))
        drawn = factors.draw(0.0, 1.0) if kind == "random" else factors.draw()
        backward(wrap(given)(x * (1 + 0.1 * drawn), target))
        assert_same_gradients(of_parameters(module.network), of_parameters(given))
    if kind == "counter":
        assert module.counts.count == 2


class MadeAnew:
    """An object whose state has another parameter whenever it is asked for."""

    def __init__(self) -> None:
        self.weight = torch.rand(3)

    def __getstate__(self) -> dict[str, Any]:
        return {"weight": nn.Parameter(self.weight)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.weight = state["weight"].data


class Keeps(nn.Module):
    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.network, self.kept = mlp(4, 5, 3), kept

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x) * self.kept.weight
        return y


@run_again
def test_a_state_that_is_made_anew_is_copied_and_that_is_all(wrap: Wrap) -> None:
    (x, target), kept = data(), MadeAnew()
    module = Keeps(kept)
    plain = Keeps(LossObject(nn.Parameter(kept.weight)))
    plain.kept.weight = kept.weight
    plain.network = copy.deepcopy(module.network)
    for one in (module, plain):
        backward(wrap(one)(x, target))
    assert_same_gradients(of_parameters(module), of_parameters(plain))


class LaidOutAnew(nn.Module):
    """Gives its weights new memory in every forward pass, as ``flatten_parameters`` may."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp(4, 5, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for p in self.network.parameters():
            p.data = p.data.clone()
        y: Tensor = self.network(x)
        return y


@run_again
def test_a_model_may_lay_its_weights_out_anew(wrap: Wrap) -> None:
    (x, target), module = data(), LaidOutAnew()
    plain = copy.deepcopy(module.network)
    train, expected = wrap(module), wrap(plain)
    for _ in range(2):
        backward(train(x, target))
        backward(expected(x, target))
    assert_same_gradients(of_parameters(module.network), of_parameters(plain))


class OnAGraph(nn.Module):
    """A graph network: reads a sparse matrix beside the features."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.f, self.read = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)

    def forward(self, x: Tensor, between: Tensor) -> Tensor:
        h = self.f(self.enter(x))
        read: Tensor = self.read(torch.sparse.mm(between, h) if between.is_sparse else between @ h)
        return read


@pytest.mark.parametrize("frozen", [Frozen(relaxation_derivative=False), Frozen(update_activity=False)])
def test_a_sparse_argument_is_as_good_as_a_dense_one(frozen: Frozen) -> None:
    x, _ = data()
    dense = torch.rand(6, 6) * (torch.rand(6, 6) > 0.5)
    module, found = OnAGraph(), []
    for between in (dense, dense.to_sparse()):
        module.zero_grad()
        model = ActivationRelaxation(module, solver=Euler(0.2, 5), frozen=frozen)
        for _ in range(2):
            backward(model(x, between).square().sum())
        found.append(of_parameters(module))
    assert_same_gradients(found[0], found[1])


class Remembers(nn.Module):
    """Recurrent layers between vertices: PyTorch's kernel for an LSTM keeps what nobody may hand it again."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.enter, self.f, self.layer = nn.Linear(4, 4), nn.Tanh(), kind(4, 5)
        self.g, self.read = nn.Tanh(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        read: Tensor = self.read(self.g(self.layer(self.f(self.enter(x)).unsqueeze(0))[0].squeeze(0)))
        return read


@pytest.mark.parametrize("rule", ["predictive coding", "equilibrium propagation", "unfrozen derivative"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_run_again(kind: Any, rule: str) -> None:
    (x, target), module = data(), Remembers(kind)
    found = []
    for written_down in (True, False):
        module.zero_grad()
        wrapped = RUN_AGAIN[rule](module)
        if not written_down:  # the model in every step
            module.layer.register_forward_hook(lambda *_: None)
        for _ in range(2):
            backward(wrapped(x, target))
        found.append(of_parameters(module))
    assert_same_gradients(found[0], found[1])


class Trainer:
    """What a loss is often a method of; its copies are counted."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.log_sigma = nn.Parameter(torch.rand(3))
        self.copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Trainer:
        self.copies += 1
        return self

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return ((output - target).square() * (-self.log_sigma).exp() + self.log_sigma).mean()


class LossObject:
    def __init__(self, log_sigma: nn.Parameter) -> None:
        self.log_sigma = log_sigma

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return ((output - target).square() * (-self.log_sigma).exp() + self.log_sigma).mean()


def with_sigma(output: Tensor, target: Tensor, log_sigma: Tensor) -> Tensor:
    return ((output - target).square() * (-log_sigma).exp() + log_sigma).mean()


@pytest.mark.parametrize("kind", [PredictiveCoding, EquilibriumPropagation])
def test_a_loss_may_have_parameters_of_its_own_however_it_is_called(kind: Any) -> None:
    (x, target), network = data(), mlp(4, 5, 3)
    trainer = Trainer(network)
    sigma = trainer.log_sigma
    found = []
    for loss_fn in (
        lambda y, t: with_sigma(y, t, sigma),
        trainer.loss,
        LossObject(sigma),
        partial(with_sigma, log_sigma=sigma),
    ):
        sigma.grad = None
        network.zero_grad()
        model = kind(network, loss_fn, num_steps=5)
        for _ in range(2):
            backward(model(x, target=target))
        found.append({**of_parameters(network), "sigma": sigma.grad})
    for gradients in found[1:]:
        assert_same_gradients(gradients, found[0])
    assert found[0]["sigma"] is not None
    assert trainer.copies == 0  # it may hold a data set
