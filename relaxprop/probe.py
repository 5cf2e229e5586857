"""Whether a model's backward may be taken more than once: a probe before the first relaxation phase of a setting.

Autograd takes the backward of a node once. The relaxation phase and the update take it again and again, with states in
the place of gradients, apart and together. For a derivative that makes no difference: it is linear, and leaves nothing
behind. But an ``autograd.Function`` or a tensor hook can do what it likes: clamp, add a penalty, count its calls, write
into what it is given, fill ``.grad``. The product ``A x + s`` onto everything is taken here with states made up, with
multiples of them, and split as `Graph.sweep` splits it. Factors that are powers of two make no rounding error.

May import: _pytorch, derivatives, feedback, graph, sight, update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from relaxprop._pytorch import GRAPH_FREED, SAVED_OVERWRITTEN, backward_class
from relaxprop.derivatives import EitherWay
from relaxprop.feedback import SendBack, SharedGradient
from relaxprop.graph import Gradients, Graph, States, Vertex, vector_jacobian_product
from relaxprop.sight import CutOffError
from relaxprop.update import Update, without_hooks

_OWN = tuple(backward_class(function) for function in (EitherWay, SendBack, SharedGradient))
_HALF = {torch.bfloat16, torch.float16}


def check_repeatable(module: nn.Module, update: Update) -> bool:
    """Refuse a model whose backward is not linear, or does more than to compute.

    What it has done to ``.grad`` and to the random states is undone.

    Returns:
        Whether there was anything to be seen: not where ∂L/∂(outputs) is not finite.

    Raises:
        RuntimeError: if it is such a model; the error names the functions in the graph that are not PyTorch's own.
    """
    graph, driven = update.graph, update.graph.output_cotangents
    scale = graph.output_scale()
    if not math.isfinite(scale):
        return False
    # ∂L/∂(outputs) is brought to about 1, so that no factor makes a product overflow or vanish.
    unit = 2.0 ** -min(max(math.frexp(scale)[1], -100), 100) if scale else 1.0
    held = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in (*module.parameters(), *update.inputs)]
    devices = {v.stand_in.device.index for v in graph.vertices if v.stand_in.is_cuda}
    cause: Exception | None = None
    try:
        with torch.random.fork_rng(list(devices)):
            before = _random_states(devices)
            reason = _why_not(update, driven, unit)
            if reason is None and any(
                not torch.equal(a, b) for a, b in zip(before, _random_states(devices), strict=True)
            ):
                reason = "draws random numbers"
    except (torch.OutOfMemoryError, CutOffError):
        raise
    except Exception as error:  # the model's own code runs there, which may raise anything
        if SAVED_OVERWRITTEN in str(error):  # as without the wrapper
            raise
        reason, cause = f"fails when it is taken again ({type(error).__name__}: {error})", error
        if GRAPH_FREED in str(error):
            reason = (
                "reads what another pass has computed, as within parametrize.cached() or by a state that was not "
                "detached, whose graph that pass's backward frees"
            )
    finally:
        graph.drive_outputs(driven)
        filled = [_put_back(*kept) for kept in held]
    if any(filled):
        reason = "fills .grad by itself"
    if reason is not None:
        raise RuntimeError(
            f"{_culprits(graph, module)} {reason}, but the relaxation phase takes every backward more than once: pass "
            "solver=Equilibrium() (with everything frozen and measure_residual=False), which takes it once"
        ) from cause
    return True


def _why_not(update: Update, driven: Sequence[Tensor | None], unit: float) -> str | None:
    graph = update.graph
    # More would leave the range of float16.
    half = any(x.dtype in _HALF for x in (*graph.outputs, *(v.output for v in graph.vertices)))
    much = 2.0**4 if half else 2.0**20
    states: States = {v: _made_up(v) for v in graph.vertices}
    first: Gradients = ()
    for factor in (1.0, 1.0, -much, 1 / much):
        cotangents = [None if g is None else g * (unit * factor) for g in driven]
        pushed = {v: x * factor for v, x in states.items()}
        given = [*pushed.values(), *(g for g in cotangents if g is not None)]
        kept = [x.clone() for x in given]
        graph.drive_outputs(cotangents)
        found = _product(update, pushed)
        if not all(_same(_values(a), _values(b)) for a, b in zip(given, kept, strict=True)):
            return "writes into the gradient that it is given"
        found = tuple([None if x is None else x / factor for x in found])  # copies, as they may be written to
        if first and not all(_equal(a, b) for a, b in zip(first, found, strict=True)):
            return "does not give the same twice" if factor == 1 else "is not linear in the gradient that it is given"
        first = first or found
    graph.drive_outputs([None if g is None else g * unit for g in driven])
    arrived: States = {}

    def settle(vertex: Vertex, arriving: Tensor) -> Tensor:
        arrived[vertex] = arriving.clone()
        return states[vertex].clone()

    graph.sweep(settle)
    if not all(_equal(x, arrived[v].to(v.stand_in.dtype), 1.0) for v, x in zip(graph.vertices, first, strict=False)):
        return "is not the sum of what it makes of two gradients apart"
    return None


def _product(update: Update, states: States) -> Gradients:
    """``A x + s`` at the vertices, the inputs and the parameters at once, as the relaxation phase takes it."""
    graph, ends = update.graph, [*update.inputs, *update.parameters]
    cotangents = graph.cotangents(states, graph.stored)
    with without_hooks(ends):
        return vector_jacobian_product(cotangents, [*(v.stand_in for v in graph.vertices), *graph.ends_of(ends)])


def _made_up(vertex: Vertex) -> Tensor:
    """A state about as large as ∂L/∂(outputs), and different everywhere. No generator is asked."""
    zeros = vertex.zeros()
    if zeros.is_nested:
        return torch.cos(vertex.stand_in.detach().to(zeros.dtype))
    return torch.cos(torch.arange(zeros.numel(), device=zeros.device).to(zeros)).view(zeros.shape)


def _equal(a: Tensor | None, b: Tensor | None, absolute: float = 0.0) -> bool:
    """Up to rounding. An overflow tells nothing, and where nothing arrives, zeros may."""
    if a is None or b is None:
        x = a if b is None else b
        return x is None or not bool(_values(x).any())
    a, b = _values(a), _values(b)
    if a.shape != b.shape:
        return False
    size, distance = float(a.norm()), float((a - b).norm())
    if not math.isfinite(size) or not bool(b.isfinite().all()):
        return True
    range_ = torch.finfo(a.dtype)
    return distance <= min(1e4 * range_.eps, 0.1) * max(size, absolute) + 2.0**20 * range_.tiny * a.numel()


def _values(x: Tensor) -> Tensor:
    """The numbers of a sparse gradient (of an embedding) or of a nested tensor, in a dense one."""
    if x.is_sparse:
        return x.coalesce().values()
    return x.values() if x.is_nested else x


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether nothing was written: what was not a number before may stay so."""
    return torch.equal(x, y) or (x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all()))


def _put_back(tensor: Tensor, gradient: Tensor | None, value: Tensor | None) -> bool:
    """Whether there was something to put back."""
    if gradient is None or value is None:
        changed = tensor.grad is not None
    else:
        changed = tensor.grad is not gradient or not _same(_values(gradient), _values(value))
    if changed:
        tensor.grad = gradient
        if gradient is not None and value is not None:
            with torch.no_grad():
                gradient.copy_(value)
    return changed


def _random_states(devices: set[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _culprits(graph: Graph, module: nn.Module) -> str:
    kinds = {type(n) for n in graph.nodes() if isinstance(n, BackwardCFunction) and not isinstance(n, _OWN)}
    names = sorted(kind.__name__.removesuffix("Backward") for kind in kinds)
    what = "a tensor hook" if not names else f"the backward of {' or '.join(names)}, or a tensor hook,"
    return f"{type(module).__name__}: {what}"
