"""Somebody's own solver or rule: what it returns, and what it gives the graph, is a state for every vertex."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from relaxprop import ActivationRelaxation, Equilibrium
from relaxprop.graph import Graph, States
from relaxprop.rules import Phase, Rule
from relaxprop.solvers import Relaxation, Solver
from relaxprop.transients import Hops
from tests.compare import assert_same_gradients, backward, gradients, refuses, squares
from tests.problems import mlp

Made = Callable[[Graph], Any]


class OwnRule(Rule):
    """Returns what a function makes of the graph."""

    def __init__(self, module: nn.Module, made: Made) -> None:
        super().__init__(module)
        vars(self)["made"] = made

    def solve(self, graph: Graph) -> Any:
        found = self.made(graph)
        return (found, Phase(2, graph.depth)) if isinstance(found, dict) else found


@dataclass(frozen=True)
class OwnSolver(Solver):
    """Likewise."""

    name: ClassVar[str] = "own"
    made: Made

    def solve(self, graph: Graph) -> Any:
        found = self.made(graph)
        return (found, Relaxation(2, graph.depth, None, 1, 0.0, converged=True)) if isinstance(found, dict) else found

    def hops(self, depth: int) -> Hops:
        return Equilibrium().hops(depth)

    @property
    def schedule(self) -> str:
        return "at once"


def by_rule(module: nn.Module, made: Made) -> nn.Module:
    return OwnRule(module, made)


def by_solver(module: nn.Module, made: Made) -> nn.Module:
    return ActivationRelaxation(module, solver=OwnSolver(made))


both = pytest.mark.parametrize("wrapped", [by_rule, by_solver])


def exact(graph: Graph) -> States:
    return graph.sweep(lambda _, arriving: arriving)


def each(change: Callable[[Tensor], Any]) -> Made:
    return lambda graph: {v: change(x) for v, x in exact(graph).items()}


def settled(settle: Callable[[Tensor], Any]) -> Made:
    return lambda graph: graph.sweep(lambda _, arriving: settle(arriving))


@both
@pytest.mark.parametrize(
    ("made", "error", "parts"),
    [
        (lambda graph: None, TypeError, ("solve must return two things", "got NoneType")),
        (lambda graph: (exact(graph), None), TypeError, ("got dict, NoneType",)),
        (lambda graph: (list(exact(graph).values()), None), TypeError, ("got list, NoneType",)),
        (lambda graph: {}, ValueError, ("gives vertex '1' no state",)),
        (lambda graph: dict(list(exact(graph).items())[1:]), ValueError, ("gives vertex '3' no state",)),
        (lambda graph: {graph.vertices[0]: graph.vertices[0].zeros()}, ValueError, ("gives vertex '3' no state",)),
        (each(lambda x: None), ValueError, ("gives vertex '1' no state",)),
        (lambda graph: exact(graph) | {"more": torch.zeros(1)}, ValueError, ("none of graph.vertices: 'more'",)),
        (lambda graph: {v.name: x for v, x in exact(graph).items()}, ValueError, ("'1', '3'", "not its name")),
        (each(lambda x: 0.5), TypeError, ("the state of vertex '3' must be a tensor, got a float",)),
        (each(lambda x: x.numpy()), TypeError, ("got a ndarray",)),
        (each(Tensor.sum), ValueError, ("has the shape (), but its activity has (2, 5)",)),
        # PyTorch would sum over the first dimension: a gradient that is twice as large.
        (each(lambda x: x.expand(2, *x.shape)), ValueError, ("has the shape (2, 2, 5), but its activity has (2, 5)",)),
        (each(lambda x: x.to("meta")), ValueError, ("is torch.strided on meta, but its activity is",)),
        (each(Tensor.to_sparse), ValueError, ("is torch.sparse_coo on cpu, but its activity is",)),
        (each(lambda x: x.to(torch.complex128)), ValueError, ("is complex, but its activity is real",)),
        # What the graph is given on the way.
        (settled(lambda x: x[0]), ValueError, ("vertex '3' has the shape (5,), but its activity has (2, 5)",)),
        (settled(Tensor.t), ValueError, ("has the shape (5, 2), but its activity has (2, 5)",)),
        (settled(lambda x: 0.5), TypeError, ("the state of vertex '3' must be a tensor, got a float",)),
        (settled(lambda x: x.to(torch.complex128)), ValueError, ("is complex, but its activity is real",)),
        (settled(lambda x: x.to("meta")), ValueError, ("is torch.strided on meta",)),
        (lambda graph: graph.transport(list(exact(graph).values())), TypeError, ("by vertex, got a list",)),
        (lambda graph: graph.transport({"1": torch.zeros(2, 4)}), ValueError, ("none of graph.vertices: '1'",)),
        (lambda graph: graph.drive({v: v.zeros()[0] for v in graph.vertices}), ValueError, ("vertex '1'", "(4,)")),
    ],
)
def test_what_is_no_state_is_refused_by_name(
    wrapped: Callable[..., nn.Module], made: Made, error: type[Exception], parts: tuple[str, ...]
) -> None:
    network = mlp(3, 4, 5, 2)
    with refuses(error, *parts):
        backward(squares(wrapped(network, made)(torch.randn(2, 3))))
    assert all(p.grad is None for p in network.parameters())


@both
def test_what_is_a_state_is_taken(wrapped: Callable[..., nn.Module]) -> None:
    network, x = mlp(3, 4, 5, 2), torch.randn(2, 3)
    expected = gradients(network, [x])
    for made in (exact, each(lambda x: x.clone().requires_grad_()), lambda graph: dict(reversed(exact(graph).items()))):
        assert_same_gradients(gradients(wrapped(network, made), [x]), expected)


class SideBranch(nn.Module):
    """A vertex that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.side, self.last = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.act(self.first(x))
        return self.last(x), self.act(self.side(x))


def first(outputs: tuple[Tensor, Tensor]) -> Tensor:
    return squares(outputs[0])


@both
def test_a_vertex_that_nothing_reaches_needs_no_state(wrapped: Callable[..., nn.Module]) -> None:
    network, x = SideBranch(), torch.randn(2, 3)
    expected = gradients(network, [x], first)
    assert_same_gradients(gradients(wrapped(network, Graph.equilibrium), [x], first), expected)
    assert expected["side.weight"] is None
