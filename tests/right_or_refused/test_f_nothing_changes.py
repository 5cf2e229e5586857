"""Where nothing or too little relaxes, or changes: it is said, or refused by name.

`use_feedback` takes what is in its table ``type → (forward, adjoint)``; what has weights but is not in it is refused by
name, unless ``skip`` (submodules or classes) leaves it. `drop_derivatives` refuses what has parameters or layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from relaxprop import (
    ActivationRelaxation,
    ClosedForm,
    Equilibrium,
    alignment,
    drop_derivatives,
    feedback_alignment,
    use_feedback,
)
from tests.right_or_refused.verdicts import REFUSALS, assert_same, check_refused, gradients, squares

SOLVER = ClosedForm(0.5, 300)


def batch() -> Tensor:
    return torch.linspace(-2, 2, 12).view(3, 4).double().sin()


# ---------------------------------------------------------------------------------------------- nothing, too little


class Called(nn.Module):
    """Layers "retina", "relay", "readout" and activations "cortex", "motor", called as ``how`` says."""

    def __init__(self, how: Callable[[Called, Tensor], Tensor]) -> None:
        super().__init__()
        self.retina, self.relay, self.readout = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.cortex, self.motor = nn.Tanh(), nn.Tanh()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def warns_or_refuses(model: nn.Module, vertices: Any, *names: str, report: bool = False) -> None:
    """One pass either warns of the part, by name, or refuses; what it does compute must be right.

    Args:
        report: whether it is enough that the record ``last_relaxation`` names it on request.
    """
    exact = gradients(model, batch())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            wrapper = ActivationRelaxation(model, solver=SOLVER, vertices=vertices, report_unrelaxed=report)
            found = gradients(wrapper, batch())
        except REFUSALS as error:
            check_refused(error, *names)
            return
    assert_same(found, exact)
    said = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    if report:
        record = wrapper.last_relaxation
        assert record is not None
        assert record.unrelaxed is not None
        assert any(name in record.unrelaxed for name in names), record
        return
    assert said, f"no word of {names}"
    for message in said:
        try:
            check_refused(UserWarning(message), *names)
        except AssertionError:
            continue
        return
    pytest.fail(f"{said} names none of {names}")


def test_no_vertex_is_called() -> None:
    model = Called(lambda m, x: m.readout(torch.tanh(m.relay(torch.tanh(m.retina(x)))))).double()
    wrapper = ActivationRelaxation(model, solver=SOLVER)
    with pytest.warns(UserWarning, match="cortex"):
        wrapper(batch())


@pytest.mark.parametrize("vertices", ["activations", "modules", "listed"])
def test_one_vertex_of_several_is_never_called(vertices: Any) -> None:
    """A vertex that the user has listed, and the model does not call, is warned of by name. Of one that a granularity
    found, it is reported on request."""
    model = Called(lambda m, x: m.readout(m.relay(m.cortex(m.retina(x))))).double()
    listed = [model.cortex, model.motor] if vertices == "listed" else vertices
    warns_or_refuses(model, listed, "motor", report=vertices != "listed")


def test_a_vertex_whose_forward_is_called_directly() -> None:
    """``self.motor.forward(h)`` runs no hook."""
    model = Called(lambda m, x: m.readout(m.motor.forward(m.relay(m.cortex(m.retina(x)))))).double()
    warns_or_refuses(model, "activations", "motor", report=True)


def test_a_layer_that_only_its_weight_is_read_of() -> None:
    def how(m: Called, x: Tensor) -> Tensor:
        second: Any = m.relay
        y: Tensor = m.readout(m.motor(functional.linear(m.cortex(m.retina(x)), second.weight, second.bias)))
        return y

    warns_or_refuses(Called(how).double(), "modules", "relay", report=True)


def test_a_vertex_within_multihead_attention_is_never_called() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.retina, self.cortex = nn.Linear(4, 4), nn.Tanh()
            self.attend = nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.cortex(self.retina(x))
            y: Tensor = self.attend(h, h, h, need_weights=False)[0]
            return y

    model = Attends().double()
    warns_or_refuses(model, [model.cortex, model.attend.out_proj], "attend.out_proj")


class Swish(nn.Module):
    """An activation of the user's own, in no file of activations."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class _Listed(Called):
    """Activations in a plain list, which PyTorch does not register."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: x)
        del self.motor
        self.hidden = [nn.Tanh()]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.readout(self.hidden[0](self.relay(self.cortex(self.retina(x)))))
        return y


def _beside(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Called(lambda m, x: m.readout(function(m.relay(m.cortex(m.retina(x))))))
        del model.motor
        return model

    return build


def _own_class() -> nn.Module:
    model = Called(lambda m, x: m.readout(m.get_submodule("own")(m.relay(m.cortex(m.retina(x))))))
    del model.motor
    model.add_module("own", Swish())
    return model


UNSAID: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "F.relu": (_beside(functional.relu), ("relu", "ReLU")),
    "torch.tanh": (_beside(torch.tanh), ("tanh",)),
    "Tensor.sigmoid": (_beside(Tensor.sigmoid), ("sigmoid",)),
    "F.gelu": (_beside(functional.gelu), ("gelu",)),
    "softplus": (_beside(functional.softplus), ("softplus",)),
    "a plain list": (_Listed, ("tanh", "hidden")),
    "an own class": (_own_class, ("own", "Swish", "sigmoid")),
}


@pytest.mark.parametrize("case", UNSAID.values(), ids=UNSAID.keys())
def test_a_nonlinearity_that_does_not_relax_beside_ones_that_do_is_reported(
    case: tuple[Callable[[], nn.Module], tuple[str, ...]],
) -> None:
    """On request, by the record ``last_relaxation``; the gradient is right all the same."""
    build, names = case
    model = build().double()
    exact = gradients(model, batch())
    wrapper = ActivationRelaxation(model, solver=SOLVER, report_unrelaxed=True)
    assert_same(gradients(wrapper, batch()), exact)
    record = wrapper.last_relaxation
    assert record is not None
    assert record.unrelaxed is not None
    assert any(name in record.unrelaxed for name in names), record


def _pooled() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3, padding=1), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten()
    )


def _in_place() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Dropout(0.0), nn.Linear(4, 3))


def _composite() -> nn.Module:
    from transformers.activations import ACT2CLS

    kind: Any = ACT2CLS["gelu_new"]
    return nn.Sequential(nn.Linear(4, 4), kind(), nn.Linear(4, 3))


def _with_feedback() -> nn.Module:
    return use_feedback(drop_derivatives(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))), "learned")


@pytest.mark.parametrize("vertices", ["activations", "modules"])
@pytest.mark.parametrize("build", [_pooled, _in_place, _composite, _with_feedback])
def test_what_is_linear_or_within_a_vertex_is_not_reported(build: Callable[[], nn.Module], vertices: Any) -> None:
    model = build().double()
    wrapper = ActivationRelaxation(model, solver=SOLVER, vertices=vertices, report_unrelaxed=True)
    gradients(wrapper, batch())
    assert wrapper.last_relaxation is not None
    assert wrapper.last_relaxation.unrelaxed == ()


@pytest.mark.parametrize("solver", [SOLVER, Equilibrium()], ids=["ClosedForm", "Equilibrium"])
def test_the_report_is_made_on_request_only(solver: Any) -> None:
    model = _beside(functional.relu)().double()
    wrapper = ActivationRelaxation(model, solver=solver)
    gradients(wrapper, batch())
    assert wrapper.last_relaxation is not None
    assert wrapper.last_relaxation.unrelaxed is None
    wrapper.report_unrelaxed = True
    gradients(wrapper, batch())
    assert wrapper.last_relaxation.unrelaxed == ("relu",)


def test_a_vertex_that_is_missing_is_warned_of_once_in_a_setting() -> None:
    model = Called(lambda m, x: m.readout(m.relay(m.cortex(m.retina(x))))).double()
    wrapper = ActivationRelaxation(model, vertices=[model.cortex, model.motor])
    for _ in range(2):
        with pytest.warns(UserWarning, match="did not call motor in the forward pass.*Leave it out"):
            wrapper(batch())
        wrapper(batch())  # a warning would be an error
        wrapper.vertices = [model.motor, model.cortex]


class _Adjoint(torch.autograd.Function):
    """An ODE's adjoint method: no graph forward, the state is integrated again backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, *parameters: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, *parameters)
        with torch.no_grad():
            return x + 0.5 * torch.tanh(layer(x))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = x + 0.5 * torch.tanh(ctx.layer(x))
            found = torch.autograd.grad(y, [x, *parameters], gradients[0])
        return found[0], None, *found[1:]


class Adjoint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Adjoint.apply(x, self.field, *self.field.parameters())  # type: ignore[no-untyped-call]
        return y


class _Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.saved_tensors[0]


class OwnFunction(nn.Module):
    """One parameter, one function of the user's own: nothing that PyTorch announces."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Exp.apply(self.scale)  # type: ignore[no-untyped-call]
        return y


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        body = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    return nn.ModuleDict({"body": body})


class _Through(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


def _scripted_body() -> nn.Module:
    return _Through(body=_scripted()["body"])  # type: ignore[index]


def _scripted_beside_eager() -> nn.Module:
    return _Through(stem=nn.Linear(4, 4), body=_scripted()["body"])  # type: ignore[index]


OPERATIONS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "scripted": (_scripted_body, ("body",)),
    "scripted beside eager": (_scripted_beside_eager, ("body",)),
    "adjoint": (lambda: _Through(ode=Adjoint()), ("ode", "_Adjoint", "_AdjointBackward")),
    "two adjoints": (lambda: _Through(ode=Adjoint(), more=Adjoint()), ("ode", "more", "_Adjoint", "_AdjointBackward")),
    "own function": (lambda: _Through(own=OwnFunction()), ("own", "_Exp", "_ExpBackward")),
}


@pytest.mark.parametrize("case", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_operations_that_cannot_be_seen_are_named(case: tuple[Callable[[], nn.Module], tuple[str, ...]]) -> None:
    """vertices="operations" finds no vertex in scripted parts and adjoint methods. Where nothing relaxes, it is warned
    of or refused; where something does, a report on request is enough."""
    build, names = case
    torch.manual_seed(1)
    warns_or_refuses(build().double(), "operations", *names, report=case is OPERATIONS["scripted beside eager"])


# ------------------------------------------------------------------------------------- use_feedback: the whole table


def conv1d(n_in: int, n_out: int) -> Any:
    """Hugging Face's own linear layer, its weight transposed."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D(n_out, n_in)


def vector() -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 4).view(2, 3, 4).double().sin()


def image(channels: int, *sizes: int) -> Tensor:
    numbers = torch.arange(2 * channels * torch.Size(sizes).numel()).double().sin()
    return numbers.view(2, channels, *sizes)


SUPPORTED: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "Linear": (lambda: nn.Linear(4, 3), vector()),
    "Conv1D": (lambda: conv1d(4, 3), vector()),
    "Conv1D, 2 dimensions": (lambda: conv1d(4, 3), vector()[0]),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1), image(4, 7)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1), image(4, 5)),
    "ConvTranspose1d, no batch": (lambda: nn.ConvTranspose1d(4, 6, 3), image(4, 5)[0]),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3), image(4, 5, 4)),
    "ConvTranspose2d, groups": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), 2, 1, 1, groups=2), image(4, 5, 4)),
    "ConvTranspose2d, dilated": (lambda: nn.ConvTranspose2d(4, 6, 3, dilation=2, bias=False), image(4, 5, 4)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 4, 2, 2), image(2, 3, 2, 2)),
}


def _through(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y: Tensor = layer(x)
    squares(y).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return y.detach(), x.grad, {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rule", ["learned", "random", "sign"])
@pytest.mark.parametrize("case", SUPPORTED.values(), ids=SUPPORTED.keys())
def test_a_supported_layer_sends_errors_back_through_its_backwards_weights(
    case: tuple[Callable[[], nn.Module], Tensor], rule: Any
) -> None:
    """The error through B is autograd's of a layer whose weight is B; the weight's gradient stays autograd's own."""
    build, x = case
    torch.manual_seed(1)
    plain = build().double()
    torch.manual_seed(1)
    layer = use_feedback(build().double(), rule)
    y_plain, _, exact = _through(plain, x)
    y, arrived, found = _through(layer, x)
    torch.testing.assert_close(y, y_plain, rtol=1e-12, atol=1e-12)
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-12)
    if rule == "learned":
        torch.testing.assert_close(found["feedback"], exact["weight"], rtol=1e-11, atol=1e-12)
    # The same error, sent through a plain layer of weight B.
    W: Any = plain.weight
    held: Any = layer
    B = W.detach().sign() * W.detach().abs().mean() if rule == "sign" else held.feedback.detach()
    assert B.shape == W.shape
    other: Any = build().double()
    other.load_state_dict(plain.state_dict())
    other.weight = nn.Parameter(B.clone())
    z = x.clone().requires_grad_()
    error = 2 * (y_plain - 0.3)
    (through_b,) = torch.autograd.grad(other(z), z, error)
    torch.testing.assert_close(arrived, through_b, rtol=1e-11, atol=1e-12)
    # And undone.
    use_feedback(layer, "symmetric")
    _, arrived, _ = _through(layer, x)
    _, symmetric, _ = _through(plain, x)
    torch.testing.assert_close(arrived, symmetric, rtol=1e-11, atol=1e-12)


def test_transposed_convolutions_keep_their_output_size_argument() -> None:
    torch.manual_seed(1)
    layer = use_feedback(nn.ConvTranspose2d(2, 3, 3, stride=2).double(), "random")
    x = image(2, 4, 4).requires_grad_()
    y = layer(x, output_size=[10, 10])
    assert y.shape[-2:] == (10, 10)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"output_padding": 2, "dilation": 3}, {"padding": 1, "stride": 3, "dilation": 2}])
def test_the_adjoint_of_a_transposed_convolution_is_autograd_s(options: dict[str, Any]) -> None:
    """Also where the output padding exceeds the stride, and leaves outputs that no input reaches."""
    torch.manual_seed(1)
    layer: Any = nn.ConvTranspose2d(2, 4, 3, **options).double()
    x = image(2, 4, 5).requires_grad_()
    (exact,) = torch.autograd.grad(squares(layer(x)), x)
    use_feedback(layer, "random")
    layer.feedback.copy_(layer.weight.detach())
    (found,) = torch.autograd.grad(squares(layer(x)), x)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_a_layer_that_derives_from_hugging_face_s_is_known() -> None:
    class Projection(type(conv1d(4, 4))):  # type: ignore[misc]
        pass

    layer = use_feedback(Projection(3, 4), "random")
    assert isinstance(layer, Projection)
    assert "feedback" in layer.state_dict()


NONE_NEEDED: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "layer norm": lambda: nn.LayerNorm([2, 4]),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "RMS norm": lambda: nn.RMSNorm(4),
    "PReLU": nn.PReLU,
    "embedding": lambda: nn.Embedding(4, 4),
    "embedding bag": lambda: nn.EmbeddingBag(4, 4),
    "a parameter that is None": lambda: _without_parameter(),
}


def _without_parameter() -> nn.Module:
    module = nn.Module()
    module.register_parameter("gain", None)
    return module


@pytest.mark.parametrize("build", NONE_NEEDED.values(), ids=NONE_NEEDED.keys())
def test_norms_and_embeddings_need_no_backwards_weights(build: Callable[[], nn.Module]) -> None:
    model = nn.ModuleDict({"stem": nn.Linear(4, 4), "cortex": build()})
    names = list(model["cortex"].state_dict())
    use_feedback(model, "random")
    assert list(feedback_alignment(model)) == ["stem"]
    assert list(model["cortex"].state_dict()) == names


def test_scripted_layers_are_refused_by_name() -> None:
    model = nn.ModuleDict({"stem": nn.Linear(4, 4), "body": _scripted()["body"]})  # type: ignore[index]
    with pytest.raises(ValueError, match=r"body.*skip"):
        use_feedback(model, "random")
    use_feedback(model, "random", skip=[model["body"]])
    assert list(feedback_alignment(model)) == ["stem"]


def test_undoing_asks_for_nothing_to_skip() -> None:
    model = nn.ModuleDict({"stem": nn.Linear(4, 4), "cortex": nn.LSTM(4, 4)})
    use_feedback(model, "learned", skip=(nn.LSTM,))
    use_feedback(model, "symmetric")
    assert type(model["stem"]) is nn.Linear


def test_every_layer_of_a_gpt2_changes() -> None:
    """Four Conv1D in each of two blocks, and the head; embeddings and norms are none of them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(n_layer=2, n_head=1, n_embd=4, vocab_size=7, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    use_feedback(model, "random")
    assert len(feedback_alignment(model)) == 9


class Matrix(nn.Module):
    """A layer of the user's own with a weight matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Descendant(nn.Linear):
    """A Linear that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight * 2, self.bias)


UNSUPPORTED: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: nn.LSTM(4, 4),
    "GRU": lambda: nn.GRU(4, 4),
    "RNN": lambda: nn.RNN(4, 4),
    "LSTMCell": lambda: nn.LSTMCell(4, 4),
    "GRUCell": lambda: nn.GRUCell(4, 4),
    "Bilinear": lambda: nn.Bilinear(4, 4, 4),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "own matrix": Matrix,
    "own forward": lambda: Descendant(4, 4),
}


@pytest.mark.parametrize("rule", ["learned", "sign"])
@pytest.mark.parametrize("build", UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_has_weights_but_no_rule_is_refused_by_name(build: Callable[[], nn.Module], rule: Any) -> None:
    """And nothing has changed then."""
    model = nn.ModuleDict({"stem": nn.Linear(4, 4), "deep": nn.ModuleDict({"cortex": build()})})
    names = list(model.state_dict())
    with pytest.raises((ValueError, TypeError)) as refused:
        use_feedback(model, rule)
    check_refused(refused.value, "deep.cortex", "deep.cortex.self_attn")
    assert "skip" in str(refused.value), "the way out is the argument"
    assert list(model.state_dict()) == names
    assert not feedback_alignment(model)


@pytest.mark.parametrize("by", ["class", "module", "iterator"])
@pytest.mark.parametrize("build", UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_skip_leaves_a_part_as_it_is(build: Callable[[], nn.Module], by: str) -> None:
    """A part, by itself or by its class; with what it is made of."""
    part = build()
    model = nn.ModuleDict({"stem": nn.Linear(4, 4), "cortex": part})
    kind, names = type(part), list(part.state_dict())
    skip: Any = {"class": (kind,), "module": [part], "iterator": iter([part])}[by]
    use_feedback(model, "random", skip=skip)
    assert type(part) is kind
    assert list(part.state_dict()) == names
    assert list(feedback_alignment(model)) == ["stem"]


def test_skip_leaves_a_supported_layer_too() -> None:
    model = nn.ModuleDict({"stem": nn.Linear(4, 4), "readout": nn.Linear(4, 4)})
    use_feedback(model, "learned", skip=(model["readout"],))
    assert list(feedback_alignment(model)) == ["stem"]


@pytest.mark.parametrize("skip", [nn.LSTM, ["cortex"], 3], ids=["no iterable", "a name", "a number"])
def test_a_wrong_skip_is_refused(skip: Any) -> None:
    with pytest.raises(TypeError, match="skip must be"):
        use_feedback(nn.Sequential(nn.Linear(4, 4)), "learned", skip=skip)


def test_a_skip_that_is_not_in_the_model_is_refused() -> None:
    """It would leave nothing, unnoticed."""
    with pytest.raises(ValueError, match="skip"):
        use_feedback(nn.Sequential(nn.Linear(4, 4)), "learned", skip=(nn.Linear(4, 4),))


# ------------------------------------------------------------------------------------------------ use_feedback: start


def _filled(layer: nn.Module, value: float) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.constant_(parameter, value)
    return layer


STARTS: dict[str, Callable[[], nn.Module]] = {
    "1 x 1": lambda: nn.Linear(1, 1),
    "1 x 1 zero": lambda: _filled(nn.Linear(1, 1), 0.0),
    "1 x 1 convolution": lambda: nn.Conv2d(1, 1, 1),
    "zero": lambda: _filled(nn.Linear(4, 3), 0.0),
    "zero convolution": lambda: _filled(nn.Conv1d(4, 3, 2), 0.0),
    "constant": lambda: _filled(nn.Linear(4, 3), 0.25),
    "ones": lambda: _filled(nn.Linear(4, 3), 1.0),
    "tiny": lambda: _filled(nn.Linear(4, 3), 1e-42),
    "depthwise, one tap": lambda: _filled(nn.Conv1d(2, 2, 1, groups=2), -0.5),
    "bfloat16": lambda: nn.Linear(1, 1).to(torch.bfloat16),
}


@pytest.mark.parametrize("rule", ["learned", "random"])
@pytest.mark.parametrize("build", STARTS.values(), ids=STARTS.keys())
def test_the_start_of_backwards_weights_is_finite_and_not_zero(build: Callable[[], nn.Module], rule: Any) -> None:
    torch.manual_seed(1)
    layer: Any = use_feedback(build(), rule)
    assert layer.feedback.isfinite().all()
    assert layer.feedback.count_nonzero() == layer.feedback.numel()
    assert layer.feedback.dtype == layer.weight.dtype


@pytest.mark.parametrize("rule", ["learned", "random"])
def test_a_zero_initialised_branch_lets_the_error_through(rule: Any) -> None:
    """The last layer of a residual branch starts at zero, and its backwards weights must not block the branch."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), _filled(nn.Linear(4, 4), 0.0)).double()
    use_feedback(model, rule)
    found = gradients(ActivationRelaxation(model, solver=SOLVER), batch())
    first = found["0.weight"]
    assert first is not None
    assert first.count_nonzero()


# --------------------------------------------------------------------------------- use_feedback: what is not trained


class LoRALinear(nn.Module):
    """A frozen layer and a trained update of low rank."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


def lora() -> nn.Module:
    return nn.Sequential(LoRALinear(nn.Linear(16, 16)), nn.Tanh(), LoRALinear(nn.Linear(16, 16)))


def frozen_backbone() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16).requires_grad_(False), nn.Tanh(), nn.Linear(16, 3))


def only_biases() -> nn.Module:
    """BitFit: the weight is frozen, the bias trains."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def frozen_convolution() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 2).requires_grad_(False), nn.Flatten(), nn.Tanh(), nn.Linear(21, 3))


def all_frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh()).requires_grad_(False)


@pytest.mark.parametrize("build", [lora, frozen_backbone, only_biases, frozen_convolution, all_frozen])
def test_a_frozen_weight_gets_no_trained_backwards_weights(build: Callable[[], nn.Module]) -> None:
    """Only a trained weight's backwards weights train; those of a frozen one stay fixed."""
    torch.manual_seed(1)
    model = build()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    use_feedback(model, "learned")
    after = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = trained | {
        name.removesuffix("weight") + "feedback" for name in trained if name.rpartition(".")[2] == "weight"
    }
    assert after == expected


def test_lora_trains_about_twice_as_many_numbers_and_not_the_base() -> None:
    torch.manual_seed(1)
    model = lora()
    before = sum(p.numel() for p in model.parameters() if p.requires_grad)
    use_feedback(model, "learned")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * before


def test_a_weight_decayed_optimiser_leaves_a_frozen_layer_s_backwards_weights() -> None:
    torch.manual_seed(1)
    model = lora().double()
    use_feedback(model, "learned")
    base: Any = model[0].base  # type: ignore[index]
    feedback = None if getattr(base, "feedback", None) is None else base.feedback.detach().clone()
    wrapper = ActivationRelaxation(model, solver=SOLVER)
    optimizer = torch.optim.AdamW([p for p in wrapper.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    squares(wrapper(torch.randn(3, 16).double())).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert feedback is None or torch.equal(base.feedback, feedback)


# -------------------------------------------------------------------------------------------------- drop_derivatives


class GainedTanh(nn.Tanh):
    """A descendant with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        return self.gain * super().forward(input)


class GatedSiLU(nn.SiLU):
    """A descendant with a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = super().forward(input) * self.gate(input)
        return y


class Snake(nn.Module):
    """From a user's file "activations.py"."""

    def __init__(self) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.frequency * x).square() / self.frequency


class SwiGLU(nn.Module):
    """Likewise, with layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(x) * functional.silu(self.gate(x))
        return y


Snake.__module__ = SwiGLU.__module__ = "project.activations"


def with_layer() -> nn.Module:
    tanh = nn.Tanh()
    tanh.add_module("scale", nn.Linear(4, 4))
    return tanh


def with_parameter() -> nn.Module:
    relu = nn.ReLU()
    relu.register_parameter("slope", nn.Parameter(torch.ones(())))
    return relu


def xielu() -> nn.Module:
    """Hugging Face's own with two trained numbers."""
    from transformers.activations import ACT2CLS

    kind: Any = ACT2CLS["xielu"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: nn.Module = kind()
    return module


OWN_PARTS: dict[str, Callable[[], nn.Module]] = {
    "parameter, descendant": GainedTanh,
    "layer, descendant": GatedSiLU,
    "parameter, own file": Snake,
    "layers, own file": SwiGLU,
    "layer, instance": with_layer,
    "parameter, instance": with_parameter,
    "PReLU": nn.PReLU,
    "transformers' xIELU": xielu,
    "a PReLU within": lambda: nn.ModuleDict({"inner": nn.PReLU()}),
}


@pytest.mark.parametrize("build", OWN_PARTS.values(), ids=OWN_PARTS.keys())
def test_an_activation_with_parameters_or_layers_keeps_its_derivative(build: Callable[[], nn.Module]) -> None:
    """f' → 1 would lose the gradients of what it has: refused by its name, and nothing has changed."""
    model = nn.ModuleDict({"retina": nn.Tanh(), "cortex": build()})
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="cortex") as refused:
        drop_derivatives(model)
    check_refused(refused.value, "cortex", "cortex.inner")
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("build", [Snake, GainedTanh])
def test_it_is_dropped_in_the_other_parts(build: Callable[[], nn.Module]) -> None:
    """The advice works: the rest of the model, part by part, and all gradients arrive."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), build()).double()
    drop_derivatives(model[1])
    found = gradients(ActivationRelaxation(model, solver=SOLVER), batch())
    assert all(g is not None and g.count_nonzero() for g in found.values())


def test_alignment_sees_every_parameter_of_an_activation() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), Snake(), nn.Linear(4, 3)).double()
    found = alignment(ActivationRelaxation(model, solver=SOLVER), squares, batch())
    assert found["1.frequency"].distance <= 1e-11
