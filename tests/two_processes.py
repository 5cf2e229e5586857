"""Two processes that compute together, as `torchrun` would start them."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable

import torch.multiprocessing

from relaxprop.lab.engines.processes import prepare


def as_two(work: Callable[..., None], *arguments: object) -> None:
    """Calls it with 0 and with 1, the process's rank, before the arguments.

    They are forked from the server that has imported PyTorch: each would take seconds for it.

    Raises:
        torch.multiprocessing.ProcessRaisedException: if one of them does, with its traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    prepare()
    torch.multiprocessing.start_processes(  # type: ignore[attr-defined, no-untyped-call]
        _begin, (port, work, *arguments), nprocs=2, start_method="forkserver" if sys.platform == "linux" else "spawn"
    )


def _begin(rank: int, port: int, work: Callable[..., None], *arguments: object) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    torch.set_num_threads(1)
    work(rank, *arguments)
