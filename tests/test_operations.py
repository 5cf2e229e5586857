"""vertices="operations": every call of a PyTorch function relaxes, in functional code too (the paper's Appendix A).

Oracles: plain autograd at equilibrium, and a literal slow loop over operations that are listed by hand.
"""

import copy
import io
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from relaxprop import (
    ActivationRelaxation,
    ClosedForm,
    Equilibrium,
    Euler,
    Frozen,
    NonFiniteStateError,
    alignment,
    certificate,
    convergence,
    describe_locality,
    drop_derivatives,
    use_feedback,
)
from relaxprop.solvers import Solver
from tests.compare import Gradients, assert_same, assert_same_gradients, backward, gradients, squares
from tests.literal import LiteralOperations, Operation, relax
from tests.problems import PROBLEMS, SOLVERS, Problem, mlp, name_of

CONVERGED: tuple[Solver, ...] = (
    Equilibrium(),
    ClosedForm(1.0, 30),
    Euler(1.0, 30),
    Euler(0.9, 100, order="asynchronous"),
)
EARLY: tuple[Any, ...] = tuple(
    kind(0.3, 4, order=order) for kind in (Euler, ClosedForm) for order in ("simultaneous", "sequential")
)
every_solver = pytest.mark.parametrize("solver", CONVERGED, ids=name_of)


class Model(nn.Module):
    """Two layers, further modules, and a forward pass that is a function of all of them and of the input."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def loss_of(result: Any) -> Tensor:
    """Different weights for all numbers of a result, however nested."""
    tensors = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    total = torch.zeros(())
    for t in tensors:
        t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
        total = total + ((t.double() - 0.3) ** 2 * torch.arange(1.0, t.numel() + 1).reshape(t.shape)).sum() / t.numel()
    return total


def build(function: Callable[..., Any], modules: Callable[[], dict[str, nn.Module]] = dict) -> nn.Module:
    torch.manual_seed(1)
    return Model(function, **modules()).double()


def relaxing(module: nn.Module, solver: Solver = CONVERGED[1], **options: Any) -> ActivationRelaxation:
    return ActivationRelaxation(module, solver=solver, vertices="operations", **options)


def x34() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def x234() -> Tensor:
    return torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def assert_as_plain(make: Callable[[], nn.Module], inputs: Sequence[Any], tolerance: float = 1e-11) -> None:
    """Results and gradients are the plain module's, pass after pass: only the first hands on copies everywhere."""
    plain = make()
    torch.manual_seed(2)
    result = copy.deepcopy(plain)(*inputs)
    expected = [gradients(plain, inputs, loss_of) for _ in range(3)]
    for solver in CONVERGED:
        model = relaxing(make(), solver)
        torch.manual_seed(2)
        torch.testing.assert_close(copy.deepcopy(model)(*inputs), result, rtol=0, atol=0)
        for wanted in expected:
            found = gradients(model, inputs, loss_of)
            for name, g in wanted.items():  # a gradient may be zero but for rounding
                ours, scale = found[name], 1 + float(g.norm() if g is not None else 0)
                assert (ours is None) == (g is None), f"{name} under {solver}"
                if g is not None and ours is not None:
                    assert float((ours - g).to_dense().norm()) < tolerance * scale, f"{name} under {solver}"
    early = [relaxing(make(), solver) for solver in EARLY]
    for _ in range(2):
        euler, euler_sequential, closed, closed_sequential = (gradients(m, inputs, loss_of) for m in early)
        assert_same_gradients(closed, euler, max(tolerance, 1e-10))
        assert_same_gradients(closed_sequential, euler_sequential, max(tolerance, 1e-10))


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


# --------------------------------------------------------------------------------------------------- work or be refused

WORKS: dict[str, Callable[..., Any]] = {}


def works(function: Callable[..., Any]) -> Callable[..., Any]:
    WORKS[function.__name__] = function
    return function


@works
def adds_in_place(s: Any, x: Tensor) -> Any:
    y = s.b(torch.tanh(s.a(x)))
    y += x
    y.mul_(2)
    return y, s.b(functional.relu(s.a(x), inplace=True))


@works
def writes_into_slices(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    h[0] = h[1] * 2
    h[:, 1:3] *= 2
    h[h < 0] = 0.1
    h.view(-1)[2:5].mul_(3)
    h.diagonal().add_(1)
    h.clamp_(max=2).index_add_(0, torch.tensor([0, 1]), torch.ones(2, 4, dtype=h.dtype))
    return s.b(h)


@works
def computes_and_then_writes(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    g = h + 1
    g.mul_(2)
    h.add_(g)
    k = h * 3
    k.sub_(g)
    return s.b(k), h


@works
def changes_shapes_in_place(s: Any, x: Tensor) -> Any:
    h, g = s.a(x), s.b(x)
    h.t_()
    g.unsqueeze_(0)
    return h, torch.tanh(g)


@works
def writes_under_no_grad(s: Any, x: Tensor) -> Any:
    h, g = s.a(x), s.b(x)
    with torch.no_grad():
        h.clamp_(min=0)
    g.detach().clamp_(min=0)
    return s.b(h), h, g


@works
def writes_into_data(s: Any, x: Tensor) -> Any:
    h, g = s.a(x), s.b(x)
    h.data.clamp_(min=0)
    g.data = g.data.clamp(min=0)
    return h, g


@works
def fills_a_buffer(s: Any, x: Tensor) -> Any:
    out, h = torch.zeros(3, 3, 4, dtype=x.dtype), x
    for i in range(3):
        h = torch.tanh(s.a(h))
        out[:, i] = h
        h = h * 1.5
        h += x
    return s.b(out)


@works
def cuts_off_in_place(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    g = s.b(h)
    g.detach_()
    return h * g


@works
def reads_views(s: Any, x: Tensor) -> Any:
    h, g = s.a(x).T.reshape(2, 6).sin().view(4, 3).T, s.b(x).unsqueeze(1).expand(3, 2, 4).exp().sum(1)
    strided = torch.as_strided(h.contiguous(), (3, 2, 2), (4, 1, 1)).exp()
    pieces = [p * q.cos() for p, q in zip(h.chunk(2, 1), g.split([2, 2], 1), strict=True)]
    return strided, torch.cat(pieces, 1), [torch.tanh(r) * i for i, r in enumerate(h.unbind(1))]


@works
def indexes(s: Any, x: Tensor) -> Any:
    h, g, index = s.a(x), s.b(x), torch.tensor([[0, 1], [2, 3], [0, 2]])
    picked = h.sin()[torch.tensor([0, 2, 0])][:, [1, 1, 3, 0]] + torch.diag(g[:3, :3]).sum()
    scattered = torch.zeros_like(x).scatter(1, index, g[:, :2].sin()).index_add(0, torch.tensor([0, 0]), h[:2])
    return picked, torch.gather(h, 1, index), scattered, g[torch.arange(3), h.argmax(1)] * h.round().long().sum()


@works
def has_several_results(s: Any, x: Tensor) -> Any:
    h, g = s.a(x), s.b(x)
    top = h.max(1)
    spread = torch.aminmax(g, dim=1)
    lists = torch._foreach_add(torch._foreach_mul([h, g], 2.0), 1.0)
    return top.values * top.indices, h.topk(2)[0] + g.sort(1).values[:, 2:], spread.max * spread.min, lists[0] * g


@works
def leaves_a_part_unread(s: Any, x: Tensor) -> Any:
    return torch.var_mean(s.a(x), 1)[1] * torch.linalg.slogdet(s.b.weight).logabsdet, s.a(x).sin().unbind(0)[1]


@works
def takes_lists(s: Any, x: Tensor) -> Any:
    h, g = s.a(x), s.b(x)
    grid = torch.meshgrid(h[0].sin(), g[1].cos(), indexing="ij")
    stacked = torch.stack([torch.where(x > 0, h.cumsum(0), g), h.logcumsumexp(1)])
    return (
        grid[0] * grid[1],
        stacked,
        torch.einsum("bi,bj->ij", h, g),
        torch.cdist(h, g),
        torch.cartesian_prod(h[0], g[0]),
    )


@works
def solves(s: Any, x: Tensor) -> Any:
    W = s.a.weight + 3 * torch.eye(4, dtype=x.dtype)
    eigen, qr, svd = torch.linalg.eigh(W + W.T), torch.linalg.qr(W), torch.linalg.svd(W)
    inverse = torch.linalg.solve(W, s.b(x).T)
    return inverse, eigen.eigenvalues * eigen.eigenvectors.abs(), qr.Q.abs() @ qr.R.abs(), svd.S * svd.U.abs()


@works
def is_complex(s: Any, x: Tensor) -> Any:
    z = torch.complex(s.a(x), s.b(x)).exp()
    w = torch.view_as_complex(s.a(x).view(3, 2, 2)) * (1 + 2j)
    spectrum = torch.fft.irfft(torch.fft.rfft(s.a(x)) * 1j)
    return z, z.real * z.imag, w.abs(), torch.view_as_real(w.conj().resolve_conj()), spectrum


@works
def stops_gradients(s: Any, x: Tensor) -> Any:
    h = s.a(x).sin()
    with torch.no_grad():
        mean = s.b(h).mean(0)
    return s.b((h - mean) * h.detach().exp() * h.sum().item().__float__())


@works
def derives_weights(s: Any, x: Tensor) -> Any:
    W = s.a.weight.clone()
    W[0] = 0
    masked = functional.linear(x, s.a.weight * (s.b.weight > 0), s.b.bias)
    called = torch.func.functional_call(s.b, {"weight": s.a.weight * 2}, (masked,))
    return (
        functional.linear(x, W),
        called,
        functional.linear(torch.tanh(s.a(called)), s.a.weight.T),
        sum(p.square().sum() for p in W),
    )


@works
def returns_all_sorts(s: Any, x: Tensor) -> Any:
    h = s.a(x).sin()
    return {"h": h, "again": h, "view": h.T, "twice": (h * 2, [h[0]]), "parameter": s.b.weight, "none": None}


@works
def calls_aten(s: Any, x: Tensor) -> Any:
    return torch.ops.aten.mul(torch.ops.aten.sin.default(s.a(x)), 1 - s.b(x)) / (2 / s.b(x).exp()) + reversed(s.a(x))


@works
def hooks_activities(s: Any, x: Tensor) -> Any:
    h, g = s.a(x), s.b(x)
    h.register_hook(lambda gradient: 2 * gradient)
    g.register_hook(lambda gradient: 3 * gradient)
    return s.b(h), g.mul_(2)


@works
def hooks_what_it_returns(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    h.register_hook(lambda gradient: 2 * gradient)
    return h, s.b(h)


@works
def saves_on_the_cpu(s: Any, x: Tensor) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return s.b(s.a(x).sin()).exp()


@works
def checkpoints(s: Any, x: Tensor) -> Any:
    h = checkpoint(
        lambda h: functional.dropout(s.b(functional.relu(s.b(h), inplace=True)).mul_(2)) + h,
        s.a(x),
        use_reentrant=False,
    )
    return checkpoint_sequential([s.a, nn.Tanh(), s.b], 2, h, use_reentrant=False)  # type: ignore[no-untyped-call]


class Doubled(TorchFunctionMode):
    """A user's own mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.sin else result


@works
def has_a_mode_of_its_own(s: Any, x: Tensor) -> Any:
    with Doubled(), torch.device("cpu"):
        h = torch.sin(s.a(x)) + torch.ones(4)
    with torch._C.DisableTorchFunction():
        h = h.sin().mul_(2.0)
    return s.b(h)


class Twice(Tensor):
    """A subclass that marks its results."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if isinstance(result, Twice):
            cast(Any, result).mark = "marked"
        return result


@works
def uses_a_subclass(s: Any, x: Tensor) -> Any:
    h: Any = torch.tanh(s.a(x).as_subclass(Twice))
    assert h.mark == "marked"
    return s.b(h).as_subclass(Tensor)


class Cubed(torch.autograd.Function):
    """Two results, and a third that is not differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Any:
        ctx.save_for_backward(x, y)
        best = x.argmax(1)
        ctx.mark_non_differentiable(best)
        return x**3, x * y, best

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, y = ctx.saved_tensors
        return 3 * x**2 * gradients[0] + gradients[1] * y, gradients[1] * x


class InPlaceDouble(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return 2 * gradients[0]


class Negated(torch.autograd.Function):
    """Hands its argument on as it is, and reverses the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return -gradients[0]


@works
def has_functions_of_its_own(s: Any, x: Tensor) -> Any:
    cubed: Any = Cubed.apply(s.a(x).sin(), s.b(x))  # type: ignore[no-untyped-call]
    h = s.a(x)
    InPlaceDouble.apply(h)  # type: ignore[no-untyped-call]
    negated: Any = Negated.apply(s.b(h))  # type: ignore[no-untyped-call]
    return cubed[0].sin() * cubed[1] + cubed[2].sum(), s.b(h), negated


class GraphOfItsOwn(torch.autograd.Function):
    """Differentiates in its backward what it recorded in its forward, as implicit layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = ctx.x.sin() * 2
        return cast(Tensor, ctx.y.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return torch.autograd.grad(ctx.y, ctx.x, gradients[0], allow_unused=True, retain_graph=True)[0]


@works
def is_sparse(s: Any, x: Tensor) -> Any:
    h = torch.sparse.mm(torch.eye(3, dtype=x.dtype).to_sparse(), s.a(x))
    return s.b(h.sin()), torch.sparse.mm(torch.relu(s.a(x)).to_sparse(), s.b.weight)


class Unnamed:
    """A function of a library, announced to PyTorch, without a name."""

    def __call__(self, x: Tensor) -> Any:
        return handle_torch_function(self, (x,), x) if has_torch_function_unary(x) else x * 2


unnamed = Unnamed()


@works
def calls_what_has_no_name(s: Any, x: Tensor) -> Any:
    return s.b(unnamed(s.a(x)))


@pytest.mark.parametrize("name", WORKS)
def test_models_of_all_kinds_are_as_plain(name: str) -> None:
    assert_as_plain(lambda: build(WORKS[name]), (x34(),))


def scripted() -> nn.Module:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return cast(nn.Module, torch.jit.script(mlp(4, 4, 4)))


normed = torch.nn.utils.parametrizations
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "attention": (lambda: nn.MultiheadAttention(4, 2), x234),
    "lstm": (lambda: nn.LSTM(4, 4, 2, dropout=0.3), x234),
    "gru": (lambda: nn.GRU(4, 4, bidirectional=True), x234),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2), x234),
    "batch-norm": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.3), nn.ReLU(True), nn.Linear(4, 4)), x34),
    "weight-norm": (lambda: normed.weight_norm(nn.Linear(4, 4)), x34),
    "spectral-norm": (lambda: normed.spectral_norm(nn.Linear(4, 4)).eval(), x34),
    "orthogonal": (lambda: normed.orthogonal(nn.Linear(4, 4)), x34),
}


def call(s: Any, x: Tensor) -> Any:
    h = torch.tanh(s.a(x))
    return s.m(h, h, h)[0].sin() if isinstance(s.m, nn.MultiheadAttention) else s.m(h)


@pytest.mark.parametrize("name", MODULES)
def test_pytorchs_modules_are_as_plain(name: str) -> None:
    make, x = MODULES[name]
    assert_as_plain(lambda: build(call, lambda: {"m": make()}), (x(),))


@every_solver
def test_a_scripted_module_is_part_of_what_reads_it(solver: Solver) -> None:
    module = build(call, lambda: {"m": scripted()})
    model = relaxing(module, solver)
    for _ in range(4):  # the interpreter changes what it runs after the first passes
        assert_same_gradients(gradients(model, (x34(),)), gradients(module, (x34(),)))


@every_solver
def test_a_scripted_module_is_one_vertex_of_modules(solver: Solver) -> None:
    module = nn.Sequential(nn.Linear(4, 4), scripted(), nn.Tanh(), nn.Linear(4, 2)).double()
    model = ActivationRelaxation(module, solver=solver, vertices="modules", measure_residual=True)
    for _ in range(4):
        assert_same_gradients(gradients(model, (x34(),)), gradients(module, (x34(),)))
    assert model.last_relaxation is not None
    assert model.last_relaxation.residuals is not None
    assert sorted(model.last_relaxation.residuals) == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match="not part of"):
        ActivationRelaxation(module, vertices=[module.get_submodule("1.1")])


@pytest.mark.parametrize("sparse", [False, True])
def test_embeddings_take_indices(sparse: bool) -> None:
    modules: Callable[[], dict[str, nn.Module]] = lambda: {"m": nn.Embedding(5, 4, sparse=sparse)}  # noqa: E731
    assert_as_plain(lambda: build(lambda s, i: s.b(s.m(i).sin()), modules), (torch.tensor([[0, 1], [1, 2]]),))


def test_a_model_may_take_another_dtype_in_the_middle() -> None:
    function = lambda s, x: s.b(torch.tanh(s.a(x)).float().exp().double())  # noqa: E731
    assert_as_plain(lambda: build(function), (x34(),), 1e-6)


@every_solver
def test_under_autocast(solver: Solver) -> None:
    def function(s: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            h = torch.tanh(s.a(x))
            with torch.no_grad():
                mean = s.b(h).float().mean()
            return s.b(h) + s.a(h * 1.0) * mean

    module = build(function).float()
    model = relaxing(module, solver)
    for _ in range(3):
        assert_same_gradients(gradients(model, (x34().float(),)), gradients(module, (x34().float(),)), 5e-2)


def test_an_overwritten_saved_result_is_refused_as_in_the_plain_module() -> None:
    def function(s: Any, x: Tensor) -> Any:
        h = s.a(x)
        z = h * h
        h.add_(1)
        return z + s.b(h)

    for model in (build(function), *(relaxing(build(function), solver) for solver in CONVERGED)):
        for _ in range(3):
            with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
                gradients(model, (x34(),))


def test_a_loop_of_another_length_is_refused_once_at_most() -> None:
    def function(s: Any, x: Tensor, n: Tensor) -> Any:
        h = s.a(x) + s.b(x)
        for _ in range(int(n)):
            h = h + x
            h *= 2
        return s.b(h + x)

    module = build(function)
    model, refused = relaxing(module), 0
    for n in (2, 2, 3, 1, 4, 2):
        try:
            found = gradients(model, (x34(), torch.tensor(n)))
        except RuntimeError as error:
            assert any("repeat the pass" in note for note in error.__notes__)  # noqa: PT017
            refused += 1
            found = gradients(model, (x34(), torch.tensor(n)))
        assert_same_gradients(found, gradients(module, (x34(), torch.tensor(n))))
    assert refused <= 1


def forward_mode(s: Any, x: Tensor) -> Any:
    ad: Any = forward_ad
    with ad.dual_level():
        return ad.unpack_dual(s.a(ad.make_dual(s.b(x), x)).sin()).tangent


jacobian: Any = torch.autograd.functional.jacobian
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "vmap": (lambda s, x: torch.vmap(lambda r: torch.tanh(s.a.weight @ r))(x), "transform of torch.func"),
    "grad": (lambda s, x: torch.func.grad(lambda z: s.a(z).sin().sum())(x), "transform of torch.func"),
    "autograd": (lambda s, x: torch.autograd.grad(s.a(x).sin().sum(), s.a.weight, create_graph=True), "calls grad"),
    "backward": (lambda s, x: (s.a(x).sin().sum().backward(), s.b(x))[1], "calls backward"),
    "jacobian": (lambda s, x: jacobian(s.a, x, create_graph=True), "calls grad"),
}


@every_solver
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_differentiate_a_cut_graph_is_refused(name: str, solver: Solver) -> None:
    function, reason = REFUSED[name]
    model = relaxing(build(function), solver)
    if isinstance(solver, Equilibrium):  # nothing is cut
        assert_same_gradients(gradients(model, (x34(),), loss_of), gradients(build(function), (x34(),), loss_of))
        return
    for _ in range(2):
        with pytest.raises(ValueError, match=f"vertices='operations': .*{reason}"):
            gradients(model, (x34(),), loss_of)


@cache
def compiled() -> Any:
    return torch.compile(lambda x: torch.tanh(x).sin(), backend="eager", fullgraph=True)


UNSURE: dict[str, Callable[..., Any]] = {
    "forward-mode": forward_mode,
    "graph-of-its-own": lambda s, x: s.b(GraphOfItsOwn.apply(s.a(x))),  # type: ignore[no-untyped-call]
    "reentrant": lambda s, x: s.b(checkpoint(s.b, s.a(x), use_reentrant=True)),
    "compiled": lambda s, x: s.b(compiled()(s.a(x))),
}


@every_solver
@pytest.mark.parametrize("name", UNSURE)
def test_is_right_or_refused_by_name(name: str, solver: Solver) -> None:
    plain = build(UNSURE[name])
    model = relaxing(build(UNSURE[name]), solver)
    with warnings.catch_warnings(action="ignore"):
        for _ in range(3):
            try:
                found = gradients(model, (x34(),), loss_of)
            except (ValueError, RuntimeError) as error:
                assert "vertices='operations'" in str(error) or "use_reentrant=False" in str(error)  # noqa: PT017
            else:
                assert_same_gradients(found, gradients(plain, (x34(),), loss_of))


@every_solver
def test_a_retained_activity_gradient_is_right_or_refused(solver: Solver) -> None:
    def function(s: Any, x: Tensor) -> Any:
        s.kept = s.a(x)
        s.kept.retain_grad()
        return s.b(torch.tanh(s.kept))

    plain: Any = build(function)
    gradients(plain, (x34(),))
    model = relaxing(build(function), solver)
    for _ in range(2):
        try:
            gradients(model, (x34(),))
        except ValueError as error:
            assert "vertices='operations'" in str(error)  # noqa: PT017
        else:
            kept: Any = model.module.kept
            assert kept.grad is not None
            assert_same(kept.grad, plain.kept.grad)


@pytest.mark.parametrize("vertices", ["operations", "modules"])
def test_unfrozen_a_checkpoint_is_right_or_refused(vertices: Any) -> None:
    """Its second run, in the backward pass, computes activities again that should be states."""

    def build_with(run: Callable[..., Any]) -> ActivationRelaxation:
        module = build(lambda s, x: s.b(run(s.m, torch.tanh(s.a(x)))), lambda: {"m": mlp(4, 4, 4)})
        frozen = Frozen(relaxation_derivative=False)
        return ActivationRelaxation(module, solver=Euler(0.3, 4), vertices=vertices, frozen=frozen)

    expected = gradients(build_with(lambda m, h: m(h)), (x34(),))
    try:
        found = gradients(build_with(lambda m, h: checkpoint(m, h, use_reentrant=False)), (x34(),))
    except (ValueError, RuntimeError) as error:
        assert "frozen" in str(error)  # noqa: PT017
    else:
        assert_same_gradients(found, expected)


# ------------------------------------------------------------------------------------------- beside the other options


@every_solver
@pytest.mark.parametrize(
    "change",
    [
        lambda m: use_feedback(m, "random"),
        use_feedback,
        drop_derivatives,
        lambda m: drop_derivatives(m, update=False),
        lambda m: drop_derivatives(use_feedback(m, "sign"), relaxation=False),
    ],
)
def test_biological_rules_are_those_of_modules_at_equilibrium(change: Any, solver: Solver) -> None:
    def found(vertices: Any) -> Gradients:
        torch.manual_seed(4)
        module = change(mlp(4, 5, 5, 3).double())
        return gradients(ActivationRelaxation(module, solver=solver, vertices=vertices), (x34(),))

    assert_same_gradients(found("operations"), found("modules"))


@every_solver
def test_a_relaxed_output_ends_at_the_same_equilibrium(solver: Solver) -> None:
    model = relaxing(build(returns_all_sorts), solver, output="relaxed")
    expected = gradients(build(returns_all_sorts), (x34(),), loss_of)
    for _ in range(2):
        assert_same_gradients(gradients(model, (x34(),), loss_of), expected)


@pytest.mark.parametrize("split", ["update_derivative", "update_activity"])
def test_a_split_update_is_refused(split: str) -> None:
    with pytest.raises(ValueError, match=r"vertices='operations' .* frozen="):
        relaxing(mlp(3, 4, 2), frozen=Frozen(**{split: False}))


def test_locality_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="vertices='operations'"):
        describe_locality(relaxing(build(call_linear)), x34())


def call_linear(s: Any, x: Tensor) -> Any:
    return s.b(torch.tanh(s.a(x)))


@every_solver
def test_an_overflow_names_the_operation(solver: Solver) -> None:
    model = relaxing(build(lambda s, x: s.b(s.a(x).pow(3))), solver)
    with torch.no_grad():
        cast(Any, model.module).a.weight.fill_(1e200)
    with pytest.raises(NonFiniteStateError, match=r"vertex '(pow|linear|linear#2)'"):
        gradients(model, (x34(),))


def test_copies_and_files_and_evaluation() -> None:
    module = build(adds_in_place)
    model = relaxing(module, EARLY[2])
    expected = gradients(model, (x34(),), loss_of)
    assert_same_gradients(gradients(copy.deepcopy(model), (x34(),), loss_of), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    build(adds_in_place).load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        found, direct = model(x34()), module(x34())
    assert all(torch.equal(ours, theirs) and not ours.requires_grad for ours, theirs in zip(found, direct, strict=True))
    assert "operations" in repr(model)


@pytest.mark.parametrize("name", ["adds_in_place", "takes_lists", "has_several_results", "checkpoints"])
def test_diagnostics_know_operations(name: str) -> None:
    model = relaxing(build(WORKS[name]), Euler(0.5, 12))
    gradients(model, (x34(),), loss_of)
    assert model.last_relaxation is not None
    weights = certificate(model, x34())
    assert len(weights) == model.last_relaxation.vertices
    assert model.last_relaxation.remaining is not None
    assert max(weights.values()) <= model.last_relaxation.remaining  # an output that is a vertex is not counted
    for below, above in pairwise(list(weights.values())):
        assert below <= above
    curves = convergence(model, loss_of, x34())
    for parameter, measured in curves.measured.items():
        assert measured == pytest.approx(curves.predicted[parameter], rel=1e-6, abs=1e-10)
    found = alignment(relaxing(build(WORKS[name])), loss_of, x34())
    assert all(a.angle < 1e-5 for a in found.values())


def test_a_model_that_only_reads_what_it_kept_is_refused() -> None:
    def function(s: Any, x: Tensor) -> Any:
        s.kept = s.a(x).sin()
        return s.b(x)

    model = relaxing(build(function))
    for _ in range(2):
        output = model(x34())
        with pytest.raises(RuntimeError, match="kept to itself"):
            backward(squares(output) + squares(cast(Any, model.module).kept))
