"""vertices="operations": every call of a PyTorch function relaxes, in functional code too (the paper's Appendix A).

Oracles: plain autograd at equilibrium, and a literal slow loop over operations that are listed by hand.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from relaxprop import ActivationRelaxation, Euler, Frozen
from relaxprop.solvers import Solver
from tests.compare import Gradients, assert_same_gradients, gradients
from tests.literal import LiteralOperations, Operation, relax
from tests.operations.models import EARLY, Model, build, loss_of, relaxing, x34, x234
from tests.problems import PROBLEMS, SOLVERS, Problem, mlp, name_of

# ------------------------------------------------------------------------------------------------------- a literal loop


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.Q, self.K, self.V = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x @ self.Q, x @ self.K, x @ self.V
        return torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v


class Gated(nn.Module):
    """g ⊙ tanh(A x) + (1 − g) ⊙ B x, added in place, and C on top."""

    def __init__(self) -> None:
        super().__init__()
        self.G, self.A, self.B, self.C = (nn.Parameter(torch.randn(4, 4)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        g = torch.sigmoid(x @ self.G)
        y = g * torch.tanh(x @ self.A)
        y += (1 - g) * (x @ self.B)
        return y.view(-1, 4) @ self.C


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A, self.B, self.C = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.A)
        return (h + functional.silu(h @ self.B)).T[:2].T @ self.C[:2]


def functional_mlp() -> nn.Module:
    return Model(
        lambda s, x: functional.linear(torch.tanh(functional.linear(x, s.a.weight, s.a.bias)), s.b.weight, s.b.bias)
    )


mm, times = torch.matmul, torch.mul
LITERAL: dict[str, tuple[Callable[[], nn.Module], list[Operation]]] = {
    "mlp": (
        functional_mlp,
        [
            Operation("u", lambda x, W, b: x @ W.T + b, "input_0 a.weight a.bias"),
            Operation("h", torch.tanh, "u"),
            Operation("y", lambda x, W, b: x @ W.T + b, "h b.weight b.bias"),
        ],
    ),
    "residual": (
        ResidualBlock,
        [
            Operation("u", mm, "input_0 A"),
            Operation("h", torch.tanh, "u"),
            Operation("v", mm, "h B"),
            Operation("s", lambda v: v * torch.sigmoid(v), "v"),
            Operation("g", torch.add, "h s"),
            Operation("y", lambda g, C: g[:, :2] @ C[:2], "g C"),
        ],
    ),
    "attention": (
        Attention,
        [
            Operation("q", mm, "input_0 Q"),
            Operation("k", mm, "input_0 K"),
            Operation("v", mm, "input_0 V"),
            Operation("qk", lambda q, k: q @ k.T, "q k"),
            Operation("scores", lambda s: s / 2, "qk"),
            Operation("p", lambda s: s.exp() / s.exp().sum(-1, keepdim=True), "scores"),
            Operation("y", mm, "p v"),
        ],
    ),
    "gated": (
        Gated,
        [
            Operation("gu", mm, "input_0 G"),
            Operation("g", torch.sigmoid, "gu"),
            Operation("au", mm, "input_0 A"),
            Operation("a", torch.tanh, "au"),
            Operation("ga", times, "g a"),
            Operation("g_", lambda g: 1 - g, "g"),
            Operation("bu", mm, "input_0 B"),
            Operation("gb", times, "g_ bu"),
            Operation("y", lambda ga, gb, C: (ga + gb) @ C, "ga gb C"),
        ],
    ),
}
every_literal = pytest.mark.parametrize("name", LITERAL)


def literal(name: str) -> tuple[nn.Module, LiteralOperations]:
    torch.manual_seed(1)
    make, operations = LITERAL[name]
    module = make().double()
    operations = [o._replace(reads=o.reads.replace("input_0", "x")) for o in operations]
    return module, LiteralOperations(operations, {"x": x34(), **dict(module.named_parameters())})


def named(found: Gradients) -> Gradients:
    return {name.replace("input 0", "x"): g for name, g in found.items()}


@pytest.mark.parametrize("solver", EARLY, ids=name_of)
@every_literal
def test_stopped_early_it_is_algorithm_1_over_operations(name: str, solver: Any) -> None:
    module, oracle = literal(name)
    expected = oracle.gradients(relax(oracle, 0.3, 4, solver.order))
    model = relaxing(module, solver)
    for _ in range(3):
        assert_same_gradients(named(gradients(model, (x34(),))), expected)
    assert model.last_relaxation is not None
    assert model.last_relaxation.vertices == len(oracle.operations)


@pytest.mark.parametrize("unfrozen", ["relaxation", "update", "both"])
@every_literal
def test_unfrozen_it_is_the_literal_loop_at_the_current_states(name: str, unfrozen: str) -> None:
    module, oracle = literal(name)
    oracle.unfrozen_relaxation = unfrozen in ("relaxation", "both")
    oracle.unfrozen_update = unfrozen in ("update", "both")
    x = relax(oracle, 0.3, 3, "simultaneous")
    expected = oracle.gradients(x)
    expected["x"] = oracle.arriving(x, oracle.unfrozen_relaxation)["x"]
    update = not oracle.unfrozen_update
    frozen = Frozen(not oracle.unfrozen_relaxation, update_derivative=update, update_activity=update)
    model = relaxing(module, Euler(0.3, 3), frozen=frozen)
    for _ in range(2):
        assert_same_gradients(named(gradients(model, (x34(),))), expected)


@pytest.mark.parametrize("solver", EARLY, ids=name_of)
def test_on_a_chain_of_modules_it_is_modules(solver: Solver) -> None:
    chain = mlp(4, 6, 5, 3).double()
    expected = gradients(ActivationRelaxation(chain, solver=solver, vertices="modules"), (x34(),))
    model = relaxing(chain, solver)
    for _ in range(2):
        assert_same_gradients(gradients(model, (x34(),)), expected)


# ------------------------------------------------------------------------------------------------------ counted by hand


class Plain(Tensor):
    """A subclass that changes nothing."""


def attend(s: Any, x: Tensor) -> Tensor:
    result: Tensor = s.m(s.a(x), x, x)[0]
    return torch.tanh(result)


def attention_module() -> dict[str, nn.Module]:
    return {"m": nn.MultiheadAttention(4, 2, batch_first=True)}


def recurrent_module() -> dict[str, nn.Module]:
    return {"m": nn.LSTM(4, 4, batch_first=True)}


COUNTED: dict[str, tuple[Callable[..., Any], Callable[[], Tensor], Callable[[], dict[str, nn.Module]], int, int]] = {
    "linear": (lambda s, x: s.b(torch.tanh(s.a(x))), x34, dict, 3, 3),
    "view": (lambda s, x: s.b(s.a(x).T.T[:2]), x34, dict, 2, 2),
    "in-place": (lambda s, x: s.b(s.a(x).mul_(2).add_(1)), x34, dict, 2, 2),
    "diamond": (lambda s, x: s.a(x).sin() * s.b(x).cos().exp(), x34, dict, 6, 4),
    "weights": (lambda s, x: functional.linear(x, s.a.weight * s.b.weight.exp()), x34, dict, 3, 3),
    "parts": (lambda s, x: s.a(x).sort(1).values + s.b(x).max(1, keepdim=True)[0], x34, dict, 5, 3),
    "no-grad": (lambda s, x: s.b(s.a(x).detach().exp()), x34, dict, 1, 1),
    "linear-3d": (lambda s, x: s.b(torch.tanh(s.a(x))), x234, dict, 3, 3),
    "einsum": (lambda s, x: torch.einsum("bi,oi->bo", x, s.a.weight).exp(), x34, dict, 2, 2),
    "pooling": (lambda s, x: functional.max_pool1d(s.a(x), 2).exp(), x34, dict, 3, 3),
    "attention": (attend, x234, attention_module, 3, 3),
    "lstm": (lambda s, x: s.b(s.m(s.a(x))[0]), x234, recurrent_module, 3, 3),
    "subclass": (lambda s, x: s.b(torch.tanh(s.a(x.as_subclass(Plain)))).as_subclass(Tensor), x34, dict, 3, 3),
}


@pytest.mark.parametrize("name", COUNTED)
def test_every_operation_is_a_vertex(name: str) -> None:
    function, x, modules, vertices, depth = COUNTED[name]
    model = relaxing(build(function, modules))
    for _ in range(2):
        gradients(model, (x(),), loss_of)
        assert model.last_relaxation is not None
        assert (model.last_relaxation.vertices, model.last_relaxation.depth) == (vertices, depth)


@pytest.mark.parametrize("solver", SOLVERS, ids=name_of)
@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_at_equilibrium_it_is_autograd_on_every_problem(problem: Problem, solver: Solver) -> None:
    module, inputs = problem.build()
    plain, model = copy.deepcopy(module), relaxing(module, solver)
    for _ in range(3):
        found, expected = (gradients(m, inputs, problem.loss) for m in (model, plain))
        assert_same_gradients(found, expected, 1e-10)
