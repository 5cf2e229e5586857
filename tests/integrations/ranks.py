"""Two processes that train one model, each on its half of a minibatch; what they find is kept as files."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from relaxprop.solvers import Solver
from tests.compare import backward
from tests.integrations.problem import EQUAL, OTHER, mlp, samples, wrapped

SHARDS_ON_CPU = hasattr(torch.compiler, "is_exporting")  # from PyTorch 2.7 on
SIZE = 8  # of the whole minibatch
SOLVERS: dict[str, Solver] = EQUAL | {"other": OTHER}
Found = dict[str, Any]


def loss_of(model: Callable[[Tensor], Tensor], rank: int | None = None) -> Tensor:
    """The mean over a rank's half, or over all."""
    x, labels = samples(SIZE, torch.float64)
    mine = slice(None) if rank is None else slice(rank * SIZE // 2, (rank + 1) * SIZE // 2)
    return functional.cross_entropy(model(x[mine]), labels[mine])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        assert p.grad is not None
        found[name] = (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
    return found


def ddp(rank: int, solver: Solver) -> Found:
    model = wrapped(mlp(torch.float64), solver)
    parallel = DistributedDataParallel(model)
    backward(loss_of(parallel, rank))
    return gradients(model)


def ddp_accumulated(rank: int, solver: Solver) -> Found:
    """Twice a half of the loss, and only the second time the ranks talk to each other."""
    model = wrapped(mlp(torch.float64), solver)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    with parallel.no_sync():
        backward(loss_of(parallel, rank) / 2)
    backward(loss_of(parallel, rank) / 2)
    return gradients(model)


def ddp_static(rank: int, solver: Solver) -> Found:
    model = wrapped(mlp(torch.float64), solver)
    parallel = DistributedDataParallel(model, static_graph=True)
    for _ in range(2):
        model.zero_grad()
        backward(loss_of(parallel, rank))
    return gradients(model)


def sharded(rank: int, solver: Solver, *, parts: str) -> Found:
    network = mlp(torch.float64)
    if parts == "before":
        for part in (0, 2, 4):
            fully_shard(network[part])
    model = wrapped(network, solver)
    if parts == "after":
        for part in (0, 2, 4):
            fully_shard(model.get_submodule(str(part)))
    fully_shard(model)
    for _ in range(2):
        model.zero_grad()
        backward(loss_of(model, rank))
    return gradients(model)


def fsdp_root(rank: int, solver: Solver) -> Found:
    return sharded(rank, solver, parts="")


def fsdp_parts_before(rank: int, solver: Solver) -> Found:
    return sharded(rank, solver, parts="before")


def fsdp_parts_after(rank: int, solver: Solver) -> Found:
    return sharded(rank, solver, parts="after")


def checkpoint(rank: int, solver: Solver, folder: Path) -> Found:
    """Trained a step, kept, and read into a fresh model; the names are the plain module's."""

    def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = wrapped(mlp(torch.float64), solver)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        backward(loss_of(model, rank))
        optimizer.step()
        return model, optimizer

    model, optimizer = trained()
    model_state, optimizer_state = get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)
    path = folder / f"{type(solver).__name__}"
    save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
    fresh, other = trained()
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    empty: dict[str, Any] = {"model": get_model_state_dict(fresh), "optimizer": get_optimizer_state_dict(fresh, other)}
    load(empty, checkpoint_id=path)
    set_model_state_dict(fresh, empty["model"])
    set_optimizer_state_dict(fresh, other, empty["optimizer"])

    def whole(m: nn.Module) -> dict[str, Tensor]:
        return {name: p.full_tensor().clone() for name, p in m.state_dict().items()}

    return {
        "names": list(model_state),
        "states": sorted(optimizer_state["state"]),
        "kept": whole(model),
        "read": whole(fresh),
    }


CASES = (ddp, ddp_accumulated, ddp_static, fsdp_root, fsdp_parts_before, fsdp_parts_after)


def work(rank: int, folder: Path) -> None:
    """All cases, one after the other."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    for case in CASES if SHARDS_ON_CPU else CASES[:3]:
        for name, solver in SOLVERS.items():
            torch.save(case(rank, solver), folder / f"{case.__name__}-{name}-{rank}.pt")
    if SHARDS_ON_CPU:
        torch.save(checkpoint(rank, EQUAL["default"], folder), folder / f"checkpoint-default-{rank}.pt")
    gc.collect()  # the models, before the group: see relaxprop/lab/distributed.py
    dist.destroy_process_group()
