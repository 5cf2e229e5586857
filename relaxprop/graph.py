r"""A forward pass recorded with its graph cut at every vertex.

Each vertex v keeps two tensors of the feedforward pass: ``output``, still attached to what computed it, and
``leaf``, a detached alias of the same value that the rest of the model reads. The derivative of the outputs by
the leaves is then the local Jacobian J, and one call of PyTorch's engine applies it on any graph:

    source       s_i = the part of ∂L/∂x_i that reaches i through no other vertex
    transport    (A x)_i = Σ_{j∈Chi(i)} J_ji^T x_j                                   the sum in (1) and (7)
    gradients    ∂L/∂W = Σ_j (∂x_j/∂W)^T x_j, over the vertices that read W           equation (2)

all of them at a `Linearisation`: the feedforward pass, or, for what is not frozen, the model run again at the current
states. ``States`` map a vertex to a tensor of the vertex's shape; a vertex that is absent counts as zero.
Source: Millidge et al., arXiv 2010.06219, section 2 and Appendix A.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from relaxprop.derivatives import Phase
from relaxprop.frozen import ALL_FROZEN, Frozen


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
Pushed = tuple[Sequence[Tensor | GradientEdge], Sequence[Tensor]]  # where products with Jacobians start, and of what


class Layer(NamedTuple):
    """A call of a module with parameters of its own."""

    module: nn.Module
    output: GradientEdge


class Linearisation(NamedTuple):
    """One run of the model, its graph cut at every vertex: where Jacobians are taken.

    Attributes:
        cuts: by vertex of the feedforward pass, the vertex in this run.
        outputs: the tensors of the model's result that require grad.
        layers: in the order of their calls; recorded where the update is split.
    """

    cuts: Mapping[Vertex, Vertex]
    outputs: Sequence[Tensor]
    layers: Sequence[Layer] = ()


class Graph:
    """A recorded forward pass.

    Args:
        stored: the feedforward pass; its vertices in their order.
        phase: tells the pass's dropped derivatives whether (1) or (2) is taken.
        clamped: whether a vertex that is itself the output is held at ∂L/∂x^L.
        frozen: what is taken at the feedforward pass, and what at the current states.
        rerun: runs the model again with every vertex set to its state; needed where something is not frozen.
        masked: whether there may be activities at the end of their type's range, which start at zero.

    Attributes:
        recorded: the vertices in the order of the feedforward pass.
        vertices: those that the driven outputs depend on (at first: that any output depends on), those with fewer
            vertices upstream first.
        depth: D, the number of vertices on the longest path.
        read: the leaf tensors that the outputs were computed from, vertices aside: parameters and inputs, by their id.
    """

    def __init__(
        self,
        stored: Linearisation,
        phase: Phase,
        *,
        clamped: bool = True,
        frozen: Frozen = ALL_FROZEN,
        rerun: Callable[[States], Linearisation] | None = None,
        masked: bool = False,
    ) -> None:
        self.stored = stored
        self.recorded = list(stored.cuts)
        self.outputs = stored.outputs
        self.phase = phase
        self.clamped = clamped
        self.frozen = frozen
        self.rerun = rerun
        self.masked = masked
        self._output_gradients: Sequence[Tensor | None] = [None] * len(self.outputs)
        self._source: States | None = None
        self._placed = [True] * len(self.outputs)
        self._place_vertices(self.outputs)

    def drive_outputs(self, gradients: Sequence[Tensor | None]) -> None:
        """Set ∂L/∂(outputs).

        A vertex that the loss does not depend on is no part of the loss's computation graph: it does not relax,
        and what is above it gets no gradient, as in backpropagation.
        """
        self._output_gradients = gradients
        self._source = None
        driven = [gradient is not None for gradient in gradients]
        if driven != self._placed:
            self._placed = driven
            self._place_vertices(self._driven(self.stored)[0])

    def _driven(self, at: Linearisation) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs that the loss depends on, and ∂L/∂(outputs)."""
        outputs, gradients = [], []
        for y, g in zip(at.outputs, self._output_gradients, strict=True):
            if g is not None:
                outputs.append(y)
                gradients.append(g)
        return outputs, gradients

    def _pushed(self, states: States, at: Linearisation) -> tuple[list[Tensor], list[Tensor]]:
        """The vertices, and their states in the activities' type."""
        cuts = at.cuts
        outputs, pushed = [cuts[v].output for v in states], list(states.values())
        if self._converts:
            pushed = [x.to(y.dtype) for x, y in zip(pushed, outputs, strict=True)]
        return outputs, pushed

    def _pushed_and_driven(self, states: States, at: Linearisation) -> Pushed:
        outputs, gradients = self._driven(at)
        computed, pushed = self._pushed(states, at)
        return outputs + computed, gradients + pushed

    def _place_vertices(self, outputs: Sequence[Tensor]) -> None:
        """Longest paths through the autograd graph joined at its cuts, in time linear in its size."""
        vertex_of = {id(v.leaf): v for v in self.recorded}
        read: dict[int, Tensor] = {}
        inputs_of: dict[_Place, list[_Place]] = {}
        upstream: dict[_Place, int] = {}
        stack = [_place(output, vertex_of) for output in outputs]
        self._ends = [place for place in stack if type(place) is Vertex]
        while stack:
            place = stack[-1]
            inputs = inputs_of.get(place)
            if inputs is None:
                inputs_of[place] = inputs = _inputs_of(place, vertex_of, read)
                if inputs:
                    stack += inputs
                    continue
            stack.pop()
            if place in upstream:
                continue
            longest = 0
            for above in inputs:
                if upstream[above] > longest:
                    longest = upstream[above]
            if type(place) is Vertex:
                place.upstream = longest
                longest += 1
            upstream[place] = longest
        self.read = read
        self._inputs = inputs_of
        self._upstream = upstream  # a place's inputs stand before it
        self.vertices = sorted([place for place in upstream if type(place) is Vertex], key=_upstream)
        self._counts = [v.upstream for v in self.vertices]
        self._converts = not _HALF.isdisjoint([v.leaf.dtype for v in self.vertices])
        self.depth = self._counts[-1] + 1 if self._counts else 0

    def heights(self, uncounted: Collection[Vertex] = ()) -> dict[Vertex, int]:
        """How many vertices are below each vertex on the longest path to the output."""
        height = dict.fromkeys(self._upstream, 0)
        found: dict[Vertex, int] = {}
        for place in reversed(self._upstream):
            longest = height[place]
            if type(place) is Vertex:
                found[place] = longest
                longest += place not in uncounted
            for above in self._inputs[place]:
                height[above] = max(height[above], longest)
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
        read = {above for inputs in self._inputs.values() for above in inputs}
        return [v for v in self._ends if v not in read]

    def with_upstream(self, count: int) -> list[Vertex]:
        """The vertices that have at least ``count`` vertices upstream of them."""
        return self.vertices[bisect_left(self._counts, count) :]

    def linearise(self, states: States) -> Linearisation:
        """Where (1) takes its Jacobians: the feedforward pass, or the current states if its derivative is unfrozen."""
        return self.stored if self.frozen.relaxation_derivative else self._current(states)

    def _current(self, states: States) -> Linearisation:
        assert self.rerun is not None
        return self.rerun(states)

    def source(self, at: Linearisation | None = None) -> States:
        """s: what reaches each vertex from ∂L/∂(outputs) through no other vertex."""
        if at is not None and at is not self.stored:
            return self._pull(self._driven(at), self.vertices, at)
        if self._source is None:
            self._source = self._pull(self._driven(self.stored), self.vertices, self.stored)
        return self._source

    def output_scale(self) -> float:
        """The largest number in ∂L/∂(outputs)."""
        return max([float(g.abs().max()) for g in self._driven(self.stored)[1] if g.numel()], default=0.0)

    def initial_states(self) -> States:
        """x̄, in float32 at least. A vertex that is itself the output and is read by none starts (and so stays)
        at ∂L/∂x^L where the output is clamped."""
        states = {v: v.leaf.detach() for v in self.vertices}
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
        at = at or self.stored
        return self._pull(self._pushed(states, at), self.vertices if onto is None else onto, at)

    def drive(self, states: States) -> States:
        """A x + s at every vertex, the Jacobians taken where (1) takes them."""
        at = self.linearise(states)
        if at is self.stored:
            arriving, source = self.transport(states), self.source()
            for v, s in source.items():
                arriving[v] = arriving[v] + s if v in arriving else s
        else:
            arriving = self._pull(self._pushed_and_driven(states, at), self.vertices, at)
        return {v: arriving[v] if v in arriving else v.zeros() for v in self.vertices}

    def sweep(self, settle: Callable[[Vertex, Tensor], Tensor], at: Linearisation | None = None) -> States:
        """One pass from the output to the input: ``x_v = settle(v, (A x)_v + s_v)``, with the x already settled."""
        levels = self.levels()
        arriving = dict(self.source(at))
        states: States = {}
        for height, level in enumerate(levels):
            settled = {v: settle(v, arriving.pop(v) if v in arriving else v.zeros()) for v in level}
            above = [v for higher in levels[height + 1 :] for v in higher]
            for vertex, x in self.transport(settled, above, at).items():
                arriving[vertex] = arriving[vertex] + x if vertex in arriving else x
            states |= settled
        return states

    def gradients(
        self,
        states: States,
        wanted: Sequence[Tensor],
        *,
        at: Linearisation | None = None,
        driven: bool = True,
        updating: bool = True,
        retain_graph: bool = True,
    ) -> Gradients:
        """(2) at one linearisation: the gradients of ``wanted`` given the states; None for a tensor that the loss does
        not depend on.

        ``driven=False`` leaves out what comes from ∂L/∂(outputs) directly, and with it all but the part linear in the
        states. ``updating=False`` takes the derivatives of the relaxation phase: an input's error, as in (1).
        """
        at = at or self.stored
        pushed = self._pushed_and_driven(states, at) if driven else self._pushed(states, at)
        with self.phase if updating else nullcontext(), _without_hooks(wanted):
            return _vector_jacobian_product(pushed, wanted, retain_graph=retain_graph)

    def update(
        self, states: States, inputs: Sequence[Tensor], parameters: Sequence[Tensor], *, retain_graph: bool = True
    ) -> Gradients:
        """(2), each factor at the feedforward pass or at the states, as `Frozen` says; before it the inputs' errors,
        which are the relaxation phase's, as in (1).

        Raises:
            ValueError: the factors differ and a parameter is read outside of the module that it belongs to.
        """
        frozen, stored = self.frozen, self.stored
        update_is_stored = frozen.update_derivative and frozen.update_activity
        current = stored
        if not update_is_stored or (inputs and not frozen.relaxation_derivative):
            current = self._current(states)
        relaxation = stored if frozen.relaxation_derivative or not inputs else current
        derivative = stored if frozen.update_derivative else current
        activity = stored if frozen.update_activity else current
        if relaxation is derivative is activity and not (inputs and self.phase.differs):
            return self.gradients(states, [*inputs, *parameters], at=activity, retain_graph=retain_graph)
        errors: Gradients = ()
        if inputs:
            errors = self.gradients(states, inputs, at=relaxation, updating=False)
        if derivative is activity:
            return errors + self.gradients(states, parameters, at=activity, retain_graph=retain_graph)
        return errors + self._split_update(states, parameters, derivative, activity)

    def _split_update(
        self, states: States, parameters: Sequence[Tensor], derivative: Linearisation, activity: Linearisation
    ) -> Gradients:
        """(2) as a product of two factors: the errors ``f'(u) ⊙ x`` at what the layers computed, u, from the one
        linearisation, and ``∂u/∂W``, which holds the presynaptic activity, from the other."""
        pushed = self._pushed_and_driven(states, derivative)
        with self.phase, _without_hooks(parameters):
            errors = _vector_jacobian_product(pushed, [layer.output for layer in derivative.layers])
            self._check_layers(activity, parameters)
            # What a layer passes on to the layers before it has the activity's derivatives: the errors replace it.
            pairs = [(layer.output, e) for layer, e in zip(activity.layers, errors, strict=True)]
            reached = [u for u, e in pairs if e is not None], [e for e in errors if e is not None]
            with _replaced_gradients(pairs):
                return _vector_jacobian_product(reached, parameters)

    def _check_layers(self, at: Linearisation, parameters: Sequence[Tensor]) -> None:
        """Refuse parameters that are read outside of their layers: where their derivative ends, nobody can say."""
        trained = {id(p) for p in parameters}
        layers: dict[Node, set[int]] = {}  # what each may read; a module may return what another did
        for module, output in at.layers:
            layers.setdefault(output.node, set()).update(map(id, module.parameters()))
        ends = self._driven(at)[0] + [at.cuts[v].output for v in self.vertices]
        between = [node for end in ends if (node := get_gradient_edge(end).node) not in layers]
        for stack, own in [(between, set[int]()), *(([node], own) for node, own in layers.items())]:
            seen = set[Node]()
            while stack:
                node = stack.pop()
                if node in seen:
                    continue
                seen.add(node)
                for above, _ in node.next_functions:
                    if type(above) is not _AccumulateGrad:
                        if above is not None and above not in layers:
                            stack.append(above)
                    elif (key := id(cast(Any, above).variable)) in trained and key not in own:
                        raise ValueError(
                            f"frozen: a parameter of shape {tuple(cast(Any, above).variable.shape)} is read outside of "
                            "a call of the module that it belongs to (as weights tied in a function, or in a module "
                            "with layers of its own), so the derivative and the presynaptic activity of its update "
                            "cannot be told apart: freeze or unfreeze update_derivative and update_activity together, "
                            "or read it in a module of its own"
                        )

    def _pull(self, pushed: Pushed, onto: Sequence[Vertex], at: Linearisation) -> States:
        cuts = at.cuts
        arrived = _vector_jacobian_product(pushed, [cuts[v].leaf for v in onto])
        states = {v: x for v, x in zip(onto, arrived, strict=True) if x is not None}
        return {v: _at_least_float32(x) for v, x in states.items()} if self._converts else states


def _vector_jacobian_product(
    pushed: Pushed, onto: Sequence[Tensor | GradientEdge], *, retain_graph: bool = True
) -> Gradients:
    """``torch.autograd.grad`` without what it does before it calls the engine, which costs as much as a small layer."""
    outputs, states = pushed
    if not outputs or not onto:
        return (None,) * len(onto)
    return _engine.run_backward(
        tuple(outputs), tuple(states), retain_graph, False, tuple(onto), allow_unreachable=True, accumulate_grad=False
    )


_engine = torch.autograd.Variable._execution_engine


def _without_hooks(tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Sets aside the hooks of parameters and inputs.

    They are there (to clip, to log) for the final gradient, which PyTorch shows them later; they would also run on what
    is taken in between.
    """
    hooked = [hooks for t in tensors if (hooks := t._backward_hooks)]
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


_HALF = {torch.bfloat16, torch.float16}


def _at_least_float32(x: Tensor) -> Tensor:
    """States are sums over many steps: half-precision activities relax in float32."""
    return x.float() if x.dtype in _HALF else x


def _within_range(x: Tensor) -> Tensor:
    """Zero for what a mask has put at −∞ or close to it: no sum of such numbers is finite, and any start will do."""
    return x.masked_fill(x.abs() > math.sqrt(torch.finfo(x.dtype).max), 0)


def _inputs_of(place: _Place, vertex_of: Mapping[int, Vertex], read: dict[int, Tensor]) -> list[_Place]:
    """What a place was computed from directly.

    Vertices, by the id of their leaf, join the graph where it was cut. The other leaf tensors go into ``read``.
    """
    if type(place) is Vertex:
        return [_place(place.output, vertex_of)]
    inputs: list[_Place] = []
    edges = ((place, 0),) if type(place) is _AccumulateGrad else cast(Node, place).next_functions
    for node, _ in edges:
        if type(node) is _AccumulateGrad:
            variable: Tensor = cast(Any, node).variable
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
