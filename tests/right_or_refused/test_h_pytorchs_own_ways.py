"""PyTorch's own ways of using a module: parametrizations, keyword arguments, batched gradients, tracing, compiling,
hooks that store activations, masks, diagnostics with keyword arguments. Each works, or one sentence has a remedy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

from relaxprop import (
    ActivationRelaxation,
    ClosedForm,
    Equilibrium,
    Euler,
    Frozen,
    NonFiniteStateError,
    UnconvergedWarning,
    use_feedback,
)
from tests.compare import refuses
from tests.right_or_refused.verdicts import (
    REFUSALS,
    Found,
    assert_same,
    check_refused,
    gradients,
    named_gradients,
    right_or_refused,
    squares,
)
from tests.right_or_refused.watching import norms, saliency

SETTINGS: dict[str, dict[str, Any]] = {
    "activations": {"solver": ClosedForm(0.5, 300)},
    "modules": {"solver": ClosedForm(0.5, 300), "vertices": "modules"},
    "operations": {"solver": ClosedForm(0.5, 300), "vertices": "operations"},
    "Equilibrium": {"solver": Equilibrium()},
}
# Converged as well, but by many products with A: what a hook does in each of them is done as often.
MANY_PRODUCTS = SETTINGS | {
    "Euler": {"solver": Euler(0.5, 300)},
    "sequential": {"solver": Euler(1.0, 4, order="sequential")},
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


# ------------------------------------------------------------------------------------------------------------- cached


@every_setting
@pytest.mark.parametrize("feedback", [False, True], ids=["symmetric", "feedback"])
def test_parametrize_cached(setting: dict[str, Any], feedback: bool) -> None:
    """Within it a parametrized weight is computed once, for all calls of the layer and of the model."""

    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.cortex(self.relay(self.cortex(self.retina(x))))
            y: Tensor = self.readout(self.motor(self.relay(h)))
            return y

    def normed() -> nn.Module:
        model = Twice()
        for layer in (model.retina, model.relay):
            parametrizations.weight_norm(layer)
        torch.manual_seed(5)
        return use_feedback(model, "random") if feedback else model

    def attempt(model: nn.Module) -> Found:
        with parametrize.cached():
            loss = squares(model(batch())) + squares(model(-batch()))
            loss.backward()  # type: ignore[no-untyped-call]
        return named_gradients(model)

    exact = attempt(normed())
    names = "retina", "relay", "retina.weight", "relay.weight", "parametrize.cached"
    right_or_refused(lambda: attempt(ActivationRelaxation(normed(), **setting)), exact, *names)


@pytest.mark.parametrize("unfrozen", ["update_derivative", "update_activity"])
def test_parametrize_cached_and_run_again(unfrozen: str) -> None:
    """What is unfrozen runs the model again, which must not read what the cache holds of another run, cut elsewhere."""

    def attempt(cached: bool) -> Found:
        model = Net()
        parametrizations.weight_norm(model.relay)
        wrapper = ActivationRelaxation(model, solver=ClosedForm(0.5, 300), frozen=Frozen(**{unfrozen: False}))
        if not cached:
            return gradients(wrapper, batch())
        with parametrize.cached():
            return gradients(wrapper, batch())

    right_or_refused(lambda: attempt(True), attempt(False), "relay", "relay.weight", "parametrize.cached")


# ------------------------------------------------------------------------------------------------- batched gradients


def _batched(model: nn.Module, x: Tensor) -> Found:
    y = model(x)
    parameters = dict(model.named_parameters())
    directions = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    found = torch.autograd.grad(y, list(parameters.values()), directions, is_grads_batched=True)
    return dict(zip(parameters, found, strict=True))


def _jacobian(model: nn.Module, x: Tensor) -> Found:
    found = torch.autograd.functional.jacobian(model, x, vectorize=True)  # type: ignore[no-untyped-call]
    return {"input": found}


def _jacobian_by_rows(model: nn.Module, x: Tensor) -> Found:
    found = torch.autograd.functional.jacobian(model, x)  # type: ignore[no-untyped-call]
    return {"input": found}


def _vmapped_sweep(model: nn.Module, x: Tensor) -> Found:
    """``torch.func.vmap`` over the vectors of products with a recorded graph, as per-sample influence is computed."""
    y = model(x)
    parameters = dict(model.named_parameters())

    def product(direction: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, list(parameters.values()), direction, retain_graph=True)

    directions = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    found = torch.func.vmap(product)(directions)
    return dict(zip(parameters, found, strict=True))


@every_setting
@pytest.mark.parametrize("way", [_batched, _jacobian, _jacobian_by_rows, _vmapped_sweep])
def test_batched_gradients_are_right_or_refused(
    way: Callable[[nn.Module, Tensor], Found], setting: dict[str, Any]
) -> None:
    """The issue leaves the choice; refused, the text names the option and offers a loop, or the solver that can."""
    exact = way(Net(), batch())
    names = "is_grads_batched", "vectorize", "vmap"
    right_or_refused(lambda: way(ActivationRelaxation(Net(), **setting), batch()), exact, *names)


# ------------------------------------------------------------------------------------------------ tracing, compiling


def _quietly(action: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


@every_setting
@pytest.mark.parametrize("grad", [True, False], ids=["gradients on", "gradients off"])
def test_jit_trace_computes_the_same_or_is_refused(setting: dict[str, Any], grad: bool) -> None:
    """A traced wrapper computes what the module does. Without gradients that must work, as it is how models are
    exported; with gradients, what is traced would not relax: the issue leaves it open, but then it is refused."""

    def attempt() -> Found:
        wrapper = ActivationRelaxation(Net(), **setting)
        with torch.set_grad_enabled(grad):
            traced: Any = torch.jit.trace(wrapper, batch())  # type: ignore[no-untyped-call]
        assert torch.equal(traced(-batch()), wrapper(-batch()))
        if not grad:
            return {}
        traced.zero_grad()
        squares(traced(-batch())).backward()  # type: ignore[no-untyped-call]
        return named_gradients(traced)

    exact = gradients(Net(), -batch()) if grad else {}
    right = right_or_refused(lambda: _quietly(attempt), exact, "torch.jit.trace", "trace", "traced", "tracing")
    assert right or grad, "without gradients the wrapper only calls its module"


@every_setting
def test_the_plain_module_is_traced_after_training(setting: dict[str, Any]) -> None:
    """The remedy that works: nothing of the wrapper is left on the module."""
    wrapper = ActivationRelaxation(Net(), **setting)
    gradients(wrapper, batch())
    trace: Any = torch.jit.trace
    traced = _quietly(lambda: trace(wrapper.module, batch()))
    assert torch.equal(traced(-batch()), wrapper.module(-batch()))


@pytest.mark.parametrize(
    ("what", "granularity"),
    [
        ("wrapper", "activations"),
        ("wrapper", "Equilibrium"),
        ("module", "operations"),
        ("module", "activations"),
        ("a layer", "operations"),
        ("a layer", "activations"),
    ],
)
def test_compiling_is_right_or_refused(granularity: str, what: str) -> None:
    """``torch.compile`` around the wrapper, in it, and around the user's own training step; no compiler is needed.

    The issue leaves the choice: one sentence with a remedy that works, or the numbers of the wrapper that is not
    compiled, also where the solver is stopped early, so that it must still relax; twice, as the second call runs what
    the first has compiled.
    """
    setting = SETTINGS[granularity]
    if granularity != "Equilibrium":
        setting = setting | {"solver": ClosedForm(0.3, 2)}
    uncompiled = ActivationRelaxation(Net(), **setting)
    if what != "wrapper" and granularity == "activations":  # what is compiled is not seen: it is one part of a Jacobian
        uncompiled.solver = ClosedForm(0.5, 300)
        setting = setting | {"solver": ClosedForm(0.5, 300)}
    exact = gradients(uncompiled, batch())
    torch._dynamo.reset()

    def attempt() -> Found:
        model: Any = Net()
        if what == "a layer":
            model.motor = torch.compile(model.motor, backend="eager")
        if what == "module":
            model = torch.compile(model, backend="eager")
        wrapper: Any = ActivationRelaxation(model, **setting)

        def step(x: Tensor) -> Tensor:
            return squares(wrapper(x))

        called: Any = torch.compile(step, backend="eager") if what == "a step" else step
        if what == "wrapper":
            compiled: Any = torch.compile(wrapper, backend="eager")
            called = lambda x: squares(compiled(x))  # noqa: E731
        for x in (-batch(), batch()):
            wrapper.zero_grad()
            try:
                called(x).backward()
            except torch._dynamo.exc.TorchDynamoException as error:  # PyTorch's own, and not for the user to read
                raise AssertionError(str(error)) from error
        return {name.replace("_orig_mod.", ""): g for name, g in named_gradients(wrapper).items()}

    try:
        right_or_refused(lambda: _quietly(attempt), exact, "torch.compile", "compile", "compiled", "operations")
    finally:
        torch._dynamo.reset()


# ----------------------------------------------------------------------------------- hooks as Opacus and BackPACK do


def _opacus(model: nn.Module) -> Callable[[], Found]:
    """Activations are pushed by a forward hook and popped by a full backward hook, which makes gradients by sample."""
    stored: dict[str, Tensor] = {}

    def capture(layer: Any, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            layer.activations.append(args[0].detach())

    def by_sample(name: str) -> Callable[..., None]:
        def hook(layer: Any, grad_input: Any, grad_output: Any) -> None:
            x = layer.activations.pop()
            stored[name] = torch.einsum("bo,bi->boi", grad_output[0], x).detach()

        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            held: Any = layer
            held.activations = []
            layer.register_forward_hook(capture)
            layer.register_full_backward_hook(by_sample(name))
    return lambda: dict(stored)


def _backpack(model: nn.Module) -> Callable[[], Found]:
    """Input and output on the module, by a forward hook; each backward hook writes a quantity on the parameter."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}

    def store(layer: Any, args: Any, output: Tensor) -> None:
        layer.input0, layer.output = args[0], output

    def extend(layer: Any, grad_input: Any, grad_output: Any) -> None:
        layer.weight.grad_batch = torch.einsum("bo,bi->boi", grad_output[0], layer.input0).detach()

    for layer in layers.values():
        layer.register_forward_hook(store)
        layer.register_full_backward_hook(extend)
    return lambda: {name: getattr(layer.weight, "grad_batch", None) for name, layer in layers.items()}


def _norms_before(model: nn.Module) -> Callable[[], Found]:
    norms: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, grad_output: Any) -> None:
            norms[name] = norms.get(name, torch.zeros(())) + grad_output[0].square().sum().detach()

        return hook

    for name, layer in model.named_modules():
        if name:
            layer.register_full_backward_pre_hook(note(name))
    return lambda: dict(norms)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # PyTorch's own, on the plain module too
@pytest.mark.parametrize("setting", MANY_PRODUCTS.values(), ids=MANY_PRODUCTS.keys())
@pytest.mark.parametrize("hooks", [_opacus, _backpack, norms, _norms_before, saliency])
def test_hooks_that_store_are_right_or_refused(
    hooks: Callable[[nn.Module], Callable[[], Found]], setting: dict[str, Any]
) -> None:
    """What they store is what plain backpropagation lets them store. The issue leaves the choice: else a module that
    has such a hook is named, with the way out."""

    def attempt(model: nn.Module, wrapper: nn.Module) -> Found:
        read = hooks(model)
        found = dict(gradients(wrapper, batch()))
        return found | {f"stored {name}": value for name, value in read().items()}

    plain, model = Net(), Net()
    exact = attempt(plain, plain)
    names = "retina", "relay", "readout", "cortex", "motor", "note"
    right_or_refused(lambda: attempt(model, ActivationRelaxation(model, **setting)), exact, *names)


def _halved(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: 0.5 * gradient)  # type: ignore[no-untyped-call]


def _counted(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient + 1)  # type: ignore[no-untyped-call]


def _accumulated(model: nn.Module) -> None:
    """An optimiser within the backward pass."""

    def step(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad = 0.5 * parameter.grad

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("setting", MANY_PRODUCTS.values(), ids=MANY_PRODUCTS.keys())
@pytest.mark.parametrize("hooks", [_halved, _counted, _accumulated])
def test_hooks_on_parameters_run_once(hooks: Callable[[nn.Module], None], setting: dict[str, Any]) -> None:
    plain, model = Net(), Net()
    hooks(plain)
    hooks(model)
    names = [name for name, _ in plain.named_parameters()]
    exact = gradients(plain, batch())
    right_or_refused(lambda: gradients(ActivationRelaxation(model, **setting), batch()), exact, *names)


# ------------------------------------------------------------------------------------------------------------- masks


class MaskedLoss(nn.Module):
    """Some classes are impossible; the loss is within the model."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.retina, self.cortex, self.readout = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)
        self.softmax = nn.Softmax(1) if how == "softmax" else nn.LogSoftmax(1)
        self.how = how
        self.mask = torch.tensor([False, True, False, True])
        self.double()

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        scores = self.readout(self.cortex(self.retina(x)))
        worst = torch.finfo(scores.dtype).min if self.how == "least number" else -torch.inf
        scores = scores.masked_fill(self.mask, worst)
        if self.how == "cross entropy":
            return functional.cross_entropy(scores, target, reduction="sum")
        if self.how == "functional":
            return functional.nll_loss(functional.log_softmax(scores, 1), target, reduction="sum")
        if self.how == "by hand":
            by_hand: Tensor = (scores.logsumexp(1) - scores.gather(1, target[:, None])[:, 0]).sum()
            return by_hand
        probabilities = self.softmax(scores)
        if self.how == "softmax":
            chosen: Tensor = -probabilities.gather(1, target[:, None]).log().sum()
            return chosen
        return functional.nll_loss(probabilities, target, reduction="sum")


def check_remedy(error: NonFiniteStateError, names: tuple[str, ...]) -> None:
    """The learning rate has nothing to do with it: what helps is named."""
    check_refused(error, *names)
    assert any(word in str(error) for word in ("mask", "Equilibrium", "zero", "converge")), f"no remedy: {error}"


MASKED = MANY_PRODUCTS | {
    "Euler, modules": {"solver": Euler(0.5, 300), "vertices": "modules"},
    "Euler, operations": {"solver": Euler(0.5, 300), "vertices": "operations"},
}


FEW_STEPS: dict[str, Any] = {"solver": ClosedForm(0.5, 62), "vertices": "modules"}
HOW = ("module", "least number", "functional", "cross entropy", "by hand", "softmax")
# Of the least number itself 62 steps leave something, which the last of these tests has.
MASKS = {
    f"{how}, {name}, {'frozen' if frozen else 'b'}": (how, setting, frozen)
    for how in HOW
    for name, setting in (MASKED | {"closed form, not negligible": FEW_STEPS}).items()
    for frozen in (True, False)
    if not (how == "least number" and setting is FEW_STEPS and frozen)
}


@pytest.mark.parametrize(("how", "setting", "frozen"), MASKS.values(), ids=MASKS.keys())
def test_a_masked_softmax_with_the_loss_inside(how: str, setting: dict[str, Any], frozen: bool) -> None:
    """Activities of −∞ are no states to start from: right, or refused by the vertex with the way out."""
    if not frozen and setting.get("vertices") == "operations":
        setting = setting | {"frozen": Frozen(update_derivative=False, update_activity=False)}
    elif not frozen:
        setting = setting | {"frozen": Frozen(update_derivative=False)}
    target = torch.tensor([0, 2, 0])
    plain = MaskedLoss(how)
    plain(batch(), target).backward()
    exact = named_gradients(plain)

    def attempt() -> Found:
        model = ActivationRelaxation(MaskedLoss(how), **setting)
        model(batch(), target).backward()
        return named_gradients(model)

    names = "softmax", "log_softmax", "masked_fill", "nll_loss", "logsumexp", "gather", "cortex", "readout"
    if frozen:
        try:
            right_or_refused(attempt, exact, *names)
        except NonFiniteStateError as error:
            check_remedy(error, names)
        return
    try:  # an update at other activities is no gradient to compare with: it must be finite, or refused
        found = attempt()
    except REFUSALS as error:
        check_refused(error, *names)
        return
    except NonFiniteStateError as error:
        check_remedy(error, names)
        return
    assert all(g is not None and g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("setting", [{"solver": Euler(0.5, 300)}, FEW_STEPS, {"solver": Equilibrium()}], ids=str)
@pytest.mark.parametrize("vertices", ["modules", "operations"])
@pytest.mark.parametrize("how", HOW)
def test_the_start_from_zero_needs_no_finite_activities(how: str, vertices: str, setting: dict[str, Any]) -> None:
    """The ways out that the refusal names: the states start at zero, or nothing is cut."""
    target = torch.tensor([0, 2, 0])
    plain = MaskedLoss(how)
    plain(batch(), target).backward()
    model = ActivationRelaxation(MaskedLoss(how), **setting | {"vertices": vertices, "initial": "zero"})
    model(batch(), target).backward()
    for name, exact in named_gradients(plain).items():
        torch.testing.assert_close(named_gradients(model)[name], exact, rtol=1e-8, atol=0)


def test_what_is_left_of_a_masks_least_number_is_told() -> None:
    """62 steps leave 1e-18 of the initial states, and one of these is 1e308."""
    model = ActivationRelaxation(MaskedLoss("least number"), solver=ClosedForm(0.5, 62), vertices="modules")
    with pytest.warns(UnconvergedWarning, match=r"of the final state of vertex .* is left of the initial state"):
        model(batch(), torch.tensor([0, 2, 0])).backward()


# ------------------------------------------------------------------------------- what runs a model's function by itself


class Calls(Net):
    """A network whose first activity goes through a function beside it."""

    def __init__(self, function: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        h = self.cortex(self.retina(x))
        y: Tensor = self.readout(self.motor(self.relay(h))) + self.function(self, x, h)
        return y


def a_condition(net: Any, x: Tensor, h: Tensor) -> Tensor:
    def one(x: Tensor) -> Tensor:
        return x.sin()

    def other(x: Tensor) -> Tensor:
        return x.cos()

    y: Tensor = torch.cond(x.sum() > 0, one, other, (h,))[:, :3]
    return y


def of_a_layer(take: Any) -> Callable[[Any, Tensor, Tensor], Tensor]:
    def function(net: Any, x: Tensor, h: Tensor) -> Tensor:
        y: Tensor = torch.func.vmap(take(lambda z: net.retina(z).sin().sum()))(x)[:, :3]
        return y

    return function


def across_an_activity(net: Any, x: Tensor, h: Tensor) -> Tensor:
    y: Tensor = torch.func.vmap(torch.func.jacrev(lambda z: net.cortex(net.retina(z)).sum()))(x)[:, :3]
    return y


RUN: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "torch.cond": a_condition,
    "jacrev": of_a_layer(torch.func.jacrev),
    "grad": of_a_layer(torch.func.grad),
    "jacfwd": of_a_layer(torch.func.jacfwd),
    "jacrev across an activity": across_an_activity,
}


@every_setting
@pytest.mark.filterwarnings("ignore")  # what PyTorch's compiler says of its own modules
@pytest.mark.parametrize("function", RUN.values(), ids=RUN.keys())
def test_what_runs_a_function_of_the_model_is_right_or_refused(function: Any, setting: dict[str, Any]) -> None:
    expected = gradients(Calls(function), batch())
    right_or_refused(lambda: gradients(ActivationRelaxation(Calls(function), **setting), batch()), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("vertices", ["activations", "operations"])
@pytest.mark.parametrize("function", RUN.values(), ids=RUN.keys())
def test_the_default_takes_them(function: Any, vertices: Any) -> None:
    model = ActivationRelaxation(Calls(function), vertices=vertices)
    if (function, vertices) == (a_condition, "operations"):
        with refuses(ValueError, "torch.cond", "compiled and announce no operations", "torch.where"):
            gradients(model, batch())
    else:
        assert_same(gradients(model, batch()), gradients(Calls(function), batch()))


@pytest.mark.parametrize("name", ["activations", "modules", "Equilibrium"])  # an operation hands on a copy
def test_what_pytorch_refuses_of_a_model_is_refused_in_its_words(name: str) -> None:
    """A saved tensor that is written in place: no hook is to blame."""

    def overwritten(net: Any, x: Tensor, h: Tensor) -> Tensor:
        y: Tensor = net.readout(x @ torch.ones(4, 5).double())
        z = y.tanh()
        z.mul_(2)
        return z

    for model in (Calls(overwritten), ActivationRelaxation(Calls(overwritten), **SETTINGS[name])):
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
            gradients(model, batch())
