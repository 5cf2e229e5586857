"""Training in several processes: `DistributedDataParallel`, ``fully_shard``, distributed checkpoints.

Each rank has half of a minibatch, and a mean over it; together they have to find the gradient of the mean over all that
one process finds for the plain module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from relaxprop import ActivationRelaxation
from relaxprop.solvers import Solver
from tests.compare import backward
from tests.integrations import ranks
from tests.integrations.problem import EQUAL, distance, mlp, samples, wrapped
from tests.two_processes import as_two

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")


NO_SHARDS = "before PyTorch 2.7 fully_shard needs a GPU"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have found, a file for each case, solver and rank."""
    path = tmp_path_factory.mktemp("ranks")
    as_two(ranks.work, path)
    return path


def expected() -> dict[str, Tensor]:
    plain = mlp(torch.float64)
    backward(ranks.loss_of(plain))
    return ranks.gradients(plain)


def found(folder: Path, case: str, solver: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{case}-{solver}-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", [case.__name__ for case in ranks.CASES])
def test_the_ranks_have_the_gradient_of_the_whole_minibatch(folder: Path, case: str) -> None:
    if "fsdp" in case and not ranks.SHARDS_ON_CPU:
        pytest.skip(NO_SHARDS)
    for solver in EQUAL:
        for gradients in found(folder, case, solver):
            assert distance(gradients, expected()) < 1e-13
    first, second = found(folder, case, "other")
    assert distance(first, second) < 1e-13
    assert distance(first, expected()) > 0.1


@pytest.mark.skipif(not ranks.SHARDS_ON_CPU, reason=NO_SHARDS)
def test_a_distributed_checkpoint_has_the_plain_names_and_is_read_back(folder: Path) -> None:
    for kept in found(folder, "checkpoint", "default"):
        assert kept["names"] == list(mlp().state_dict())
        assert kept["states"] == sorted(mlp().state_dict())
        assert distance(kept["read"], kept["kept"]) == 0
        assert distance(kept["kept"], mlp(torch.float64).state_dict()) > 0.01


class _Parallel(DistributedDataParallel):
    """Without the processes that the constructor asks for."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


def test_what_has_to_be_outside_is_refused_inside() -> None:
    with pytest.raises(TypeError, match=r"module is a DistributedDataParallel.*DistributedDataParallel\(Activation"):
        ActivationRelaxation(_Parallel(mlp()))
    with pytest.raises(TypeError, match="the part '1' of module is a DataParallel"):
        ActivationRelaxation(nn.Sequential(mlp(), nn.DataParallel(nn.Linear(4, 4))))
    with pytest.raises(TypeError, match="wrap the plain module once"):
        ActivationRelaxation(nn.Sequential(wrapped(mlp(), EQUAL["default"])))


@pytest.mark.parametrize("solver", EQUAL.values(), ids=str)
def test_what_is_put_inside_later_is_refused_in_the_first_pass(solver: Solver) -> None:
    x, _ = samples(4)
    model = wrapped(mlp(), solver)
    model[2] = _Parallel(nn.Linear(8, 8))
    with pytest.raises(TypeError, match="the part '2' of module is a DistributedDataParallel"):
        model(x)
    model[2] = wrapped(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), solver)
    with pytest.raises(TypeError, match="the part '2' of module is an ActivationRelaxation already"):
        model(x)


def test_data_parallel_is_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match="DistributedDataParallel"):
        wrapped(mlp(), EQUAL["default"])._replicate_for_data_parallel()
