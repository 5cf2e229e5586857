r"""The recorded graph: which vertex reads which, and the operator A of equation (1).

Each vertex v keeps two tensors of the feedforward pass: ``output``, still attached to what computed it, and
``stand_in``, a detached alias of the same value that the rest of the model reads in the vertex's place. The derivative
of the outputs by the stand-ins is then the local Jacobian J, and one call of PyTorch's engine applies it on any graph:

    source       s_i = the part of ∂L/∂x_i that reaches i through no other vertex
    transport    (A x)_i = Σ_{j∈Chi(i)} J_ji^T x_j                                   the sum in (1) and (7)
    drive        A x + s
    advance      x_v = settle(v, (A x)_v + s_v), with the x before the step
    sweep        the same from the output towards the input, with the x already settled
    equilibrium  x = A x + s, by one sweep

A cotangent is what the engine is given for a tensor (a state for a vertex, ∂L/∂x^L for an output); a vector-Jacobian
product is what it makes of them. All are taken at a `Linearisation`: the feedforward pass, or the model run again at
the current states. ``States`` map a vertex to a tensor of the vertex's shape; a vertex that is absent counts as zero.
Source: Millidge et al., arXiv 2010.06219, section 2 and Appendix A.

May import: _pytorch.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple, Protocol, cast, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from relaxprop._pytorch import is_leaf_node, leaf_of, run_backward


@final
class Vertex:
    """One activity of the graph: a tensor that a module or an operation computed in the feedforward pass."""

    __slots__ = ("name", "output", "stand_in", "upstream")

    def __init__(self, name: str, output: Tensor, stand_in: Tensor) -> None:
        self.name = name
        self.output = output
        self.stand_in = stand_in
        self.upstream = 0  # vertices before this one on the longest path from the input

    def __repr__(self) -> str:
        return f"Vertex({self.name!r}, shape={tuple(self.stand_in.shape)})"

    def zeros(self) -> Tensor:
        """The state zero."""
        return _at_least_float32(torch.zeros_like(self.stand_in))


# Bytes of states for which PyTorch's engine is called once, since a call takes as long as it takes to fill so many.
SMALL = 1 << 18

States = dict[Vertex, Tensor]
Gradients = tuple[Tensor | None, ...]
_Place = Node | Vertex


class Layer(NamedTuple):
    """A call of a module with parameters of its own."""

    own: frozenset[int]  # the ids of these parameters in the call
    output: GradientEdge


class Linearisation(NamedTuple):
    """One run of the model, its graph cut at every vertex: where Jacobians are taken.

    Attributes:
        cuts: by vertex of the feedforward pass, the vertex in this run.
        outputs: the tensors of the model's result that require grad.
        layers: in the order of their calls; recorded where the weight update needs them.
        switches: the nodes that pass an error on differently in (1) and in (2) (`derivatives`).
    """

    cuts: Mapping[Vertex, Vertex]
    outputs: Sequence[Tensor]
    layers: Sequence[Layer] = ()
    switches: Sequence[Node] = ()


class Cotangents(NamedTuple):
    """What a product with Jacobians starts from: a cotangent for each of some tensors."""

    tensors: Sequence[Tensor | GradientEdge]
    values: Sequence[Tensor]


# What is made of a linearisation and of the states, by PyTorch alone; None where nothing depends on them.
Function = Callable[[Linearisation, States], Sequence[Tensor | None]]


class Anew(Protocol):
    """The model run again at given states (`rerun`)."""

    def __call__(self, states: States, *, layers: bool = False) -> Linearisation: ...

    def compute(
        self, states: States, function: Function, key: object, beside: Sequence[Tensor | None], times: int = 1
    ) -> Sequence[Tensor | None]: ...


class Graph:
    """A recorded forward pass.

    Args:
        stored: the feedforward pass; its vertices in their order.
        clamped: whether a vertex that is itself the output is held at ∂L/∂x^L.
        from_zero: whether the states start at zero, and not at x̄.
        masked: whether there may be activities at the end of their type's range, which start at zero.
        linearise: the Jacobians of (1) at given states; None where they are those of the feedforward pass, so that (1)
            is linear.

    Attributes:
        recorded: the vertices in the order of the feedforward pass.
        vertices: those that the driven outputs depend on (at first: that any output depends on), those with fewer
            vertices upstream first.
        depth: D, the number of vertices on the longest path.
        read: the leaf tensors that the outputs were computed from, vertices aside: parameters and inputs, by their id.
        ends: by the same ids, where their gradients arrive. (A tensor that was given other data of another type since
            does not know it any more.)
    """

    def __init__(
        self,
        stored: Linearisation,
        *,
        clamped: bool = True,
        from_zero: bool = False,
        masked: bool = False,
        linearise: Anew | None = None,
    ) -> None:
        self.stored = stored
        self.recorded = list(stored.cuts)
        self.outputs = stored.outputs
        self.clamped = clamped
        self.from_zero = from_zero
        self.masked = masked
        self._linearise = linearise
        self._output_cotangents: Sequence[Tensor | None] = [None] * len(self.outputs)
        self._source: States | None = None
        self._pieces: dict[Vertex, tuple[list[Vertex], list[Vertex]]] | None = None
        self._placed = [True] * len(self.outputs)
        self._place_vertices(self.outputs)

    # ------------------------------------------------------------------------------------------------ its topology

    def drive_outputs(self, cotangents: Sequence[Tensor | None]) -> None:
        """Set ∂L/∂(outputs).

        A vertex that the loss does not depend on is no part of the loss's computation graph: it does not relax,
        and what it alone was computed from gets no gradient, as in backpropagation.
        """
        self._output_cotangents = cotangents
        self._source = None
        driven = [cotangent is not None for cotangent in cotangents]
        if driven != self._placed:
            self._placed = driven
            self._place_vertices([y for y, is_driven in zip(self.outputs, driven, strict=True) if is_driven])

    def _place_vertices(self, outputs: Sequence[Tensor]) -> None:
        """Longest paths through the autograd graph joined at its cuts, in time linear in its size."""
        vertex_of = {id(v.stand_in): v for v in self.recorded}
        read: dict[int, Tensor] = {}
        ends: dict[int, GradientEdge] = {}
        inputs_of: dict[_Place, list[_Place]] = {}
        upstream: dict[_Place, int] = {}
        stack = [_place(output, vertex_of) for output in outputs]
        self._ends = [place for place in stack if type(place) is Vertex]
        while stack:
            place = stack[-1]
            inputs = inputs_of.get(place)
            if inputs is None:
                inputs_of[place] = inputs = _inputs_of(place, vertex_of, read, ends)
                if inputs:
                    stack += inputs
                    continue
            stack.pop()
            if place in upstream:
                continue
            longest = 0
            for source in inputs:
                if upstream[source] > longest:
                    longest = upstream[source]
            if type(place) is Vertex:
                place.upstream = longest
                longest += 1
            upstream[place] = longest
        self.read, self.ends = read, ends
        self._pieces = None
        self._inputs = inputs_of
        self._upstream = upstream  # a place's inputs stand before it
        self.vertices = sorted([place for place in upstream if type(place) is Vertex], key=_upstream)
        self._counts = [v.upstream for v in self.vertices]
        self._converts = not _HALF.isdisjoint([v.stand_in.dtype for v in self.vertices])
        self.depth = self._counts[-1] + 1 if self._counts else 0

    def heights(self, uncounted: Collection[Vertex] = ()) -> dict[Vertex, int]:
        """How many vertices lie between each vertex and the output on the longest path there."""
        height = dict.fromkeys(self._upstream, 0)
        found: dict[Vertex, int] = {}
        for place in reversed(self._upstream):
            longest = height[place]
            if type(place) is Vertex:
                found[place] = longest
                longest += place not in uncounted
            for source in self._inputs[place]:
                height[source] = max(height[source], longest)
        return found

    def levels(self) -> list[list[Vertex]]:
        """The vertices by height."""
        levels: list[list[Vertex]] = [[] for _ in range(self.depth)]
        for vertex, height in self.heights().items():
            levels[height].append(vertex)
        return levels

    def held(self) -> list[Vertex]:
        """The vertices that are a driven output themselves and that no other reads: clamped, they stay at ∂L/∂x^L."""
        if not (self.clamped and self._ends):
            return []
        read = {source for inputs in self._inputs.values() for source in inputs}
        return [v for v in self._ends if v not in read]

    def with_upstream(self, count: int) -> list[Vertex]:
        """The vertices that have at least ``count`` vertices upstream of them."""
        return self.vertices[bisect_left(self._counts, count) :]

    def _fall_apart(self) -> dict[Vertex, tuple[list[Vertex], list[Vertex]]]:
        """The pieces that the graph falls into where it is cut, so that a product with A is one with each of them.

        By the first vertex that a piece reads, all that it reads, and all that it computes. Small pieces are together.
        """
        within: dict[_Place, _Place] = {place: place for place in self._upstream}

        def piece(place: _Place) -> _Place:
            while within[place] is not place:
                within[place] = place = within[within[place]]
            return place

        for place in self._upstream:
            if type(place) is not Vertex:  # a vertex is read in one piece and computed in another
                for source in self._inputs[place]:
                    within[piece(source)] = piece(place)
        read: dict[_Place, list[Vertex]] = {}
        computed: dict[_Place, list[Vertex]] = {}
        for v in self.vertices:
            read.setdefault(piece(v), []).append(v)
            computed.setdefault(piece(*self._inputs[v]), []).append(v)
        pieces: dict[Vertex, tuple[list[Vertex], list[Vertex]]] = {}
        size = SMALL + 1
        for place in [place for place in read if place in computed]:
            size += (own := sum([v.stand_in.nbytes for v in read[place]]))
            if size > SMALL:
                size, together = own, pieces.setdefault(read[place][0], ([], []))
            together[0].extend(read[place])
            together[1].extend(computed[place])
        return pieces

    def _read_by(self, vertices: Iterable[Vertex]) -> list[Vertex]:
        """The vertices that any of the given ones reads directly."""
        found: dict[Vertex, None] = {}
        stack = [source for v in vertices for source in self._inputs[v]]
        seen = set[Node]()
        while stack:
            place = stack.pop()
            if type(place) is Vertex:
                found[place] = None
            elif place not in seen:
                seen.add(place)
                stack += self._inputs[place]
        return list(found)

    def ends_of(self, tensors: Iterable[Tensor]) -> list[Tensor | GradientEdge]:
        """Where the gradients of inputs and parameters arrive."""
        return [self.ends.get(id(x), x) for x in tensors]

    def is_between(self, place: int) -> bool:
        """Whether other outputs, which the loss depends on, were computed from the one at this place."""
        if all(g is None for i, g in enumerate(self._output_cotangents) if i != place):
            return False
        output = self.stored.outputs[place]
        stand_in = next((v for v in self.recorded if v.stand_in is output), None)
        return any((stand_in or output.grad_fn) in inputs for inputs in self._inputs.values())

    def __contains__(self, node: Node) -> bool:
        """Whether any output was computed by the node of PyTorch's graph."""
        return node in self._inputs

    @property
    def size(self) -> int:
        """The number of vertices and of nodes of PyTorch's graph."""
        return len(self._upstream)

    def nodes(self) -> list[Node]:
        """The nodes of PyTorch's graph, each after those that it reads."""
        return [place for place in self._upstream if type(place) is not Vertex]

    # ---------------------------------------------------------------------------------------------- the operator A

    @property
    def is_linear(self) -> bool:
        """Whether (1) takes its Jacobians at the feedforward pass, so that its drive ``A x + s`` is linear in x."""
        return self._linearise is None

    def linearise(self, states: States) -> Linearisation:
        """Where (1) takes its Jacobians."""
        return self.stored if self._linearise is None else self._linearise(states)

    def compute(self, states: States, function: Function, key: object, times: int = 1) -> Sequence[Tensor | None]:
        """What a function makes of the states and of the linearisation there, in a nonlinear relaxation.

        Args:
            states: of the vertices.
            function: of a linearisation and the states; beside these it reads ∂L/∂(outputs) alone.
            key: functions of one key make the same.
            times: how often: if more than once, the function makes the states of the next time.
        """
        assert self._linearise is not None
        return self._linearise.compute(states, function, key, self._output_cotangents, times)

    def source(self, at: Linearisation | None = None) -> States:
        """s: what reaches each vertex from ∂L/∂(outputs) through no other vertex."""
        if at is not None and at is not self.stored:
            return self._arriving(self._output_cotangents_at(at), self.vertices, at)
        if self._source is None:
            self._source = self._arriving(self._output_cotangents_at(self.stored), self.vertices, self.stored)
        return self._source

    @property
    def output_cotangents(self) -> Sequence[Tensor | None]:
        """∂L/∂(outputs), as `drive_outputs` was given them."""
        return self._output_cotangents

    def output_scale(self) -> float:
        """The largest number in ∂L/∂(outputs)."""
        cotangents = self._output_cotangents_at(self.stored).values
        return max([float(g.abs().max()) for g in cotangents if g.numel()], default=0.0)

    def initial_states(self) -> States:
        """x_0: x̄, in float32 at least, or zero. A vertex that is itself the output and is read by none starts (and so
        stays) at ∂L/∂x^L where the output is clamped."""
        if self.from_zero:
            states = {v: v.zeros() for v in self.vertices}
        else:
            states = {v: v.stand_in.detach() for v in self.vertices}
            if self._converts:
                states = {v: _at_least_float32(x) for v, x in states.items()}
            if self.masked:
                states = {v: _within_range(x) for v, x in states.items()}
        for v in self.held():
            states[v] = self.source()[v]
        return states

    def transport(
        self, states: States, onto: Sequence[Vertex] | None = None, at: Linearisation | None = None
    ) -> States:
        """A x at the vertices ``onto`` (by default at all): one product with every local Jacobian."""
        at, onto = at or self.stored, self.vertices if onto is None else onto
        return self._product(states, onto, at, driven=False)

    def drive(self, states: States) -> States:
        """A x + s at every vertex, the Jacobians taken where (1) takes them."""
        if not self.is_linear:
            found = self.compute(states, lambda at, states: [*self.drive_at(at, states).values()], "drive")
            return cast(States, dict(zip(self.vertices, found, strict=True)))
        arriving = self.transport(states)
        for v, s in self.source().items():
            arriving[v] = arriving[v] + s if v in arriving else s
        return {v: arriving[v] if v in arriving else v.zeros() for v in self.vertices}

    def drive_at(self, at: Linearisation, states: States) -> States:
        """A x + s at every vertex, the Jacobians taken at a given linearisation."""
        arriving = self._product(states, self.vertices, at, driven=True)
        return {v: arriving[v] if v in arriving else v.zeros() for v in self.vertices}

    def sweep(self, settle: Callable[[Vertex, Tensor], Tensor], at: Linearisation | None = None) -> States:
        """One pass from the output towards the input: ``x_v = settle(v, (A x)_v + s_v)``, with the x already
        settled. ``settle`` writes into nothing that it is given."""
        return self._sweep(lambda v, arriving: settle(v, v.zeros() if arriving is None else arriving), at)

    def equilibrium(self) -> States:
        """``x = A x + s``, where all vertices rest. One that nothing reaches is absent, so that what is computed from
        it alone has no gradient, as in backpropagation."""
        return self._sweep(lambda _, arriving: arriving, None)

    def _sweep(self, settle: Callable[[Vertex, Tensor | None], Tensor | None], at: Linearisation | None) -> States:
        arriving = dict(self.source(at))
        states: States = {}
        for level in self.levels():
            settled = {v: x for v in level if (x := settle(v, arriving.pop(v, None))) is not None}
            # Only those that the level reads: asking for all that are still to come is quadratic in depth.
            for vertex, x in self.transport(settled, self._read_by(settled), at).items():
                arriving[vertex] = arriving[vertex] + x if vertex in arriving else x
            states |= settled
        return states

    def advance(self, states: States, settle: Callable[[Vertex, Tensor], Tensor]) -> States:
        """``x_v = settle(v, (A x)_v + s_v)`` at every vertex, with the x that are given.

        Where (1) is linear, from the input towards the output: what x_v drives is settled before v is, so that
        ``settle`` may write into x_v.
        """
        if not self.is_linear:
            return {v: settle(v, drive) for v, drive in self.drive(states).items()}
        if self._pieces is None:
            self._pieces = self._fall_apart()
        pieces, source, arrived = self._pieces, self.source(), States()

        def drive(v: Vertex) -> Tensor:
            if v in pieces:
                read, computed = pieces[v]
                arrived.update(self.transport({w: states[w] for w in computed}, read))
            if v not in arrived:
                return source[v] if v in source else v.zeros()
            return arrived.pop(v) + source[v] if v in source else arrived.pop(v)

        return {v: settle(v, drive(v)) for v in self.vertices}

    def _product(self, states: States, onto: Sequence[Vertex], at: Linearisation, *, driven: bool) -> States:
        try:
            return self._arriving(self.cotangents(states, at, driven=driven), onto, at)
        except Exception:
            check_are_states(states, self)  # PyTorch names no vertex
            raise

    def cotangents(self, states: States, at: Linearisation, *, driven: bool = True) -> Cotangents:
        """The vertices' states in their activities' type and, where ``driven``, ∂L/∂(outputs)."""
        cuts = at.cuts
        tensors, values = [cuts[v].output for v in states], list(states.values())
        if self._converts:
            values = [x.to(y.dtype) for x, y in zip(values, tensors, strict=True)]
        if not driven:
            return Cotangents(tensors, values)
        outputs = self._output_cotangents_at(at)
        return Cotangents([*outputs.tensors, *tensors], [*outputs.values, *values])

    def _output_cotangents_at(self, at: Linearisation) -> Cotangents:
        """The outputs that the loss depends on, and ∂L/∂(outputs)."""
        outputs, cotangents = [], []
        for y, g in zip(at.outputs, self._output_cotangents, strict=True):
            if g is not None:
                outputs.append(y)
                cotangents.append(g)
        return Cotangents(outputs, cotangents)

    def _arriving(self, cotangents: Cotangents, onto: Sequence[Vertex], at: Linearisation) -> States:
        cuts = at.cuts
        arrived = vector_jacobian_product(cotangents, [cuts[v].stand_in for v in onto])
        states = {v: x for v, x in zip(onto, arrived, strict=True) if x is not None}
        return {v: _at_least_float32(x) for v, x in states.items()} if self._converts else states


def check_are_states(states: Mapping[Vertex, Tensor], graph: Graph, by: str = "graph") -> None:
    """Refuse what is no state of a vertex: a tensor of its activity's shape, on its device.

    Args:
        states: by vertex.
        graph: whose vertices they are.
        by: who has made the states, or is given them, for the message.

    Raises:
        TypeError: if the states are no dictionary, or one is no tensor.
        ValueError: if a key is no vertex of the graph, or a state is not like the vertex's activity.
    """
    if not isinstance(states, Mapping):
        raise TypeError(f"{by}: the states must be a dictionary by vertex, got a {type(states).__name__}")
    if others := states.keys() - set(graph.recorded):
        names = ", ".join(sorted(map(repr, others))[:3])
        raise ValueError(
            f"{by}: a state of what is none of graph.vertices: {names} (the key is the vertex, not its name)"
        )
    for vertex, x in states.items():
        what, activity = f"{by}: the state of vertex {vertex.name!r}", vertex.stand_in
        if not isinstance(x, Tensor):
            raise TypeError(f"{what} must be a tensor, got a {type(x).__name__}")
        if x.shape != activity.shape:
            raise ValueError(f"{what} has the shape {tuple(x.shape)}, but its activity has {tuple(activity.shape)}")
        if (x.device, x.layout) != (activity.device, activity.layout):
            raise ValueError(
                f"{what} is {x.layout} on {x.device}, but its activity is {activity.layout} on {activity.device}"
            )
        if x.is_complex() and not activity.is_complex():
            raise ValueError(f"{what} is complex, but its activity is real")


def vector_jacobian_product(
    cotangents: Cotangents, onto: Sequence[Tensor | GradientEdge], *, retain_graph: bool = True
) -> Gradients:
    """``Σ_j (∂y_j/∂z)^T g_j`` for every z in ``onto``, given a cotangent g_j for each y_j; None where no y_j depends on
    z."""
    tensors, values = cotangents
    if not tensors or not onto:
        return (None,) * len(onto)
    return run_backward(tensors, values, onto, retain_graph=retain_graph)


_HALF = {torch.bfloat16, torch.float16}


def _at_least_float32(x: Tensor) -> Tensor:
    """States are sums over many steps: half-precision activities relax in float32."""
    return x.float() if x.dtype in _HALF else x


def _within_range(x: Tensor) -> Tensor:
    """Zero for what a mask has put at −∞ or close to it: no sum of such numbers is finite, and any start will do."""
    return x.masked_fill(x.abs() > math.sqrt(torch.finfo(x.dtype).max), 0)


def _inputs_of(
    place: _Place, vertex_of: Mapping[int, Vertex], read: dict[int, Tensor], ends: dict[int, GradientEdge]
) -> list[_Place]:
    """What a place was computed from directly.

    Vertices, by the id of their stand-in, join the graph where it was cut. The other leaf tensors go into ``read``, and
    their nodes into ``ends``.
    """
    if type(place) is Vertex:
        return [_place(place.output, vertex_of)]
    inputs: list[_Place] = []
    # A leaf's node reads nothing: where an output is a leaf, the place is that node.
    for node, _ in place.next_functions or ((place, 0),):
        if is_leaf_node(node):
            variable = leaf_of(node)
            vertex = vertex_of.get(id(variable))
            if vertex is None:
                read[id(variable)] = variable
                ends[id(variable)] = GradientEdge(node, 0)
            else:
                inputs.append(vertex)
        elif node is not None:
            inputs.append(node)
    return inputs


def _place(tensor: Tensor, vertex_of: Mapping[int, Vertex]) -> _Place:
    return vertex_of.get(id(tensor)) or tensor.grad_fn or get_gradient_edge(tensor).node


_upstream = attrgetter("upstream")
