r"""How far a learning rule is from backpropagation, on the user's own model, loss and data.

Nothing here changes the model: gradients are returned and not accumulated, and every pass works on a copy of the
model's state (batch norm's statistics, plain attributes, random generators).

May import: derivatives, feedback, inspect.model, kept, rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from relaxprop.derivatives import restored
from relaxprop.feedback import backwards_weights, symmetric, weight_of
from relaxprop.inspect.model import LossFunction, SamePass, check_loss_function, check_model, scalar, undisturbed
from relaxprop.kept import refuse_reading
from relaxprop.rule import LearningRule


@dataclass(frozen=True)
class Alignment:
    """A parameter's gradient beside backpropagation's, or a layer's backwards weights beside its weights.

    Attributes:
        cosine: of the angle between the two, in [−1, 1]; not a number where one of them is zero or not finite.
        angle: the same in degrees, in [0, 180].
        norm_ratio: norm of the first over the norm of the second.
        distance: norm of the difference over the norm of the second; not a number where that is zero.
    """

    cosine: float
    angle: float
    norm_ratio: float
    distance: float


def alignment(model: LearningRule, loss_fn: LossFunction, *inputs: Any, **kwargs: Any) -> dict[str, Alignment]:
    """Compares the gradient of every parameter with backpropagation's, on the same forward pass.

    Args:
        model: the wrapped module, by any learning rule.
        loss_fn: maps the model's result to a scalar loss, for instance
            ``lambda output: ((output - target) ** 2).sum()``; where the loss is within (``model(x, target=…)``), the
            identity.
        inputs: the model's arguments.
        kwargs: its keyword arguments.

    Returns:
        By the parameter's name in the plain module; parameters that the loss does not depend on are left out.

    Raises:
        TypeError: if ``model`` is not wrapped, ``loss_fn`` is no function, or the loss is not a scalar.
        ValueError: if the model has lazy modules that have not seen an input yet.
        RuntimeError: if the passes differ, since the model keeps a state where it is not put back, the loss reads an
            activity that the model did not return, or within ``torch.inference_mode()``.
    """
    check_model(model, LearningRule)
    check_loss_function(loss_fn)
    parameters = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
    if not parameters:
        return {}
    same_pass = SamePass(model)

    def gradients(forward: Callable[..., Any]) -> tuple[Tensor | None, ...]:
        with undisturbed(model), torch.enable_grad():
            with same_pass():
                result = forward(*inputs, **kwargs)
            loss = scalar(loss_fn(result))
            refuse_reading(loss)
            return torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)

    relaxed = gradients(model)
    with symmetric(model.module), restored(model.module):
        exact = gradients(model._plain)
    return {
        name: _compare(torch.zeros_like(b) if g is None else g, b)
        for name, g, b in zip(parameters, relaxed, exact, strict=True)
        if b is not None
    }


def feedback_alignment(module: nn.Module) -> dict[str, Alignment]:
    """Compares the backwards weights B of every layer that has some with its weights W (`use_feedback`).

    Both have W's shape; the cosine is that of B^T and W^T likewise: 1 where errors go back as in backpropagation.

    Args:
        module: a module, wrapped or not.

    Returns:
        By the layer's name in the plain module; empty where no layer has backwards weights of its own.

    Raises:
        TypeError: if ``module`` is not a module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    module = module.module if isinstance(module, LearningRule) else module
    return {name: _compare(b, weight_of(layer)) for name, layer, b in backwards_weights(module)}


def _compare(gradient: Tensor, exact: Tensor) -> Alignment:
    g, b = numbers(gradient.detach()), numbers(exact.detach())
    g_norm, b_norm = float(g.norm()), float(b.norm())
    distance = float((g - b).norm()) / b_norm if b_norm else math.nan
    if not (g_norm and b_norm and math.isfinite(g_norm) and math.isfinite(b_norm)):
        return Alignment(math.nan, math.nan, g_norm / b_norm if b_norm else math.nan, distance)
    g, b = g / g_norm, b / b_norm
    # The angle from the chord: the arc cosine would round angles below 1e-8 to zero.
    angle = 2 * math.atan2(float((g - b).norm()), float((g + b).norm()))
    return Alignment(min(1.0, max(-1.0, float(g @ b))), math.degrees(angle), g_norm / b_norm, distance)


def numbers(gradient: Tensor) -> Tensor:
    """All numbers of a gradient in one row, in double precision: complex ones as pairs, sparse ones with zeros."""
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return (torch.view_as_real(gradient) if gradient.is_complex() else gradient).double().flatten()
