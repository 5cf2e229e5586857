r"""Activation Relaxation: backpropagation's gradients from local dynamics.

Notation: x̄_i is vertex i's activity in the feedforward pass, x_i its state in the relaxation phase (same shape,
other meaning: it converges to a gradient), Chi(i) the vertices that read i directly, L the loss.

    (1)  dx_i/dt = −x_i + Σ_{j∈Chi(i)} x_j ∂x_j/∂x_i |_x̄        relaxation phase, started at x_i = x̄_i
    (2)  ∂L/∂W^l = (f'(W^l x̄^l) ⊙ x^{l+1}) x̄^{lT}               weight update, at the end of the phase

The paper derives (1) for layers ``x^{l+1} = f(W^l x^l)``, where the sum is ``W^{lT} (f'(W^l x̄^l) ⊙ x^{l+1})``, and
states it for any directed acyclic graph in its equation (7). At equilibrium ``x_i = ∂L/∂x_i``.

Algorithm 1 takes three steps. The feedforward pass is PyTorch's own; `recording` keeps its graph, cut at every vertex.
`relax` below is the other two. Where to read on: `graph` applies the sum in (1) to all vertices at once, `solvers`
integrates (1), `update` is (2), and `wrapper` puts all of it into the place of a model.
Source: Millidge, Tschantz, Seth, Buckley, arXiv 2010.06219, section 2 and Algorithm 1.

May import: graph, solvers, update, _pytorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from relaxprop._pytorch import graph_is_kept, is_batched, is_view
from relaxprop.graph import Gradients, Graph, States
from relaxprop.solvers import Relaxation
from relaxprop.update import Update

# How (1) is integrated: a solver's ``solve``.
Solve = Callable[[Graph], tuple[States, Relaxation]]
# What is told when the relaxation phase ends: the graph, the final states, and the record of how they were found.
OnRelaxed = Callable[[Graph, States, Relaxation], None]
# Whether the loss reads more of the recorded pass than its result: `kept.is_read_beside`.
IsReadBeside = Callable[[Node, Graph], bool]


def relax(graph: Graph, solve: Solve, update: Update, on_relaxed: OnRelaxed, *, retain_graph: bool) -> Gradients:
    """Algorithm 1 after the feedforward pass: the gradients of inputs and parameters, given ∂L/∂x^L on the graph."""
    states, record = solve(graph)  # (1)
    on_relaxed(graph, states, record)
    return update(states, retain_graph=retain_graph)  # (2)


class RelaxationPhase(torch.autograd.Function):
    """The model as one node of PyTorch's graph, with (1) and (2) as its backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        update: Update,
        solve: Solve,
        on_relaxed: OnRelaxed,
        is_read_beside: IsReadBeside,
        shown: Sequence[Tensor],
        *given: Tensor,
    ) -> tuple[Tensor, ...]:
        """What the user gets of the outputs ``shown``; ``given`` are the tensors that gradients are wanted for."""
        ctx.set_materialize_grads(False)
        ctx.update, ctx.solve, ctx.on_relaxed, ctx.is_read_beside = update, solve, on_relaxed, is_read_beside
        # Saved only so that PyTorch itself refuses a second backward pass without retain_graph.
        ctx.save_for_backward(_EMPTY)
        # The user may write into an output in place. Where that is a vertex, or a view of one, its memory holds x̄.
        pairs = zip(shown, update.graph.outputs, strict=True)
        return tuple([x.detach().clone() if o.is_leaf or is_view(o) else x.detach() for x, o in pairs])

    @staticmethod
    def backward(ctx: Any, *output_cotangents: Tensor | None) -> Any:
        refuse_second_derivative()
        refuse_batched(output_cotangents)
        ctx.saved_tensors  # noqa: B018 (see forward)
        update, solve, keep = ctx.update, ctx.solve, graph_is_kept()
        if not keep:
            ctx.update = ctx.solve = None  # and with them the recorded pass
        update.graph.drive_outputs(output_cotangents)
        retain = ctx.is_read_beside(ctx, update.graph) or keep
        gradients = relax(update.graph, solve, update, ctx.on_relaxed, retain_graph=retain)
        return None, None, None, None, None, *gradients


_EMPTY = torch.empty(0)


def refuse_second_derivative() -> None:
    """Refuse ``create_graph=True``, within a backward pass.

    Raises:
        RuntimeError: if a second derivative is asked for.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True asks for a second derivative, and the relaxation phase gives first derivatives "
            "only: call backward() without create_graph, or differentiate the plain module (wrapper.module)"
        )


def refuse_batched(cotangents: Sequence[Tensor | None]) -> None:
    """Refuse many cotangents at once, within a backward pass.

    Raises:
        RuntimeError: if ``is_grads_batched``, ``vectorize`` or ``torch.func.vmap`` asks for several products in one.
    """
    if any(x is not None and is_batched(x) for x in cotangents):
        raise RuntimeError(
            "several gradients are asked for at once (is_grads_batched, vectorize or vmap), and one relaxation phase "
            "gives one: call torch.autograd.grad for one after the other, or use the plain module (wrapper.module)"
        )
