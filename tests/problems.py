"""What is tested: models, problems with what is known about their graphs by hand, and solvers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from relaxprop import ActivationRelaxation, ClosedForm, Continuous, Equilibrium, Euler, Frozen
from relaxprop.graph import Graph
from relaxprop.solvers import Solver
from relaxprop.vertices import Granularity, find_vertices
from tests.compare import Gradients, backward, driven_graph, gradients, squares


@dataclass(frozen=True)
class Problem:
    """A model, its arguments and a loss of its result, with what is known about its graph by hand.

    Attributes:
        depth: D, the number of vertices on the longest path.
        ends_in_vertex: whether the output itself is a vertex, which is clamped and so exact from the start.
        mixes_samples: whether a sample's activity depends on its batch mates, or on chance.
    """

    name: str
    module: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    loss: Callable[[Any], Tensor]
    depth: int
    vertices: Granularity = "activations"
    ends_in_vertex: bool = False
    mixes_samples: bool = False

    def build(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Any, ...]]:
        torch.manual_seed(1)
        module = self.module().to(dtype)
        inputs = pytree.tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, self.inputs())
        return module, inputs

    def gradients(self, solver: Solver | None = None, dtype: torch.dtype = torch.float64, **options: Any) -> Gradients:
        """Gradients by the wrapper, or without a solver by plain autograd."""
        module, inputs = self.build(dtype)
        if solver is not None:
            module = ActivationRelaxation(module, solver=solver, vertices=self.vertices, **options)
        return gradients(module, inputs, self.loss)

    def graph(self) -> Graph:
        """A recorded pass whose outputs are driven by the loss."""
        module, inputs = self.build()
        return driven_graph(module, self.vertices, inputs, self.loss)


def activity_gradients(problem: Problem) -> list[Tensor | None]:
    """∂L/∂x of every vertex in the order of the forward pass, by plain autograd: a zero is added to each activity."""
    module, inputs = problem.build()
    probes: list[Tensor] = []

    def probe(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        probes.append(torch.zeros_like(output, requires_grad=True))
        return output + probes[-1]

    for vertex in find_vertices(module, problem.vertices):
        vertex.register_forward_hook(probe)
    torch.manual_seed(2)
    backward(problem.loss(module(*inputs)))
    return [p.grad for p in probes]


def name_of(value: Any) -> str:
    """A readable test id."""
    if isinstance(value, Problem):
        return value.name
    if isinstance(value, Solver):
        order = getattr(value, "order", None)
        return type(value).__name__ + (f"-{order}" if order else "")
    if isinstance(value, Frozen):
        return "+".join(name for name, stored in vars(value).items() if not stored) or "all"
    return str(value)


# --------------------------------------------------------------------------------------------------------------- models


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with tanh between them and a linear output."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def twins(solver: Solver, *sizes: int) -> tuple[nn.Sequential, ActivationRelaxation]:
    """A plain network and a wrapped copy of it."""
    plain = mlp(*sizes).double()
    return plain, ActivationRelaxation(copy.deepcopy(plain), solver=solver)


def cnn() -> nn.Sequential:
    convolutions = [nn.Conv2d(1, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.Tanh()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16, 6), nn.Sigmoid(), nn.Linear(6, 3))


class Branches(nn.Module):
    """a = tanh(V z), b = tanh(W a), c = tanh(W b + a), d = tanh(U a), output P (c + d) + Q b: W is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.V, self.W, self.U = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.P, self.Q = nn.Linear(5, 3), nn.Linear(5, 3)
        self.f_a, self.f_b, self.f_c, self.f_d = nn.Tanh(), nn.Tanh(), nn.Tanh(), nn.Tanh()

    def forward(self, z: Tensor) -> Tensor:
        a = self.f_a(self.V(z))
        b = self.f_b(self.W(a))
        c = self.f_c(self.W(b) + a)
        d = self.f_d(self.U(a))
        output: Tensor = self.P(c + d) + self.Q(b)
        return output


class Residual(nn.Module):
    """Two residual blocks of different length, a concatenated branch, and vertices added to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(4))
        self.branch, self.head = nn.Linear(4, 2), nn.Linear(6, 3)
        self.f = nn.ModuleList([nn.Tanh(), nn.SiLU(), nn.GELU(), nn.Sigmoid(), nn.Tanh()])

    def forward(self, x: Tensor) -> Tensor:
        h = self.f[0](self.stem(x))
        g = h + self.f[2](self.second(self.f[1](self.first(h))))
        k = g + self.f[3](self.third(g))
        output: Tensor = self.head(torch.cat([k, self.f[4](self.branch(h))], dim=1))
        return output


class Shared(nn.Module):
    """One layer applied three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(self.layer(self.layer(x)))
        return 2 * output


class Unrolled(nn.Module):
    """A recurrent cell called once for each of T moments; all moments are read out."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.recur, self.f, self.read = nn.Linear(2, 5), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)

    def forward(self, sequence: Tensor) -> Tensor:  # (batch, T, 2)
        h = sequence.new_zeros(len(sequence), 5)
        outputs = []
        for x in sequence.unbind(1):
            h = self.f(self.enter(x) + self.recur(h))
            outputs.append(self.read(h))
        return torch.stack(outputs, 1)


class Nested(nn.Module):
    """Two inputs, one of them in a dict; the result holds an activity, a head, an index and an unused head."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.f, self.g = nn.Linear(3, 4), nn.Linear(2, 4), nn.Tanh(), nn.Tanh()
        self.middle, self.head, self.other = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> dict[str, Any]:
        h = self.f(self.left(x) + self.right(more["y"]) * more["scale"])
        k = self.g(self.middle(h))
        logits = self.head(k)
        return {"hidden": h, "heads": (logits, [self.other(h)]), "best": logits.argmax(1), "none": None}


def nested_loss(result: dict[str, Any]) -> Tensor:
    return squares(result["hidden"]) + squares(result["heads"][0])


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 5, 3)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net(x), target, reduction="sum")


class InPlace(nn.Module):
    """Writes into what modules handed on: activations in place, ``h += x``, ``h *= 2``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.relu, self.silu, self.leaky = nn.ReLU(inplace=True), nn.SiLU(), nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.first(x))
        g = self.silu(self.second(h))
        g += h
        k = self.leaky(self.third(g))
        output: Tensor = self.head(k)
        output += x
        output *= 2
        return output


def regularised() -> nn.Sequential:
    # Batch norm takes the mean off again, so a bias before it would have the gradient zero.
    first = [nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3)]
    second = [nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3)]
    return nn.Sequential(*first, *second, nn.Linear(5, 2))


# ------------------------------------------------------------------------------------------------------------- problems

PROBLEMS = (
    Problem("mlp", lambda: mlp(5, 7, 6, 4, 3), lambda: (torch.randn(3, 5),), squares, depth=3),
    Problem("cnn", cnn, lambda: (torch.randn(2, 1, 10, 10),), squares, depth=3),
    Problem("branches", Branches, lambda: (torch.randn(3, 4),), squares, depth=3),
    Problem("residual", Residual, lambda: (torch.randn(3, 4),), squares, depth=4),
    Problem("shared", Shared, lambda: (torch.randn(3, 4),), squares, depth=3),
    Problem("unrolled", Unrolled, lambda: (torch.randn(2, 6, 2),), squares, depth=6),
    Problem(
        "nested",
        Nested,
        lambda: (torch.randn(3, 3), {"y": torch.randn(3, 2), "scale": torch.rand(3, 1)}),
        nested_loss,
        depth=2,
    ),
    Problem("own-loss", OwnLoss, lambda: (torch.randn(3, 4), torch.tensor([0, 2, 1])), lambda loss: loss, depth=2),
    Problem("regularised", regularised, lambda: (torch.randn(6, 4),), squares, depth=2, mixes_samples=True),
    Problem("in-place", InPlace, lambda: (torch.randn(3, 4),), squares, depth=3),
    Problem(
        "ends-in-vertex",
        lambda: nn.Sequential(*mlp(4, 5, 5, 3), nn.Sigmoid()),
        lambda: (torch.randn(3, 4),),
        squares,
        depth=3,
        ends_in_vertex=True,
    ),
    Problem(
        "all-modules",
        lambda: mlp(4, 5, 5, 2),
        lambda: (torch.randn(3, 4),),
        squares,
        depth=5,
        vertices="modules",
        ends_in_vertex=True,
    ),
)


# ------------------------------------------------------------------------------------------ solvers, and what is frozen

# Each with enough steps for every problem. A new solver joins here and inherits the contract.
SOLVERS: tuple[Solver, ...] = (
    Euler(0.7, 60),
    Euler(0.7, 60, order="sequential"),
    Euler(0.9, 150, order="asynchronous"),
    ClosedForm(0.7, 60),
    ClosedForm(0.7, 60, order="sequential"),
    Continuous(80.0),
    Equilibrium(),
)

# The same solvers, stopped long before they converge.
STOPPED_EARLY: tuple[Solver, ...] = (
    Euler(0.3, 4),
    Euler(0.3, 4, order="sequential"),
    Euler(0.3, 4, order="asynchronous"),
    ClosedForm(0.3, 4),
    ClosedForm(0.3, 4, order="sequential"),
    Continuous(1.2),
)
# Every value of `Frozen` that is allowed.
COMBINATIONS = [
    Frozen(r, u, a, i) for r, u, a, i in product((True, False), repeat=4) if i or not (r and u and a)
]  # fmt: skip

# The conditions under which one quantity or several are taken at the current states.
A = Frozen(relaxation_derivative=False)
B = Frozen(update_derivative=False)
C = Frozen(relaxation_derivative=False, update_derivative=False)
D = Frozen(update_activity=False)
NOTHING = Frozen(relaxation_derivative=False, update_derivative=False, update_activity=False)
CONDITIONS = (A, B, C, D, NOTHING)
