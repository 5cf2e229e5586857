"""Models whose forward passes are functions, and the solvers under which they relax at every operation."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from relaxprop import ActivationRelaxation, ClosedForm, Equilibrium, Euler
from relaxprop.solvers import Solver
from tests.problems import name_of

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


# ------------------------------------------------------------------------------------------ forward passes of all kinds

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


# PyTorch 2.6 has none.
_AMINMAX_HAS_A_DERIVATIVE = "Aminmax" in str(torch.aminmax(torch.ones(1, requires_grad=True)).max.grad_fn)


@works
def has_several_results(s: Any, x: Tensor) -> Any:
    h, g = s.a(x), s.b(x)
    top = h.max(1)
    low, high = torch.aminmax(g, dim=1) if _AMINMAX_HAS_A_DERIVATIVE else torch.std_mean(g, dim=1)
    lists = torch._foreach_add(torch._foreach_mul([h, g], 2.0), 1.0)
    return top.values * top.indices, h.topk(2)[0] + g.sort(1).values[:, 2:], low * high, lists[0] * g


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
