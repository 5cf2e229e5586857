"""What is computed on a GPU as one CUDA graph: what it launches is written down once, and then launched as a whole.

A training step of a small network takes hundreds of short kernels, and Python launches them one by one more slowly than
the GPU computes them. A graph has the same kernels on the same memory, so that all they read has to stand in the same
place whenever it is launched.

May import: nothing of this project.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Step = Callable[[Tensor], Tensor]

WARM_UP = 3  # calls before the capture, in which libraries choose their kernels, and a learning rule looks at the model

_log = logging.getLogger(__name__)


def make_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Lets an optimiser that counts its steps count them on the GPU, where a graph can."""
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
    for parameter, state in optimizer.state.items():
        state.update({name: x.to(parameter.device) for name, x in state.items() if isinstance(x, Tensor)})


class Graphed(Generic[T]):
    """A computation as a CUDA graph: it is called as the computation is, and does the same.

    The first calls compute it as it is, and so do all where the capture fails: a warning tells the reason.

    Args:
        compute: waits for nothing that the GPU computes. Of what it returns, tensors stand in the same place after
            every launch.
        device: a CUDA device.
    """

    def __init__(self, compute: Callable[[], T], device: torch.device | str) -> None:
        self._compute = compute
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._warm_up = WARM_UP
        self._fails = False
        self._captured: tuple[torch.cuda.CUDAGraph, T] | None = None

    @property
    def is_captured(self) -> bool:
        """Whether it is launched as a whole now."""
        return self._captured is not None

    def __call__(self) -> T:
        if self._captured is None and not self._warm_up and not self._fails:
            self._capture()
        if self._captured is not None:
            graph, result = self._captured
            graph.replay()
            return result
        self._warm_up = max(0, self._warm_up - 1)
        return self.beside(self._compute)

    def beside(self, compute: Callable[[], T]) -> T:
        """Another computation with the same weights, as it is: what a backward pass adds up is bound to the stream of
        its first one."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            result = compute()
        here.wait_stream(self._stream)
        return result

    def _capture(self) -> None:
        """Writes it down; nothing is computed meanwhile."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                result = self._compute()
        except RuntimeError as error:
            self._fails = True
            torch.cuda.set_stream(here)  # a capture that cannot be ended stays on its own
            reason = str(error).splitlines()[0]
            _log.warning("kernels are launched one by one, as this cannot be a CUDA graph: %s", reason)
        else:
            self._captured = graph, result


class GraphedStep:
    """A training step as a CUDA graph. It is called as the step is; what it returns stands where the next call's result
    will. Minibatches of another size than the first one's are computed as they are.

    Args:
        step: called with the rows of the minibatch.
        device: a CUDA device.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step, self._device = step, device
        self._rows: Tensor | None = None

    @property
    def is_captured(self) -> bool:
        """Whether minibatches of the first one's size are launched as a whole now."""
        return self._rows is not None and self._graphed.is_captured

    def __call__(self, rows: Tensor) -> Tensor:
        if self._rows is None:
            self._rows = torch.empty_like(rows)
            self._graphed = Graphed(partial(self._step, self._rows), self._device)
        if rows.shape != self._rows.shape:
            return self._graphed.beside(partial(self._step, rows))
        self._rows.copy_(rows)
        return self._graphed()
