"""Hooks as users put them on a model, that only look at what flows back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.right_or_refused.verdicts import Found


def norms(model: nn.Module) -> Callable[[], Found]:
    """Gradient norms, summed up as they come."""
    norms: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, grad_input: Any, grad_output: Any) -> None:
            norms[name] = norms.get(name, torch.zeros(())) + grad_output[0].square().sum().detach()

        return hook

    for name, layer in model.named_modules():
        if name:
            layer.register_full_backward_hook(note(name))
    return lambda: dict(norms)


def saliency(model: nn.Module) -> Callable[[], Found]:
    """Grad-CAM: the activity by a forward hook, its gradient by a hook on the tensor."""
    stored: dict[str, Tensor] = {}

    def store(layer: nn.Module, args: Any, output: Tensor) -> None:
        def note(gradient: Tensor) -> None:
            stored["gradient"] = stored.get("gradient", torch.zeros(())) + gradient

        output.register_hook(note)  # type: ignore[no-untyped-call]

    model.get_submodule("motor").register_forward_hook(store)
    return lambda: dict(stored)
