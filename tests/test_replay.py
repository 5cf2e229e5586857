"""Runs at other states by the calls between the vertices alone: the same as by the model, and only where that is plain.

The model itself is run again wherever somebody else's hook may look on, so that a hook which does nothing gives the
other way to compute the same.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook

from relaxprop import ActivationRelaxation, EquilibriumPropagation, Euler, Frozen, PredictiveCoding
from relaxprop._pytorch import is_undisturbed
from tests.compare import assert_same, backward, gradients, squares
from tests.problems import NOTHING, PROBLEMS, A, C, Problem, mlp, name_of
from tests.test_rerun import UNUSUAL

EULER = Euler(0.3, 5)
REPLAYS = is_undisturbed()  # older versions of PyTorch do not tell
both_conditions = pytest.mark.parametrize("frozen", [A, C], ids=name_of)


def looked_at(module: nn.Module) -> nn.Module:
    """The module, at whose calls a hook looks on now."""
    module.register_forward_hook(lambda module, args, output: None)
    return module


# ------------------------------------------------------------------------------------------------- the paper's equation


def test_the_papers_perceptron_by_hand() -> None:
    """``x^l ← x^l + η (W^{lT} (f'(W^l x^l) ⊙ x^{l+1}) − x^l)``, by matrix products alone."""
    torch.manual_seed(1)
    network = mlp(7, 6, 5, 4, 3).double()
    image, target, eta, num_steps = torch.randn(9, 7).double(), torch.randn(9, 3).double(), 0.1, 30
    layers = [m for m in network if isinstance(m, nn.Linear)]
    activities = [image]
    for layer in layers[:-1]:
        activities.append(torch.tanh(activities[-1] @ layer.weight.T + layer.bias).detach())
    output = activities[-1] @ layers[-1].weight.T + layers[-1].bias
    error = 2 * (output - target).detach()
    states = [x.clone() for x in activities[1:]]
    for _ in range(num_steps):
        drives = []
        for layer, x, above in zip(layers[1:-1], states, states[1:], strict=False):
            u = torch.addmm(layer.bias, x, layer.weight.T)
            drives.append(torch.mm((1 - torch.tanh(u) ** 2) * above, layer.weight))
        drives.append(torch.mm(error, layers[-1].weight))
        for x, drive in zip(states, drives, strict=True):
            x.add_(drive - x, alpha=eta)
    model = ActivationRelaxation(network, solver=Euler(eta, num_steps), frozen=A, keep_states=True)
    for _ in range(2):  # the first pass compares the two ways
        backward(((model(image) - target) ** 2).sum())
        assert model.last_relaxation is not None
        assert model.last_relaxation.states is not None
        for found, expected in zip(model.last_relaxation.states.values(), states, strict=True):
            assert_same(found, expected.detach())


# ------------------------------------------------------------------------------------------------------ equal, and used


@both_conditions
@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
@pytest.mark.parametrize("problem", [*PROBLEMS, *UNUSUAL], ids=name_of)
def test_to_the_last_bit(problem: Problem, frozen: Frozen, order: Any) -> None:
    module, inputs = problem.build()
    solver = Euler(0.3, 5, order=order)
    model, other = (
        ActivationRelaxation(m, solver=solver, vertices=problem.vertices, frozen=frozen)
        for m in (module, looked_at(copy.deepcopy(module)))
    )
    for _ in range(2):  # the first pass of a setting compares the two ways
        found, expected = gradients(model, inputs, problem.loss), gradients(other, inputs, problem.loss)
        for name, gradient in expected.items():
            actual = found[name]
            assert (actual is None) == (gradient is None), name
            assert actual is None or gradient is None or torch.equal(actual, gradient), name


CALLED: list[str] = []  # what no one puts back between two runs


class Counted(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any) -> Any:
        CALLED.append("forward")
        return self.network(*args)


def calls_of_a_pass(module: nn.Module, inputs: Any, num_steps: int, loss: Any = squares, **options: Any) -> int:
    """How often one pass calls the model, the first one of a setting aside."""
    model = ActivationRelaxation(Counted(module), solver=Euler(0.3, num_steps), **options)
    gradients(model, inputs, loss)
    CALLED.clear()
    gradients(model, inputs, loss)
    return len(CALLED)


WITH_STATE = ("regularised", "in-place")


@both_conditions
@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_the_model_is_called_as_often_however_many_steps_there_are(problem: Problem, frozen: Frozen) -> None:
    module, inputs = problem.build()
    few, many = (
        calls_of_a_pass(module, inputs, n, problem.loss, vertices=problem.vertices, frozen=frozen) for n in (3, 7)
    )
    assert many - few == (4 if problem.name in WITH_STATE or not REPLAYS else 0)


@pytest.mark.parametrize("rule", [PredictiveCoding, EquilibriumPropagation])
def test_activities_move_by_the_same_steps(rule: Any) -> None:
    torch.manual_seed(1)
    x, target = torch.randn(3, 4).double(), torch.randn(3, 2).double()
    network, found = mlp(4, 5, 5, 2).double(), []
    for module in (network, looked_at(copy.deepcopy(network))):
        model = rule(module, lambda y, t: ((y - t) ** 2).sum(), num_steps=20)
        for _ in range(2):
            model.zero_grad()
            backward(model(x, target=target))
            found.append([p.grad for p in module.parameters()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("rule", [PredictiveCoding, EquilibriumPropagation])
def test_moving_activities_call_the_model_as_often_however_many_steps_there_are(rule: Any) -> None:
    x, target, calls = torch.randn(3, 4), torch.randn(3, 2), []
    for num_steps in (3, 7):
        model = rule(Counted(mlp(4, 5, 5, 2)), lambda y, t: ((y - t) ** 2).sum(), num_steps=num_steps)
        for _ in range(2):
            CALLED.clear()
            backward(model(x, target=target))
        calls.append(len(CALLED))
    assert (calls[0] == calls[1]) is REPLAYS


# ------------------------------------------------------------------------------------------------ more than calls


class Between(nn.Module):
    """Two vertices, and between them what is to be tried."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.f, self.middle, self.g = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh()
        self.last = nn.Linear(5, 2)
        self.begin()

    def begin(self) -> None:
        pass

    def between(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(self.first(x))
        h = self.middle(self.between(h))
        output: Tensor = self.last(self.g(h))
        return output


class Double(torch.autograd.Function):
    """An identity with a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class DoubleOfAnother(Double):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


class OnlyBackward(torch.autograd.Function):
    """Gives what depends on its input in the backward pass only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ones: Tensor) -> Tensor:
        ctx.mark_dirty(ones)
        return ones

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return 3 * gradient, None


class Identity(Between):
    def between(self, h: Tensor) -> Tensor:
        y: Tensor = Double.apply(h)  # type: ignore[no-untyped-call]
        return y


class Cloned(Between):
    def between(self, h: Tensor) -> Tensor:
        y: Tensor = DoubleOfAnother.apply(h)  # type: ignore[no-untyped-call]
        return y


class Injected(Between):
    def between(self, h: Tensor) -> Tensor:
        ones = torch.ones(5).double()
        y: Tensor = OnlyBackward.apply(h.sum(0), ones)  # type: ignore[no-untyped-call]
        return h * y


class Item(Between):
    def between(self, h: Tensor) -> Tensor:
        return h * h.detach().mean().item()


class Branch(Between):
    def between(self, h: Tensor) -> Tensor:
        return h * 2 if h.mean() > 0 else h / 2


class Index(Between):
    def between(self, h: Tensor) -> Tensor:
        return h * [1.0, 2.0, 3.0, 4.0, 5.0][h[0].argmax()]


class Listed(Between):
    def between(self, h: Tensor) -> Tensor:
        return h * float(h.detach().tolist()[0][0])


class ByNumpy(Between):
    def between(self, h: Tensor) -> Tensor:
        return h * torch.from_numpy(np.abs(h.detach().numpy()))


class ByArray(Between):
    def between(self, h: Tensor) -> Tensor:
        return h * float(np.asarray(h.detach()).mean())


class ByAddress(Between):
    """As a kernel of somebody's own: it is told where a tensor lies, and writes into another."""

    def between(self, h: Tensor) -> Tensor:
        given, gate = h.detach().contiguous(), torch.empty_like(h)
        ctypes.memmove(gate.data_ptr(), given.data_ptr(), given.numel() * given.element_size())
        return h * gate


class Unannounced:
    """Who takes a tensor by DLPack, which PyTorch announces to nobody."""

    def __init__(self, x: Tensor) -> None:
        self.capsule = torch.utils.dlpack.to_dlpack(x)  # type: ignore[attr-defined]

    def __dlpack__(self, **options: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class ByCapsule(Between):
    def between(self, h: Tensor) -> Tensor:
        return h * float(np.from_dlpack(Unannounced(h.detach())).mean())


class Chosen(Between):
    def between(self, h: Tensor) -> Tensor:
        return h * h[h > 0].mean()


class Counting(Between):
    def between(self, h: Tensor) -> Tensor:
        return h / (h > 0).nonzero().shape[0]


class WithoutGradients(Between):
    def between(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            gate = h.sigmoid()
        return h * gate


class InLowerPrecision(Between):
    def between(self, h: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = functional.linear(h.float(), self.middle.weight.float())
        return y.to(h)


class Packed(Between):
    """Saves half of what it should."""

    def between(self, h: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda x: x / 2, lambda x: x):
            return h * h


class Hooked(Between):
    def between(self, h: Tensor) -> Tensor:
        h = h * 1
        h.register_hook(lambda gradient: 2 * gradient)  # type: ignore[no-untyped-call]
        return h


class InPlaceOnCopy(Between):
    def between(self, h: Tensor) -> Tensor:
        h = h * 1
        h += 1
        return h


class Closed(Between):
    """Reads what no one knows of."""

    def begin(self) -> None:
        gain = torch.rand(5).double()
        self.gain: Callable[[], Tensor] = lambda: gain

    def between(self, h: Tensor) -> Tensor:
        return h * self.gain()


class Dropping(Between):
    def begin(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def between(self, h: Tensor) -> Tensor:
        return h * torch.bernoulli(h.detach().abs(), generator=self.generator)


class Average(Between):
    mean: Tensor

    def begin(self) -> None:
        self.register_buffer("mean", torch.zeros(5).double())

    def between(self, h: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return h - self.mean.clone()


class Subclass(Tensor):
    pass


class OfAnotherClass(Between):
    def between(self, h: Tensor) -> Tensor:
        y: Tensor = h.as_subclass(Subclass).cos().as_subclass(Tensor)
        return y


class Scripted(Between):
    def begin(self) -> None:
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(5, 5), nn.Softsign()).double())
        # TorchScript compiles after its first calls, and then rounds otherwise.
        for _ in range(3):
            h = torch.linspace(-1, 1, 15).view(3, 5).double().requires_grad_()
            torch.autograd.grad(self.scripted(h).sum(), h)

    def between(self, h: Tensor) -> Tensor:
        y: Tensor = self.scripted(h)
        return y


class Transformed(Between):
    def between(self, h: Tensor) -> Tensor:
        y: Tensor = torch.vmap(torch.sin)(h.detach())
        return h * y


MORE_THAN_CALLS = [
    *(
        Identity,
        Cloned,
        Injected,
        Item,
        Branch,
        Index,
        Listed,
        ByNumpy,
        ByArray,
        ByAddress,
        ByCapsule,
        Chosen,
        Counting,
    ),
    *(WithoutGradients, InLowerPrecision, Packed, Hooked, InPlaceOnCopy, Closed, Dropping, Average, OfAnotherClass),
    *(Transformed,),
]


class Normalised(Between):
    """Batch norm in evaluation, and a buffer that is read."""

    scale: Tensor

    def begin(self) -> None:
        self.register_buffer("scale", torch.rand(5).double())
        self.norm = nn.BatchNorm1d(5).eval()

    def between(self, h: Tensor) -> Tensor:
        y: Tensor = self.norm(h) * self.scale
        return y


class Shaped(Between):
    def between(self, h: Tensor) -> Tensor:
        batch, width = h.shape
        h = h.view(batch, width, 1).expand(-1, -1, len(h)).transpose(1, 2)
        h = h[:, 0, :].reshape(h.size(0), -1)
        values, where = h.max(dim=1, keepdim=True)
        parts = torch.split(torch.cat([h, h + values + where], dim=1), [2 * width - 3, 3], dim=1)
        return torch.stack([*parts[0].unbind(1)[:width]], 1) if h.requires_grad and h.dim() == 2 else h


class Gathered(Between):
    """Its derivative writes into zeros."""

    def between(self, h: Tensor) -> Tensor:
        return h.index_select(1, torch.tensor([2, 0, 0, 4, 1]))


class Recurring(Between):
    """Writes into a view of what it makes of its first hidden state."""

    def begin(self) -> None:
        self.cell = nn.GRU(5, 5, batch_first=True)

    def between(self, h: Tensor) -> Tensor:
        y: Tensor = self.cell(h.unsqueeze(1))[0]
        return y.squeeze(1)


class Attending(Between):
    def begin(self) -> None:
        self.attention = nn.MultiheadAttention(5, 1)

    def between(self, h: Tensor) -> Tensor:
        y: Tensor = self.attention(h, h, h, need_weights=False)[0]
        return y


class Targets(Between):
    """Numbers that depend on no state may decide on the path."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(self.first(x))
        h = h * 2 if x.mean() > 0 else h / 2
        onto = functional.one_hot((x[:, 0] > 0).long(), 5)
        output: Tensor = self.last(self.g(self.middle(h) * onto))
        return output


ONLY_CALLS = [Between, Normalised, Shaped, Gathered, Attending, Targets]


def both_ways(network: type[Between], frozen: Frozen) -> int:
    """How much oftener a pass with more steps calls the model; the gradients are compared with the other way's."""

    def fresh() -> nn.Module:
        torch.manual_seed(1)
        return network().double()

    x = (torch.linspace(-1, 1, 12).view(3, 4).double().sin(),)
    model, other = (ActivationRelaxation(m, solver=EULER, frozen=frozen) for m in (fresh(), looked_at(fresh())))
    for _ in range(3):
        found, expected = gradients(model, x), gradients(other, x)
        assert all(torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True))  # type: ignore[arg-type]
    few, many = (calls_of_a_pass(fresh(), x, n, frozen=frozen) for n in (3, 7))
    return many - few


@both_conditions
@pytest.mark.parametrize("network", MORE_THAN_CALLS)
def test_what_is_more_than_calls_is_run_by_the_model(network: type[Between], frozen: Frozen) -> None:
    assert both_ways(network, frozen) == 4


@both_conditions
@pytest.mark.parametrize("network", ONLY_CALLS)
def test_what_is_only_calls_is_replayed(network: type[Between], frozen: Frozen) -> None:
    assert both_ways(network, frozen) == (0 if REPLAYS else 4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("network", [Scripted, Recurring])
def test_what_is_told_otherwise_is_right(network: type[Between]) -> None:
    both_ways(network, A)


@contextmanager
def hook_on_all_modules() -> Iterator[None]:
    handle = register_module_forward_hook(lambda module, args, output: None)
    try:
        yield
    finally:
        handle.remove()


def test_a_hook_on_all_modules_sees_every_run() -> None:
    with hook_on_all_modules():
        assert both_ways(Between, A) == 4
    assert both_ways(Between, A) == (0 if REPLAYS else 4)


# ----------------------------------------------------------------------------------------------- between two steps


@pytest.mark.parametrize("within", [False, True])
def test_autocast_around_the_backward_pass_is_not_the_models(within: bool) -> None:
    torch.manual_seed(1)
    module, x, found = Between(), torch.randn(3, 4), []
    for network in (module, looked_at(copy.deepcopy(module))):
        model = ActivationRelaxation(network, solver=EULER, frozen=A)
        for _ in range(2):
            network.zero_grad()
            loss = squares(model(x))
            with torch.autocast("cpu", torch.bfloat16, enabled=within):
                backward(loss)
        found.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None)


def test_a_buffer_is_that_of_the_feedforward_pass() -> None:
    torch.manual_seed(1)
    module, x, found = Normalised().double(), torch.randn(3, 4).double(), []
    scale = module.scale.clone()
    model = ActivationRelaxation(module, solver=EULER, frozen=NOTHING)
    for factor in (1, 2, 3):
        module.scale.data.copy_(scale)
        loss = squares(model(x))
        for _ in range(2):
            module.scale.data.mul_(factor)
            module.zero_grad()
            backward(loss, retain_graph=True)
            found.append([p.grad for p in module.parameters()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True) if a is not None and b is not None)


def test_a_weight_that_changes_between_two_backward_passes_is_refused() -> None:
    module, x = mlp(4, 5, 5, 2), torch.randn(3, 4)
    model = ActivationRelaxation(module, solver=EULER, frozen=A)
    loss = squares(model(x))
    backward(loss, retain_graph=True)
    with torch.no_grad():
        module[0].weight.mul_(2)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=r"the parameter '0.weight' was changed in place"):
        backward(loss)
