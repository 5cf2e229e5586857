r"""A forward pass recorded with its graph cut at every vertex.

Each vertex v keeps two tensors of the feedforward pass: ``output``, still attached to what computed it, and
``leaf``, a detached alias of the same value that the rest of the model reads. The derivative of the outputs by
the leaves is then the local Jacobian J, and one call of PyTorch's engine applies it on any graph:

    source       s_i = the part of ∂L/∂x_i that reaches i through no other vertex
    transport    (A x)_i = Σ_{j∈Chi(i)} J_ji^T x_j                                   the sum in (1) and (7)
    gradients    ∂L/∂W = Σ_j (∂x_j/∂W)^T x_j, over the vertices that read W           equation (2)

all of them at the frozen feedforward pass. ``States`` map a vertex to a tensor of the vertex's shape; a vertex
that is absent counts as zero.
Source: Millidge et al., arXiv 2010.06219, section 2 and Appendix A.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node, _engine_run_backward, get_gradient_edge

from relaxprop.derivatives import Phase


class Vertex:
    """One activity of the graph: a tensor that a module computed in the feedforward pass."""

    __slots__ = ("leaf", "name", "output", "upstream")

    def __init__(self, name: str, output: Tensor, leaf: Tensor) -> None:
        self.name = name
        self.output = output
        self.leaf = leaf
        self.upstream = 0  # vertices above this one on the longest path from the input

    def __repr__(self) -> str:
        return f"Vertex({self.name!r}, shape={tuple(self.leaf.shape)})"

    def zeros(self) -> Tensor:
        """The state zero."""
        return _at_least_float32(torch.zeros_like(self.leaf))


States = dict[Vertex, Tensor]
_Place = Node | Vertex
_AccumulateGrad: Any = type(get_gradient_edge(torch.empty(0, requires_grad=True)).node)
Gradients = tuple[Tensor | None, ...]


class Graph:
    """A recorded forward pass.

    Args:
        recorded: the vertices in the order of the feedforward pass.
        outputs: the tensors of the model's result that require grad.
        phase: tells the pass's dropped derivatives whether (1) or (2) is taken.
        clamped: whether a vertex that is itself the output is held at ∂L/∂x^L.

    Attributes:
        vertices: those that the driven outputs depend on (at first: that any output depends on), those with fewer
            vertices upstream first.
        depth: D, the number of vertices on the longest path.
        read: the leaf tensors that the outputs were computed from, vertices aside: parameters and inputs, by their id.
    """

    def __init__(
        self, recorded: Sequence[Vertex], outputs: Sequence[Tensor], phase: Phase, *, clamped: bool = True
    ) -> None:
        self.recorded = recorded
        self.outputs = outputs
        self.phase = phase
        self.clamped = clamped
        self._driven: list[tuple[Tensor, Tensor]] = []
        self._placed = [True] * len(outputs)
        self._place_vertices(outputs)

    def drive_outputs(self, gradients: Sequence[Tensor | None]) -> None:
        """Set ∂L/∂(outputs).

        A vertex that the loss does not depend on is no part of the loss's computation graph: it does not relax,
        and what is above it gets no gradient, as in backpropagation.
        """
        pairs = zip(self.outputs, gradients, strict=True)
        self._driven = [(output, gradient) for output, gradient in pairs if gradient is not None]
        driven = [gradient is not None for gradient in gradients]
        if driven != self._placed:
            self._placed = driven
            self._place_vertices([output for output, _ in self._driven])

    def _place_vertices(self, outputs: Sequence[Tensor]) -> None:
        """Longest paths through the autograd graph joined at its cuts, in time linear in its size."""
        vertex_of = {id(v.leaf): v for v in self.recorded}
        self.read: dict[int, Tensor] = {}
        self._inputs: dict[_Place, list[_Place]] = {}
        self._upstream: dict[_Place, int] = {}  # a place's inputs stand before it
        stack = [_place(output, vertex_of) for output in outputs]
        while stack:
            place = stack.pop()
            if place in self._upstream:
                continue
            if place not in self._inputs:
                self._inputs[place] = inputs = _inputs_of(place, vertex_of, self.read)
                if inputs:
                    stack.append(place)
                    stack += inputs
                    continue
            longest = max([self._upstream[above] for above in self._inputs[place]], default=0)
            if type(place) is Vertex:
                place.upstream = longest
                longest += 1
            self._upstream[place] = longest
        self.vertices = sorted([place for place in self._inputs if type(place) is Vertex], key=_upstream)
        self.depth = self.vertices[-1].upstream + 1 if self.vertices else 0

    def levels(self) -> list[list[Vertex]]:
        """The vertices by height: how many vertices are below them on the longest path to the output."""
        height = dict.fromkeys(self._upstream, 0)
        levels: list[list[Vertex]] = [[] for _ in range(self.depth)]
        for place in reversed(self._upstream):
            longest = height[place]
            if type(place) is Vertex:
                levels[longest].append(place)
                longest += 1
            for above in self._inputs[place]:
                height[above] = max(height[above], longest)
        return levels

    def with_upstream(self, count: int) -> list[Vertex]:
        """The vertices that have at least ``count`` vertices upstream of them."""
        return self.vertices[bisect_left(self.vertices, count, key=_upstream) :]

    def source(self) -> States:
        """s: what reaches each vertex from ∂L/∂(outputs) through no other vertex."""
        return self._pull(self._driven, self.vertices)

    def initial_states(self, source: States) -> States:
        """x̄, in float32 at least. A vertex that is itself the output and is read by none starts (and so stays)
        at ∂L/∂x^L where the output is clamped."""
        states = {v: _at_least_float32(v.leaf.detach()) for v in self.vertices}
        if self.clamped:
            ends = {id(output) for output, _ in self._driven}
            if held := [v for v in self.vertices if id(v.leaf) in ends]:
                read = {above for inputs in self._inputs.values() for above in inputs}
                states |= {v: source[v] for v in held if v not in read}
        return states

    def transport(self, states: States, onto: Sequence[Vertex] | None = None) -> States:
        """A x at the vertices ``onto`` (by default at all): one product with every local Jacobian."""
        pushed = [(v.output, x) for v, x in states.items()]
        return self._pull(pushed, self.vertices if onto is None else onto)

    def sweep(self, source: States, settle: Callable[[Vertex, Tensor], Tensor]) -> States:
        """One pass from the output to the input: ``x_v = settle(v, (A x)_v + s_v)``, with the x already settled."""
        levels = self.levels()
        arriving = dict(source)
        states: States = {}
        for height, level in enumerate(levels):
            settled = {v: settle(v, arriving.pop(v) if v in arriving else v.zeros()) for v in level}
            above = [v for higher in levels[height + 1 :] for v in higher]
            for vertex, x in self.transport(settled, above).items():
                arriving[vertex] = arriving[vertex] + x if vertex in arriving else x
            states |= settled
        return states

    def gradients(
        self,
        states: States,
        wanted: Sequence[Tensor],
        *,
        driven: bool = True,
        updating: bool = True,
        retain_graph: bool = True,
    ) -> Gradients:
        """(2): the gradients of ``wanted`` given the states; None for a tensor that the loss does not depend on.

        ``driven=False`` leaves out what comes from ∂L/∂(outputs) directly, and with it all but the part linear in the
        states. ``updating=False`` takes the derivatives of the relaxation phase: an input's error, as in (1).
        """
        pushed = [*(self._driven if driven else ()), *((v.output, x) for v, x in states.items())]
        self.phase.updating = updating
        try:
            with _without_hooks(wanted):
                return _vector_jacobian_product(pushed, wanted, retain_graph=retain_graph)
        finally:
            self.phase.updating = False

    def _pull(self, pushed: Sequence[tuple[Tensor, Tensor]], onto: Sequence[Vertex]) -> States:
        arrived = _vector_jacobian_product(pushed, [v.leaf for v in onto])
        return {v: _at_least_float32(x) for v, x in zip(onto, arrived, strict=True) if x is not None}


def _vector_jacobian_product(
    pushed: Sequence[tuple[Tensor, Tensor]], onto: Sequence[Tensor], *, retain_graph: bool = True
) -> Gradients:
    """``torch.autograd.grad`` without its checks of arguments, which would cost as much as a small layer."""
    if not pushed or not onto:
        return (None,) * len(onto)
    outputs = tuple([tensor for tensor, _ in pushed])
    states = tuple([x if x.dtype == tensor.dtype else x.to(tensor.dtype) for tensor, x in pushed])
    gradients: Gradients = _engine_run_backward(
        outputs, states, retain_graph, False, tuple(onto), allow_unreachable=True, accumulate_grad=False
    )
    return gradients


@contextmanager
def _without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Sets aside the hooks of parameters and inputs.

    They are there (to clip, to log) for the final gradient, which PyTorch shows them later; they would also run on what
    is taken in between.
    """
    hooked = [hooks for t in tensors if (hooks := t._backward_hooks)]
    aside = [dict(hooks) for hooks in hooked]
    for hooks in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in zip(hooked, aside, strict=True):
            hooks.update(own)


def _at_least_float32(x: Tensor) -> Tensor:
    """States are sums over many steps: half-precision activities relax in float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _inputs_of(place: _Place, vertex_of: Mapping[int, Vertex], read: dict[int, Tensor]) -> list[_Place]:
    """What a place was computed from directly.

    Vertices, by the id of their leaf, join the graph where it was cut. The other leaf tensors go into ``read``.
    """
    if type(place) is Vertex:
        return [_place(place.output, vertex_of)]
    inputs: list[_Place] = []
    nodes = ((place, 0),) if type(place) is _AccumulateGrad else cast(Node, place).next_functions
    for node, _ in nodes:
        if type(node) is _AccumulateGrad:
            variable = cast(Any, node).variable
            vertex = vertex_of.get(id(variable))
            if vertex is None:
                read[id(variable)] = variable
            else:
                inputs.append(vertex)
        elif node is not None:
            inputs.append(node)
    return inputs


def _place(tensor: Tensor, vertex_of: Mapping[int, Vertex]) -> _Place:
    return vertex_of.get(id(tensor)) or tensor.grad_fn or get_gradient_edge(tensor).node


_upstream = attrgetter("upstream")
