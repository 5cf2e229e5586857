r"""A forward pass recorded with its graph cut at every vertex.

Each vertex v keeps two tensors of the feedforward pass: ``output``, still attached to what computed it, and
``leaf``, a detached alias of the same value that the rest of the model reads. The derivative of the outputs by
the leaves is then the local Jacobian J, and one call of ``torch.autograd.grad`` applies it on any graph:

    source       s_i = the part of ∂L/∂x_i that reaches i through no other vertex
    transport    (A x)_i = Σ_{j∈Chi(i)} J_ji^T x_j                                   the sum in (1) and (7)
    gradients    ∂L/∂W = Σ_j (∂x_j/∂W)^T x_j, over the vertices that read W           equation (2)

all of them at the frozen feedforward pass. ``States`` map a vertex to a tensor of the vertex's shape; a vertex
that is absent counts as zero.
Source: Millidge et al., arXiv 2010.06219, section 2 and Appendix A.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge


class Vertex:
    """One activity of the graph: a tensor that a module computed in the feedforward pass."""

    __slots__ = ("height", "leaf", "name", "output", "upstream")

    def __init__(self, name: str, output: Tensor, leaf: Tensor) -> None:
        self.name = name
        self.output = output
        self.leaf = leaf
        self.upstream = 0  # vertices above this one on the longest path from the input
        self.height = 0  # vertices below this one on the longest path to the output

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
        trained: the tensors that gradients are wanted for: parameters, and inputs that require grad.
        clamped: whether a vertex that is itself the output is held at ∂L/∂x^L.
    """

    def __init__(
        self,
        recorded: Sequence[Vertex],
        outputs: Sequence[Tensor],
        trained: Sequence[Tensor],
        *,
        clamped: bool = True,
    ) -> None:
        self.recorded = recorded
        self.outputs = outputs
        self.trained = trained
        self.clamped = clamped
        self.vertices: list[Vertex] = []
        self.levels: list[list[Vertex]] = []
        self._driven: list[tuple[Tensor, Tensor]] = []

    @property
    def depth(self) -> int:
        """D: the number of vertices on the longest path."""
        return len(self.levels)

    def drive_outputs(self, gradients: Sequence[Tensor | None]) -> None:
        """Set ∂L/∂(outputs), and find the vertices that the loss depends on and their place in the graph.

        A vertex that the loss does not depend on is no part of the loss's computation graph: it does not relax,
        and what is above it gets no gradient, as in backpropagation.
        """
        pairs = zip(self.outputs, gradients, strict=True)
        self._driven = [(output, gradient) for output, gradient in pairs if gradient is not None]
        self.vertices = self._place_vertices()
        self.levels = [[] for _ in range(max((v.height + 1 for v in self.vertices), default=0))]
        for vertex in self.vertices:
            self.levels[vertex.height].append(vertex)

    def _place_vertices(self) -> list[Vertex]:
        """Longest paths through the autograd graph joined at its cuts, in time linear in its size."""
        vertex_of = {id(v.leaf): v for v in self.recorded}
        inputs = _inputs_first([output for output, _ in self._driven], vertex_of)
        upstream: dict[_Place, int] = {}
        for node, above in inputs.items():
            upstream[node] = longest = max([upstream[n] for n in above], default=0)
            if isinstance(node, Vertex):
                node.upstream = longest
                upstream[node] += 1
        height = dict.fromkeys(inputs, 0)
        for node, above in reversed(inputs.items()):
            below = height[node]
            if isinstance(node, Vertex):
                node.height = below
                below += 1
            for n in above:
                if height[n] < below:
                    height[n] = below
        return sorted((n for n in inputs if isinstance(n, Vertex)), key=lambda v: v.upstream)

    def with_upstream(self, count: int) -> list[Vertex]:
        """The vertices that have at least ``count`` vertices upstream of them."""
        return self.vertices[bisect_left(self.vertices, count, key=lambda v: v.upstream) :]

    def source(self) -> States:
        """s: what reaches each vertex from ∂L/∂(outputs) through no other vertex."""
        return self._pull(self._driven, self.vertices)

    def initial_states(self, source: States) -> States:
        """x̄, in float32 at least. A vertex that is itself the output and is read by none starts (and so stays)
        at ∂L/∂x^L where the output is clamped."""
        ends = {id(output) for output, _ in self._driven} if self.clamped else set()
        return {
            v: source[v] if v.height == 0 and id(v.leaf) in ends else _at_least_float32(v.leaf.detach())
            for v in self.vertices
        }

    def transport(self, states: States, onto: Sequence[Vertex] | None = None) -> States:
        """A x at the vertices ``onto`` (by default at all): one product with every local Jacobian."""
        pushed = [(v.output, x) for v, x in states.items()]
        return self._pull(pushed, self.vertices if onto is None else onto)

    def sweep(self, source: States, settle: Callable[[Vertex, Tensor], Tensor]) -> States:
        """One pass from the output to the input: ``x_v = settle(v, (A x)_v + s_v)``, with the x already settled."""
        arriving = dict(source)
        states: States = {}
        for height, level in enumerate(self.levels):
            settled = {v: settle(v, arriving.pop(v) if v in arriving else v.zeros()) for v in level}
            above = [v for higher in self.levels[height + 1 :] for v in higher]
            for vertex, x in self.transport(settled, above).items():
                arriving[vertex] = arriving[vertex] + x if vertex in arriving else x
            states |= settled
        return states

    def gradients(
        self, states: States, wanted: Sequence[Tensor], *, driven: bool = True, retain_graph: bool = True
    ) -> Gradients:
        """(2): the gradients of ``wanted`` given the states; None for a tensor that the loss does not depend on.

        ``driven=False`` leaves out what comes from ∂L/∂(outputs) directly, and with it all but the part linear in the
        states.
        """
        pushed = [*(self._driven if driven else ()), *((v.output, x) for v, x in states.items())]
        return _vector_jacobian_product(pushed, wanted, retain_graph=retain_graph)

    def _pull(self, pushed: Sequence[tuple[Tensor, Tensor]], onto: Sequence[Vertex]) -> States:
        arrived = _vector_jacobian_product(pushed, [v.leaf for v in onto])
        return {v: _at_least_float32(x) for v, x in zip(onto, arrived, strict=True) if x is not None}

    def check_trained(self) -> None:
        """Refuse a pass that read a tensor requiring grad which is neither a parameter nor an input.

        Raises:
            ValueError: there is such a tensor; no gradient could reach it.
        """
        known = {id(t) for t in self.trained} | {id(v.leaf) for v in self.recorded}
        ends = [*self.outputs, *(v.output for v in self.recorded)]
        stack: list[Node] = [get_gradient_edge(end).node for end in ends]
        seen: set[Node] = set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            stack.extend(above for above, _ in node.next_functions if above is not None)
            variable: Any = getattr(node, "variable", None) if type(node) is _AccumulateGrad else None
            if variable is not None and id(variable) not in known:
                raise ValueError(
                    f"the model read a tensor of shape {tuple(variable.shape)} that requires grad but is neither one "
                    "of its parameters nor one of its inputs, so no gradient can reach it: register it as an "
                    "nn.Parameter, pass it to the model as an argument, or detach it"
                )


def _vector_jacobian_product(
    pushed: Sequence[tuple[Tensor, Tensor]], onto: Sequence[Tensor], *, retain_graph: bool = True
) -> Gradients:
    if not pushed or not onto:
        return (None,) * len(onto)
    return torch.autograd.grad(
        outputs=[tensor for tensor, _ in pushed],
        inputs=onto,
        grad_outputs=[x if x.dtype == tensor.dtype else x.to(tensor.dtype) for tensor, x in pushed],
        retain_graph=retain_graph,
        allow_unused=True,
    )


def _at_least_float32(x: Tensor) -> Tensor:
    """States are sums over many steps: half-precision activities relax in float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _inputs_first(ends: Iterable[Tensor], vertex_of: Mapping[int, Vertex]) -> dict[_Place, list[_Place]]:
    """What the tensors ``ends`` were computed from: every place with its inputs, which come before the place itself.

    Vertices (given by the id of their leaf) join the graph where it was cut; parameters are left out.
    """
    ordered: dict[_Place, list[_Place]] = {}
    seen: set[_Place] = set()
    stack: list[tuple[_Place, list[_Place] | None]] = [(_place(end, vertex_of), None) for end in ends]
    while stack:
        place, inputs = stack.pop()
        if inputs is not None:
            ordered[place] = inputs
        elif place not in seen:
            seen.add(place)
            inputs = [_place(place.output, vertex_of)] if isinstance(place, Vertex) else []
            if not isinstance(place, Vertex):
                for node, _ in place.next_functions:
                    if type(node) is _AccumulateGrad:
                        vertex = vertex_of.get(id(node.variable))  # type: ignore[union-attr]
                        if vertex is not None:
                            inputs.append(vertex)
                    elif node is not None:
                        inputs.append(node)
            stack.append((place, inputs))
            stack.extend((above, None) for above in inputs)
    return ordered


def _place(tensor: Tensor, vertex_of: Mapping[int, Vertex]) -> _Place:
    return vertex_of.get(id(tensor)) or tensor.grad_fn or get_gradient_edge(tensor).node
