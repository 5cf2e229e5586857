"""Situations that share the message "a tensor that is neither parameter nor input": each trains, or has its own text.

And losses that read an activity which the model kept to itself: refused, or right, by whichever call the gradient is
taken.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relaxprop import (
    ActivationRelaxation,
    ClosedForm,
    Equilibrium,
    Euler,
    alignment,
    certificate,
    convergence,
    describe_locality,
)
from tests.right_or_refused.verdicts import (
    REFUSALS,
    TOLERANCE,
    Found,
    assert_same,
    check_refused,
    gradients,
    named_gradients,
    right_or_refused,
    squares,
)

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

    def forward(self, x: Any) -> Any:
        return self.readout(self.motor(self.relay(self.cortex(self.retina(x)))))


# ------------------------------------------------------------------------------------------- leaves within the pass


class LoRA(nn.Module):
    """A frozen embedding and layer; what trains is below them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.base = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.down, self.up, self.readout = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False), nn.Linear(4, 3)
        self.cortex, self.motor = nn.Tanh(), nn.Tanh()
        for part in (self.embedding, self.base, self.readout):
            part.requires_grad_(False)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.cortex(self.embedding(tokens))
        y: Tensor = self.readout(self.motor(self.base(h) + self.up(self.down(h))))
        return y


def _recipe(model: LoRA) -> None:
    model.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_(True))


def _recipe_in_place(model: LoRA) -> None:
    def make_inputs_require_grads(module: nn.Module, args: Any, output: Tensor) -> None:
        output.requires_grad_(True)

    model.get_submodule("embedding").register_forward_hook(make_inputs_require_grads)


def _recipe_before(model: LoRA) -> None:
    model.cortex.register_forward_pre_hook(lambda module, args: (args[0].requires_grad_(True),))


@every_setting
@pytest.mark.parametrize("recipe", [_recipe, _recipe_in_place, _recipe_before])
def test_an_embedding_made_to_require_grad_trains(recipe: Callable[[LoRA], None], setting: dict[str, Any]) -> None:
    """As Hugging Face's ``enable_input_require_grads`` does it for gradient checkpointing."""
    tokens = torch.tensor([[1, 2], [3, 6]])
    plain, model = LoRA(), LoRA()
    exact = gradients(plain, tokens)
    recipe(model)
    for _ in range(2):  # what is learned of a pass must not matter to the next
        assert_same(gradients(ActivationRelaxation(model, **setting), tokens), exact)


class DummyLeaf(Net):
    """A tensor that requires grad and carries nothing, as older checkpointing recipes add."""

    def forward(self, x: Tensor) -> Tensor:
        dummy = torch.zeros((), dtype=x.dtype, requires_grad=True)
        h = self.cortex(self.retina(x)) + dummy
        y: Tensor = self.readout(self.motor(self.relay(h)))
        return y


class DummyFirst(Net):
    """Added to the input, above all vertices."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.zeros(1, dtype=x.dtype, requires_grad=True))  # type: ignore[no-any-return]


class StopGradient(Net):
    """The activity as a new leaf, so that what is above gets no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.cortex(self.retina(x)).detach().requires_grad_()
        y: Tensor = self.readout(self.motor(self.relay(h)))
        return y


class Positions(Net):
    """Positions as leaves, though nobody differentiates by them in this pass."""

    def forward(self, x: Tensor) -> Tensor:
        t = torch.linspace(0, 1, 5, dtype=x.dtype).requires_grad_()
        y: Tensor = self.readout(self.motor(self.relay(self.cortex(self.retina(x)) * t.cos())))
        return y


class ConstantInput(Net):
    """The input made to require grad by the model itself, in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x.requires_grad_()
        return super().forward(x)  # type: ignore[no-any-return]


@every_setting
@pytest.mark.parametrize("net", [DummyLeaf, DummyFirst, StopGradient, Positions, ConstantInput])
def test_leaves_made_within_the_pass_train(net: type[Net], setting: dict[str, Any]) -> None:
    exact = gradients(net(), batch())
    model = ActivationRelaxation(net(), **setting)
    for _ in range(2):
        assert_same(gradients(model, batch()), exact)


class Probe(Net):
    """A zero added to an activity and kept, so that its ``grad`` can be looked at."""

    probe: Tensor

    def forward(self, x: Tensor) -> Tensor:
        h = self.cortex(self.retina(x))
        self.probe = torch.zeros_like(h, requires_grad=True)
        y: Tensor = self.readout(self.motor(self.relay(h + self.probe)))
        return y


@every_setting
def test_a_kept_leaf_gets_its_gradient_or_is_refused(setting: dict[str, Any]) -> None:
    """The issue leaves the choice: the leaf's own gradient arrives, or "probe" is named."""

    def attempt(model: Probe, wrapper: nn.Module) -> Found:
        found = dict(gradients(wrapper, batch()))
        return found | {"probe": model.probe.grad}

    plain, model = Probe(), Probe()
    exact = attempt(plain, plain)
    right_or_refused(lambda: attempt(model, ActivationRelaxation(model, **setting)), exact, "probe")


class Foreign(Net):
    """A trained tensor on a plain attribute, not registered: its gradient arrives or it is named."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = torch.ones((), dtype=torch.float64, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) * self.temperature
        return y


@every_setting
def test_a_tensor_on_an_attribute_is_right_or_named(setting: dict[str, Any]) -> None:
    def attempt(model: Foreign, wrapper: nn.Module) -> Found:
        found = dict(gradients(wrapper, batch()))
        return found | {"temperature": model.temperature.grad}

    plain, model = Foreign(), Foreign()
    exact = attempt(plain, plain)
    right_or_refused(lambda: attempt(model, ActivationRelaxation(model, **setting)), exact, "temperature")


# --------------------------------------------------------------------------------------------------- state carried over


class Carries(Net):
    """A state that goes from call to call undetached, on an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.recall: Any = None

    def old(self) -> Tensor:
        return torch.zeros(3, 5, dtype=torch.float64) if self.recall is None else self.recall

    def keep(self, h: Tensor) -> None:
        self.recall = h

    def forward(self, x: Tensor) -> Tensor:
        h = self.cortex(self.retina(x) + self.old())
        self.keep(h)
        y: Tensor = self.readout(self.motor(self.relay(h)))
        return y


class CarriesInList(Carries):
    def __init__(self) -> None:
        super().__init__()
        self.recall = []

    def old(self) -> Tensor:
        return self.recall[-1] if self.recall else torch.zeros(3, 5, dtype=torch.float64)

    def keep(self, h: Tensor) -> None:
        self.recall.append(h)


class CarriesInDict(Carries):
    def __init__(self) -> None:
        super().__init__()
        self.recall = {}

    def old(self) -> Tensor:
        return self.recall.get("h", torch.zeros(3, 5, dtype=torch.float64))  # type: ignore[no-any-return]

    def keep(self, h: Tensor) -> None:
        self.recall["h"] = h


class CarriesInBuffer(Carries):
    """The running state of a recurrent cell in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        del self.recall
        self.register_buffer("recall", None)


class CarriesAverage(Carries):
    """A moving average of activities that keeps its graph."""

    def keep(self, h: Tensor) -> None:
        self.recall = 0.5 * self.old() + 0.5 * h


class CarriesOnChild(Carries):
    """On a part of the model."""

    def old(self) -> Tensor:
        return vars(self.motor).get("recall", torch.zeros(3, 5, dtype=torch.float64))  # type: ignore[no-any-return]

    def keep(self, h: Tensor) -> None:
        vars(self.motor)["recall"] = h


CARRYING = (Carries, CarriesInList, CarriesInDict, CarriesInBuffer, CarriesAverage, CarriesOnChild)


@every_setting
@pytest.mark.parametrize("net", CARRYING)
def test_state_carried_over_undetached_is_right_or_named(net: type[Net], setting: dict[str, Any]) -> None:
    """Two calls, one loss over both, as backpropagation through time has it. The issue leaves the choice."""

    def attempt(model: nn.Module) -> Found:
        loss = squares(model(batch())) + squares(model(-batch()))
        loss.backward()  # type: ignore[no-untyped-call]
        return named_gradients(model)

    exact = attempt(net())
    right_or_refused(lambda: attempt(ActivationRelaxation(net(), **setting)), exact, "recall", "motor.recall")


@every_setting
@pytest.mark.parametrize("net", CARRYING)
def test_state_carried_over_undetached_from_a_pass_that_is_done(net: type[Net], setting: dict[str, Any]) -> None:
    """A loss and a backward per call: backpropagation itself refuses the second ("backward through the graph a second
    time"). So must this, but naming the attribute, where the graph is cut; or it trains by the second call alone."""
    model, twin = ActivationRelaxation(net(), **setting), net()

    def alone() -> Found:
        twin(batch())
        held: Any = (
            vars(twin.motor) if net is CarriesOnChild else twin._buffers if net is CarriesInBuffer else vars(twin)
        )
        recall = held["recall"]
        if isinstance(recall, list):
            recall[-1] = recall[-1].detach()
        elif isinstance(recall, dict):
            recall["h"] = recall["h"].detach()
        else:
            held["recall"] = recall.detach()
        return gradients(twin, -batch())

    exact = alone()
    gradients(model, batch())
    pytorchs_own = ("second time",) if setting is SETTINGS["Equilibrium"] else ()
    right_or_refused(lambda: gradients(model, -batch()), exact, "recall", "motor.recall", *pytorchs_own)


@every_setting
def test_state_carried_as_an_argument_is_right(setting: dict[str, Any]) -> None:
    """What is returned and given back is no secret: the gradient goes through both calls."""

    class Cell(Net):
        def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
            h = self.cortex(self.retina(x) if h is None else self.retina(x) + h)
            return self.readout(self.motor(self.relay(h))), h

    def attempt(model: nn.Module) -> Found:
        y, h = model(batch())
        z, _ = model(-batch(), h)
        (squares(y) + squares(z)).backward()  # type: ignore[no-untyped-call]
        return named_gradients(model)

    assert_same(attempt(ActivationRelaxation(Cell(), **setting)), attempt(Cell()))


# ------------------------------------------------------------------------------------------------------ meta-learning


def _inner(model: nn.Module, wrapper: nn.Module) -> dict[str, Tensor]:
    """One step of gradient descent whose own graph is left out, as first-order MAML does."""
    found = torch.autograd.grad(squares(wrapper(batch())), list(model.parameters()))
    return {name: p - 0.1 * g for (name, p), g in zip(model.named_parameters(), found, strict=True)}


def _functional(model: Net, wrapper: nn.Module) -> Found:
    fast = _inner(model, wrapper)
    prefix = "" if wrapper is model else "module."
    named = {prefix + name: p for name, p in fast.items()}
    squares(torch.func.functional_call(wrapper, named, (-batch(),))).backward()  # type: ignore[no-untyped-call]
    return named_gradients(model)


def _replaced(model: Net, wrapper: nn.Module) -> Found:
    """Clones in the parameters' places, as learn2learn's ``clone_module`` puts them there."""
    fast = _inner(model, wrapper)
    slow = dict(model.named_parameters())
    for name, p in fast.items():
        path, _, last = name.rpartition(".")
        model.get_submodule(path)._parameters[last] = p  # type: ignore[assignment]
    squares(wrapper(-batch())).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in slow.items()}


def _plain_clones(model: Net, wrapper: nn.Module) -> Found:
    """Clones without a step between."""
    slow = dict(model.named_parameters())
    for name, p in slow.items():
        path, _, last = name.rpartition(".")
        model.get_submodule(path)._parameters[last] = p.clone()  # type: ignore[assignment]
    squares(wrapper(-batch())).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in slow.items()}


def _attributes(model: Net, wrapper: nn.Module) -> Found:
    """The parameter deleted and its clone set as a plain attribute, as older recipes do."""
    slow = dict(model.named_parameters())
    for name, p in slow.items():
        path, _, last = name.rpartition(".")
        part = model.get_submodule(path)
        delattr(part, last)
        setattr(part, last, p.clone())
    squares(wrapper(-batch())).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in slow.items()}


def _hypernetwork(model: Net, wrapper: nn.Module) -> Found:
    """One weight is made by another network."""
    maker = nn.Linear(1, 20).double()
    nn.init.constant_(maker.weight, 0.1)
    nn.init.constant_(maker.bias, 0.2)
    del model.retina.weight
    model.retina.weight = maker(torch.ones(1).double()).view(5, 4)
    squares(wrapper(batch())).backward()  # type: ignore[no-untyped-call]
    return {f"maker.{name}": p.grad for name, p in maker.named_parameters()} | dict(named_gradients(model))


@every_setting
@pytest.mark.parametrize("way", [_functional, _replaced, _plain_clones, _attributes, _hypernetwork])
def test_clones_of_parameters_are_right_or_named(
    way: Callable[[Net, nn.Module], Found], setting: dict[str, Any]
) -> None:
    """A meta-learning loop. The issue leaves the choice; refused, a parameter's name is there."""
    plain, model = Net(), Net()
    names = [name for name, _ in plain.named_parameters()]
    names += [f"module.{name}" for name in names]
    exact = way(plain, plain)
    right_or_refused(lambda: way(model, ActivationRelaxation(model, **setting)), exact, *names)


@every_setting
def test_detached_clones_by_functional_call_are_right(setting: dict[str, Any]) -> None:
    """Leaves in the parameters' places are what the user wants gradients of."""

    def attempt(model: Net, wrapper: nn.Module, prefix: str) -> Found:
        fast = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        named = {prefix + n: p for n, p in fast.items()}
        squares(torch.func.functional_call(wrapper, named, (batch(),))).backward()  # type: ignore[no-untyped-call]
        return {n: p.grad for n, p in fast.items()}

    plain, model = Net(), Net()
    wrapper = ActivationRelaxation(model, **setting)
    assert_same(attempt(model, wrapper, "module."), attempt(plain, plain, ""))


# -------------------------------------------------------------------------------- tensors in objects of the user's own


@dataclass
class Batch:
    data: Tensor
    more: list[Tensor] = field(default_factory=list)


@dataclass
class Outer:
    inner: Batch
    note: str = ""


@dataclass(slots=True)
class Slotted:
    data: Tensor


class SlottedToo(Slotted):
    pass


class TakesObject(Net):
    def forward(self, x: Any) -> Any:
        while not isinstance(x, Tensor):
            x = x[0] if isinstance(x, list) else getattr(x, "inner", None) or x.data
        return super().forward(x)


TAKEN: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": Batch,
    "nested dataclass": lambda x: Outer(Batch(x)),
    "slots": Slotted,
    "list of dataclasses": lambda x: [Batch(x)],
    "namespace": lambda x: SimpleNamespace(data=x),
}


@every_setting
@pytest.mark.parametrize("wrap", TAKEN.values(), ids=TAKEN.keys())
def test_a_dataclass_of_data_trains(wrap: Callable[[Tensor], Any], setting: dict[str, Any]) -> None:
    exact = gradients(TakesObject(), wrap(batch()))
    assert_same(gradients(ActivationRelaxation(TakesObject(), **setting), wrap(batch())), exact)


@every_setting
@pytest.mark.parametrize("wrap", TAKEN.values(), ids=TAKEN.keys())
def test_a_tensor_that_requires_grad_in_a_dataclass_is_right_or_named(
    wrap: Callable[[Tensor], Any], setting: dict[str, Any]
) -> None:
    """The issue leaves the choice: the input's gradient arrives, or the class is named."""

    def attempt(model: nn.Module) -> Found:
        x = batch().requires_grad_()
        return dict(gradients(model, wrap(x))) | {"input": x.grad}

    kinds = "Batch", "Outer", "Slotted", "SimpleNamespace", "data"
    exact = attempt(TakesObject())
    right_or_refused(lambda: attempt(ActivationRelaxation(TakesObject(), **setting)), exact, *kinds)


@every_setting
def test_an_input_from_above_in_a_dataclass_is_right_or_named(setting: dict[str, Any]) -> None:
    """The wrapper is a part of a larger model, so that its input has a graph of its own."""

    def attempt(body: nn.Module) -> Found:
        torch.manual_seed(2)
        stem = nn.Linear(4, 4).double()
        squares(body(Batch(stem(batch())))).backward()  # type: ignore[no-untyped-call]
        return dict(named_gradients(body)) | {f"stem.{n}": p.grad for n, p in stem.named_parameters()}

    exact = attempt(TakesObject())
    right_or_refused(lambda: attempt(ActivationRelaxation(TakesObject(), **setting)), exact, "Batch", "data")


class Returns(Net):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(super().forward(x))


def _policy(y: Tensor) -> Any:
    normal = torch.distributions.Normal(y, torch.ones_like(y), validate_args=False)
    return torch.distributions.Independent(normal, 1, validate_args=False)


RETURNED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], str]] = {
    "dataclass": (Batch, lambda r: squares(r.data), "Batch"),
    "nested dataclass": (lambda y: Outer(Batch(y)), lambda r: squares(r.inner.data), "Outer"),
    "list in a dataclass": (lambda y: Batch(torch.zeros(()), [y]), lambda r: squares(r.more[0]), "Batch"),
    "dataclass in a list": (lambda y: [Outer(Batch(y))], lambda r: squares(r[0].inner.data), "Outer"),
    "slots": (Slotted, lambda r: squares(r.data), "Slotted"),
    "namespace of a dict": (
        lambda y: SimpleNamespace(all={"y": y}),
        lambda r: squares(r.all["y"]),
        "SimpleNamespace",
    ),
    "Normal": (
        lambda y: torch.distributions.Normal(y, torch.ones_like(y), validate_args=False),
        lambda r: squares(r.mean),
        "Normal",
    ),
    "Independent": (_policy, lambda r: squares(r.mean), "Independent"),
    "beside a tensor": (
        lambda y: (y, Outer(Batch(2 * y))),
        lambda r: squares(r[0]) + squares(r[1].inner.data),
        "Outer",
    ),
    "named by a method": (lambda y: SimpleNamespace(y=y).__getattribute__, lambda r: squares(r("y")), "y"),
    "partly bound": (lambda y: partial(torch.mul, y), lambda r: squares(r(1.0)), "partial"),
    "deep": (lambda y: Outer(Outer(Batch(y))), lambda r: squares(r.inner.inner.data), "Outer"),  # type: ignore[arg-type]
    "deque of objects": (lambda y: deque([Batch(y)]), lambda r: squares(r[0].data), "Batch"),
    "inherited slots": (SlottedToo, lambda r: squares(r.data), "SlottedToo"),
    "a set": (lambda y: frozenset([y]), lambda r: squares(next(iter(r))), "frozenset"),
    "a closure": (lambda y: lambda: y, lambda r: squares(r()), "function"),
}


@every_setting
@pytest.mark.parametrize("case", RETURNED.values(), ids=RETURNED.keys())
@pytest.mark.parametrize("by", ["backward", "grad"])
def test_a_result_in_an_object_is_right_or_named(
    case: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], str], setting: dict[str, Any], by: str
) -> None:
    """The issue leaves the choice: right, or the class is named with what to return instead."""
    wrap, loss, name = case

    def attempt(model: nn.Module) -> Found:
        if by == "backward":
            return gradients(model, batch(), loss=loss)
        parameters = dict(model.named_parameters())
        found = torch.autograd.grad(loss(model(batch())), list(parameters.values()), allow_unused=True)
        return dict(zip(parameters, found, strict=True))

    exact = attempt(Returns(wrap))
    right_or_refused(lambda: attempt(ActivationRelaxation(Returns(wrap), **setting)), exact, name, "cortex", "motor")


# ---------------------------------------------------------------------------------------------------- another thread


class Meets(Net):
    """Two threads are in the middle of the pass at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier = threading.Barrier(2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.retina(x)
        self.barrier.wait(10)
        h = self.cortex(h)
        self.barrier.wait(10)
        y: Tensor = self.readout(self.motor(self.relay(h)))
        self.barrier.wait(10)
        return y


@every_setting
def test_two_threads_in_one_wrapper_are_right_or_refused(setting: dict[str, Any]) -> None:
    """The issue asks that hooks act for their own thread; refused instead, the threads are named."""
    plain, model = Net(), Meets()
    wrapper = ActivationRelaxation(model, **setting)
    parameters = list(model.parameters())

    def attempt(x: Tensor) -> Found:
        try:
            with torch.enable_grad():
                found = torch.autograd.grad(squares(wrapper(x)), parameters)
        except threading.BrokenBarrierError:
            raise RuntimeError("the other thread was refused: run one thread at a time") from None
        except REFUSALS:
            model.barrier.abort()
            raise
        return {name: g for (name, _), g in zip(plain.named_parameters(), found, strict=True)}

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(attempt, x) for x in (batch(), -batch())]
        for x, future in zip((batch(), -batch()), futures, strict=True):
            right_or_refused(future.result, gradients(plain, x), "thread", "threads")


class BranchesInThreads(Net):
    """The model computes its own branches in a pool."""

    def forward(self, x: Tensor) -> Tensor:
        def branch(first: bool) -> Tensor:
            with torch.enable_grad():
                y: Tensor = self.cortex(self.retina(x)) if first else self.motor(self.relay(self.retina(x)))
                return y

        with ThreadPoolExecutor(2) as pool:
            y: Tensor = self.readout(sum(pool.map(branch, (True, False))))
        return y


class LayerInThread(Net):
    """One layer is called in a thread of its own."""

    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            h = pool.submit(lambda: self.cortex(self.retina(x))).result()
        y: Tensor = self.readout(self.motor(self.relay(h)))
        return y


@every_setting
@pytest.mark.parametrize("net", [BranchesInThreads, LayerInThread])
def test_threads_within_the_model_are_right_or_refused(net: type[Net], setting: dict[str, Any]) -> None:
    exact = gradients(net(), batch())
    names = "thread", "threads", "cortex", "motor"
    right_or_refused(lambda: gradients(ActivationRelaxation(net(), **setting), batch()), exact, *names)


@every_setting
def test_forward_in_one_thread_and_backward_in_another_is_right(setting: dict[str, Any]) -> None:
    model = ActivationRelaxation(Net(), **setting)
    with ThreadPoolExecutor(1) as pool:
        loss = pool.submit(lambda: squares(model(batch()))).result()
    loss.backward()  # type: ignore[no-untyped-call]
    assert_same(named_gradients(model), gradients(Net(), batch()))


# ------------------------------------------------------------------------------------------- activities that were kept


class Keeps(Net):
    """A kept activity, and a loss that reads it: a sparsity penalty, say."""

    def __init__(self) -> None:
        super().__init__()
        self.aside: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.cortex(self.retina(x))
        self.aside = h
        y: Tensor = self.readout(self.motor(self.relay(h)))
        return y

    def penalty(self) -> Tensor:
        total: Tensor = self.aside.square().sum()
        return total


class KeepsLoss(Keeps):
    """An auxiliary loss, as a mixture of experts keeps it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.cortex(self.retina(x))
        self.aside = 2 * h.square().sum()
        y: Tensor = self.readout(self.motor(self.relay(h)))
        return y

    def penalty(self) -> Tensor:
        total: Tensor = self.aside
        return total


class KeepsInList(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        self.aside = []
        h = self.cortex(self.retina(x))
        self.aside.append(h)
        k = self.motor(self.relay(h))
        self.aside.append(k)
        y: Tensor = self.readout(k)
        return y

    def penalty(self) -> Tensor:
        total: Tensor = torch.cat(self.aside).square().sum()
        return total


class KeepsByHook(Keeps):
    """A feature extractor: a forward hook puts an activity in a dict of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = {}
        self.motor.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.aside["motor"] = output

    def forward(self, x: Tensor) -> Tensor:
        return Net.forward(self, x)  # type: ignore[no-any-return]

    def penalty(self) -> Tensor:
        total: Tensor = self.aside["motor"].square().sum()
        return total


class KeepsBeforeVertex(Keeps):
    """What is between two vertices, computed from one."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.relay(self.cortex(self.retina(x)))
        self.aside = h
        y: Tensor = self.readout(self.motor(h))
        return y


class KeepsOutput(Keeps):
    """The output itself, kept as well as returned."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Net.forward(self, x)
        self.aside = y
        return y


class KeepsAboveAll(Keeps):
    """Above every vertex: no product with A reaches it."""

    def forward(self, x: Tensor) -> Tensor:
        u = self.retina(x)
        self.aside = u
        y: Tensor = self.readout(self.motor(self.relay(self.cortex(u))))
        return y


ELSEWHERE: dict[str, Any] = {}


class KeepsGlobally(Keeps):
    """In a dict of the script's own."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.cortex(self.retina(x))
        ELSEWHERE["h"] = h.sin()
        y: Tensor = self.readout(self.motor(self.relay(h)))
        return y

    def penalty(self) -> Tensor:
        total: Tensor = ELSEWHERE["h"].square().sum()
        return total


class KeepsInClosure(Keeps):
    """What computes the penalty is kept, and encloses the activity."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.cortex(self.retina(x))
        self.aside = lambda: (h**2).sum()
        y: Tensor = self.readout(self.motor(self.relay(h)))
        return y

    def penalty(self) -> Tensor:
        total: Tensor = self.aside()
        return total


class KeepsOutside(KeepsByHook):
    """A hook of the user's puts what a layer gets in a list that the model does not know."""

    def __init__(self) -> None:
        Keeps.__init__(self)
        seen: list[Tensor] = []
        self.relay.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        self.penalty = lambda: seen[-1].square().sum()  # type: ignore[method-assign]


class KeepsOnChild(Keeps):
    """On a part of the model, in a tuple in a dict."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.cortex(self.retina(x))
        vars(self.motor)["aside"] = {"now": (h, 1)}
        y: Tensor = self.readout(self.motor(self.relay(h)))
        return y

    def penalty(self) -> Tensor:
        total: Tensor = vars(self.motor)["aside"]["now"][0].square().sum()
        return total


class KeepsDifference(Keeps):
    """Computed from two activities and from the weights between them (predictive coding, consistency losses)."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.cortex(self.retina(x))
        k = self.motor(self.relay(h))
        self.aside = k - self.relay(h)
        y: Tensor = self.readout(k)
        return y


KEEPING = (
    Keeps,
    KeepsLoss,
    KeepsInList,
    KeepsByHook,
    KeepsBeforeVertex,
    KeepsOutput,
    KeepsAboveAll,
    KeepsGlobally,
    KeepsInClosure,
    KeepsOutside,
    KeepsOnChild,
    KeepsDifference,
)
NAMES = "aside", "cortex", "motor", "relay", "retina", "readout", "linear", "tanh", "sin", "square"


def _backward(model: nn.Module, loss: Tensor) -> Found:
    loss.backward()  # type: ignore[no-untyped-call]
    return named_gradients(model)


def _grad(model: nn.Module, loss: Tensor) -> Found:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def _backward_inputs(model: nn.Module, loss: Tensor) -> Found:
    loss.backward(inputs=list(model.parameters()))  # type: ignore[no-untyped-call]
    return named_gradients(model)


WAYS = {"backward": _backward, "grad": _grad, "backward(inputs=…)": _backward_inputs}


@every_setting
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("net", KEEPING)
def test_a_loss_that_reads_a_kept_activity_is_right_or_named(
    net: type[Keeps], way: Callable[[nn.Module, Tensor], Found], setting: dict[str, Any]
) -> None:
    """By whichever call the gradient is taken. Uncut, under `Equilibrium`, it is right."""

    def attempt(model: Keeps, wrapper: nn.Module) -> Found:
        return way(wrapper, squares(wrapper(batch())) + model.penalty())

    plain, model = net(), net()
    exact = attempt(plain, plain)
    right = right_or_refused(lambda: attempt(model, ActivationRelaxation(model, **setting)), exact, *NAMES)
    if setting is SETTINGS["Equilibrium"]:
        assert right, "the graph is not cut: nothing is to be refused"


@every_setting
@pytest.mark.parametrize("way", [_backward, alignment], ids=["backward", "alignment"])
def test_a_loss_that_reads_nothing_but_a_kept_activity_is_right_or_named(way: Any, setting: dict[str, Any]) -> None:
    def attempt(model: Keeps, wrapper: nn.Module) -> Found:
        if way is alignment and wrapper is not model:
            found = alignment(wrapper, lambda y: model.penalty(), batch())
            assert max(entry.distance for entry in found.values()) <= TOLERANCE
        wrapper(batch())
        return _backward(wrapper, model.penalty())

    plain, model = Keeps(), Keeps()
    exact = attempt(plain, plain)
    right_or_refused(lambda: attempt(model, ActivationRelaxation(model, **setting)), exact, *NAMES)


class KeepsLater(Keeps):
    """Keeps from its third pass on."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        h = self.cortex(self.retina(x))
        self.aside = h if self.passes > 2 else h.detach()
        y: Tensor = self.readout(self.motor(self.relay(h)))
        return y


@every_setting
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("part", ["all", "one", "retained"])
def test_whichever_pass_keeps_and_whatever_is_asked_for(
    part: str, way: Callable[[nn.Module, Tensor], Found], setting: dict[str, Any]
) -> None:
    """A later pass than the first, one weight only, a graph that is kept."""

    def attempt(model: Keeps, wrapper: nn.Module) -> Found:
        for _ in range(2):
            way(wrapper, squares(wrapper(batch())) + model.penalty())
        wrapper.zero_grad()
        loss = squares(wrapper(batch())) + model.penalty()
        if part == "all":
            return way(wrapper, loss)
        wanted = [model.retina.weight]
        if part == "retained":
            torch.autograd.grad(loss, wanted, retain_graph=True)
        return {"retina.weight": torch.autograd.grad(loss, wanted)[0]}

    plain, model = KeepsLater(), KeepsLater()
    exact = attempt(plain, plain)
    right = right_or_refused(lambda: attempt(model, ActivationRelaxation(model, **setting)), exact, *NAMES)
    assert right == (setting is SETTINGS["Equilibrium"])


@every_setting
@pytest.mark.parametrize("net", [Keeps, KeepsAboveAll, KeepsGlobally])
def test_a_kept_activity_that_only_some_gradients_look_at_is_right(net: type[Keeps], setting: dict[str, Any]) -> None:
    """The loss does not read it, whichever call the gradient is taken by."""
    exact = gradients(net(), batch())
    for way in WAYS.values():
        wrapper = ActivationRelaxation(net(), **setting)
        assert_same(way(wrapper, squares(wrapper(batch()))), exact)


@every_setting
def test_one_wrapper_that_reads_what_another_keeps_is_right_or_named(setting: dict[str, Any]) -> None:
    """The kept activity is an argument of the second model, and nothing else of the first is in the loss but itself."""

    class Head(Net):
        def __init__(self) -> None:
            super().__init__()
            self.retina = nn.Linear(5, 5).double()

    def attempt(model: Keeps, wrapper: nn.Module, head: nn.Module) -> Found:
        y = wrapper(batch())
        found = torch.autograd.grad(squares(y) + squares(head(model.aside)), list(model.parameters()))
        return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True)}

    plain, model = Keeps(), Keeps()
    exact = attempt(plain, plain, Head())
    right_or_refused(
        lambda: attempt(model, ActivationRelaxation(model, **setting), ActivationRelaxation(Head(), **setting)),
        exact,
        *NAMES,
    )


@every_setting
@pytest.mark.parametrize("net", KEEPING)
def test_alignment_of_such_a_loss_is_right_or_named(net: type[Keeps], setting: dict[str, Any]) -> None:
    """It compares by ``torch.autograd.grad``."""
    model = net()
    wrapper = ActivationRelaxation(model, **setting)
    try:
        found = alignment(wrapper, lambda y: squares(y) + model.penalty(), batch())
    except REFUSALS as error:
        check_refused(error, *NAMES)
        return
    assert found.keys() == dict(model.named_parameters()).keys()
    assert max(entry.distance for entry in found.values()) <= TOLERANCE


@pytest.mark.parametrize("net", KEEPING)
def test_convergence_of_such_a_loss_is_right_or_named(net: type[Keeps]) -> None:
    model = net()
    wrapper = ActivationRelaxation(model)
    try:
        found = convergence(wrapper, lambda y: squares(y) + model.penalty(), batch(), solver=Euler(1.0, 4))
    except REFUSALS as error:
        check_refused(error, *NAMES)
        return
    assert max(float(curve[-1]) for curve in found.measured.values()) <= TOLERANCE


@every_setting
def test_a_pass_that_was_refused_leaves_no_gradient(setting: dict[str, Any]) -> None:
    """What is refused must not have half changed ``.grad`` of the parameters above the kept activity."""
    model = Keeps()
    wrapper = ActivationRelaxation(model, **setting)
    exact = gradients(wrapper, batch())
    wrapper.zero_grad()
    try:
        (squares(wrapper(batch())) + model.penalty()).backward()  # type: ignore[no-untyped-call]
    except REFUSALS:
        wrapper.zero_grad()
        assert_same(gradients(wrapper, batch()), exact)


@every_setting
def test_kept_and_only_looked_at_is_right(setting: dict[str, Any]) -> None:
    """Nobody differentiates what was kept: it does no harm."""
    assert_same(gradients(ActivationRelaxation(Keeps(), **setting), batch()), gradients(Keeps(), batch()))


def test_diagnostics_without_a_loss_take_a_model_that_keeps() -> None:
    wrapper = ActivationRelaxation(Keeps())
    assert certificate(wrapper, batch())
    assert describe_locality(wrapper, batch()).rows
