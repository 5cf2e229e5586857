"""One tensor under two names: what is written under the one is read under the other, as without a cut, or is refused.

Inputs that the model writes into, modules that return what they were given, results that are the same tensor or an
input, and what is noted on a tensor, or asked of its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_full_backward_hook

from relaxprop import (
    ActivationRelaxation,
    ClosedForm,
    DirectFeedback,
    Equilibrium,
    Euler,
    Frozen,
    PredictiveCoding,
)
from relaxprop.sight import CutOffError
from tests.compare import refuses

CUT: dict[str, dict[str, Any]] = {
    "closed form": {"solver": ClosedForm(0.9, 80)},
    "default": {"keep_states": True},
    "Euler": {"solver": Euler(0.9, 80)},
    "modules": {"solver": ClosedForm(0.9, 80), "vertices": "modules"},
    "operations": {"keep_states": True, "vertices": "operations"},
}
UNCUT: dict[str, dict[str, Any]] = {"uncut": {}, "Equilibrium": {"solver": Equilibrium()}}
cut = pytest.mark.parametrize("setting", CUT.values(), ids=CUT.keys())
uncut = pytest.mark.parametrize("setting", UNCUT.values(), ids=UNCUT.keys())
every_setting = pytest.mark.parametrize("setting", [*CUT.values(), *UNCUT.values()], ids=[*CUT.keys(), *UNCUT.keys()])

Build = Callable[[], nn.Module]
Use = Callable[[Any, Tensor], Any]  # the model and the stem's result: the loss


class Function(nn.Module):
    """A model with two layers, which calls the function with itself and the input."""

    def __init__(self, function: Callable[[Any, Tensor], Any], act: nn.Module | None = None) -> None:
        super().__init__()
        self.one, self.two, self.tanh = nn.Linear(6, 6), nn.Linear(6, 6), nn.Tanh()
        self.act = nn.Tanh() if act is None else act
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def outcome(build: Build, use: Use, setting: dict[str, Any] | None, passes: int = 3) -> list[Any]:
    """The losses of some passes, and all gradients."""
    torch.manual_seed(0)
    stem, model = nn.Linear(6, 6).double(), build().double()
    wrapped = model if setting is None else ActivationRelaxation(model, **setting)
    found: list[Any] = []
    for _ in range(passes):
        for part in (stem, model):
            part.zero_grad()
        loss = use(wrapped, stem(torch.linspace(-1, 1, 30).view(5, 6).double().sin()))
        loss.backward()
        found.append(loss.detach())
        found += [p.grad for part in (stem, model) for p in part.parameters()]
    return found


def assert_as_plain(build: Build, use: Use, setting: dict[str, Any]) -> None:
    for found, expected in zip(outcome(build, use, setting), outcome(build, use, None), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def both(f: Any, z: Tensor) -> Any:
    """A loss that reads the input too, after the model."""
    return ((f(z) + z) ** 2).sum()


# --------------------------------------------------------------------------------------- the model writes into an input


def relu_first(m: Any, x: Tensor) -> Any:
    return m.two(m.tanh(m.one(torch.relu_(x))))


def add(m: Any, x: Tensor) -> Any:
    x += 1
    return m.two(m.tanh(m.one(x)))


def multiply_late(m: Any, x: Tensor) -> Any:
    y = m.two(m.tanh(x + 1))
    x.mul_(3)
    return y


def into_a_part(m: Any, x: Tensor) -> Any:
    x[:, :2] = m.tanh(m.one(x.clone()))[:, :2]
    return m.two(m.tanh(x * 1))


def without_gradients(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        x.clamp_(-0.1, 0.1)
    return m.two(m.tanh(m.one(x * 1)))


def and_returns_it(m: Any, x: Tensor) -> Any:
    y = m.two(m.tanh(m.one(x.mul_(2))))
    return y + x


WRITE = [relu_first, add, multiply_late, into_a_part, without_gradients, and_returns_it]


@every_setting
@pytest.mark.parametrize("write", WRITE, ids=lambda f: f.__name__)
def test_what_the_model_writes_into_an_input_is_there_afterwards(write: Any, setting: dict[str, Any]) -> None:
    assert_as_plain(lambda: Function(write), both, setting)


@every_setting
def test_a_module_that_works_in_place_may_come_first(setting: dict[str, Any]) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    assert_as_plain(build, both, setting)


@cut
def test_an_input_that_is_given_in_a_list_and_handed_back(setting: dict[str, Any]) -> None:
    def use(f: Any, z: Tensor) -> Any:
        given = [z]
        y, back = f(given)
        assert given[0] is z
        assert back is z
        return ((y + z) ** 2).sum() + (back**3).sum()

    def function(m: Any, x: Any) -> Any:
        x[0].add_(1)
        return m.two(m.tanh(m.one(x[0]))), x[0]

    assert_as_plain(lambda: Function(function), use, setting)


@cut
def test_a_leaf_is_not_written_into(setting: dict[str, Any]) -> None:
    """As without a cut."""
    torch.manual_seed(0)
    model, x = Function(add).double(), torch.ones(5, 6, dtype=torch.float64, requires_grad=True)
    for f in (model, ActivationRelaxation(model, **setting)):
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            f(x)
        assert torch.equal(x.detach(), torch.ones_like(x))


def test_what_is_run_again_does_not_write_into_its_input() -> None:
    torch.manual_seed(0)
    model, stem = Function(add).double(), nn.Linear(6, 6).double()
    z = stem(torch.ones(5, 6).double())
    unfrozen: dict[str, Any] = {"solver": Euler(0.5, 5), "frozen": Frozen(relaxation_derivative=False)}
    said = ("Function writes in place into an input of shape (5, 6)", "x = x.clone()")
    with refuses(ValueError, *said):
        ActivationRelaxation(model, **unfrozen)(z)
    with refuses(ValueError, "writes in place into an input of shape (5, 6)", "x = x.clone()"):
        PredictiveCoding(model, lambda y, t: ((y - t) ** 2).sum())(z, target=torch.zeros(5, 6).double())


@cut
def test_an_input_whose_shape_changes_is_refused(setting: dict[str, Any]) -> None:
    def function(m: Any, x: Tensor) -> Any:
        return m.two(m.tanh(m.one(x.unsqueeze_(0))))

    torch.manual_seed(0)
    model, stem = Function(function).double(), nn.Linear(6, 6).double()
    with refuses(ValueError, "writes in place into an input of shape (5, 6) and changes more than its numbers"):
        ActivationRelaxation(model, **setting)(stem(torch.ones(5, 6).double()))


def test_a_rule_of_another_kind_writes_too() -> None:
    def use(f: Any, z: Tensor) -> Any:
        return ((f(z) + z) ** 2).sum()

    torch.manual_seed(0)
    stem, model = nn.Linear(6, 6).double(), Function(add).double()
    x = torch.linspace(-1, 1, 30).view(5, 6).double()
    assert torch.equal(use(DirectFeedback(model), stem(x)), use(model, stem(x)))


# -------------------------------------------------------------------------- a module returns what it was given, written


class Shortcut(nn.Module):
    """A block with pre-activation: the shortcut is the input itself, and is written into by what follows."""

    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.one, self.two, self.relu, self.shortcut = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(True), shortcut

    def forward(self, x: Tensor) -> Any:
        rest = self.shortcut(x)
        return self.two(self.relu(self.one(self.relu(x)))) + rest


def written_result(m: Any, x: Tensor) -> Any:
    h = m.one(x)
    w = m.act(h)
    w += 1
    return m.two(m.tanh(m.one(h))) + w.sum()


def written_origin(m: Any, x: Tensor) -> Any:
    h = m.one(x) * 2
    w = m.act(h)
    h.add_(1)
    return m.two(m.tanh(w))


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Any:
        y = x.tanh() * 1
        return y, y


def one_of_two(m: Any, x: Tensor) -> Any:
    a, b = m.act(m.one(x))
    a.mul_(2)
    return m.two(a + b)


ALIASES: dict[str, tuple[Build, str]] = {
    "shortcut": (lambda: nn.Sequential(nn.Linear(6, 6), *[Shortcut(nn.Identity()) for _ in range(2)]), "modules"),
    "dropout as shortcut": (
        lambda: nn.Sequential(nn.Linear(6, 6), *[Shortcut(nn.Dropout()) for _ in range(2)]).eval(),
        "modules",
    ),
    "the result of what works in place": (
        lambda: Function(written_result, nn.Hardtanh(-0.5, 0.5, True)),
        "activations",
    ),
    "what Identity was given": (lambda: Function(written_origin, nn.Identity()), "modules"),
    "what Flatten was given": (lambda: Function(written_origin, nn.Flatten()), "modules"),
    "what Sequential was given": (lambda: Function(written_origin, nn.Sequential()), "modules"),
}


@pytest.mark.parametrize(("build", "vertices"), ALIASES.values(), ids=ALIASES.keys())
@pytest.mark.parametrize("solver", [ClosedForm(0.9, 80), Euler(0.9, 80)], ids=str)
def test_a_write_that_a_cut_would_hide_is_refused(build: Build, vertices: Any, solver: Any) -> None:
    torch.manual_seed(0)
    model = build().double()
    wrapped = ActivationRelaxation(model, solver=solver, vertices=vertices)
    x = torch.linspace(-1, 1, 30).view(5, 6).double()
    for _ in range(3):
        with refuses(ValueError, "writes in place into what the vertex", "under another name", "solver=Equilibrium()"):
            wrapped(x)


@uncut
@pytest.mark.parametrize(("build", "vertices"), ALIASES.values(), ids=ALIASES.keys())
def test_the_way_out_of_it(build: Build, vertices: Any, setting: dict[str, Any]) -> None:
    assert_as_plain(build, lambda f, z: f(z * 1).pow(2).sum(), setting | {"vertices": vertices})


@every_setting
def test_a_tensor_that_a_module_returns_twice_stays_one(setting: dict[str, Any]) -> None:
    if setting.get("vertices") != "operations":
        setting = setting | {"vertices": "modules"}
    assert_as_plain(lambda: Function(one_of_two, Twice()), lambda f, z: f(z).pow(2).sum(), setting)


class Residual(nn.Module):
    """In place as in most residual networks: no name is left for what is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.relu = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        out = self.two(self.relu(self.one(x)))
        out += x
        out = self.relu(out)
        out = out * 1
        out += 0.5
        return out


@every_setting
def test_what_is_written_under_its_only_name_is_no_matter(setting: dict[str, Any]) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), Residual(), Residual(), nn.Linear(6, 6))

    assert_as_plain(build, lambda f, z: f(z).pow(2).sum(), setting)


@every_setting
def test_another_part_of_the_same_memory_may_be_written_into(setting: dict[str, Any]) -> None:
    def function(m: Any, x: Tensor) -> Any:
        kept = torch.zeros(2, 5, 6, dtype=x.dtype) + m.one(x)
        first = m.act(kept[0])
        kept[1] = 3.0
        return m.two(m.tanh(first)) + kept[1]

    if setting.get("vertices") == "activations":
        setting = setting | {"vertices": "modules"}
    assert_as_plain(lambda: Function(function, nn.Identity()), lambda f, z: f(z).pow(2).sum(), setting)


# ------------------------------------------------------------------------------------------ results that are one tensor


@every_setting
def test_a_result_that_is_returned_twice_stays_one(setting: dict[str, Any]) -> None:
    def use(f: Any, z: Tensor) -> Any:
        y, same = f(z)
        assert y is same
        y.mul_(2)
        return (same**2).sum()

    def function(m: Any, x: Tensor) -> Any:
        y = m.two(m.tanh(m.one(x)))
        return y, y

    assert_as_plain(lambda: Function(function), use, setting)


@every_setting
def test_an_input_that_is_handed_back_is_the_callers_own(setting: dict[str, Any]) -> None:
    def use(f: Any, z: Tensor) -> Any:
        y, back = f(z)
        assert back is z
        z.mul_(2)
        return (y**2).sum() + (back**2).sum()

    assert_as_plain(lambda: Function(lambda m, x: (m.two(m.tanh(m.one(x * 1))), x)), use, setting)


@every_setting
def test_what_an_input_that_is_handed_back_is_used_for_elsewhere_is_no_matter(setting: dict[str, Any]) -> None:
    """A second derivative, with the model not on the way."""

    def use(f: Any, z: Tensor) -> Any:
        y, back = f(z)
        (penalty,) = torch.autograd.grad((back**3).sum(), z, create_graph=True)
        return (y**2).sum() + (penalty**2).sum()

    assert_as_plain(lambda: Function(lambda m, x: (m.two(m.tanh(m.one(x * 1))), x)), use, setting)


# -------------------------------------------------------------------- what is noted on a tensor, or asked of a gradient


class Tag(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.tanh()
        y.scale = 3.0  # type: ignore[attr-defined]
        return y


@every_setting
def test_what_is_noted_on_a_tensor_is_found(setting: dict[str, Any]) -> None:
    def function(m: Any, x: Any) -> Any:
        h = m.act(m.one(x))
        return m.two(h * getattr(h, "scale", 1.0)) * getattr(x, "gain", 1.0)

    def use(f: Any, z: Any) -> Any:
        z.gain = 5.0
        return f(z).pow(2).sum()

    if "vertices" not in setting:
        setting = setting | {"vertices": "modules"}
    assert_as_plain(lambda: Function(function, Tag()), use, setting)


def with_hidden(m: Any, x: Tensor) -> Any:
    h = m.tanh(m.one(x))
    return m.two(h), h


LOOK: dict[str, Callable[[Tensor], object]] = {
    "retain_grad": lambda h: h.retain_grad(),
    "a hook that looks": lambda h: h.register_hook(lambda g: None),  # type: ignore[no-untyped-call]
    "a hook that changes": lambda h: h.register_hook(lambda g: 0.1 * g),  # type: ignore[no-untyped-call]
}


@cut
@pytest.mark.parametrize("look", LOOK.values(), ids=LOOK.keys())
def test_a_gradient_on_the_way_to_another_result_is_not_shown_in_part(look: Any, setting: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = ActivationRelaxation(Function(with_hidden).double(), **setting)
    readings = [lambda y, h: y.sum() + h.sum(), lambda y, h: y.sum()]
    # PyTorch calls a hook with None where the loss does not read the tensor at all.
    for reads in readings[: 1 if look is LOOK["a hook that changes"] else 2]:
        y, h = model(torch.ones(5, 6).double())
        look(h)
        with refuses(RuntimeError, "shape (5, 6)", "the part alone that the loss reads there", "solver=Equilibrium()"):
            reads(y, h).backward()  # type: ignore[no-untyped-call]


@every_setting
@pytest.mark.parametrize("look", LOOK.values(), ids=LOOK.keys())
def test_a_gradient_that_no_other_result_reads_is_shown(look: Any, setting: dict[str, Any]) -> None:
    def use(f: Any, z: Tensor) -> Any:
        y, h = f(z)
        look(y)
        return (y * 2).sum() + h.sum()

    assert_as_plain(lambda: Function(with_hidden), use, setting)


@cut
def test_the_gradient_of_a_hidden_result_is_asked_for(setting: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = ActivationRelaxation(Function(with_hidden).double(), **setting)
    y, h = model(torch.ones(5, 6).double())
    with refuses(RuntimeError, "the part alone that the loss reads there"):
        torch.autograd.grad(y.sum() + h.sum(), [h, *model.parameters()])


@contextmanager
def global_hook(seen: list[str]) -> Iterator[None]:
    def hook(module: nn.Module, into: Any, out: Any) -> None:
        seen.append(type(module).__name__)

    handle = register_module_full_backward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@cut
def test_a_hook_on_all_modules_would_see_products(setting: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = ActivationRelaxation(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double(), **setting)
    x = torch.ones(5, 6).double()
    with global_hook([]), refuses(CutOffError, "all modules have a full backward hook, hook", "solver=Equilibrium()"):
        model(x)
    model(x).sum().backward()


@uncut
def test_a_hook_on_all_modules_sees_gradients(setting: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    x, expected, found = torch.ones(5, 6, requires_grad=True).double(), list[str](), list[str]()
    with global_hook(expected):
        plain(x).sum().backward()
    with global_hook(found):
        ActivationRelaxation(plain, **setting)(x).sum().backward()
    assert [name for name in found if name in ("Linear", "Tanh")] == [n for n in expected if n != "Sequential"]


@every_setting
@pytest.mark.parametrize("part", ["one", "two"])
def test_a_parameter_whose_data_were_of_another_type_in_between(part: str, setting: dict[str, Any]) -> None:
    """As an offloader does: the gradient arrives where the pass has read the parameter."""

    def use(f: Any, z: Tensor) -> Any:
        loss: Tensor = f(z).pow(2).sum()
        weight = f.get_parameter(f"{part}.weight")
        own = weight.data
        weight.data = torch.empty(0, dtype=torch.float32)
        weight.data = own
        return loss

    assert_as_plain(lambda: Function(lambda m, x: m.two(m.tanh(m.one(x)))), use, setting)


@every_setting
def test_a_parameter_that_needs_no_gradient_any_more(setting: dict[str, Any]) -> None:
    def use(f: Any, z: Tensor) -> Any:
        for p in f.parameters():
            p.requires_grad_(True)
        loss: Tensor = f(z).pow(2).sum()
        f.get_parameter("one.weight").requires_grad_(False)
        return loss

    assert_as_plain(lambda: Function(lambda m, x: m.two(m.tanh(m.one(x)))), use, setting)


class Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None


@pytest.mark.parametrize("name", [*UNCUT, "closed form", "default", "modules", "operations"])
def test_what_nothing_reaches_has_no_gradient(name: str) -> None:
    """Zeros would be no matter, but for an optimiser with weight decay."""

    def function(m: Any, x: Tensor) -> Any:
        return Stop.apply(m.tanh(m.one(x))) + m.act(m.two(x))  # type: ignore[no-untyped-call]

    assert_as_plain(lambda: Function(function), lambda f, z: f(z).pow(2).sum(), (CUT | UNCUT)[name])
