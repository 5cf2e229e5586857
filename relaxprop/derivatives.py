r"""Dropped nonlinear derivatives: f' → 1, so that an error passes an activation as if it were linear.

    (4)  dx^l/dt = −x^l + W^{lT} x^{l+1}                 relaxation phase, without f'(W^l x̄^l)
         ∂L/∂W^l → x^{l+1} x̄^{lT}                        weight update, likewise

Source: Millidge et al., arXiv 2010.06219, equation (4). The paper drops f' in both places; its authors' code keeps it
in the update of the MLP and drops it in that of the CNN.

May import: variants, vertices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from relaxprop.variants import Variant, first_tensor, plain_class, switch_off
from relaxprop.vertices import is_activation

M = TypeVar("M", bound=nn.Module)

# Their Jacobian is no f' of each element, or drawn anew in every pass.
_NOT_ELEMENTWISE = (nn.Softmax, nn.Softmin, nn.Softmax2d, nn.LogSoftmax, nn.GLU, nn.RReLU)


# Within a recorded pass: where its activations list their nodes that differ between (1) and (2).
recorded_switches: ContextVar[list[Node] | None] = ContextVar("recorded_switches", default=None)


@contextmanager
def updating(switches: Sequence[Node]) -> Iterator[None]:
    """Within it, these nodes pass an error on as in the weight update, (2); else as in the relaxation phase, (1)."""
    nodes = cast(Sequence[Any], switches)
    for node in nodes:
        node.in_update = True
    try:
        yield
    finally:
        for node in nodes:
            node.in_update = False


def drop_derivatives(module: M, *, relaxation: bool = True, update: bool = True) -> M:
    """Drops the derivative of every elementwise activation module in ``module``, in place.

    Exact where the activation is the identity. ``print(module)`` shows what is dropped.

    Args:
        module: a module, or any part of one: ``drop_derivatives(net.convolutional)``.
        relaxation: f' → 1 in the relaxation phase, equation (1).
        update: f' → 1 in the weight update, equation (2). With both False, the derivatives are restored.

    Returns:
        The module itself.

    Raises:
        TypeError: if ``module`` is not a module, or an option is neither True nor False.
        ValueError: if ``module`` has no activation module, or one that is not elementwise or has parameters or layers
            of its own, whose gradients would be lost with f'. Nothing has changed then.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    for name, value in (("relaxation", relaxation), ("update", update)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    activations = {name: m for name, m in module.named_modules() if is_activation(m)}
    if not activations:
        raise ValueError(f"module has no activation module: {type(module).__name__} has no derivative to drop")
    if relaxation or update:
        for name, activation in activations.items():
            reason = _why_not(activation)
            if reason:
                raise ValueError(
                    f"module {name or type(activation).__name__!r}: {reason}; apply drop_derivatives to the other parts"
                )
    for activation in activations.values():
        _set_dropped(activation, relaxation, update)
    return module


def _why_not(activation: nn.Module) -> str | None:
    """The reason why f' → 1 means nothing for an activation; None if it means something."""
    name = plain_class(activation).__name__
    if isinstance(activation, _NOT_ELEMENTWISE):
        return f"{name} is not an elementwise function, so f' → 1 means nothing for it"
    # What PyTorch keeps a parametrized tensor's makings in is no layer of the activation's own.
    if any(True for _ in activation.parameters()) or activation._modules.keys() - {"parametrizations"}:
        return f"{name} has parameters or layers of its own, whose gradients would be lost with f'"
    return None


def _set_dropped(activation: Any, relaxation: bool, update: bool) -> None:
    if relaxation or update:
        _Dropped.switch_on(activation)
        activation.dropped_in_relaxation, activation.dropped_in_update = relaxation, update
    else:
        switch_off(activation)
        for name in ("dropped_in_relaxation", "dropped_in_update"):
            activation.__dict__.pop(name, None)


class _Dropped(Variant):
    """An activation without its derivative."""

    prefix = "Dropped"
    dropped_in_relaxation: bool
    dropped_in_update: bool

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        h, more, named = first_tensor(args, kwargs)
        switches = recorded_switches.get()
        differs = self.dropped_in_relaxation != self.dropped_in_update
        if differs and switches is None and torch.is_grad_enabled() and h.requires_grad:
            raise RuntimeError(
                f"{type(self).__name__} drops its derivative in one of relaxation and weight update only, which plain "
                "backpropagation cannot tell apart: call it within ActivationRelaxation"
            )
        # In-place activations overwrite h, which the identity still needs to see as it was.
        argument = h.clone() if getattr(self, "inplace", False) else h
        if not differs:
            argument = argument.detach()
        y: Tensor = super().forward(argument, *more, **named)
        if not (h.requires_grad and torch.is_grad_enabled()):
            return y
        through: Tensor = EitherWay.apply(h, y, self.dropped_in_relaxation, self.dropped_in_update)  # type: ignore[no-untyped-call]
        if differs and switches is not None:
            switches.append(cast(Node, through.grad_fn))
        return through

    def extra_repr(self) -> str:
        places = {"relaxation": self.dropped_in_relaxation, "update": self.dropped_in_update}
        dropped = f"dropped derivative in {' and '.join(name for name, value in places.items() if value)}"
        return ", ".join(filter(None, (super().extra_repr(), dropped)))


class EitherWay(torch.autograd.Function):
    """y = f(h); its backward passes the error to h as it is where f' is dropped, and on through f where it is not."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, y: Tensor, in_relaxation: bool, in_update: bool) -> Tensor:
        ctx.dropped, ctx.in_update = (in_relaxation, in_update), False
        ctx.set_materialize_grads(False)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        return (gradient, None, None, None) if ctx.dropped[ctx.in_update] else (None, gradient, None, None)


def differs_by_phase(modules: Iterable[nn.Module]) -> bool:
    """Whether any of the modules drops its derivative in one of the two places only."""
    return any(isinstance(m, _Dropped) and m.dropped_in_relaxation != m.dropped_in_update for m in modules)


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Within it, the activations of ``module`` have their derivatives."""
    dropped = {m: (m.dropped_in_relaxation, m.dropped_in_update) for m in module.modules() if isinstance(m, _Dropped)}
    try:
        for activation in dropped:
            _set_dropped(activation, False, False)
        yield
    finally:
        for activation, places in dropped.items():
            _set_dropped(activation, *places)
