r"""Equation (2), the weight update that ends the relaxation phase:

    ∂L/∂W^l = ( f'(W^l x̄^l) ⊙ x^{l+1} ) x̄^{lT}          on any graph: ∂L/∂W = Σ_j (∂x_j/∂W)^T x_j

over the vertices j that read W. `Frozen` says which of its two factors, the derivative and the presynaptic activity, is
the feedforward pass's, and which is taken at the states that the relaxation phase has ended in.
Source: Millidge et al., arXiv 2010.06219, equation (2) and section 4.1.

May import: derivatives, frozen, graph, _pytorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from relaxprop._pytorch import arrived_hooks, is_leaf_node, leaf_of
from relaxprop.derivatives import updating
from relaxprop.frozen import Frozen
from relaxprop.graph import Anew, Cotangents, Gradients, Graph, Linearisation, States, vector_jacobian_product


class Update(NamedTuple):
    """(2) of a recorded pass: called with the final states, it gives the inputs' errors, then the weight gradients.

    Attributes:
        graph: the recorded pass.
        frozen: where the factors of (2) are taken.
        inputs: what stands in the graph for the inputs that require grad. Their errors are the relaxation phase's, (1).
        parameters: those that the result was computed from.
        rerun: the model run again at given states, its layers noted where so asked; None where everything is frozen.
    """

    graph: Graph
    frozen: Frozen
    inputs: Sequence[Tensor]
    parameters: Sequence[Tensor]
    rerun: Anew | None = None

    def __call__(self, states: States, *, retain_graph: bool = True) -> Gradients:
        """The gradients; None for a tensor that the loss does not depend on.

        Raises:
            ValueError: if the factors differ and a parameter is read outside of the module that it belongs to.
        """
        graph, frozen, inputs, parameters = self.graph, self.frozen, self.inputs, self.parameters
        stored = current = graph.stored
        if not (frozen.update_derivative and frozen.update_activity) or (inputs and not frozen.relaxation_derivative):
            assert self.rerun is not None
            current = self.rerun(states, layers=frozen.splits_update)
        relaxation = stored if frozen.relaxation_derivative or not inputs else current
        derivative = stored if frozen.update_derivative else current
        activity = stored if frozen.update_activity else current
        if relaxation is derivative is activity and not (inputs and activity.switches):
            return gradients(graph, states, [*inputs, *parameters], at=activity, retain_graph=retain_graph)
        errors: Gradients = ()
        if inputs:
            errors = gradients(graph, states, inputs, at=relaxation, in_update=False)
        if derivative is activity:
            return errors + gradients(graph, states, parameters, at=activity, retain_graph=retain_graph)
        return errors + _split_update(graph, states, parameters, derivative, activity)


def gradients(
    graph: Graph,
    states: States,
    wanted: Sequence[Tensor],
    *,
    at: Linearisation | None = None,
    driven: bool = True,
    in_update: bool = True,
    retain_graph: bool = True,
) -> Gradients:
    """(2) at one linearisation: the gradients of ``wanted`` given the states; None for a tensor that the loss does not
    depend on.

    ``driven=False`` leaves out what comes from ∂L/∂(outputs) directly, and with it all but the part linear in the
    states. ``in_update=False`` takes the derivatives of the relaxation phase: an input's error, as in (1).
    """
    at = at or graph.stored
    cotangents = graph.cotangents(states, at, driven=driven)
    with updating(at.switches) if in_update and at.switches else nullcontext(), without_hooks(wanted):
        return vector_jacobian_product(cotangents, graph.ends_of(wanted), retain_graph=retain_graph)


def _split_update(
    graph: Graph, states: States, parameters: Sequence[Tensor], derivative: Linearisation, activity: Linearisation
) -> Gradients:
    """(2) as a product of two factors: the errors ``f'(u) ⊙ x`` at what the layers computed, u, from the one
    linearisation, and ``∂u/∂W``, which holds the presynaptic activity, from the other."""
    cotangents = graph.cotangents(states, derivative)
    with updating((*derivative.switches, *activity.switches)), without_hooks(parameters):
        errors = vector_jacobian_product(cotangents, [layer.output for layer in derivative.layers])
        _check_layers(graph, activity, parameters)
        # What a layer passes on to the layers before it has the activity's derivatives: the errors replace it.
        pairs = [(layer.output, e) for layer, e in zip(activity.layers, errors, strict=True)]
        reached = Cotangents([u for u, e in pairs if e is not None], [e for e in errors if e is not None])
        with _replaced_gradients(pairs):
            return vector_jacobian_product(reached, graph.ends_of(parameters))


def _check_layers(graph: Graph, at: Linearisation, parameters: Sequence[Tensor]) -> None:
    """Refuse parameters that are read outside of their layers: where their derivative ends, nobody can say.

    Raises:
        ValueError: if a parameter is read outside of its layer.
    """
    trained = {id(p) for p in parameters}
    layers: dict[Node, set[int]] = {}  # what each may read; a module may return what another did
    for layer in at.layers:
        layers.setdefault(layer.output.node, set()).update(layer.own)
    ends = graph.cotangents({v: v.stand_in for v in graph.vertices}, at).tensors
    between = [node for end in ends if (node := _node(end)) not in layers]
    for stack, own in [(between, set[int]()), *(([node], own) for node, own in layers.items())]:
        seen = set[Node]()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            for source, _ in node.next_functions:
                if not is_leaf_node(source):
                    if source is not None and source not in layers:
                        stack.append(source)
                elif (key := id(leaf_of(source))) in trained and key not in own:
                    raise ValueError(
                        f"frozen: a parameter of shape {tuple(leaf_of(source).shape)} is read outside of "
                        "a call of the module that it belongs to (as weights tied in a function, or in a module "
                        "with layers of its own), so the derivative and the presynaptic activity of its update "
                        "cannot be told apart: freeze or unfreeze update_derivative and update_activity together, "
                        "or read it in a module of its own"
                    )


def _node(end: Tensor | GradientEdge) -> Node:
    return get_gradient_edge(end).node if isinstance(end, Tensor) else end.node


def without_hooks(tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Sets aside the hooks of parameters and inputs.

    They are there (to clip, to log) for the final gradient, which PyTorch shows them later; they would also run on what
    is taken in between.
    """
    hooked = [hooks for t in tensors if (hooks := arrived_hooks(t))]
    return _set_aside(hooked) if hooked else nullcontext()


@contextmanager
def _set_aside(hooked: Sequence[dict[int, Any]]) -> Iterator[None]:
    aside = [dict(hooks) for hooks in hooked]
    for hooks in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in zip(hooked, aside, strict=True):
            hooks.update(own)


@contextmanager
def _replaced_gradients(gradients: Sequence[tuple[GradientEdge, Tensor | None]]) -> Iterator[None]:
    """Within it, whatever gradient arrives at an edge is replaced by the given one; None stands for zero."""
    by_node: dict[Node, dict[int, Tensor | None]] = {}
    for edge, gradient in gradients:
        by_node.setdefault(edge.node, {})[edge.output_nr] = gradient

    def hook(own: dict[int, Tensor | None]) -> Callable[[Sequence[Tensor | None]], Any]:
        def replace(arrived: Sequence[Tensor | None]) -> Any:
            return tuple([_instead(x, own[i]) if i in own else x for i, x in enumerate(arrived)])

        return replace

    handles = [node.register_prehook(hook(own)) for node, own in by_node.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _instead(arrived: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    return gradient if gradient is not None or arrived is None else torch.zeros_like(arrived)
