"""What a forward pass reads and writes besides its arguments, kept so that it can be run again as it was.

Dropout draws the feedforward pass's own masks in every later run, batch norm's statistics are updated once, autocast
and the training mode are what they were. What cannot be put back is refused: parameters and inputs that were changed in
place since.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


class Surroundings:
    """The surroundings of one forward pass; made right before it.

    Args:
        module: the model.
        inputs: the tensors among its arguments.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.module = module
        self.training = [(m, m.training) for m in module.modules()]
        self.buffers = [
            (m._buffers, name, buffer, buffer.clone())
            for m, _ in self.training
            for name, buffer in m._buffers.items()
            if buffer is not None
        ]
        tensors = [*module.parameters(), *inputs]
        self.devices = sorted({t.get_device() for t in tensors if t.is_cuda})
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in (("cpu", "cuda") if self.devices else ("cpu",))
        ]
        self.random = _random_states(self.devices)
        self.draws = False
        self.fixed = tensors
        self.versions = [t._version for t in tensors]

    def passed(self) -> None:
        """To be called after the forward pass: what it did not touch need not be put back."""
        self.draws = any(
            not torch.equal(before, after)
            for before, after in zip(self.random, _random_states(self.devices), strict=True)
        )
        self.buffers = [kept for kept in self.buffers if kept[0][kept[1]] is not kept[2] or _differ(kept[2], kept[3])]
        self.versions = [t._version for t in self.fixed]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within it, a run of the model finds what the forward pass found; afterwards all is as it was.

        Raises:
            RuntimeError: a parameter or an input was changed in place since the forward pass.
        """
        if [t._version for t in self.fixed] != self.versions:
            raise RuntimeError(
                "a parameter or an input of the model was changed in place since the forward pass, which has to be run "
                "again for what frozen leaves unfrozen: call backward() before optimizer.step(), and change copies"
            )
        with ExitStack() as stack:
            for kind, dtype, enabled in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled))
            if self.draws:
                stack.enter_context(torch.random.fork_rng(self.devices))
                _set_random_states(self.devices, self.random)
            changed = [(m, m.training) for m, training in self.training if m.training != training]
            own = [(buffers, name, buffers[name]) for buffers, name, _, _ in self.buffers]
            try:
                for module, training in changed:
                    module.training = not training
                # Other tensors in their place, since a write into them would be one into what is saved for backward.
                for buffers, name, _, value in self.buffers:
                    buffers[name] = value.clone()
                yield
            finally:
                for buffers, name, buffer in own:
                    buffers[name] = buffer
                for module, training in changed:
                    module.training = training


def _random_states(devices: Sequence[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _set_random_states(devices: Sequence[int], states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


def _differ(buffer: Tensor, value: Tensor) -> bool:
    return not torch.equal(buffer, value)
