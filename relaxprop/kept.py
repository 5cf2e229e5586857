"""Activities that a model keeps to itself: on an attribute, in a list, in a closure.

The relaxation phase knows what the model returns, and nothing of a loss that reads a stand-in directly. Whichever call
takes the gradient, such a loss is refused by name.

May import: _pytorch, graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from relaxprop._pytorch import (
    accumulated_hooks,
    arrived_hooks,
    engine_calls,
    hook_accumulated,
    is_leaf_node,
    leaf_of,
    tree_leaves,
)
from relaxprop.graph import Graph

_STRUCTURE = frozenset(vars(nn.Module()))


def mark(stand_in: Tensor, origin: str, module: ReferenceType[nn.Module]) -> None:
    """Marks the leaf tensor as one that a recorded pass of the module hands on, and lets no gradient be left in it."""
    hook_accumulated(stand_in, partial(_refuse_gradient, origin, module))


def refuse_earlier(module: nn.Module, leaf: Tensor) -> None:
    """Refuse a leaf that a pass reads and that an earlier pass has handed on: no gradient could reach it.

    Raises:
        ValueError: if it is one.
    """
    if (hook := _mark_of(leaf)) is not None:
        raise ValueError(
            f"the model read an activity of {hook.args[0]!r}, of shape {tuple(leaf.shape)}, of an earlier pass, which "
            f"it kept ({_where_kept(module)}), so no gradient can reach it: return it and pass it to the model as an "
            "argument, or detach it"
        )


def is_read_beside(phase: Node, graph: Graph, *, always: bool = True) -> bool:
    """Within the backward pass of the node ``phase``: whether the loss reads any of the recorded graph beside the
    model's result, so that more than the relaxation phase needs it.

    Args:
        phase: the model's node in the loss's graph.
        graph: the recorded pass.
        always: whether to look where all leaves get their gradients, too. There an activity refuses its own.

    Raises:
        RuntimeError: if the loss reads an activity, and only some gradients are asked for (``torch.autograd.grad``,
            ``backward(inputs=…)``). Autograd runs what leads to a tensor that is asked for then, and nothing leads from
            an activity to a parameter. Or if the gradient of a result is looked at from which others were computed.
    """
    beside = False
    looked_at = [y.output_nr for y in _handed_out(phase) if y.retains_grad or _has_hooks(y)]
    for outputs, wanted in engine_calls():
        looked_at += [edge.output_nr for edge in map(_edge, wanted) if edge.node is phase]
        if wanted or always:
            nodes = list(_upstream(outputs, but_for=None if wanted else phase))
            if wanted and phase in nodes:
                _refuse_activities(nodes)
            beside = beside or any(node in graph for node in nodes)
    for place in looked_at:
        if graph.is_between(place):
            raise RuntimeError(
                f"the gradient of a tensor of shape {tuple(graph.stored.outputs[place].shape)} that the model returned "
                "is looked at (by a hook, retain_grad or torch.autograd.grad), and would be the part alone that the "
                "loss reads there: the model has computed other results from it, which the relaxation phase passes as "
                "one. Pass solver=Equilibrium(), which cuts nothing in training, or read keep_states=True's "
                "last_relaxation.states"
            )
    return beside


def note_handed_out(outputs: Sequence[Tensor]) -> None:
    """Notes on their node what the user gets of a pass, where it is more than one tensor."""
    if len(outputs) > 1:
        cast(Any, outputs[0].grad_fn).handed_out = [ReferenceType(y) for y in outputs]


def _handed_out(phase: Node) -> list[Tensor]:
    """That of it which is still there, and as it was."""
    found = [y() for y in getattr(phase, "handed_out", ())]
    return [y for y in found if y is not None and y.grad_fn is phase]


def _has_hooks(y: Tensor) -> bool:
    """Whether it has hooks other than PyTorch's own, which ask when a gradient arrives (FSDP's do)."""
    hooks = (arrived_hooks(y) or {}).values()
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks)


def _edge(x: Tensor | GradientEdge) -> GradientEdge:
    return get_gradient_edge(x) if isinstance(x, Tensor) else x


def refuse_reading(loss: Tensor, graph: Graph | None = None) -> None:
    """Refuse a loss that reads what the model computed and did not return.

    Raises:
        RuntimeError: if it reads an activity, or what ``graph`` has on the way to one.
    """
    if not loss.requires_grad:
        return
    nodes = list(_upstream([loss]))
    _refuse_activities(nodes)
    if graph is not None and (names := [node.name() for node in nodes if node in graph]):
        raise RuntimeError(
            f"the loss reads what the model computed by {names[0]} on the way to {graph.vertices[0].name!r} and did "
            "not return: return it from the model, with the output"
        )


def _where_kept(module: nn.Module | None) -> str:
    """Which of the module's attributes hold what was computed from activities of a recorded pass."""
    names = [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in (module.named_modules() if module is not None else ())
        for name, value in _attributes(part).items()
        if any(_reads_an_activity(x) for x in tree_leaves(value) if isinstance(x, Tensor))
    ]
    if names:
        return f"on the attribute {' or '.join(map(repr, names))}"
    return "not on an attribute of its modules: in a list that it was given, a closure, a hook or parametrize.cached()"


def _attributes(part: nn.Module) -> Mapping[str, Any]:
    own = {} if isinstance(part, torch.jit.ScriptModule) else vars(part)
    return {name: x for name, x in own.items() if name not in _STRUCTURE} | dict(part._buffers)


def _reads_an_activity(x: Tensor) -> bool:
    return x.requires_grad and any(
        is_leaf_node(node) and _mark_of(leaf_of(node)) is not None for node in _upstream([x])
    )


def _mark_of(leaf: Tensor) -> partial[None] | None:
    for hook in (accumulated_hooks(leaf) or {}).values():
        if isinstance(hook, partial) and hook.func is _refuse_gradient:
            return hook
    return None


def _upstream(tensors: Iterable[Tensor | GradientEdge], but_for: Node | None = None) -> Iterator[Node]:
    """The nodes of PyTorch's graph that the tensors were computed by, without what ``but_for`` reads."""
    stack = [_edge(x).node for x in tensors]
    seen = set[Node]()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            if node is not but_for:
                stack += [source for source, _ in node.next_functions if source is not None]


def _refuse_activities(nodes: Iterable[Node]) -> None:
    for node in nodes:
        if is_leaf_node(node) and (hook := _mark_of(leaf := leaf_of(node))) is not None:
            raise _unknown(hook.args[0], hook.args[1], leaf)


def _refuse_gradient(origin: str, module: ReferenceType[nn.Module], stand_in: Tensor) -> None:
    stand_in.grad = None
    raise _unknown(origin, module, stand_in)


def _unknown(origin: str, module: ReferenceType[nn.Module], stand_in: Tensor) -> RuntimeError:
    return RuntimeError(
        f"the loss reads an activity of {origin!r}, of shape {tuple(stand_in.shape)}, that the model kept to itself "
        f"({_where_kept(module())}) and did not return, so the relaxation phase does not know of it: return it from "
        "the model, with the output"
    )
