"""What every tool is tried on: small models, and the three ways in which each is trained.

Under ``EQUAL`` a tool has to give what it gives for the plain module; under ``OTHER`` it must not, or else the wrapper
would be plain backpropagation there and nobody would notice.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from relaxprop import ActivationRelaxation, ClosedForm, Euler
from relaxprop.solvers import Solver
from tests import problems
from tests.compare import largest_distance

# Until converged on PyTorch's own graph, and on one that is cut at every vertex.
EQUAL: dict[str, Solver] = {"default": ClosedForm(), "cut": ClosedForm(0.9, 400)}
OTHER = Euler(0.1, 3)
ROUNDING = 1e-5  # of float32, over some training steps


def wrapped(module: nn.Module, solver: Solver) -> ActivationRelaxation:
    return ActivationRelaxation(module, solver=solver)


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Three layers, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return problems.mlp(6, 8, 8, 4).to(dtype)


def samples(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs and classes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(4, (count,), generator=generator)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """The largest relative distance of two tensors of one name."""
    assert list(left) == list(right)
    return largest_distance(dict(left), dict(right))
