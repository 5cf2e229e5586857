"""One run on several processes, as ``torchrun`` starts them: each computes its share of every minibatch.

`DistributedDataParallel` adds the gradients up, so that a minibatch gives what it gives in one process, up to the order
of the sums. It adds and does not average, as the losses here are sums too: a relaxation phase that has not converged
leaves something of its initial state, which does not shrink with the loss.

May import: nothing of this project.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


class Group(NamedTuple):
    """The processes of a run.

    Attributes:
        rank: this one's number, from 0 on.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what the run leaves."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """Those of the rows that are this process's."""
        return rows if self.size == 1 else rows[self.rank :: self.size]

    def total(self, *values: Tensor) -> list[Tensor]:
        """The sums of the values over all processes."""
        if self.size > 1:
            for value in values:
                distributed.all_reduce(value)
        return list(values)

    def agreed(self, number: int) -> int:
        """The first process's number."""
        if self.size == 1:
            return number
        told = torch.tensor([number])
        distributed.broadcast(told, 0)
        return int(told)

    def spread(self, model: nn.Module) -> nn.Module:
        """The model with gradients that are added up over all processes."""
        if self.size == 1:
            return model
        spread = DistributedDataParallel(model)
        # Without annotations, which PyTorch would compare with its own, and these are strings.
        spread.register_comm_hook(None, lambda state, bucket: _add_up(bucket))
        return spread


ALONE = Group()


def _add_up(bucket: Any) -> torch.futures.Future[Tensor]:
    future = distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])  # type: ignore[no-any-return]


def this_group() -> Group:
    """The group that this process has joined; itself alone where it has joined none."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return ALONE
    return Group(distributed.get_rank(), distributed.get_world_size())


def is_started_by_torchrun() -> bool:
    """Whether this is one of several processes that are to compute one run."""
    return distributed.is_available() and distributed.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """Within it, this process belongs to the group that ``torchrun`` has started, if it has started any."""
    if not is_started_by_torchrun():
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend)
    try:
        yield this_group()
    finally:
        # The models go first. What lets go of the group last joins its threads, which need Python's lock to let go of
        # gradients; only the group's own Python object gives the lock free for that, a model would keep it for ever.
        gc.collect()
        distributed.destroy_process_group()
