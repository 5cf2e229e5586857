r"""Backwards weights: what carries the error back through a synaptic layer in place of W^T.

    (3)  dx^l/dt = −x^l + ψ^l (f'(W^l x̄^l) ⊙ x^{l+1}),     Δψ^l = ΔW^l

A layer with feedback computes ``u = W x + b`` from a detached input, so that PyTorch's own operations make the weight
gradient and nothing else, and then passes u through an identity whose backward sends ``B^T g`` to x:

    rule         B                                                               trained
    symmetric    W, backpropagation's weight transport                           —
    learned      ψ, of a random start of its own                                 by W's own gradient: equation (3)
    random       fixed, of a random start of its own (feedback alignment)        no
    sign         sign(W) · mean |W|                                              follows W

Under ``learned``, ψ and W get the same gradient, so with plain gradient descent ``W − ψ`` stays as it is; with weight
decay λ on both it shrinks by ``1 − η λ`` a step, and ψ aligns with W (Kolen and Pollack, 1994).
What a layer computes and how its error goes back stands in `LAYERS`, by its class: a new kind is one entry there.
Source: Millidge et al., arXiv 2010.06219, equation (3); the authors' text writes ψ for the transposed matrix, here ψ
has the shape of W.

May import: variants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from relaxprop.variants import Variant, plain_class, switch_off

FeedbackRule = Literal["learned", "random", "sign", "symmetric"]
RULES: tuple[FeedbackRule, ...] = get_args(FeedbackRule)

M = TypeVar("M", bound=nn.Module)


class Synapses(NamedTuple):
    """What a kind of layer computes with any weight of W's shape, and how it sends an error back.

    Attributes:
        forward: ``u = W x + b``, called with the layer, x and W.
        adjoint: ``B^T g``, called with the layer, B, g and the shape of x.
        why_not: why a layer of this kind cannot have backwards weights, if so.
    """

    forward: Callable[[Any, Tensor, Tensor], Tensor]
    adjoint: Callable[[Any, Tensor, Tensor, torch.Size], Tensor]
    why_not: Callable[[Any], str | None] = lambda layer: None


def use_feedback(module: M, rule: FeedbackRule = "learned") -> M:
    """Gives every synaptic layer in ``module`` (Linear, Conv1d/2d/3d: those of `LAYERS`) backwards weights, in place.

    Call it before the optimiser is made: learned backwards weights are parameters (``feedback``, of the weight's
    shape), fixed ones are buffers. Both start at N(0, s²), s the standard deviation of the layer's weights, drawn from
    PyTorch's generator. ``print(module)`` shows the rule.

    Args:
        module: a module, or any part of one: ``use_feedback(net.convolutional)``.
        rule: "learned", "random", "sign", or "symmetric", which undoes the others.

    Returns:
        The module itself.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: an unknown rule; no such layer in ``module``; or a layer for which it would not be right.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
    layers = {name: m for name, m in module.named_modules() if _synapses(m) is not None}
    if not layers:
        raise ValueError(f"module has no {_kinds()} layer: {type(module).__name__} needs no backwards weights")
    for name, submodule in module.named_modules():
        reason = _why_not(submodule)
        if reason:
            raise ValueError(
                f"module {name or type(module).__name__!r}: {reason}; apply use_feedback to the other parts"
            )
    for layer in layers.values():
        _set_rule(layer, rule)
    return module


def _why_not(module: nn.Module) -> str | None:
    """Why backwards weights would not be right for a module, if so."""
    if isinstance(module, nn.MultiheadAttention):
        return "MultiheadAttention reads its layers' weights without calling the layers"
    synapses = _synapses(module)
    if synapses is None:
        return None
    base = plain_class(module)
    if not any(base.forward is kind.forward for kind in LAYERS):
        return f"{base.__name__} has a forward pass of its own"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return f"{base.__name__} has no weights before its first forward pass"
    return synapses.why_not(module)


def _set_rule(layer: Any, rule: FeedbackRule) -> None:
    for kind in (layer._parameters, layer._buffers):
        kind.pop("feedback", None)
    if rule == "symmetric":
        switch_off(layer)
        layer.__dict__.pop("feedback_rule", None)
        return
    _Feedback.switch_on(layer)
    layer.feedback_rule = rule
    if rule in ("learned", "random"):
        weight = layer.weight.detach()
        start = torch.randn_like(weight) * weight.std()
        if rule == "learned":
            layer.register_parameter("feedback", nn.Parameter(start))
        else:
            layer.register_buffer("feedback", start)


class _Feedback(Variant):
    """A synaptic layer whose backward goes through its backwards weights."""

    prefix = "Feedback"
    weight: Tensor
    bias: Tensor | None
    feedback: Tensor
    feedback_rule: FeedbackRule

    def forward(self, x: Tensor) -> Tensor:
        learned = self.feedback_rule == "learned"
        weight = SharedGradient.apply(self.weight, self.feedback) if learned else self.weight  # type: ignore[no-untyped-call]
        synapses = _synapses(self)
        assert synapses is not None
        u = synapses.forward(self, x.detach(), weight)
        if not x.requires_grad or not torch.is_grad_enabled():
            return u
        sent: Tensor = SendBack.apply(u, x, self, synapses.adjoint)  # type: ignore[no-untyped-call]
        return sent

    def backwards_weight(self) -> Tensor:
        """B, of the shape of W."""
        if self.feedback_rule == "symmetric":
            return self.weight.detach()
        if self.feedback_rule == "sign":
            w = self.weight.detach()
            return w.sign() * w.abs().mean()
        return self.feedback.detach()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, feedback={self.feedback_rule}"


class SharedGradient(torch.autograd.Function):
    """W in the forward pass; W's gradient for W, and a copy of it for ψ (clipping works in place, so no alias)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, feedback: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        for_weight, for_feedback = ctx.needs_input_grad
        return gradient if for_weight else None, gradient.clone() if for_feedback else None


class SendBack(torch.autograd.Function):
    """Identity of u; its backward passes the error on to u and sends ``B^T g`` to the layer's input x."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor, layer: _Feedback, adjoint: Any) -> Tensor:
        ctx.save_for_backward(layer.backwards_weight())
        ctx.layer, ctx.adjoint, ctx.shape = layer, adjoint, x.shape
        return u.view_as(u)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (backwards_weight,) = ctx.saved_tensors
        sent = ctx.adjoint(ctx.layer, backwards_weight.to(gradient.dtype), gradient, ctx.shape)
        return gradient, sent, None, None


def _linear(layer: nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight, layer.bias)


def _linear_adjoint(layer: nn.Linear, weight: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    return gradient @ weight


def _convolution(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    convolve: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[weight.dim() - 3]
    u: Tensor = convolve(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return u


def _convolution_adjoint(layer: Any, weight: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    dimensions = weight.dim() - 2
    unbatched = len(shape) == dimensions + 1
    if unbatched:
        gradient, shape = gradient.unsqueeze(0), torch.Size((1, *shape))
    padding = layer.padding
    if padding == "valid":
        padding = (0,) * dimensions
    elif padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    x_gradient: Tensor = torch.ops.aten.convolution_backward(
        gradient,
        gradient.new_empty(1).expand(shape),
        weight,
        None,
        layer.stride,
        padding,
        layer.dilation,
        False,
        (0,) * dimensions,
        layer.groups,
        (True, False, False),
    )[0]
    return x_gradient.squeeze(0) if unbatched else x_gradient


def _why_not_convolution(layer: Any) -> str | None:
    if layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r} is not supported, only 'zeros'"
    if layer.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)):
        return "padding='same' with an even kernel pads its two sides differently"
    return None


_CONVOLUTION = Synapses(_convolution, _convolution_adjoint, _why_not_convolution)
LAYERS: dict[type[nn.Module], Synapses] = {
    nn.Linear: Synapses(_linear, _linear_adjoint),
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
}


def _synapses(module: nn.Module) -> Synapses | None:
    """The entry of the module's class, or of the nearest one that it derives from."""
    return next((LAYERS[kind] for kind in type(module).__mro__ if kind in LAYERS), None)


def _kinds() -> str:
    return " or ".join(kind.__name__ for kind in LAYERS)


def backwards_weights(module: nn.Module) -> Iterator[tuple[str, _Feedback, Tensor]]:
    """The layers that have backwards weights of their own: name, layer and B, of the shape of W."""
    for name, layer in module.named_modules():
        if isinstance(layer, _Feedback):
            yield name, layer, layer.backwards_weight()


@contextmanager
def symmetric(module: nn.Module) -> Iterator[None]:
    """Within it, the layers of ``module`` transport their errors by W^T, whatever their rule."""
    layers = {m: m.feedback_rule for m in module.modules() if isinstance(m, _Feedback)}
    try:
        for layer in layers:
            layer.feedback_rule = "symmetric"
        yield
    finally:
        for layer, rule in layers.items():
            layer.feedback_rule = rule
