"""What is frozen and what is not, against loops written from equations (1) and (2).

In the loops a network is a list of states, the input's first: ``slopes(y)`` are the derivatives f' at activities y,
``drive(x, slopes)`` is the sum in (1), and ``gradients(x, slopes, y)`` is (2) with presynaptic activities y.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple, Protocol

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.nn import functional

from relaxprop import (
    ActivationRelaxation,
    ClosedForm,
    Continuous,
    Equilibrium,
    Euler,
    Frozen,
    drop_derivatives,
    use_feedback,
)
from relaxprop.feedback import FeedbackRule
from relaxprop.solvers import Solver
from tests.helpers import (
    Branches,
    Gradients,
    assert_literal,
    backwards,
    branches_update,
    cnn,
    gradients,
    mlp,
    name_of,
)

COMBINATIONS = [
    Frozen(r, u, a, i) for r, u, a, i in product((True, False), repeat=4) if i or not (r and u and a)
]  # fmt: skip
LINEAR: tuple[Solver, ...] = (
    ClosedForm(0.3, 7),
    ClosedForm(0.3, 7, order="sequential"),
    ClosedForm(0.9, 300),
    Continuous(2.0),
    Equilibrium(),
)
SIMULATED: tuple[Solver, ...] = tuple(
    Euler(0.3, 7, order=order) for order in ("simultaneous", "sequential", "asynchronous")
)


def shown(value: Any) -> str:
    if isinstance(value, Frozen):
        unfrozen = [name for name, stored in vars(value).items() if not stored]
        return "+".join(unfrozen) or "all"
    return name_of(value)


# ---------------------------------------------------------------------------------------------------------- the loops


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


def weight(layer: Any) -> Tensor:
    found: Tensor = layer.weight.detach()
    return found


def affine(layer: Any, y: Tensor) -> Tensor:
    u: Tensor = y @ weight(layer).T + layer.bias.detach()
    return u


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


def assert_same_as_loop(
    name: str,
    frozen: Frozen,
    solver: Solver,
    *,
    rule: FeedbackRule = "symmetric",
    dropped: tuple[bool, bool] = (False, False),
    tolerance: float | None = None,
) -> None:
    module, z = network(name)
    use_feedback(module, rule)
    expected = simulate(name, module, z, frozen, solver, dropped)
    drop_derivatives(module, relaxation=dropped[0], update=dropped[1])
    found = gradients(ActivationRelaxation(module, solver=solver, frozen=frozen), (z,))
    assert_literal(found, expected, tolerance)


every_network = pytest.mark.parametrize("name", NETWORKS)


# -------------------------------------------------------------------------------------------------- every combination


@every_network
@pytest.mark.parametrize("frozen", COMBINATIONS, ids=shown)
@pytest.mark.parametrize("solver", SIMULATED, ids=shown)
def test_simulated_relaxation(name: str, frozen: Frozen, solver: Solver) -> None:
    assert_same_as_loop(name, frozen, solver)


@every_network
@pytest.mark.parametrize("frozen", [f for f in COMBINATIONS if f.relaxation_derivative], ids=shown)
@pytest.mark.parametrize("solver", LINEAR, ids=shown)
def test_relaxation_in_closed_form(name: str, frozen: Frozen, solver: Solver) -> None:
    assert_same_as_loop(name, frozen, solver)


@every_network
@pytest.mark.parametrize("frozen", [f for f in COMBINATIONS if not f.relaxation_derivative], ids=shown)
def test_unfrozen_relaxation_in_continuous_time(name: str, frozen: Frozen) -> None:
    # The solver allows an error of 1e-8 per step. Max-pooling's choice jumps later on: see the next test.
    assert_same_as_loop(name, frozen, Continuous(0.02 if name == "cnn" else 2.0), tolerance=1e-6)


def test_a_derivative_that_jumps_is_not_integrated_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relaxprop.solvers.MAX_EVALUATIONS", 500)
    module, z = network("cnn")
    model = ActivationRelaxation(module, solver=Continuous(2.0), frozen=Frozen(relaxation_derivative=False))
    with pytest.raises(RuntimeError, match=r"Continuous\(duration=2.0\): .* more than 500 evaluations; .* use Euler"):
        gradients(model, (z,))


@every_network
@pytest.mark.parametrize("frozen", [f for f in COMBINATIONS if f.input], ids=shown)
@pytest.mark.parametrize("rule", ["learned", "random", "sign"])
@pytest.mark.parametrize("dropped", [(False, False), (True, True), (True, False), (False, True)])
def test_every_rule_under_every_condition(
    name: str, frozen: Frozen, rule: FeedbackRule, dropped: tuple[bool, bool]
) -> None:
    linear: tuple[Solver, ...] = (ClosedForm(0.3, 7), Equilibrium()) if frozen.relaxation_derivative else ()
    for solver in (*linear, *SIMULATED):
        assert_same_as_loop(name, frozen, solver, rule=rule, dropped=dropped)


@pytest.mark.parametrize("frozen", [f for f in COMBINATIONS if f.input], ids=shown)
@pytest.mark.parametrize("rule", ["learned", "random", "sign"])
@pytest.mark.parametrize("dropped", [(True, False), (False, True)])
def test_every_rule_under_every_condition_in_continuous_time(
    frozen: Frozen, rule: FeedbackRule, dropped: tuple[bool, bool]
) -> None:
    assert_same_as_loop("mlp", frozen, Continuous(0.5), rule=rule, dropped=dropped, tolerance=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_integration_is_as_exact_at_any_scale_of_the_loss(scale: float, dtype: torch.dtype) -> None:
    """Where the model is linear there is nothing to unfreeze, and the Poisson weights are exact."""
    torch.manual_seed(4)
    layers = [nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 2)]
    module, z = nn.Sequential(*layers).to(dtype), torch.randn(3, 4, dtype=dtype)
    found = []
    for frozen in (Frozen(), Frozen(relaxation_derivative=False)):
        module.zero_grad()
        model = ActivationRelaxation(module, solver=Continuous(15.0), vertices=[layers[1], layers[3]], frozen=frozen)
        (scale * model(z).abs().square().sum()).backward()
        found.append([p.grad for p in module.parameters()])
    for exact, integrated in zip(*found, strict=True):
        assert exact is not None
        assert integrated is not None
        assert float((integrated - exact).norm()) < 0.01 * float(exact.norm())
