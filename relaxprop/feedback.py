r"""Backwards weights: what carries the error back through a synaptic layer in place of W^T.

    (3)  dx^l/dt = −x^l + ψ^l (f'(W^l x̄^l) ⊙ x^{l+1}),     Δψ^l = ΔW^l

A layer with feedback computes ``u = W x + b`` from a detached input, so that PyTorch's own operations make the weight
gradient and nothing else, and then passes u through an identity whose backward sends ``B^T g`` to x:

    rule         B                                                               trained
    symmetric    W, backpropagation's weight transport                           —
    learned      ψ, of a random start of its own                                 by W's own gradient: equation (3)
    random       fixed, of a random start of its own (feedback alignment)        no
    sign         sign(W) · mean |W|                                              follows W
    fixed-sign   sign(W) ⊙ |M|, M fixed, of a random start of its own            only its signs follow W
    batch-sign   sign(W) ⊙ |M|, M drawn anew in every pass                       follows W
    mirror       of a random start of its own                                    by noise, in phases of its own

Mirror: while nothing is learned, noise ξ at the layer's input makes the response ``y = W ξ``, and ``ΔB ∝ y ξ^T``, whose
mean over the noise is W (`mirror_weights`). It reads what is presynaptic and postsynaptic to the layer alone.
A frozen W (``requires_grad=False``) has no gradient to share, so its ψ stays fixed as well.

Under ``learned``, ψ and W get the same gradient, so with plain gradient descent ``W − ψ`` stays as it is; with weight
decay λ on both it shrinks by ``1 − η λ`` a step, and ψ aligns with W (Kolen and Pollack, 1994). Where several layers
share W, it gets the sum of their gradients and each ψ that of its own layer, so that ``W − ψ`` changes.
What a layer computes and how its error goes back stands in `LAYERS`, by its class: a new kind is one entry there. What
has parameters but is neither there nor among `NEED_NONE` is refused by name, since its error would go back through its
weights unnoticed.
Sources: Millidge et al., arXiv 2010.06219, equation (3), whose text writes ψ for the transposed matrix, here ψ has the
shape of W; Lillicrap et al. 2016 (random); Liao, Leibo, Poggio 2016, and Moskovitz, Litwin-Kumar, Abbott, arXiv
1812.06488 (the signs); Akrout et al., arXiv 1904.05391 (mirror).

May import: _pytorch, variants, vertices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized

from relaxprop._pytorch import has_no_numbers
from relaxprop.variants import Variant, first_tensor, plain_class, switch_off
from relaxprop.vertices import find_layers

FeedbackRule = Literal["learned", "mirror", "random", "sign", "fixed-sign", "batch-sign", "symmetric"]
RULES: tuple[FeedbackRule, ...] = get_args(FeedbackRule)

M = TypeVar("M", bound=nn.Module)


class Synapses(NamedTuple):
    """What a kind of layer computes with any weight of W's shape, and how it sends an error back.

    Attributes:
        forward: ``u = W x + b``, called with the layer, x, W, and what else the layer is called with.
        adjoint: ``B^T g``, called with the layer, B, g and the shape of x.
        why_not: the reason why a layer cannot have backwards weights; None if it can.
        noise: the shape of a sample of noise that reaches every weight of a layer; None where the layer has no mirror.
    """

    forward: Callable[..., Tensor]
    adjoint: Callable[[Any, Tensor, Tensor, torch.Size], Tensor]
    why_not: Callable[[Any], str | None] = lambda layer: None
    noise: Callable[[Any], tuple[int, ...]] | None = None


def use_feedback(module: M, rule: FeedbackRule = "learned", *, skip: Iterable[nn.Module | type[nn.Module]] = ()) -> M:
    """Gives every synaptic layer in ``module`` backwards weights, in place.

    These are Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d and the Conv1D of Hugging Face, as in GPT-2 (`LAYERS`). Norms
    and embeddings (`NEED_NONE`) send no error through a weight matrix, and stay as they are.

    Call it before the optimiser is made: learned backwards weights are parameters (``feedback``, of the weight's
    shape), fixed ones are buffers, and so are those of a layer whose weight does not require grad. All start at
    N(0, s²), s the standard deviation of the layer's weights (their root mean square where they are all equal,
    1/√(inputs) where they are all zero), drawn from PyTorch's generator. ``print(module)`` shows the rule.

    Args:
        module: a module, or any part of one: ``use_feedback(net.convolutional)``.
        rule: "learned", "mirror" (call `mirror_weights` along with the training), "random", "sign", "fixed-sign",
            "batch-sign", or "symmetric", which undoes the others. "batch-sign" draws from PyTorch's generator whenever
            a layer is called on what requires grad.
        skip: submodules, or classes of submodules, that are left as they are, with all that is in them: they go on
            transporting their errors by their own weights.

    Returns:
        The module itself.

    Raises:
        TypeError: if ``module`` is not a module, or ``skip`` is not an iterable of modules and classes.
        ValueError: if the rule is unknown, ``module`` has no such layer, a module to skip is not part of it, or a part
            has parameters of its own for which no backwards weights are known or would be right. Nothing has changed
            then.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
    skipped = _skipped(module, skip)
    layers = [m for m in module.modules() if m not in skipped and _synapses(m) is not None]
    if rule != "symmetric":
        _check(module, skipped, rule)
    if not layers:
        outside = " outside of what skip leaves as it is" if skipped else ""
        raise ValueError(f"module has no {_kinds()} layer{outside}: {type(module).__name__} needs no backwards weights")
    for layer in layers:
        _set_rule(layer, rule)
    return module


def _skipped(module: nn.Module, skip: Any) -> set[nn.Module]:
    """The modules to leave as they are, with all that is in them."""
    must = "skip must be an iterable of the module's submodules or of classes of modules"
    if not isinstance(skip, Iterable) or isinstance(skip, str | nn.Module | type):
        raise TypeError(f"{must}, got {getattr(skip, '__name__', repr(skip))}")
    parts, roots = set(module.modules()), set[nn.Module]()
    for entry in skip:
        if isinstance(entry, nn.Module):
            if entry not in parts:
                raise ValueError(f"{must}, got a {type(entry).__name__} that is not part of {type(module).__name__}")
            roots.add(entry)
        elif isinstance(entry, type) and issubclass(entry, nn.Module):
            roots |= {m for m in parts if isinstance(m, entry)}
        else:
            raise TypeError(f"{must}, got {entry!r} in it")
    return {part for root in roots for part in root.modules()}


def _check(module: nn.Module, skipped: set[nn.Module], rule: FeedbackRule) -> None:
    """Refuse what has weights but cannot have backwards weights.

    Raises:
        ValueError: if there is such a part.
    """
    layers = set(find_layers(module))
    for name, part in module.named_modules():
        if part in skipped or part not in layers:
            continue
        reason = _why_not(part)
        synapses = _synapses(part)
        if reason is None and rule == "mirror" and synapses is not None and synapses.noise is None:
            reason = f"no noise is known that reaches every weight of {plain_class(part).__name__}, as its mirror needs"
        weight = None if reason or synapses is None else weight_of(part)
        if weight is not None and weight.is_complex():
            reason = "its weight is complex, and no backwards weights are known for complex errors"
        if weight is not None and rule in _WITH_OWN_WEIGHTS and has_no_numbers(weight):
            reason = "its weight has no numbers yet (on the device meta), which say how large backwards weights begin"
        if reason:
            kind = plain_class(part).__name__
            raise ValueError(
                f"module {name or type(module).__name__!r}: {reason}; pass skip=({kind},) or skip=(the module,) to "
                "leave it as it is, with all that is in it, or apply use_feedback to the other parts"
            )


def _why_not(module: nn.Module) -> str | None:
    """The reason why backwards weights would not be right for a module with parameters of its own; None if they are."""
    base = plain_class(module)
    if isinstance(module, nn.MultiheadAttention):
        return "MultiheadAttention reads its layers' weights without calling the layers"
    synapses, kind = _synapses(module), _kind(module)
    if synapses is None or kind is None:
        has_any = is_parametrized(module) or any(p is not None for p in module._parameters.values())
        if not has_any or isinstance(module, NEED_NONE):
            return None
        return f"{base.__name__} has parameters of its own, and no backwards weights are known for it"
    if base.forward is not kind.forward:
        return f"{base.__name__} has a forward pass of its own"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return f"{base.__name__} has no weights before its first forward pass"
    return synapses.why_not(module)


def weight_of(layer: Any) -> Tensor:
    """W, for a look at it: spectral norm, which iterates whenever its weight is read in training, does not."""
    iterating = [m for m in layer.parametrizations.modules() if m.training] if is_parametrized(layer) else []
    try:
        for m in iterating:
            m.training = False
        weight: Tensor = layer.weight
    finally:
        for m in iterating:
            m.training = True
    return weight


def _set_rule(layer: Any, rule: FeedbackRule) -> None:
    for kind in (layer._parameters, layer._buffers):
        kind.pop("feedback", None)
    if rule == "symmetric":
        switch_off(layer)
        layer.__dict__.pop("feedback_rule", None)
        return
    _Feedback.switch_on(layer)
    layer.feedback_rule = rule
    if rule in _WITH_OWN_WEIGHTS:
        with torch.enable_grad():  # else a parametrized weight does not say whether it is trained
            weight = weight_of(layer)
        start = _start(weight.detach())
        start = start.abs() if rule == "fixed-sign" else start
        if rule == "learned" and weight.requires_grad:
            layer.register_parameter("feedback", nn.Parameter(start))
        else:
            layer.register_buffer("feedback", start)


_WITH_OWN_WEIGHTS: tuple[FeedbackRule, ...] = ("learned", "mirror", "random", "fixed-sign")


def _start(weight: Tensor) -> Tensor:
    """Backwards weights of the weights' size, and never zero: nothing could pass through them, nor be learned."""
    number = torch.finfo(weight.dtype)
    start = torch.randn_like(weight)
    rms = float(weight.norm()) / math.sqrt(max(weight.numel(), 1))
    deviation = weight.std() if weight.numel() > 1 else weight.new_zeros(())
    # The deviation of equal numbers may be what rounding leaves of it.
    if math.isfinite(deviation) and deviation > number.eps * rms > 0:
        return start * deviation
    return start * (rms if number.tiny < rms < math.inf else 1 / math.sqrt(max(weight[:1].numel(), 1)))


class _Feedback(Variant):
    """A synaptic layer whose backward goes through its backwards weights."""

    prefix = "Feedback"
    weight: Tensor
    bias: Tensor | None
    feedback: Tensor
    feedback_rule: FeedbackRule

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x, more, named = first_tensor(args, kwargs)
        W = self.weight  # read once: a parametrization computes it, and spectral norm iterates with it
        learned = self.feedback_rule == "learned"
        weight = SharedGradient.apply(W, self.feedback) if learned else W  # type: ignore[no-untyped-call]
        synapses = _synapses(self)
        assert synapses is not None
        u = synapses.forward(self, x.detach(), weight, *more, **named)
        if not x.requires_grad or not torch.is_grad_enabled():
            return u
        sent: Tensor = SendBack.apply(u, x, self, self._backwards_weight(W), synapses.adjoint)  # type: ignore[no-untyped-call]
        return sent

    def backwards_weight(self) -> Tensor:
        """B, of the shape of W; where it is drawn anew in every pass, one such draw."""
        weight = weight_of(self)
        if self.feedback_rule != "batch-sign":
            return self._backwards_weight(weight)
        with torch.random.fork_rng([weight.get_device()] if weight.is_cuda else []):
            return self._backwards_weight(weight)

    def _backwards_weight(self, weight: Tensor) -> Tensor:
        if self.feedback_rule == "symmetric":
            return weight.detach()
        w = weight.detach()
        if self.feedback_rule == "sign":
            return w.sign() * w.abs().mean()
        if self.feedback_rule == "fixed-sign":
            return w.sign() * self.feedback
        if self.feedback_rule == "batch-sign":  # of a mean that is the rule "sign"
            return w.sign() * torch.randn_like(w).abs() * (w.abs().mean() * math.sqrt(math.pi / 2))
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
    def forward(ctx: Any, u: Tensor, x: Tensor, layer: _Feedback, backwards_weight: Tensor, adjoint: Any) -> Tensor:
        ctx.save_for_backward(backwards_weight)
        ctx.layer, ctx.adjoint, ctx.shape = layer, adjoint, x.shape
        return u.view_as(u)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (backwards_weight,) = ctx.saved_tensors
        sent = ctx.adjoint(ctx.layer, backwards_weight.to(gradient.dtype), gradient, ctx.shape)
        return gradient, sent, None, None, None


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


def _transposed(
    layer: Any, x: Tensor, weight: Tensor, output_size: list[int] | tuple[int, ...] | None = None
) -> Tensor:
    dimensions = weight.dim() - 2
    more = layer.output_padding
    if output_size is not None:
        # By how much the size that is asked for exceeds the least.
        places = (layer.stride, layer.padding, layer.dilation, layer.kernel_size)
        least = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in zip(x.shape[-dimensions:], *places, strict=True)
        ]
        more = [size - n for size, n in zip(output_size[-dimensions:], least, strict=True)]
    convolve: Any = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[
        dimensions - 1
    ]
    u: Tensor = convolve(x, weight, layer.bias, layer.stride, layer.padding, more, layer.groups, layer.dilation)
    return u


def _transposed_adjoint(layer: Any, weight: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    dimensions = weight.dim() - 2
    convolve: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[dimensions - 1]
    sent: Tensor = convolve(gradient, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    # An output padding of a stride or more (which a dilation allows) leaves places that no input reaches.
    for dimension in range(-dimensions, 0):
        sent = sent.narrow(dimension, 0, shape[dimension])
    return sent


def _conv1d_of_transformers(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight.T, layer.bias)


def _conv1d_of_transformers_adjoint(layer: Any, weight: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    return gradient @ weight.T


def _linear_noise(layer: nn.Linear) -> tuple[int, ...]:
    return (layer.in_features,)


def _convolution_noise(layer: Any) -> tuple[int, ...]:
    sizes = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
    return (layer.in_channels, *(d * (k - 1) + 1 + 2 * s for k, d, s in sizes))


def _transposed_noise(layer: Any) -> tuple[int, ...]:
    return (layer.in_channels, *(2 * -(-p // s) + 3 for p, s in zip(layer.padding, layer.stride, strict=True)))


def _conv1d_of_transformers_noise(layer: Any) -> tuple[int, ...]:
    return (len(layer.weight),)


_CONVOLUTION = Synapses(_convolution, _convolution_adjoint, _why_not_convolution, _convolution_noise)
_TRANSPOSED = Synapses(_transposed, _transposed_adjoint, noise=_transposed_noise)

# By class, or by the full name of a class of another library, which is not imported for it.
LAYERS: dict[type[nn.Module] | str, Synapses] = {
    nn.Linear: Synapses(_linear, _linear_adjoint, noise=_linear_noise),
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
    nn.ConvTranspose1d: _TRANSPOSED,
    nn.ConvTranspose2d: _TRANSPOSED,
    nn.ConvTranspose3d: _TRANSPOSED,
    "transformers.pytorch_utils.Conv1D": Synapses(
        _conv1d_of_transformers, _conv1d_of_transformers_adjoint, noise=_conv1d_of_transformers_noise
    ),
}

# Elementwise gains and look-ups: an error passes no weight matrix there.
NEED_NONE: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.PReLU,
    nn.Embedding,
    nn.EmbeddingBag,
)


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """The module's class, or the nearest one that it derives from, that has an entry."""
    kinds = type(module).__mro__
    known = next((kind for kind in kinds if kind in LAYERS), None)  # nearly always, and without making up names
    return known or next((kind for kind in kinds if _full_name(kind) in LAYERS), None)


def _synapses(module: nn.Module) -> Synapses | None:
    kind = _kind(module)
    return None if kind is None else LAYERS.get(kind) or LAYERS[_full_name(kind)]


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _kinds() -> str:
    return " or ".join(kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__ for kind in LAYERS)


def backwards_weights(module: nn.Module) -> Iterator[tuple[str, _Feedback, Tensor]]:
    """The layers that have backwards weights of their own: name, layer and B, of the shape of W."""
    for name, layer in module.named_modules():
        if isinstance(layer, _Feedback):
            yield name, layer, layer.backwards_weight()


@torch.inference_mode(False)  # within which no weight gradient can be taken, and ``y ξ^T`` is one
@torch.no_grad()
def mirror_weights(module: nn.Module, *, samples: int = 64, rate: float = 0.1) -> None:
    """One phase of noise of all layers in ``module`` whose backwards weights are "mirror": ``B ← (1 − r) B + r M``.

        M = mean of y ξ^T,  y = W ξ     over samples of noise ξ ~ N(0, 1), so that the mean of M is W

    Nothing is learned meanwhile, and the bias is left out of y. Call it along with the training, for instance after
    every optimiser step. B is on average at ``W + (1 − r)^n (B_0 − W)`` after n phases on fixed weights.

    (Akrout, Wilson, Humphreys, Lillicrap, Tweed, arXiv 1904.05391, where r is the weight decay of B.) A convolution
    sees an image of noise as large as a few kernels, and its y ξ^T is averaged over places.

    Args:
        module: a module, wrapped or not, in which `use_feedback` has set the rule "mirror".
        samples: of noise in the phase, ≥ 1; drawn from PyTorch's generator.
        rate: r in (0, 1], how much of B a phase replaces.

    Raises:
        TypeError: if ``module`` is not a module, or an argument is not a number.
        ValueError: if an argument is outside of its range, or no layer has the rule "mirror".
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(samples, bool) or not isinstance(samples, int):
        raise TypeError(f"samples must be a whole number, got {samples!r}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if isinstance(rate, bool) or not isinstance(rate, Real):
        raise TypeError(f"rate must be a number in (0, 1], got {rate!r}")
    if not 0 < float(rate) <= 1:
        raise ValueError(f"rate must be in (0, 1], got {rate!r}")
    layers = [m for m in module.modules() if isinstance(m, _Feedback) and m.feedback_rule == "mirror"]
    if not layers:
        raise ValueError(
            f"no layer of {type(module).__name__} has the rule 'mirror': call use_feedback(module, 'mirror') first"
        )
    for layer in layers:
        mirrored, seen = _mirrored(layer, samples)
        layer.feedback.copy_(torch.where(seen, torch.lerp(layer.feedback, mirrored, float(rate)), layer.feedback))


def _mirrored(layer: _Feedback, samples: int) -> tuple[Tensor, Tensor]:
    """M of a layer, and which of its weights any noise has passed."""
    synapses = _synapses(layer)
    assert synapses is not None
    assert synapses.noise is not None
    W = weight_of(layer).detach()
    noise = torch.randn(samples, *synapses.noise(layer), dtype=W.dtype, device=W.device)
    share = 1 / samples if W.dtype == torch.float16 else 1.0  # of each sample, whose sum is to stay in the type's range

    def product(x: Tensor, y: Tensor | None) -> Tensor:
        """y x^T, summed over samples and places, times the share; y = 1 where it is None."""
        with torch.enable_grad():
            leaf = W.clone().requires_grad_()
            u = synapses.forward(layer, x, leaf)
            (found,) = torch.autograd.grad(u, leaf, (torch.ones_like(u) if y is None else y) * share)
        return found

    response = synapses.forward(layer, noise, W) - synapses.forward(layer, torch.zeros_like(noise), W)
    pairs = product(torch.ones_like(noise), None)
    return product(noise, response) / pairs.clamp(min=share), pairs > 0


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
