"""What the tests share: problems, solvers, and the oracles that neither knows about.

The oracles are plain autograd (`gradients` of a plain module, `activity_gradients`) and `relax`, a literal slow loop of
equations (1) and (2) over a network whose f' and W are written out by hand (`LiteralChain`, `LiteralBranches`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from relaxprop import ActivationRelaxation, ClosedForm, Continuous, Equilibrium, Euler
from relaxprop.graph import Graph, States
from relaxprop.recording import Recorder
from relaxprop.solvers import Solver
from relaxprop.vertices import Granularity, find_vertices

# Relative distance (of norms) at which two results are the same.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 5e-2}

Gradients = dict[str, Tensor | None]


def distance(actual: Tensor, expected: Tensor) -> float:
    """``‖actual − expected‖ / ‖expected‖``, absolute where nothing is expected."""
    assert actual.shape == expected.shape
    size = float(expected.norm())
    return float((actual - expected).norm()) / (size or 1.0)


def assert_same(actual: Tensor, expected: Tensor, what: str = "tensor", tolerance: float | None = None) -> None:
    allowed = TOLERANCES[expected.dtype] if tolerance is None else tolerance
    found = distance(actual, expected)
    assert found <= allowed, f"{what} is {found:.2e} off, {allowed:.0e} allowed"


def assert_same_gradients(actual: Gradients, expected: Gradients, tolerance: float | None = None) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        found = actual[name]
        assert (found is None) == (wanted is None), f"{name}: got {found}, expected {wanted}"
        if found is not None and wanted is not None:
            assert_same(found, wanted, name, tolerance)


def assert_literal(found: Gradients, expected: Gradients, tolerance: float | None = None) -> None:
    """As `assert_same_gradients`, where only the expected ones are looked at, none of which is missing."""
    for name, wanted in expected.items():
        assert wanted is not None
        actual = found[name]
        assert actual is not None
        assert_same(actual, wanted, name, tolerance)


def largest_distance(actual: Gradients, expected: Gradients) -> float:
    pairs = [(actual[name], wanted) for name, wanted in expected.items()]
    return max(distance(a, e) for a, e in pairs if a is not None and e is not None)


def backward(loss: Tensor, **options: Any) -> None:
    """``loss.backward()``, which PyTorch has left without types."""
    loss.backward(**options)  # type: ignore[no-untyped-call]


def squares(output: Tensor) -> Tensor:
    """The paper's loss with a constant target; a sum, so samples do not mix."""
    return ((output - 0.3) ** 2).sum()


# ---------------------------------------------------------------------------------------------------------- problems


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


def gradients(model: nn.Module, inputs: Sequence[Any], loss: Callable[[Any], Tensor] = squares) -> Gradients:
    """The gradients of all parameters, by the plain module's names, and of all inputs, after one backward pass."""
    for parameter in model.parameters():
        parameter.grad = None
    arrived: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        arrived.append(x.detach().requires_grad_())
        return arrived[-1]

    arguments = pytree.tree_map(watched, tuple(inputs))
    torch.manual_seed(2)
    backward(loss(model(*arguments)))
    found: Gradients = {f"input {i}": x.grad for i, x in enumerate(arrived)}
    return found | {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def driven_graph(
    module: nn.Module,
    vertices: Granularity | Iterable[nn.Module],
    inputs: Sequence[Any],
    loss: Callable[[Any], Tensor] = squares,
) -> Graph:
    torch.manual_seed(2)
    recording = Recorder().record(module, vertices, inputs)
    outputs: list[Tensor] = []

    def cut_off(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.requires_grad:
            return x
        outputs.append(x.detach().requires_grad_())
        return outputs[-1]

    final = loss(pytree.tree_map(cut_off, recording.result))
    recording.graph.drive_outputs(torch.autograd.grad(final, outputs, allow_unused=True))
    return recording.graph


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


def random_states(graph: Graph) -> States:
    return {v: torch.randn_like(v.leaf) for v in graph.vertices}


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with tanh between them and a linear output."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


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


def name_of(value: Any) -> str:
    """A readable test id."""
    if isinstance(value, Problem):
        return value.name
    if isinstance(value, Solver):
        order = getattr(value, "order", None)
        return type(value).__name__ + (f"-{order}" if order else "")
    return str(value)


# ------------------------------------------------------------------------------------------------------- slow loops


class LiteralNetwork(Protocol):
    """A network whose equations (1) and (2) are written out; ``x`` lists its states from the input on."""

    activities: list[Tensor]  # x̄, where the states start

    def drive(self, x: Sequence[Tensor]) -> list[Tensor]:
        """The sum in (1) for every vertex."""

    def gradients(self, x: Sequence[Tensor]) -> Gradients:
        """(2), and the input's gradient, by the names that `gradients` uses."""


def relax(network: LiteralNetwork, step_size: float, num_steps: int, order: str) -> list[Tensor]:
    """Algorithm 1. The states of a `LiteralNetwork` are in topological order, so the last is nearest to the output."""
    x = list(network.activities)
    for _ in range(num_steps):
        if order == "simultaneous":
            x = [x_i + step_size * (d_i - x_i) for x_i, d_i in zip(x, network.drive(x), strict=True)]
        else:
            for i in reversed(range(len(x))):
                x[i] = x[i] + step_size * (network.drive(x)[i] - x[i])
    return x


def _affine(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return x @ layer.weight.detach().T + layer.bias.detach()


def backwards(layer: Any) -> Tensor:
    """B, which stands for W where errors are sent back."""
    W: Tensor = layer.weight.detach()
    rule = getattr(layer, "feedback_rule", "symmetric")
    if rule == "sign":
        return W.sign() * W.abs().mean()
    B: Tensor = W if rule == "symmetric" else layer.feedback.detach()
    return B


def branches_update(deltas: Sequence[Tensor], y: Sequence[Tensor], error: Tensor) -> Gradients:
    """(2) of `Branches`: the errors of a, b, c, d with presynaptic activities z, a, b, c, d."""
    delta_a, delta_b, delta_c, delta_d = deltas
    z, a, b, c, d = y
    return {
        "V.weight": delta_a.T @ z,
        "V.bias": delta_a.sum(0),
        "W.weight": delta_b.T @ a + delta_c.T @ b,
        "W.bias": delta_b.sum(0) + delta_c.sum(0),
        "U.weight": delta_d.T @ a,
        "U.bias": delta_d.sum(0),
        "P.weight": error.T @ (c + d),
        "P.bias": error.sum(0),
        "Q.weight": error.T @ b,
        "Q.bias": error.sum(0),
    }


class LiteralChain:
    """x^{l+1} = tanh(W^l x^l + b^l) with a linear output and loss Σ (x^L − 0.3)², for a network made by `mlp`.

    ``B`` replaces W in (1); ``relaxing`` and ``updating`` are f' in (1) and in (2).
    """

    def __init__(self, network: nn.Sequential, z: Tensor) -> None:
        self.layers = [layer for layer in network if isinstance(layer, nn.Linear)]
        self.B = [layer.weight.detach() for layer in self.layers]
        self.z, self.activities, self.relaxing = z, list[Tensor](), list[Tensor]()
        x = z
        for layer in self.layers[:-1]:
            u = _affine(layer, x)
            x = torch.tanh(u)
            self.activities.append(x)
            self.relaxing.append(1 - torch.tanh(u) ** 2)
        self.updating = self.relaxing
        self.error = 2 * (_affine(self.layers[-1], x) - 0.3)

    def _deltas(self, slopes: Sequence[Tensor], x: Sequence[Tensor]) -> list[Tensor]:
        return [slope * x_i for slope, x_i in zip(slopes, x, strict=True)] + [self.error]

    def drive(self, x: Sequence[Tensor]) -> list[Tensor]:
        deltas = self._deltas(self.relaxing, x)
        return [delta @ B for delta, B in zip(deltas[1:], self.B[1:], strict=True)]

    def gradients(self, x: Sequence[Tensor]) -> Gradients:
        deltas, below = self._deltas(self.updating, x), [self.z, *self.activities]
        found: Gradients = {"input 0": self._deltas(self.relaxing, x)[0] @ self.B[0]}
        for i, (delta, x_bar) in enumerate(zip(deltas, below, strict=True)):
            found |= {f"{2 * i}.weight": delta.T @ x_bar, f"{2 * i}.bias": delta.sum(0)}
        return found


class LiteralBranches:
    """`Branches` with the same loss."""

    def __init__(self, network: Branches, z: Tensor) -> None:
        self.V, self.W, self.U, self.P, self.Q = (
            layer.weight.detach() for layer in (network.V, network.W, network.U, network.P, network.Q)
        )
        a = torch.tanh(_affine(network.V, z))
        b = torch.tanh(_affine(network.W, a))
        c = torch.tanh(_affine(network.W, b) + a)
        d = torch.tanh(_affine(network.U, a))
        self.z, self.activities = z, [a, b, c, d]
        self.error = 2 * (_affine(network.P, c + d) + _affine(network.Q, b) - 0.3)

    def deltas(self, x: Sequence[Tensor]) -> list[Tensor]:
        return [(1 - x_bar**2) * x_i for x_bar, x_i in zip(self.activities, x, strict=True)]

    def drive(self, x: Sequence[Tensor]) -> list[Tensor]:
        _, delta_b, delta_c, delta_d = self.deltas(x)
        drive_a = delta_b @ self.W + delta_c + delta_d @ self.U
        drive_b = delta_c @ self.W + self.error @ self.Q
        return [drive_a, drive_b, self.error @ self.P, self.error @ self.P]

    def gradients(self, x: Sequence[Tensor]) -> Gradients:
        deltas = self.deltas(x)
        found: Gradients = {"input 0": deltas[0] @ self.V}
        return found | branches_update(deltas, [self.z, *self.activities], self.error)


def literal_problems() -> list[tuple[nn.Module, Tensor, LiteralNetwork]]:
    """A chain and a graph with branches, each with an input and its literal twin."""
    chain, z = mlp(4, 6, 5, 5, 3).double(), torch.randn(3, 4).double()
    branches = Branches().double()
    return [(chain, z, LiteralChain(chain, z)), (branches, z, LiteralBranches(branches, z))]
