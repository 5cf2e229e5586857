"""The wrapper in its module's place: names, attributes, methods, class, copies, and what resists."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Generic, TypeVar, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from relaxprop import ActivationRelaxation, ClosedForm, Equilibrium, Euler
from tests.compare import backward, squares
from tests.problems import mlp

T = TypeVar("T")
X = torch.linspace(-1, 1, 6).view(2, 3)
CUT = ClosedForm(0.9, 400)


def wrap(module: nn.Module, **settings: Any) -> Any:
    return ActivationRelaxation(module, **{"solver": CUT} | settings)


class Body(nn.Module):
    """Three layers; the odd modules below differ from it in one thing each."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.act, self.last = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)
        self.temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.act(self.first(x))) / self.temperature
        return y


class CallsItself(Body):
    def __call__(self, x: Tensor, scale: float = 1.0) -> Any:
        return super().__call__(x) * scale


class Fallback(Body):
    def __getattr__(self, name: str) -> Any:
        return 7 if name == "made_up" else super().__getattr__(name)


class Notes(Body):
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__.setdefault("noted", []).append(name)


class Sized(Body):
    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self.first, self.last])


class CopiesItself(Body):
    def __deepcopy__(self, memo: Any) -> Any:
        other = type(self)()
        other.load_state_dict(self.state_dict())
        other.temperature = self.temperature
        return other


class Reduces(Body):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced, (type(self), self.state_dict())


def _reduced(kind: type[Body], state: dict[str, Tensor]) -> Body:
    module = kind()
    module.load_state_dict(state)
    return module


class HasSlots(Body):
    __slots__ = ("extra",)


class Interface(ABC):
    @abstractmethod
    def name(self) -> str: ...


class Implements(Body, Interface):
    def name(self) -> str:
        return "implemented"


class OfType(Body, Generic[T]):
    pass


class Asks:
    def __init_subclass__(cls, *, title: str = "", **more: Any) -> None:
        super().__init_subclass__(**more)
        if not title:
            raise TypeError("a title is asked for")


class Titled(Body, Asks, title="a title"):
    pass


class UsesSuper(Body):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def described(self) -> str:
        return f"{super().__repr__()[:4]} {self.temperature}"


class WithProperty(Body):
    @property
    def sharpness(self) -> float:
        return 1 / self.temperature

    @sharpness.setter
    def sharpness(self, value: float) -> None:
        self.temperature = 1 / value

    @classmethod
    def made(cls) -> WithProperty:
        return cls()


class WithExtraState(Body):
    def get_extra_state(self) -> Any:
        return torch.tensor(self.temperature)

    def set_extra_state(self, state: Any) -> None:
        self.temperature = float(state)


ODD: tuple[type[Body], ...] = (
    Body, CallsItself, Fallback, Notes, Sized, CopiesItself, Reduces, HasSlots, Implements, OfType, Titled, UsesSuper,
    WithProperty, WithExtraState,
)  # fmt: skip
odd = pytest.mark.parametrize("kind", ODD, ids=lambda kind: kind.__name__)


def found(model: Callable[..., Any], module: nn.Module) -> dict[str, Tensor]:
    module.zero_grad()
    squares(model(X)).backward()  # type: ignore[no-untyped-call]
    return {name: cast(Tensor, p.grad).clone() for name, p in module.named_parameters()}


def assert_relaxes(model: Any, module: nn.Module, plain: nn.Module) -> None:
    """Equal to backpropagation where it converges, and not where it does not."""
    for name, exact in found(plain, plain).items():
        torch.testing.assert_close(found(model, module)[name], exact, msg=name)
    assert model.last_relaxation.vertices == 1
    solver, model.solver = model.solver, Euler(0.1, 2)
    first = next(iter(found(plain, plain)))
    assert not torch.allclose(found(model, module)[first], found(plain, plain)[first], rtol=0.1)
    model.solver = solver


@odd
def test_an_odd_module_relaxes_under_its_own_names(kind: type[Body]) -> None:
    plain, model = kind(), wrap(kind())
    assert_relaxes(model, model, plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert isinstance(model, ActivationRelaxation)
    assert type(model.module) is kind
    assert str(inspect.signature(model.forward)) == str(inspect.signature(plain.forward))
    fresh = kind()
    fresh.load_state_dict(model.state_dict())
    model.load_state_dict(fresh.state_dict(), strict=True)


@odd
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), None], ids=["copy", "pickle", "file"]
)
def test_a_copy_is_a_wrapper_of_its_own(kind: type[Body], again: Callable[[Any], Any] | None) -> None:
    model = wrap(kind())
    if again is None:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = again(model)
    assert type(twin).__name__ == type(model).__name__
    assert twin.module is not model.module
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in model.parameters())
    assert [id(p) for p in twin.parameters()] == [id(p) for p in twin.module.parameters()]
    assert twin.settings == model.settings
    assert_relaxes(twin, twin, kind())


def test_it_is_of_the_modules_class_where_that_can_be() -> None:
    for kind in ODD:
        assert isinstance(wrap(kind()), kind) == (kind not in (HasSlots, Titled))
    assert isinstance(wrap(mlp(3, 4, 2)), nn.Sequential)


def test_what_a_class_adds_is_reached() -> None:
    assert wrap(Fallback()).made_up == 7
    assert wrap(Implements()).name() == "implemented"
    assert wrap(UsesSuper()).described() == "Uses 1.0"
    assert wrap(CallsItself())(X, scale=2.0).shape == (2, 2)
    model = wrap(WithProperty())
    model.sharpness = 4.0
    assert model.module.temperature == model.temperature == 0.25
    assert type(model.made()) is WithProperty
    extra = wrap(WithExtraState())
    extra.temperature = 3.0
    other = wrap(WithExtraState())
    other.load_state_dict(extra.state_dict())
    assert other.module.temperature == 3.0
    with pytest.raises(AttributeError, match="nothing"):
        wrap(Body()).nothing  # noqa: B018
    assert {"temperature", "first", "solver"} <= set(dir(wrap(Body())))


def test_attributes_are_set_on_the_module() -> None:
    model = wrap(Body())
    model.temperature = 2.0
    model.new = "attribute"
    assert (model.module.temperature, model.module.new) == (2.0, "attribute")
    model.last = nn.Linear(4, 5)
    model.register_buffer("count", torch.zeros(1))
    model.register_parameter("gain", nn.Parameter(torch.ones(1)))
    model.add_module("more", nn.Tanh())
    assert model.module(X).shape == model(X).shape == (2, 5)
    assert {"count", "gain"} <= set(model.module.state_dict())
    assert list(model.module.state_dict()) == list(model.state_dict())
    assert model.module.more is model.more
    del model.new, model.more
    assert not hasattr(model.module, "new")
    assert not hasattr(model.module, "more")
    model.eval()
    assert not any(part.training for part in model.module.modules())
    model.module.train()
    assert model.training
    model.double()
    assert model.module.first.weight.dtype == torch.float64
    with pytest.raises(AttributeError, match="wrap the other module anew"):
        model.module = Body()


def test_a_sequential_can_be_taken_apart_and_changed() -> None:
    model = wrap(mlp(3, 4, 2))
    assert len(model) == len(model.module) == 3
    assert model[0] is model.module[0]
    assert list(model) == list(model.module.children())
    model[2] = nn.Linear(4, 6)
    model.append(nn.Tanh())
    assert model(X).shape == (2, 6)
    del model[3]
    assert list(model.state_dict()) == list(mlp(3, 4, 2).state_dict())
    assert len(model.module) == 3
    backward(squares(model(X)))
    assert model.last_relaxation.vertices == 1


class CalledAlike(Body):
    """Its parts and attributes are called as the wrapper's settings, and as what else it has."""

    def __init__(self) -> None:
        super().__init__()
        self.output, self.frozen, self.record = nn.Linear(2, 2), True, "a record"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.output(super().forward(x))
        return y


def test_where_names_meet_they_are_the_modules() -> None:
    model, plain = wrap(CalledAlike(), output="relaxed"), CalledAlike()
    assert model.output is model.module.output
    assert model.frozen is True
    assert model.settings.output == "relaxed"
    assert model.get_submodule("output") is model.module.output
    model.output = nn.Linear(2, 3)
    assert model.module(X).shape == (2, 3)
    model.module.output = plain.output
    with pytest.raises(AttributeError, match=r"'frozen' is a setting.*dataclasses\.replace.*wrapper\.module\.frozen"):
        model.frozen = False
    model.settings = replace(model.settings, output="clamped", solver=Equilibrium())
    assert model.settings.output == "clamped"
    with pytest.raises(TypeError, match="settings must be a Settings"):
        model.settings = "clamped"
    model.settings = replace(model.settings, solver=CUT)
    for name, gradient in found(plain, plain).items():
        torch.testing.assert_close(found(model, model)[name], gradient)


def test_functional_calls_reach_every_parameter() -> None:
    plain, model = Body(), wrap(Body())
    values = {name: (2 * p).detach().requires_grad_() for name, p in plain.named_parameters()}
    for solver, equal in ((ClosedForm(), True), (CUT, True), (Euler(0.1, 2), False)):
        model.solver = solver
        ours = torch.autograd.grad(squares(torch.func.functional_call(model, values, (X,))), list(values.values()))
        theirs = torch.autograd.grad(squares(torch.func.functional_call(plain, values, (X,))), list(values.values()))
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(ours, theirs, strict=True)) == equal
    assert list(model.parameters()) == list(model.module.parameters())


@pytest.mark.parametrize("through", ["wrapper", "module"])
def test_parametrizations_and_pruning_of_a_part(through: str) -> None:
    def changed(model: nn.Module, body: Any) -> nn.Module:
        parametrizations.weight_norm(body.first)
        cast(Any, prune).l1_unstructured(body.last, "weight", 0.5)
        return model

    plain = Body()
    changed(plain, plain)
    model = wrap(Body())
    changed(model, model if through == "wrapper" else model.module)
    assert list(model.state_dict()) == list(plain.state_dict())
    for name, gradient in found(plain, plain).items():
        torch.testing.assert_close(found(model, model)[name], gradient)


def test_averaged_weights() -> None:
    model = wrap(Body())
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged(X), model.module(X))
    assert isinstance(averaged.module, ActivationRelaxation)
    assert averaged.module.module is not model.module


def test_hooks_on_the_wrapper_and_on_the_module_run_once_each() -> None:
    model, calls = wrap(Body()), list[str]()
    model.register_forward_hook(lambda *_: calls.append("wrapper"))
    model.module.register_forward_hook(lambda *_: calls.append("module"))
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model(X)
    assert calls == ["before", "module", "wrapper"]


def test_the_plain_module_stays_plain() -> None:
    plain = Body()
    before = set(vars(plain))
    model = wrap(plain)
    backward(squares(model(X)))
    assert type(plain) is Body
    assert set(vars(plain)) == before
    assert not any(part._forward_hooks for part in plain.modules())
    assert found(plain, plain)


def test_a_part_of_a_larger_model_has_no_prefix_of_its_own() -> None:
    larger = nn.ModuleDict({"body": wrap(Body()), "head": nn.Linear(2, 2)})
    plain = nn.ModuleDict({"body": Body(), "head": nn.Linear(2, 2)})
    assert list(larger.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(larger.state_dict())
    larger.load_state_dict(plain.state_dict(), assign=True)
    assert larger.get_parameter("body.first.weight") is cast(Any, larger["body"]).module.first.weight
    torch.testing.assert_close(larger["body"](X), plain["body"](X))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler does
def test_it_can_be_compiled_in_place() -> None:
    model = wrap(Body())
    model.compile(backend="eager")
    backward(squares(model(X)))
    assert model.last_relaxation.vertices == 1
    assert model.module._compiled_call_impl is None


def test_printed_it_says_how_the_module_relaxes() -> None:
    assert repr(wrap(nn.Tanh())) == (
        f"ActivationRelaxation(\n  solver={CUT}, vertices=activations, output=clamped\n  Tanh()\n)"
    )
