"""What a forward pass reads and writes besides its arguments, kept so that it can be run again as it was.

Dropout draws the feedforward pass's own masks in every later run, batch norm's statistics are updated once, autocast
and the training mode are what they were. What cannot be put back is refused: parameters and inputs that were changed in
place since.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Surroundings:
    """The surroundings of one forward pass; made right before it.

    Args:
        module: the model.
        inputs: the tensors among its arguments.

    Raises:
        ValueError: the model has lazy modules that have not seen an input yet.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        modules = list(module.modules())
        self.module = module
        self.training = [(m, m.training) for m in modules]
        held = [
            (m._buffers, name, buffer) for m in modules for name, buffer in m._buffers.items() if buffer is not None
        ]
        parameters = [p for m in modules for p in m._parameters.values() if p is not None]
        if any(is_lazy(x) for x in (*parameters, *(buffer for *_, buffer in held))):
            raise ValueError(
                "frozen: lazy modules take shape in their first forward pass, which could not be run again as it was: "
                "call the model once under torch.no_grad() before training"
            )
        self.buffers = [_Kept(buffers, name, buffer.clone()) for buffers, name, buffer in held]
        self.inputs = inputs
        self.fixed = [*parameters, *inputs]
        self.versions = [_version(x) for x in self.fixed]
        self.devices = sorted({x.get_device() for x in self.fixed if x.is_cuda})
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in (("cpu", "cuda") if self.devices else ("cpu",))
        ]
        self.random = _random_states(self.devices)
        self.draws = False

    def passed(self) -> None:
        """To be called after the forward pass.

        Raises:
            ValueError: the model wrote into its input, so that it is gone.
        """
        for x, version in zip(self.inputs, self.versions[len(self.versions) - len(self.inputs) :], strict=True):
            if _version(x) != version:
                raise ValueError(
                    f"frozen: the model writes in place into {self._name(x)}, so it cannot be run again on it, as "
                    "what is unfrozen needs: let the model work on a copy (x = x.clone())"
                )
        now = _random_states(self.devices)
        self.draws = any(not torch.equal(before, after) for before, after in zip(self.random, now, strict=True))
        self.versions = [_version(x) for x in self.fixed]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within it, a run of the model finds what the forward pass found; afterwards all is as it was.

        Raises:
            RuntimeError: a parameter or an input was changed in place since the forward pass.
        """
        for x, version in zip(self.fixed, self.versions, strict=True):
            if _version(x) != version:
                raise RuntimeError(
                    f"frozen: {self._name(x)} was changed in place since the forward pass, which has to be run again "
                    "for what is unfrozen: call backward() before optimizer.step(), and change copies"
                )
        with ExitStack() as stack:
            for kind, dtype, enabled in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled))
            if self.draws:
                stack.enter_context(torch.random.fork_rng(self.devices))
                _set_random_states(self.devices, self.random)
            changed = [(m, m.training) for m, training in self.training if m.training != training]
            present = [kept.buffers[kept.name] for kept in self.buffers]
            try:
                for module, training in changed:
                    module.training = not training
                # Other tensors in their place, since a write into them would be one into what is saved for backward.
                for kept in self.buffers:
                    kept.buffers[kept.name] = kept.value.clone()
                yield
            finally:
                for kept, buffer in zip(self.buffers, present, strict=True):
                    kept.buffers[kept.name] = buffer
                for module, training in changed:
                    module.training = training

    def _name(self, tensor: Tensor) -> str:
        names = {id(p): f"the parameter {name!r}" for name, p in self.module.named_parameters()}
        return names.get(id(tensor), f"an input of shape {tuple(tensor.shape)}")


class _Kept(NamedTuple):
    """A buffer of a module and what it held before the forward pass."""

    buffers: dict[str, Tensor | None]
    name: str
    value: Tensor


def _version(x: Tensor) -> int:
    """How often the tensor was written to; those made for inference do not count that."""
    return 0 if x.is_inference() else x._version


def _random_states(devices: Sequence[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _set_random_states(devices: Sequence[int], states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)
