"""Literal slow loops, written from the equations: they share no code with the library's relaxation.

`relax` is Algorithm 1 over a network whose f' and W are written out by hand (`LiteralChain`, `LiteralBranches`) or over
operations that are listed by hand (`LiteralOperations`). `simulate` is Algorithm 1 where not everything is frozen.
There a network (`Loop`) is a list of states, the input's first: ``slopes(y)`` are the derivatives f' at activities y,
``drive(x, slopes)`` is the sum in (1), and ``gradients(x, slopes, y)`` is (2) with presynaptic activities y.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.nn import functional

from relaxprop import Continuous, Equilibrium, Frozen
from relaxprop.solvers import Solver
from tests.compare import Gradients
from tests.problems import Branches, cnn, mlp


class LiteralNetwork(Protocol):
    """A network whose equations (1) and (2) are written out; ``x`` lists its states from the input on."""

    activities: list[Tensor]  # x̄, where the states start

    def drive(self, x: Sequence[Tensor]) -> list[Tensor]:
        """The sum in (1) for every vertex."""

    def gradients(self, x: Sequence[Tensor]) -> Gradients:
        """(2), and the input's gradient, by the names that `gradients` uses."""


def relax(
    network: LiteralNetwork, step_size: float, num_steps: int, order: str, start: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Algorithm 1, by default from x̄. The states of a `LiteralNetwork` are in topological order, so the last is nearest
    to the output."""
    x = list(network.activities if start is None else start)
    for _ in range(num_steps):
        if order == "simultaneous":
            x = [x_i + step_size * (d_i - x_i) for x_i, d_i in zip(x, network.drive(x), strict=True)]
        else:
            for i in reversed(range(len(x))):
                x[i] = x[i] + step_size * (network.drive(x)[i] - x[i])
    return x


def weight(layer: Any) -> Tensor:
    found: Tensor = layer.weight.detach()
    return found


def affine(layer: Any, y: Tensor) -> Tensor:
    u: Tensor = y @ weight(layer).T + layer.bias.detach()
    return u


def backwards(layer: Any) -> Tensor:
    """B, which stands for W where errors are sent back."""
    W: Tensor = layer.weight.detach()
    rule = getattr(layer, "feedback_rule", "symmetric")
    if rule == "sign":
        return W.sign() * W.abs().mean()
    if rule == "fixed-sign":
        magnitudes: Tensor = layer.feedback
        return W.sign() * magnitudes
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
            u = affine(layer, x)
            x = torch.tanh(u)
            self.activities.append(x)
            self.relaxing.append(1 - torch.tanh(u) ** 2)
        self.updating = self.relaxing
        self.error = 2 * (affine(self.layers[-1], x) - 0.3)

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
        a = torch.tanh(affine(network.V, z))
        b = torch.tanh(affine(network.W, a))
        c = torch.tanh(affine(network.W, b) + a)
        d = torch.tanh(affine(network.U, a))
        self.z, self.activities = z, [a, b, c, d]
        self.error = 2 * (affine(network.P, c + d) + affine(network.Q, b) - 0.3)

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


# --------------------------------------------------------------------------------------- where not everything is frozen


class Loop(Protocol):
    """A network with its equations written out."""

    error: Tensor  # ∂L/∂x^L

    def forward(self) -> list[Tensor]:
        """The activities, the input first."""

    def slopes(self, y: Sequence[Tensor]) -> list[Any]:
        """f' of every vertex but the input, at activities y."""

    def drive(self, x: Sequence[Tensor], slopes: Sequence[Any]) -> list[Tensor]:
        """The sum in (1) for every vertex, the input first."""

    def gradients(self, x: Sequence[Tensor], slopes: Sequence[Any], y: Sequence[Tensor]) -> Gradients:
        """(2)."""


def tanh_slope(u: Tensor) -> Tensor:
    return 1 - torch.tanh(u) ** 2


def sigmoid_slope(u: Tensor) -> Tensor:
    return torch.sigmoid(u) * torch.sigmoid(-u)


def convolved(layer: Any, y: Tensor) -> Tensor:
    """The convolution as a product with the patches of y."""
    patches = functional.unfold(y, layer.kernel_size)
    size = y.shape[-1] - layer.kernel_size[0] + 1
    u = weight(layer).flatten(1) @ patches + layer.bias.detach()[:, None]
    planes: Tensor = u.view(len(y), -1, size, size)
    return planes


def convolved_back(layer: Any, delta: Tensor, size: int) -> Tensor:
    """Every error on its way back into the patch that it came from."""
    patches = backwards(layer).flatten(1).T @ delta.flatten(2)
    return functional.fold(patches, (size, size), layer.kernel_size)


def convolution_update(layer: Any, delta: Tensor, y: Tensor) -> Tensor:
    patches = functional.unfold(y, layer.kernel_size)
    return torch.einsum("nol,npl->op", delta.flatten(2), patches).view_as(layer.weight)


class LoopChain:
    def __init__(self, network: nn.Sequential, z: Tensor) -> None:
        self.layers = [m for m in network if isinstance(m, nn.Linear)]
        self.z = z
        self.error = 2 * (affine(self.layers[-1], self.forward()[-1]) - 0.3)

    def forward(self) -> list[Tensor]:
        y = [self.z]
        for layer in self.layers[:-1]:
            y.append(torch.tanh(affine(layer, y[-1])))
        return y

    def slopes(self, y: Sequence[Tensor]) -> list[Any]:
        return [tanh_slope(affine(layer, y_l)) for layer, y_l in zip(self.layers, y, strict=True)][:-1]

    def deltas(self, x: Sequence[Tensor], slopes: Sequence[Any]) -> list[Tensor]:
        return [slope * x_i for slope, x_i in zip(slopes, x[1:], strict=True)] + [self.error]

    def drive(self, x: Sequence[Tensor], slopes: Sequence[Any]) -> list[Tensor]:
        return [delta @ backwards(m) for m, delta in zip(self.layers, self.deltas(x, slopes), strict=True)]

    def gradients(self, x: Sequence[Tensor], slopes: Sequence[Any], y: Sequence[Tensor]) -> Gradients:
        found: Gradients = {}
        for i, (delta, y_l) in enumerate(zip(self.deltas(x, slopes), y, strict=True)):
            found |= {f"{2 * i}.weight": delta.T @ y_l, f"{2 * i}.bias": delta.sum(0)}
        return found


class LoopBranches:
    def __init__(self, network: Branches, z: Tensor) -> None:
        self.net, self.z = network, z
        _, _, b, c, d = self.forward()
        self.error = 2 * (affine(network.P, c + d) + affine(network.Q, b) - 0.3)

    def sums(self, y: Sequence[Tensor]) -> list[Tensor]:
        z, a, b, *_ = y
        net = self.net
        return [affine(net.V, z), affine(net.W, a), affine(net.W, b) + a, affine(net.U, a)]

    def forward(self) -> list[Tensor]:
        a = torch.tanh(affine(self.net.V, self.z))
        b = torch.tanh(affine(self.net.W, a))
        return [self.z, a, b, torch.tanh(affine(self.net.W, b) + a), torch.tanh(affine(self.net.U, a))]

    def slopes(self, y: Sequence[Tensor]) -> list[Any]:
        return [tanh_slope(u) for u in self.sums(y)]

    def drive(self, x: Sequence[Tensor], slopes: Sequence[Any]) -> list[Tensor]:
        V, W, U, P, Q = (backwards(m) for m in (self.net.V, self.net.W, self.net.U, self.net.P, self.net.Q))
        delta_a, delta_b, delta_c, delta_d = (slope * x_i for slope, x_i in zip(slopes, x[1:], strict=True))
        to_a = delta_b @ W + delta_c + delta_d @ U
        return [delta_a @ V, to_a, delta_c @ W + self.error @ Q, self.error @ P, self.error @ P]

    def gradients(self, x: Sequence[Tensor], slopes: Sequence[Any], y: Sequence[Tensor]) -> Gradients:
        return branches_update([slope * x_i for slope, x_i in zip(slopes, x[1:], strict=True)], y, self.error)


class LoopCNN:
    """Convolution, tanh, 2×2 max-pooling, convolution, tanh, linear, sigmoid, linear."""

    def __init__(self, network: nn.Sequential, z: Tensor) -> None:
        self.first, self.second, self.third, self.last = (network[i] for i in (0, 3, 6, 8))
        self.z = z
        self.error = 2 * (affine(self.last, self.forward()[-1]) - 0.3)

    def pooled(self, y: Tensor, where: Tensor) -> Tensor:
        """The pixels of y at which ``where`` is largest within its 2×2 block."""
        best = functional.max_pool2d(where, 2, return_indices=True)[1]
        return y.flatten(2).gather(2, best.flatten(2)).view_as(best)

    def unpooled(self, x: Tensor, where: Tensor) -> Tensor:
        best = functional.max_pool2d(where, 2, return_indices=True)[1]
        return torch.zeros_like(where).flatten(2).scatter(2, best.flatten(2), x.flatten(2)).view_as(where)

    def forward(self) -> list[Tensor]:
        a = torch.tanh(convolved(self.first, self.z))
        b = torch.tanh(convolved(self.second, self.pooled(a, a)))
        return [self.z, a, b, torch.sigmoid(affine(self.third, b.flatten(1)))]

    def slopes(self, y: Sequence[Tensor]) -> list[Any]:
        z, a, b, _ = y
        return [
            tanh_slope(convolved(self.first, z)),
            (tanh_slope(convolved(self.second, self.pooled(a, a))), a),
            sigmoid_slope(affine(self.third, b.flatten(1))),
        ]

    def drive(self, x: Sequence[Tensor], slopes: Sequence[Any]) -> list[Tensor]:
        z, a, b, c = x
        to_a = convolved_back(self.second, slopes[1][0] * b, a.shape[-1] // 2)
        return [
            convolved_back(self.first, slopes[0] * a, z.shape[-1]),
            self.unpooled(to_a, slopes[1][1]),
            ((slopes[2] * c) @ backwards(self.third)).view_as(b),
            self.error @ backwards(self.last),
        ]

    def gradients(self, x: Sequence[Tensor], slopes: Sequence[Any], y: Sequence[Tensor]) -> Gradients:
        deltas = [slopes[0] * x[1], slopes[1][0] * x[2], slopes[2] * x[3], self.error]
        z, a, b, c = y
        return {
            "0.weight": convolution_update(self.first, deltas[0], z),
            "0.bias": deltas[0].sum((0, 2, 3)),
            "3.weight": convolution_update(self.second, deltas[1], self.pooled(a, a)),
            "3.bias": deltas[1].sum((0, 2, 3)),
            "6.weight": deltas[2].T @ b.flatten(1),
            "6.bias": deltas[2].sum(0),
            "8.weight": deltas[3].T @ c,
            "8.bias": deltas[3].sum(0),
        }


class Network(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    loop: Callable[[Any, Tensor], Loop]
    draws: tuple[int, ...]  # the states in the order in which an asynchronous step draws for them: by vertices upstream


NETWORKS = {
    "mlp": Network(lambda: mlp(4, 6, 5, 5, 3), (3, 4), LoopChain, (0, 1, 2, 3)),
    "branches": Network(Branches, (3, 4), LoopBranches, (0, 1, 2, 4, 3)),
    "cnn": Network(cnn, (2, 1, 10, 10), LoopCNN, (0, 1, 2, 3)),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    """With weights large enough for f' to differ between x̄ and x."""
    torch.manual_seed(3)
    module = NETWORKS[name].make().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    return module, torch.randn(NETWORKS[name].shape).double()


def simulate(
    name: str,
    module: nn.Module,
    z: Tensor,
    frozen: Frozen,
    solver: Solver,
    dropped: tuple[bool, bool] = (False, False),
) -> Gradients:
    """Algorithm 1 under ``frozen``, with f' → 1 in (1) and in (2) as ``dropped`` says."""
    loop = NETWORKS[name].loop(module, z)
    bar = loop.forward()
    x = list(bar)

    def derivatives(at: Sequence[Tensor], drop: bool) -> list[Any]:
        found = loop.slopes(at)
        if not drop:
            return found
        return [(torch.ones_like(s[0]), s[1]) if isinstance(s, tuple) else torch.ones_like(s) for s in found]

    def drive(x: Sequence[Tensor], slopes: Sequence[Any]) -> list[Tensor]:
        driven = loop.drive(x, slopes)
        return driven if not frozen.input else [x[0], *driven[1:]]

    def slopes(x: Sequence[Tensor]) -> list[Any]:
        return derivatives(bar if frozen.relaxation_derivative else x, dropped[0])

    if isinstance(solver, Continuous):
        sizes = [len(part.flatten()) for part in x]

        def unpacked(flat: np.ndarray[Any, np.dtype[np.float64]]) -> list[Tensor]:
            parts = torch.split(torch.from_numpy(flat), sizes)
            return [part.view_as(like) for part, like in zip(parts, bar, strict=True)]

        def derivative(_: float, flat: Any) -> Any:
            x = unpacked(flat)
            return torch.cat([(d - s).flatten() for d, s in zip(drive(x, slopes(x)), x, strict=True)]).numpy()

        start = torch.cat([part.flatten() for part in x]).numpy()
        x = unpacked(solve_ivp(derivative, (0, solver.duration), start, "DOP853", rtol=1e-12, atol=1e-13).y[:, -1])
    else:
        equilibrium = isinstance(solver, Equilibrium)
        step_size = 1.0 if equilibrium else vars(solver)["step_size"]
        order = "simultaneous" if equilibrium else vars(solver)["order"]
        torch.manual_seed(2)  # as `gradients` has it
        for _ in range(len(x) if equilibrium else vars(solver)["num_steps"]):
            at = slopes(x)
            if order != "sequential":
                moves = set(range(len(x)))
                if order == "asynchronous":
                    order_of_draws = [i for i in NETWORKS[name].draws if i or not frozen.input]
                    chosen = torch.rand(len(order_of_draws)) < 0.5
                    moves = {i for i, chosen_i in zip(order_of_draws, chosen, strict=True) if chosen_i}
                driven = drive(x, at)
                x = [x_i + step_size * (driven[i] - x_i) if i in moves else x_i for i, x_i in enumerate(x)]
            else:
                for i in reversed(range(len(x))):
                    x[i] = x[i] + step_size * (drive(x, at)[i] - x[i])
    update_slopes = derivatives(bar if frozen.update_derivative else x, dropped[1])
    return loop.gradients(x, update_slopes, bar if frozen.update_activity else x)


# ----------------------------------------------------------------------------------------------------------- operations


class Operation(NamedTuple):
    name: str
    function: Callable[..., Tensor]
    reads: str  # names of operations and of what is given, with spaces between them


class LiteralOperations:
    """Operations in the order of the forward pass, the last one the output, with the loss `squares` of it.

    A view or a write in place is part of the operation that reads it.
    """

    def __init__(self, operations: Sequence[Operation], given: dict[str, Tensor]) -> None:
        self.operations = operations
        self.given = {name: x.detach() for name, x in given.items()}
        self.values = dict(self.given)
        for name, function, reads in operations:
            self.values[name] = function(*(self.values[r] for r in reads.split())).detach()
        self.error = 2 * (self.values[operations[-1].name] - 0.3)
        self.activities = [self.values[o.name] for o in operations[:-1]] + [self.error]
        self.unfrozen_relaxation = self.unfrozen_update = False

    def arriving(self, x: Sequence[Tensor], unfrozen: bool) -> dict[str, Tensor]:
        """Σ_j x_j ∂x_j/∂x_i for all i, one operation after the other, at x̄ or at x."""
        states = dict(zip((o.name for o in self.operations), x, strict=True))
        at = self.values | states if unfrozen else self.values
        total = {name: torch.zeros_like(value) for name, value in self.values.items()}
        for name, function, reads in self.operations:
            leaves = {r: at[r].clone().requires_grad_() for r in reads.split()}
            result = function(*(leaves[r] for r in reads.split()))
            products = torch.autograd.grad(result, list(leaves.values()), states[name])
            for r, product in zip(leaves, products, strict=True):
                total[r] = total[r] + product
        return total

    def drive(self, x: Sequence[Tensor]) -> list[Tensor]:
        total = self.arriving(x, self.unfrozen_relaxation)
        return [total[o.name] for o in self.operations[:-1]] + [self.error]

    def gradients(self, x: Sequence[Tensor]) -> Gradients:
        errors, updates = self.arriving(x, self.unfrozen_relaxation), self.arriving(x, self.unfrozen_update)
        return {name: (errors if name == "input 0" else updates)[name] for name in self.given}
