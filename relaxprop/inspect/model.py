"""What every inspection shares: a wrapped model that it leaves as it was.

May import: wrapper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from relaxprop.wrapper import ActivationRelaxation

LossFunction = Callable[[Any], Tensor]


@contextmanager
def undisturbed(model: ActivationRelaxation) -> Iterator[None]:
    """Within it, forward passes leave no trace: buffers and the random state are put back."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer.copy_(value))


def check_model(model: object) -> None:
    """Refuse what is not wrapped.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(model, ActivationRelaxation):
        raise TypeError(f"model must be an ActivationRelaxation, got {type(model).__name__}: wrap the module first")


def scalar(loss: object) -> Tensor:
    """The loss.

    Raises:
        TypeError: if it is no tensor of one number.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss_fn must return a scalar tensor, got {what}")
    return loss
