r"""Follows PyTorch's graph of a recorded pass from every state and output towards the input, and says what is read.

No equation of any layer is known here. One forward pass is recorded as for training, and PyTorch's own graph of it is
followed from each vertex j, and from the output, to the vertices and parameters that j was computed from. On the way
a node's backward reads what the node has saved, and where a saved tensor came from tells what it is:

    from parameters only                           a weight, or a gain, that carries the error
    from an activity                               the derivative of a function that is not linear
    from an activity, on the parameter's branch    the presynaptic activity

May import: derivatives, feedback, frozen, graph, nested, rule, vertices, _pytorch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from relaxprop._pytorch import backward_class, is_leaf_node, leaf_of
from relaxprop.derivatives import EitherWay
from relaxprop.feedback import FeedbackRule, SendBack
from relaxprop.frozen import Frozen
from relaxprop.graph import Vertex
from relaxprop.nested import map_tensors, tensors_in, tensors_reached, tensors_requiring_grad
from relaxprop.rule import LearningRule
from relaxprop.vertices import find_layers

KINDS = {
    "weight transport": "W is known only to its layer's own synapses, but carries an error back",
    "weight signs": "the signs of W are known only to its layer's own synapses, but carry an error back",
    "memory of x̄": "non-local in time, as it has to be remembered while x relaxes",
    "minibatch": "batch norm's statistics are those of other samples too",
    "error broadcast": "the output's error comes to every vertex directly, past all layers between",
    "target broadcast": "the target comes to every vertex directly, past all layers",
    "two phases": "a difference between two phases, of which the first has to be remembered",
}


@dataclass(frozen=True)
class Reads:
    """What one update reads; x is a current state, x̄ an activity of the feedforward pass. Of rules whose activities
    move, v is a current activity and ε its error.

    Attributes:
        update: ``x of 1``, the state of vertex 1; or a layer's parameters, ``0.weight, 0.bias``.
        equation: 1, the relaxation, or 2, the weight update.
        activities: first the vertex's own state, or what is presynaptic to the layer (``pre: x̄ of 1``); then the
            states whose error arrives. ``∂L/∂output`` is held while x relaxes, and so is the input.
        weights: what carries these errors; empty for a direct connection.
        derivative: of each function on their way that is not linear, taken ``at x̄``, ``at x``, ``at input`` (where no
            state changes it), or ``dropped``.
        non_local: what of all this is not local, as ``kind: what``, the kind one of `KINDS`.
    """

    update: str
    equation: Literal[1, 2]
    activities: tuple[str, ...]
    weights: tuple[str, ...]
    derivative: tuple[str, ...]
    non_local: tuple[str, ...]


class _Leaf(NamedTuple):
    """Where the graph ends."""

    kind: Literal["vertex", "parameter", "input"]
    name: str


_INPUT = _Leaf("input", "input")


class _Use(NamedTuple):
    """Something that a node's backward reads.

    Attributes:
        kind: what it is; the last three are presynaptic.
        name: whose.
        moves: whether it was computed from a vertex, so that it changes while the states relax.
        within: the module that the node belongs to.
    """

    kind: Literal[
        "weight",
        "gain",
        "learned",
        "mirror",
        "random",
        "drawn",
        "sign",
        "derivative",
        "dropped",
        "minibatch",
        "vertex",
        "output",
        "input",
    ]
    name: str
    moves: bool = False
    within: str = ""


REMEMBERED = " at x̄"  # where x̄ is a memory; "at x̄" is where the activities still are it
_Uses = dict[_Use, None]  # a set that keeps its order
_Ways = Mapping[Node, Mapping[_Leaf, _Uses]]

# Linear in each argument, so that an error on its way to one of them reads the other ones only.
_LINEAR = {
    *("Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Addmv", "Dot", "Linear", "Convolution"),
    *("Mul", "Div", "Addcmul", "Lerp", "Trilinear", "NllLoss", "NllLoss2D"),
}
_SELECTIONS = {"Max", "Min", "Sort", "Topk", "Kthvalue", "Median", "Mode", "Cummax", "Cummin"}  # save no values
_GAINS = {"Mul", "Div", "Addcmul", "Lerp", "PreluKernel"}  # and norms: one number per unit, which the unit itself knows
_RECURRENT = {"MkldnnRnnLayer", "CudnnRnn", "MiopenRnn"}  # a layer with all its moments in one node
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_EITHER_WAY: Any = backward_class(EitherWay)
_SEND_BACK: Any = backward_class(SendBack)


class Words(NamedTuple):
    """How a rule's rows are spelt.

    Attributes:
        state: what the vertices' update changes.
        own: what a vertex reads of itself.
        error: what comes to an update from a vertex.
        activity: what is presynaptic, and where derivatives are taken, where it is no memory.
    """

    state: str = "x"
    own: tuple[str, ...] = ("own x",)
    error: str = "x"
    activity: str = "x"


RELAXATION = Words()


class Walk:
    """A recorded pass, and what is read on every way through its graph towards the input.

    Attributes:
        vertices: by vertex, the node that computed it.
        ends: by the name of an output's error, the node that computed the output.
        order: the nodes, each after all that it was computed from.
        computed_from: by node, those that it was computed from, each with the number of the edge.
        sources: by node, where the ways from it towards the input end.
        saved: by node, the tensors that it saved, each with the node that computed it.
        within: by node, the module without submodules that made it.
        returned: by node, the layer that returned what it computed.
    """

    def __init__(
        self,
        model: LearningRule,
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        frozen: Frozen,
        words: Words = RELAXATION,
    ) -> None:
        self.module, self.frozen, self.words = model.module, frozen, words
        self.names = {m: name or type(m).__name__ for name, m in model.module.named_modules()}
        self.modules = {name: m for m, name in self.names.items()}
        self.vertices: dict[Vertex, Node] = {}
        self.ends: dict[str, Node] = {}
        self.order: list[Node] = []
        self.computed_from: dict[Node, list[tuple[int, Node]]] = {}
        self.sources: dict[Node, frozenset[_Leaf]] = {}
        self.saved: dict[Node, list[tuple[Tensor, Node | None]]] = {}
        self.within: dict[Node, str] = {}
        self.returned: dict[Node, str] = {}
        self.joined: dict[int, Node] = {}  # by the id of a leaf where the graph is not cut, what computed it
        named = [(p, _plain(name)) for name, p in model.module.named_parameters()]
        self.leaves = {id(p): _Leaf("parameter", name) for p, name in named}
        # Parameters that are not trained are no part of the graph: what reads them is known by their memory.
        self.memory = {p.untyped_storage().data_ptr(): name for p, name in named if p.numel()}
        self._record(model, inputs, kwargs)

    def _record(self, model: LearningRule, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        # Where the input requires grad, the graph tells who reads it.
        traced = self.frozen.input and not tensors_requiring_grad((inputs, kwargs))
        if traced:
            inputs = [map_tensors(_traced, x) for x in inputs]
            kwargs = {name: map_tensors(_traced, x) for name, x in kwargs.items()}
        layers = set(find_layers(self.module))
        handles = [handle for m in self.names for handle in self._note(m, m in layers)]
        try:
            graph = model.record(inputs, kwargs).graph
            self.graph = graph  # in PyTorch 2.6, a node of an autograd.Function tells nothing once its graph is gone
        finally:
            for handle in handles:
                handle.remove()

        def is_real(node: Node) -> bool:
            return not traced or self.sources[node] != {_INPUT}

        for vertex in graph.recorded:
            node = self._visit(vertex.output)
            if not is_real(node):  # a vertex only because the input is traced
                self.joined[id(vertex.stand_in)] = node
                continue
            self.leaves[id(vertex.stand_in)] = _Leaf("vertex", vertex.name)
            if vertex in graph.vertices:
                self.vertices[vertex] = node
        nodes = [node for output in graph.outputs if is_real(node := self._visit(output))]
        self.ends = {f"∂L/∂output[{k}]" if len(nodes) > 1 else "∂L/∂output": node for k, node in enumerate(nodes)}
        self.clamped = {id(output) for output in graph.outputs} if graph.clamped else set()

    def _note(self, module: nn.Module, is_layer: bool) -> Iterator[RemovableHandle]:
        """Notes which nodes a module makes: those between what it is called with and what it returns."""
        name = self.names[module].partition(".parametrizations.")[0]
        is_whole = all(part == "parametrizations" for part, _ in module.named_children())
        calls: list[set[Node]] = []

        def on_call(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append({_node(x) for x in tensors_reached((args, kwargs))})

        def on_return(_: nn.Module, args: Any, output: Any) -> None:
            before = calls.pop()
            stack = [node for x in tensors_reached(output) if (node := _node(x)) not in before]
            if is_layer:
                self.returned |= dict.fromkeys(stack, name)
            while is_whole and stack:
                node = stack.pop()
                if node not in before and node not in self.within:
                    self.within[node] = name
                    stack += [earlier for earlier, _ in node.next_functions if earlier is not None]

        if is_layer or is_whole:
            yield module.register_forward_pre_hook(on_call, with_kwargs=True)
            yield module.register_forward_hook(on_return)

    def _visit(self, end: Tensor) -> Node:
        """Puts what a tensor was computed from in order, and finds its sources."""
        stack = [first := _node(end)]
        while stack:
            node = stack[-1]
            if node not in self.computed_from:
                self.computed_from[node] = self._computed_from(node)
                stack += [earlier for _, earlier in self.computed_from[node] if earlier not in self.sources]
                continue
            stack.pop()
            if node not in self.sources:
                self.saved[node] = [(x, _node(x) if x.requires_grad else None) for x in _saved(node)]
                self.sources[node] = self._sources(node)
                self.order.append(node)
                for x, computed in self.saved[node]:
                    if computed is not None and computed not in self.sources:
                        self._visit(x)  # it lies on no way from the node to the input
        return first

    def _computed_from(self, node: Node) -> list[tuple[int, Node]]:
        if is_leaf_node(node):
            joined = self.joined.get(id(leaf_of(node)))
            return [] if joined is None else [(0, joined)]
        return [(i, earlier) for i, (earlier, _) in enumerate(node.next_functions) if earlier is not None]

    def _sources(self, node: Node) -> frozenset[_Leaf]:
        if not self.computed_from[node]:
            return frozenset({self.leaves.get(id(leaf_of(node)), _INPUT)})
        sources = frozenset[_Leaf]().union(*(self.sources[earlier] for _, earlier in self.computed_from[node]))
        # What a layer returns is an activity, even if it was computed from parameters alone.
        return sources | {_INPUT} if node in self.returned or self._looks_up(node) else sources

    def _looks_up(self, node: Node) -> bool:
        """Whether the node takes from parameters what indices say: an embedding. Indices have no gradient."""
        return all(_are_parameters(self.sources[earlier]) for _, earlier in self.computed_from[node]) and any(
            computed is None and not _is_continuous(x) for x, computed in self.saved[node]
        )

    def _ways(self, kind: Literal["vertex", "parameter"]) -> _Ways:
        """By node and by the leaf where ways from it towards the input end, what is read on all of these ways.

        Those to vertices are the relaxation's, (1), those to parameters the update's, (2).
        """
        ways: dict[Node, dict[_Leaf, _Uses]] = {}
        for node in self.order:
            found: dict[_Leaf, _Uses] = {}
            ways[node] = found
            if not self.computed_from[node]:
                found |= {leaf: {} for leaf in self.sources[node] if leaf.kind == kind}
            for i, earlier in self.computed_from[node]:
                if isinstance(node, _EITHER_WAY) and i != (0 if node.dropped[kind == "parameter"] else 1):
                    continue
                uses = self._uses(node, i, earlier) if ways[earlier] else {}
                for leaf, further in ways[earlier].items():
                    found[leaf] = found.get(leaf, {}) | uses | further
        return ways

    def _uses(self, node: Any, i: int, earlier: Node) -> _Uses:
        """What a node's backward reads to send the error on along its edge i."""
        within = self.within.get(node, "")
        if isinstance(node, _EITHER_WAY):
            return {_Use("dropped", within): None} if i == 0 else {}
        if isinstance(node, _SEND_BACK):
            # The layer computes from a detached input, so the activity beside its weights is on the other edge.
            if i == 0:
                return self._presynaptic(node.next_functions[1][0], within)
            return self._backwards_weights(node.layer.feedback_rule, self.names[node.layer])
        operation = node.name().partition("Backward")[0]
        uses: _Uses = {}
        saved = self.saved[node]
        measures = "BatchNorm" in operation and getattr(node, "_saved_training", True)
        # Instance norm is PyTorch's batch norm of a batch that is part of the channels.
        if measures and not isinstance(self.modules.get(within), _INSTANCE_NORMS):
            uses[_Use("minibatch", within or _spoken(operation))] = None
        if operation in _LINEAR or ("BatchNorm" in operation and not measures):
            is_square = [n for n, _ in node.next_functions].count(earlier) > 1
            saved = [(x, computed) for x, computed in saved if computed is not earlier or is_square]
        to_parameters = _are_parameters(self.sources[earlier])  # not the error's way on, but the parameter's branch
        if operation in _RECURRENT:
            uses |= self._through_time(node, within, to_parameters=to_parameters)
            if not to_parameters:
                return uses
        if to_parameters:
            for _, computed in saved:
                if computed not in (None, node) and not _are_parameters(self.sources[computed]):
                    uses |= self._presynaptic(computed, within)
            return uses | {_Use("input", "input"): None} if self._looks_up(node) else uses
        function = _Use("derivative", within or _spoken(operation), within=within)
        if operation in _SELECTIONS:
            uses[function._replace(moves=_move(self.sources[earlier]))] = None
        for x, computed in saved:
            sources = frozenset[_Leaf]() if computed is None else self.sources.get(computed, self.sources[node])
            if weights := self._weights(x, sources):
                is_gain = operation in _GAINS or "Norm" in operation
                uses |= {_Use("gain" if is_gain else "weight", name): None for name in weights}
            elif sources:
                uses[function._replace(moves=_move(sources))] = None
        return uses

    def _through_time(self, node: Node, within: str, *, to_parameters: bool) -> _Uses:
        """What carries the error from moment to moment of a layer, and from there to its input."""
        uses: _Uses = {_Use("derivative", within, _move(self.sources[node]), within): None}
        for x, computed in self.saved[node]:
            for name in self._weights(x, frozenset() if computed is None else self.sources[computed]):
                if "weight_hh" in name or ("weight_ih" in name and not to_parameters):
                    uses[_Use("weight", name)] = None
        return uses

    def _backwards_weights(self, rule: FeedbackRule, layer: str) -> _Uses:
        own = f"{layer}.feedback"
        match rule:
            case "learned" | "mirror" | "random":
                return {_Use(rule, own): None}
            case "fixed-sign":
                return {_Use("sign", f"{layer}.weight"): None, _Use("random", own): None}
            case "batch-sign":
                return {_Use("sign", f"{layer}.weight"): None, _Use("drawn", layer): None}
            case _:
                return {_Use("weight" if rule == "symmetric" else "sign", f"{layer}.weight"): None}

    def _weights(self, x: Tensor, sources: frozenset[_Leaf]) -> list[str]:
        """The parameters that a saved tensor was computed from, if from nothing else."""
        if sources:
            return sorted({leaf.name for leaf in sources}) if _are_parameters(sources) else []
        name = self.memory.get(x.untyped_storage().data_ptr()) if x.numel() else None
        return [] if name is None else [name]

    def _presynaptic(self, node: Node, within: str) -> _Uses:
        """The nearest vertices, layers and inputs that a layer's activity was computed from."""
        uses: _Uses = {}
        stack, seen = [node], set[Node]()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if self.returned.get(node, within) != within:
                uses[_Use("output", self.returned[node], _move(self.sources[node]))] = None
            elif not self.computed_from[node]:
                (leaf,) = self.sources[node]
                if leaf.kind != "parameter":
                    uses[_Use(leaf.kind, leaf.name, leaf.kind == "vertex")] = None
            else:
                stack += [earlier for _, earlier in reversed(self.computed_from[node])]
        return uses

    def states(self) -> Iterator[Reads]:
        """(1): a row for every vertex."""
        ways = self._ways("vertex")
        for vertex in self.vertices:
            children, uses = self._children(ways, [_Leaf("vertex", vertex.name)])
            # As in `Graph.initial_states`: an output that no vertex reads is held at its error.
            held = id(vertex.stand_in) in self.clamped and set(children) <= self.ends.keys()
            own = () if held else self.words.own
            yield self._reads(f"{self.words.state} of {vertex.name}", 1, own, children, uses)

    def layers(self) -> Iterator[Reads]:
        """(2): a row for every layer, and one for its learned backwards weights."""
        ways = self._ways("parameter")
        trained = {leaf for node in (*self.vertices.values(), *self.ends.values()) for leaf in ways[node]}
        for layer in find_layers(self.module):
            own = [p for name, p in layer.named_parameters() if name.startswith("parametrizations.") or "." not in name]
            leaves = [leaf for p in own if (leaf := self.leaves[id(p)]) in trained]
            trained -= set(leaves)  # tied parameters are the first layer's that has them
            learned = self.leaves.get(id(getattr(layer, "feedback", None)))
            for is_feedback in (False, True):
                if group := [leaf for leaf in leaves if (leaf == learned) is is_feedback]:
                    children, uses = self._children(ways, group)
                    update = ", ".join(dict.fromkeys(leaf.name for leaf in group))
                    yield self._reads(update, 2, (), children, uses, self.names[layer])

    def _children(self, ways: _Ways, leaves: Sequence[_Leaf]) -> tuple[tuple[str, ...], _Uses]:
        """The vertices and outputs whose error comes to any of these leaves directly, and what is read on its way."""
        starts = {f"{self.words.error} of {vertex.name}": node for vertex, node in self.vertices.items()} | self.ends
        children: dict[str, None] = {}
        uses: _Uses = {}
        for name, node in starts.items():
            for leaf in leaves:
                if leaf in ways[node]:
                    children[name] = None
                    uses |= ways[node][leaf]
        return tuple(children), uses

    def _reads(
        self,
        update: str,
        equation: Literal[1, 2],
        own: tuple[str, ...],
        children: tuple[str, ...],
        uses: _Uses,
        layer: str | None = None,
    ) -> Reads:
        presynaptic, weights, derivative, non_local = list(own), list[str](), list[str](), list[str]()
        for use in uses:
            name = use.name
            match use.kind:
                case "weight":
                    weights.append(f"{name}, transposed")
                    non_local.append(f"weight transport: {name}")
                case "sign":
                    weights.append(f"signs of {name}")
                    non_local.append(f"weight signs: {name}")
                case "gain":
                    weights.append(f"{name}, a gain")
                case "learned" | "mirror" | "random":
                    how = {"learned": "learned", "mirror": "mirrored in phases of noise", "random": "fixed"}[use.kind]
                    weights.append(f"{name}, {how}")
                case "drawn":
                    weights.append(f"magnitudes of {name}, drawn in every pass")
                case "minibatch":
                    non_local.append(f"minibatch: {name}")
                case "dropped":
                    derivative.append(f"f' of {name} dropped")
                case "derivative":
                    where = self._where(use, equation, layer)
                    derivative.append(f"f' of {name} {where.strip()}")
                    if where == REMEMBERED:
                        non_local.append(f"memory of x̄: f' of {name}")
                case _:
                    stored = use.moves and self.frozen.update_activity
                    what = f"output of {name}" if use.kind == "output" else name
                    if use.kind == "vertex":
                        what = f"{'x̄' if stored else self.words.activity} of {name}"
                    elif use.moves:
                        what += " at x̄" if stored else f" at {self.words.activity}"
                    presynaptic.append(f"pre: {what}")
                    if stored:
                        non_local.append(f"memory of x̄: {what}")
        return Reads(
            update,
            equation,
            _once((*presynaptic, *children)),
            _once(weights),
            _once(derivative),
            tuple(entry for kind in KINDS for entry in _once(non_local) if entry.startswith(kind + ":")),
        )

    def _where(self, derivative: _Use, equation: int, layer: str | None) -> str:
        if not derivative.moves:
            return "at input"
        current = f"at {self.words.activity}"
        if equation == 1:
            return REMEMBERED if self.frozen.relaxation_derivative else current
        # What is within the layer itself is taken with the presynaptic activity, see `Graph.update`.
        within = derivative.within == layer
        return REMEMBERED if (self.frozen.update_activity if within else self.frozen.update_derivative) else current


def _once(entries: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entries))


def _plain(name: str) -> str:
    """A parameter's name without what parametrizations make of it."""
    return re.sub(r"(^|\.)parametrizations\.(\w+)\.original\d*$", r"\1\2", name)


def _spoken(operation: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation).lower()


def _node(tensor: Tensor) -> Node:
    return get_gradient_edge(tensor).node


def _saved(node: Any) -> list[Tensor]:
    """What a node keeps for its backward (a bias is kept by some, but no gradient needs it)."""
    kept: Any
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        kept = node.saved_tensors
    else:
        kept = [getattr(node, name) for name in dir(node) if name.startswith("_saved_") and name != "_saved_bias"]
    return tensors_in(kept)


def _traced(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if _is_continuous(x) else x


def _is_continuous(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _are_parameters(sources: frozenset[_Leaf]) -> bool:
    return all(leaf.kind == "parameter" for leaf in sources)


def _move(sources: frozenset[_Leaf]) -> bool:
    return any(leaf.kind == "vertex" for leaf in sources)
