"""What a model or its user keeps, gives or changes beside the module tree, between the forward pass and the backward.

Parameters in lists and objects, losses with an owner, weights that are given for one pass, losses that are written in
place, arrays: as a pass that has all of this in its usual place.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from relaxprop import (
    ActivationRelaxation,
    ClosedForm,
    DirectFeedback,
    DivergedError,
    EquilibriumPropagation,
    Euler,
    Frozen,
    PredictiveCoding,
)
from tests.compare import assert_same, assert_same_gradients, backward, of_parameters, refuses
from tests.problems import mlp

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
