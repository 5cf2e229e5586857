"""Kind A: a backward that is not linear, repeatable and stateless, between a layer and the next vertex.

The relaxation phase takes it in one product or many, and the update once more. Autograd takes it once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from relaxprop import ActivationRelaxation, ClosedForm, Continuous, Equilibrium, Euler
from tests.right_or_refused.helper import (
    all_solvers,
    all_vertices,
    assert_same,
    backward,
    cutting_solvers,
    right_or_refused,
    squares,
)

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
TARGET = torch.tensor([0, 2, 1])


class Net(nn.Module):
    """``special`` between two layers; what it gives is read by a vertex and, past that, by the output."""

    def __init__(self, special: nn.Module) -> None:
        super().__init__()
        self.first, self.f, self.special = nn.Linear(4, 4), nn.Tanh(), special
        self.second, self.g, self.head = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.special(self.f(self.first(x)))
        h = h + self.g(self.second(h))
        output: Tensor = self.head(h)
        return output


class Chain(Net):
    """The same without the way past."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.special(self.f(self.first(x)))
        output: Tensor = self.head(self.g(self.second(h)))
        return output


class Applied(nn.Module):
    """An autograd.Function as a module."""

    def __init__(self, function: Any, *constants: Any) -> None:
        super().__init__()
        self.function, self.constants = function, constants

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function.apply(x, *self.constants)
        return y


class Hook(nn.Module):
    """A hook on what arrives."""

    def __init__(self, hook: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.hook = hook

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1.0
        if y.requires_grad:
            y.register_hook(self.hook)  # type: ignore[no-untyped-call]
        return y


# ------------------------------------------------------------------------------------------- backwards that are neither


class _Reversible(torch.autograd.Function):
    """As in revtorch, MemCNN and Reformer: activities are computed again, and parameters get their ``.grad`` inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: ReversibleBlock) -> Tensor:
        ctx.block = block
        with torch.no_grad():
            y = block.couple(x)
        ctx.y = y.detach()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        block, y = ctx.block, ctx.y
        with torch.no_grad():
            y1, y2 = y.chunk(2, 1)
            x2 = y2 - torch.tanh(block.G(y1))
            x1 = y1 - torch.tanh(block.F(x2))
        with torch.enable_grad():
            x = torch.cat([x1, x2], 1).detach().requires_grad_()
            torch.autograd.backward(block.couple(x), dy)
        return x.grad, None


class ReversibleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.F, self.G = nn.Linear(2, 2), nn.Linear(2, 2)

    def couple(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        y1 = x1 + torch.tanh(self.F(x2))
        return torch.cat([y1, x2 + torch.tanh(self.G(y1))], 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Reversible.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class _Freeing(torch.autograd.Function):
    """Sets free, once used, what it keeps on ctx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        kept, ctx.kept = ctx.kept, None
        return g * kept if kept is not None else g


class _FreeingHard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        kept = ctx.kept
        del ctx.kept
        return g * kept


class _ScalesKept(torch.autograd.Function):
    """A buffer on ctx, filled with the local derivative and scaled in place by what arrives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.buffer = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return ctx.buffer.mul_(g)


class _L1Penalty(torch.autograd.Function):
    """A sparsity penalty put into the gradient: affine."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g + ctx.weight * x.sign(), None


class _AddAuxiliaryLoss(torch.autograd.Function):
    """DeepSeek-MoE's and Megatron's way to add a balancing loss: its gradient is 1, whatever arrives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, torch.ones((), dtype=ctx.dtype)


class Balanced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        p = torch.softmax(self.gate(x), 1)
        y: Tensor = _AddAuxiliaryLoss.apply(x * p[:, :1], (p.mean(0) ** 2).sum())  # type: ignore[no-untyped-call]
        return y


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g / (g.norm() + 1e-12)


class _Noisy(torch.autograd.Function):
    """Stochastically rounded or noisy gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * (1 + 0.1 * torch.randn_like(g))


class _Negates(torch.autograd.Function):
    """A gradient reversal that writes into what arrives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g.neg_()


class _MasksInPlace(torch.autograd.Function):
    """``grad_input = grad_output; grad_input[…] = 0``, without the clone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-0.5, 0.5)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        g[x.abs() > 0.5] = 0
        return g


class Scheduled(nn.Module):
    """A gradient reversal whose factor grows with every backward."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _ScheduledReversal.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class _ScheduledReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: Scheduled) -> Tensor:
        ctx.owner = owner
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        ctx.owner.count += 1
        return -g * ctx.owner.count / 10, None


class Implicit(nn.Module):
    """An equilibrium layer as in the deep implicit layers tutorial: its hook solves the adjoint fixed point.

    Args:
        once: whether the hook removes itself, as in DEQ's own code.
    """

    def __init__(self, once: bool) -> None:
        super().__init__()
        self.W, self.U, self.once = nn.Linear(4, 4, bias=False), nn.Linear(4, 4), once
        nn.init.normal_(self.W.weight, std=0.2)

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.W(z) + self.U(x))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(60):
                z = self.f(z, x)
        z = self.f(z, x)
        if not z.requires_grad:
            return z
        z0 = z.detach().requires_grad_()
        f0 = self.f(z0, x)

        def solve(gradient: Tensor) -> Tensor:
            if self.once:
                handle.remove()
            g = gradient
            for _ in range(60):
                g = torch.autograd.grad(f0, z0, g, retain_graph=True)[0] + gradient
            return g

        handle = z.register_hook(solve)  # type: ignore[no-untyped-call]
        return z


class OnceHook(nn.Module):
    """A hook that scales the gradient and removes itself."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1.0
        if y.requires_grad:

            def scale(g: Tensor) -> Tensor:
                handle.remove()
                return 3 * g

            handle = y.register_hook(scale)  # type: ignore[no-untyped-call]
        return y


class Momentum(nn.Module):
    """A hook that smooths gradients over its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.average: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1.0
        if y.requires_grad:
            y.register_hook(self.smooth)  # type: ignore[no-untyped-call]
        return y

    def smooth(self, g: Tensor) -> Tensor:
        self.average = g if self.average is None else 0.5 * self.average + 0.5 * g
        return self.average


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = nn.Linear(4, 4), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(lambda h: torch.sin(self.inner(h)), x, use_reentrant=self.use_reentrant)
        return y


class _AccumulatesInside(torch.autograd.Function):
    """Adds the weight's gradient to ``weight.grad`` itself, as fused linear layers of Megatron and Apex do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,), weight = ctx.saved_tensors, ctx.weight
        gradient = g.T @ x
        weight.grad = gradient if weight.grad is None else weight.grad + gradient
        return g @ weight.detach(), None


class FusedAccumulation(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _AccumulatesInside.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return y


def _clamp(g: Tensor) -> Tensor:
    return g.clamp(-0.05, 0.05)


IMPURE: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "reversible": (ReversibleBlock, ("_Reversible", "special")),
    "freeing": (lambda: Applied(_Freeing), ("_Freeing", "special")),
    "freeing-hard": (lambda: Applied(_FreeingHard), ("_FreeingHard", "special")),
    "scales-kept": (lambda: Applied(_ScalesKept), ("_ScalesKept", "special")),
    "l1-penalty": (lambda: Applied(_L1Penalty, 0.1), ("_L1Penalty", "special")),
    "auxiliary-loss": (Balanced, ("_AddAuxiliaryLoss", "special")),
    "normalised": (lambda: Applied(_Normalised), ("_Normalised", "special")),
    "noisy": (lambda: Applied(_Noisy), ("_Noisy", "special")),
    "negates-in-place": (lambda: Applied(_Negates), ("_Negates", "special")),
    "masks-in-place": (lambda: Applied(_MasksInPlace), ("_MasksInPlace", "special")),
    "scheduled-reversal": (Scheduled, ("_ScheduledReversal", "special")),
    "implicit-once": (lambda: Implicit(True), ("solve", "hook", "special")),
    "implicit": (lambda: Implicit(False), ("solve", "hook", "special")),
    "hook-once": (OnceHook, ("scale", "hook", "special")),
    "hook-momentum": (Momentum, ("smooth", "hook", "special")),
    "hook-clamp": (lambda: Hook(_clamp), ("_clamp", "hook", "special")),
    "hook-norm": (lambda: Hook(lambda g: g / g.norm().clamp(min=1e-12)), ("hook", "special")),
    "hook-noise": (lambda: Hook(lambda g: g + 0.1 * torch.randn_like(g)), ("hook", "special")),
    "checkpoint-reentrant": (lambda: Checkpointed(True), ("CheckpointFunction", "special")),
    "fused-accumulation": (lambda: FusedAccumulation(4, 4, bias=False), ("_AccumulatesInside", "special")),
}


@all_vertices
@all_solvers
@pytest.mark.parametrize("shape", [Net, Chain])
@pytest.mark.parametrize("case", IMPURE)
def test_an_impure_backward_is_right_or_refused(case: str, shape: type[Net], solver: Any, vertices: Any) -> None:
    special, names = IMPURE[case]
    outcome = right_or_refused(lambda: shape(special()), [X], solver=solver, vertices=vertices, names=names)
    if solver == Equilibrium():
        assert outcome == "right"


@cutting_solvers
@pytest.mark.parametrize("case", ["reversible", "scales-kept", "fused-accumulation", "negates-in-place"])
def test_a_vertex_itself_is_impure(case: str, solver: Any) -> None:
    """The state is handed straight to the function's backward."""
    special, names = IMPURE[case]
    right_or_refused(
        lambda: Net(special()),
        [X],
        solver=solver,
        vertices=lambda net: [net.f, net.special, net.g],
        names=names,
    )


# ----------------------------------------------------------------------------------------- losses fused with a layer


class _FusedCrossEntropy(torch.autograd.Function):
    """Liger's: the gradient is computed in the forward pass and scaled in place in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.gradient = (torch.softmax(logits, 1) - nn.functional.one_hot(target, logits.shape[1])) / len(logits)
        return nn.functional.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        if not torch.equal(g, torch.ones_like(g)):
            ctx.gradient.mul_(g)
        return ctx.gradient, None


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """The same with the last layer inside."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits = h @ weight.T
        error = (torch.softmax(logits, 1) - nn.functional.one_hot(target, logits.shape[1])) / len(logits)
        ctx.kept = error @ weight, error.T @ h
        return nn.functional.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        for kept in ctx.kept:
            kept.mul_(g)
        return *ctx.kept, None


class FusedLoss(nn.Module):
    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.first, self.f, self.second, self.g = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()
        self.head, self.linear = nn.Linear(4, 3, bias=False), linear

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        h = self.g(self.second(self.f(self.first(x))))
        if self.linear:
            loss = _FusedLinearCrossEntropy.apply(h, self.head.weight, target)  # type: ignore[no-untyped-call]
        else:
            loss = _FusedCrossEntropy.apply(self.head(h), target)  # type: ignore[no-untyped-call]
        return cast(Tensor, loss)


@all_vertices
@all_solvers
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("linear", [False, True])
def test_a_fused_loss_is_right_or_refused(linear: bool, scale: float, solver: Any, vertices: Any) -> None:
    """With a scale of 1 nothing is multiplied; accumulation and gradient scalers have another."""
    outcome = right_or_refused(
        lambda: FusedLoss(linear),
        [X, TARGET],
        lambda loss: scale * loss,
        solver=solver,
        vertices=vertices,
        names=["_FusedCrossEntropy", "_FusedLinearCrossEntropy", "FusedLoss"],
    )
    if solver == Equilibrium():
        assert outcome == "right"


@cutting_solvers
def test_a_scale_that_comes_later_is_right_or_refused(solver: Any) -> None:
    """The first pass of a setting has a scale of 1, at which the fused loss repeats itself."""
    scales: list[float] = []

    def make() -> nn.Module:
        scales[:] = [0.25, 1.0]
        return FusedLoss(False)

    right_or_refused(
        make,
        [X, TARGET],
        lambda loss: scales.pop() * loss,
        solver=solver,
        vertices="activations",
        names=["_FusedCrossEntropy", "FusedLoss"],
    )


@cutting_solvers
def test_a_clamp_that_bites_later_is_right_or_refused(solver: Any) -> None:
    """In the first pass the gradients are too small to be clamped."""
    scales: list[float] = []

    def make() -> nn.Module:
        scales[:] = [1.0, 1e-6]
        return Net(Hook(_clamp))

    right_or_refused(
        make,
        [X],
        lambda output: scales.pop() * squares(output),
        solver=solver,
        vertices="activations",
        names=["_clamp", "hook", "special"],
    )


# --------------------------------------------------------------------------------------- the solvers agree, or refuse


@pytest.mark.parametrize(
    "case", ["hook-clamp", "hook-norm", "l1-penalty", "auxiliary-loss", "normalised", "reversible"]
)
@pytest.mark.parametrize("shape", [Net, Chain])
def test_the_closed_form_equals_the_steps_or_both_refuse(case: str, shape: type[Net]) -> None:
    """Stopped early: powers of A are the steps only if A is linear."""
    special, names = IMPURE[case]
    found, refusals = [], []
    for solver in (ClosedForm(0.3, 5), Euler(0.3, 5)):
        torch.manual_seed(1)
        net = shape(special()).double()
        try:
            backward(squares(ActivationRelaxation(net, solver=solver)(X)))
        except (RuntimeError, ValueError) as error:
            refusals.append(str(error))
        else:
            found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    if not refusals:
        assert_same(found[0], found[1])
    for refusal in refusals:
        assert any(name in refusal for name in names)


# ---------------------------------------------------------------------------------------------------------- controls


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g


class _HardStraightThrough(torch.autograd.Function):
    """Binary networks' clipped identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g * (x.abs() <= 0.5)


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g.neg() * ctx.factor, None


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g * x.cos()


class _WithContext(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x * weight, x + weight

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor, k: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return g * weight + k, (g * x + k).sum(0)


class _Unmaterialised(torch.autograd.Function):
    """Two results, of which not each is in every product: None arrives for the others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return 2 * x, 3 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, k: Tensor | None) -> Any:
        parts = [factor * part for factor, part in ((2, g), (3, k)) if part is not None]
        return sum(parts) if parts else None


class TwoResults(nn.Module):
    def __init__(self, function: Any, *, weight: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4)) if weight else None
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.function.apply(x) if self.weight is None else self.function.apply(x, self.weight)
        result: Tensor = a + b.sin()
        return result


class Detached(nn.Module):
    """The straight-through estimator without a function of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x.round() - x).detach()


class MadeAnew(nn.Module):
    """Makes its function's module in every call."""

    def forward(self, x: Tensor) -> Tensor:
        return Applied(_Elementwise)(x)  # type: ignore[no-any-return]


PURE: dict[str, Callable[[], nn.Module]] = {
    "straight-through": lambda: Applied(_StraightThrough),
    "straight-through-hard": lambda: Applied(_HardStraightThrough),
    "straight-through-detached": Detached,
    "reversal": lambda: Applied(_Reversal, 0.7),
    "elementwise": lambda: Applied(_Elementwise),
    "elementwise-made-anew": MadeAnew,
    "two-results": lambda: TwoResults(_WithContext, weight=True),
    "unmaterialised": lambda: TwoResults(_Unmaterialised, weight=False),
    "hook-scales": lambda: Hook(lambda g: 0.5 * g),
    "hook-masks": lambda: Hook(lambda g: g * torch.tensor([1.0, 0.0, 1.0, 2.0], dtype=g.dtype)),
    "hook-reverses": lambda: Hook(torch.neg),
    "checkpoint": lambda: Checkpointed(False),
    "dropout": lambda: nn.Dropout(0.4),
    "max-pool": lambda: nn.AdaptiveMaxPool1d(4),
    "spectral-norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)).eval(),
    "embedding-like": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Softmax(1)),
}


@all_vertices
@all_solvers
@pytest.mark.parametrize("shape", [Net, Chain])
@pytest.mark.parametrize("case", PURE)
def test_a_pure_and_linear_backward_is_right(case: str, shape: type[Net], solver: Any, vertices: Any) -> None:
    outcome = right_or_refused(lambda: shape(PURE[case]()), [X], solver=solver, vertices=vertices, names=["special"])
    assert outcome == "right"


@all_vertices
@all_solvers
def test_a_hook_that_looks_on_is_right_or_refused(solver: Any, vertices: Any) -> None:
    """Whether it keeps what it has seen, nobody can tell from outside: it may be refused, as what counts is."""
    outcome = right_or_refused(
        lambda: Net(Hook(lambda g: None)), [X], solver=solver, vertices=vertices, names=["hook", "special"]
    )
    if solver == Equilibrium():
        assert outcome == "right"


@pytest.mark.parametrize("solver", [ClosedForm(0.5, 5), Euler(0.5, 5), Continuous(3.0)], ids=str)
@pytest.mark.parametrize("case", PURE)
def test_a_pure_backward_is_taken_when_stopped_early_too(case: str, solver: Any) -> None:
    torch.manual_seed(1)
    net = Net(PURE[case]()).double()
    backward(squares(ActivationRelaxation(net, solver=solver)(X)))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@cutting_solvers
def test_large_and_small_gradients_of_a_pure_backward_are_right(solver: Any) -> None:
    """A scaled product that is compared must not overflow or drown, whatever the loss's scale."""
    small = (1e-8,) if isinstance(solver, Euler) else (1e-30, 1e-200)  # steps leave a rest of the start
    for scale in (0.0, *small, 1e30, 1e150):

        def loss(output: Tensor, scale: float = scale) -> Tensor:
            return scale * output.sum()

        def net() -> nn.Module:
            return Net(Applied(_HardStraightThrough))

        outcome = right_or_refused(net, [X], loss, solver=solver, vertices="activations", names=["special"], passes=1)
        assert outcome == "right"


@cutting_solvers
def test_nothing_is_counted_twice_by_what_watches(solver: Any) -> None:
    """A pure net's ``.grad`` of an earlier pass is added to, not replaced or doubled."""

    def run(model: nn.Module, inputs: Sequence[Any]) -> Tensor:
        backward(squares(model(*inputs)))
        return squares(model(*inputs))

    outcome = right_or_refused(
        lambda: Net(Applied(_Elementwise)), [X], solver=solver, vertices="activations", names=["special"], run=run
    )
    assert outcome == "right"
