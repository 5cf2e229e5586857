r"""What every update reads: a claim of biological plausibility, checked on the user's own model.

    (1)  dx_i/dt = −x_i + Σ_j W^T (f' ⊙ x_j)         its own state; states, derivatives and weights of the children j
    (2)  ΔW ∝ (W_+^T (f' ⊙ x_j)) x^T                 the same of what is above the layer, and the presynaptic activity

No equation of any layer is known here. One forward pass is recorded as for training, and PyTorch's own graph of it is
followed from each vertex j, and from the output, up to the vertices and parameters that j was computed from. On the way
a node's backward reads what the node has saved, and where a saved tensor came from tells what it is:

    from parameters only                           a weight, or a gain, that carries the error
    from an activity                               the derivative of a function that is not linear
    from an activity, on the parameter's branch    the presynaptic activity

Not seen: what is computed from activities without a gradient (``x * (x > 0)`` reads a mask).
Not judged: weights shared by places (convolution) or by moments (a layer that is called again), which make an update a
sum over them; an error sent on to the model's input; how a loss outside of the model makes the error of the output.
Source: Millidge et al., arXiv 2010.06219, sections 3 and 4, whose simplifications take these entries away one by one.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from relaxprop.derivatives import _EitherWay
from relaxprop.diagnostics import check_model, undisturbed
from relaxprop.feedback import _SendBack
from relaxprop.graph import Vertex, _AccumulateGrad
from relaxprop.operations import uncompiled
from relaxprop.recording import Recorder, map_tensors, tensors_requiring_grad
from relaxprop.relaxation import ActivationRelaxation
from relaxprop.solvers import ClosedForm, Continuous, Euler, Solver
from relaxprop.vertices import are_operations, find_layers, named_parts

KINDS = {
    "weight transport": "W is known only to its layer's own synapses, but carries an error back",
    "weight signs": "the signs of W are known only to its layer's own synapses, but carry an error back",
    "memory of x̄": "non-local in time, as it has to be remembered while x relaxes",
    "minibatch": "batch norm's statistics are those of other samples too",
}
_LINE = 100  # columns of a printed table


@dataclass(frozen=True)
class Reads:
    """What one update reads; x is a current state, x̄ a stored activity of the feedforward pass.

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


@dataclass(frozen=True)
class Locality:
    """What every update of a model reads; ``print`` shows it as a table.

    Attributes:
        rows: those of (1), in the order of the feedforward pass, then those of (2), in the order of the model's layers.
        schedule: in which order the states are updated, and what that takes.
    """

    rows: tuple[Reads, ...]
    schedule: str

    @property
    def non_local(self) -> set[str]:
        """The kinds of what is not local, of `KINDS`."""
        return {entry.partition(":")[0] for row in self.rows for entry in row.non_local}

    def __str__(self) -> str:
        titles = [("update",), ("eq.",), ("reads",), ("weights",), ("derivative",), ("not local",)]
        rows = [
            [row.update.split(", "), (f"({row.equation})",), row.activities, row.weights, row.derivative, row.non_local]
            for row in self.rows
        ]
        notes = [f"{kind}: {why}" for kind, why in KINDS.items() if kind in self.non_local]
        notes = ["x: current state, x̄: stored activity, pre: presynaptic", f"schedule: {self.schedule}", *notes]
        return "\n".join([*_table([titles, *rows]), "", *_wrapped(notes, _LINE)])


def describe_locality(model: ActivationRelaxation, *inputs: Any) -> Locality:
    r"""Lists for every update of (1) and (2) what it reads, and what of that is not local.

        (1)  dx_i/dt = −x_i + Σ_{j∈Chi(i)} x_j ∂x_j/∂x_i        a row for every vertex i
        (2)  ∂L/∂W = Σ_j (∂x_j/∂W)^T x_j                        a row for every module with parameters of its own

    Learned backwards weights, equation (3), have a row of their own. All is found in one forward pass in the model's
    current mode, with the loss taken to depend on every output. The model, its buffers and the random state stay as
    they are.

    Args:
        model: the wrapped module.
        inputs: the model's arguments.

    Raises:
        TypeError: ``model`` is not wrapped.
        ValueError: its vertices are operations, of which a layer has several, or a part of it is scripted.
    """
    check_model(model)
    for module, name in named_parts(model.module).items():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"describe_locality cannot see into the scripted module {name!r}: describe the model as it was before "
                "it was scripted"
            )
    if are_operations(model.vertices):
        raise ValueError(
            "describe_locality goes from layer to layer, got a model with vertices='operations': wrap its module "
            "(model.module) with vertices='modules' or 'activations'"
        )
    try:
        with undisturbed(model), torch.enable_grad(), uncompiled():
            walk = _Walk(model, inputs)
            return Locality((*walk.states(), *walk.layers()), _schedule(model.solver))
    except TypeError as error:  # an argument is missing
        if not inputs:
            error.add_note("describe_locality(model, *inputs) runs one forward pass: pass it what the model reads")
        raise


def _schedule(solver: Solver) -> str:
    if getattr(solver, "order", None) == "sequential":
        return "sequential, from the output down: each layer waits for the one above"
    if getattr(solver, "order", None) == "asynchronous":
        return "asynchronous: no clock, each state is updated in a random half of the steps"
    if isinstance(solver, Euler):
        return "simultaneous: all states step together, by a global clock"
    if isinstance(solver, ClosedForm):
        return "closed form of the simultaneous order: all states step together, by a global clock"
    if isinstance(solver, Continuous):
        return "continuous time: no clock"
    return "equilibrium: the limit of every schedule, found in one sweep from the output down"


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
        "weight", "gain", "learned", "random", "sign", "derivative", "dropped", "minibatch", "vertex", "output", "input"
    ]
    name: str
    moves: bool = False
    within: str = ""


_Uses = dict[_Use, None]  # a set that keeps its order
_Ways = Mapping[Node, Mapping[_Leaf, _Uses]]

# Linear in each argument, so that an error on its way to one of them reads the other ones only.
_LINEAR = {
    *("Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Addmv", "Dot", "Linear", "Convolution"),
    *("Mul", "Div", "Addcmul", "NllLoss", "NllLoss2D"),
}
_SELECTIONS = {"Max", "Min", "Sort", "Topk", "Kthvalue", "Median", "Mode", "Cummax", "Cummin"}  # save no values
_GAINS = {"Mul", "Div", "Addcmul", "PreluKernel"}  # and norms: one number per unit, which the unit itself knows
_EITHER_WAY: Any = _EitherWay._backward_cls
_SEND_BACK: Any = _SendBack._backward_cls


class _Walk:
    """A recorded pass, and what is read on every way up through its graph.

    Attributes:
        vertices: by vertex, the node that computed it.
        ends: by the name of an output's error, the node that computed the output.
        order: the nodes, each after all that it was computed from.
        above: by node, those that it was computed from, each with the number of the edge.
        sources: by node, where the ways up from it end.
        saved: by node, the tensors that it saved, each with the node that computed it.
        within: by node, the module without submodules that made it.
        returned: by node, the layer that returned what it computed.
    """

    def __init__(self, model: ActivationRelaxation, inputs: Sequence[Any]) -> None:
        self.module, self.frozen = model.module, model.frozen
        self.names = {m: name or type(m).__name__ for name, m in model.module.named_modules()}
        self.modules = {name: m for m, name in self.names.items()}
        self.vertices: dict[Vertex, Node] = {}
        self.ends: dict[str, Node] = {}
        self.order: list[Node] = []
        self.above: dict[Node, list[tuple[int, Node]]] = {}
        self.sources: dict[Node, frozenset[_Leaf]] = {}
        self.saved: dict[Node, list[tuple[Tensor, Node | None]]] = {}
        self.within: dict[Node, str] = {}
        self.returned: dict[Node, str] = {}
        self.joined: dict[int, Node] = {}  # by the id of a leaf where the graph is not cut, what computed it
        named = [(p, _plain(name)) for name, p in model.module.named_parameters()]
        self.leaves = {id(p): _Leaf("parameter", name) for p, name in named}
        # Parameters that are not trained are no part of the graph: what reads them is known by their memory.
        self.memory = {p.untyped_storage().data_ptr(): name for p, name in named if p.numel()}
        self._record(model, inputs)

    def _record(self, model: ActivationRelaxation, inputs: Sequence[Any]) -> None:
        # Where the input requires grad, the graph tells who reads it.
        traced = self.frozen.input and not tensors_requiring_grad(inputs)
        arguments = [map_tensors(_traced, x) for x in inputs] if traced else inputs
        layers = set(find_layers(self.module))
        handles = [handle for m in self.names for handle in self._note(m, m in layers)]
        try:
            graph = Recorder(model.output, self.frozen).record(self.module, model.vertices, arguments).graph
        finally:
            for handle in handles:
                handle.remove()

        def is_real(node: Node) -> bool:
            return not traced or self.sources[node] != {_INPUT}

        for vertex in graph.recorded:
            node = self._visit(vertex.output)
            if not is_real(node):  # a vertex only because the input is traced
                self.joined[id(vertex.leaf)] = node
                continue
            self.leaves[id(vertex.leaf)] = _Leaf("vertex", vertex.name)
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
            calls.append({_node(x) for x in tensors_requiring_grad((args, kwargs))})

        def on_return(_: nn.Module, args: Any, output: Any) -> None:
            before = calls.pop()
            stack = [node for x in tensors_requiring_grad(output) if (node := _node(x)) not in before]
            if is_layer:
                self.returned |= dict.fromkeys(stack, name)
            while is_whole and stack:
                node = stack.pop()
                if node not in before and node not in self.within:
                    self.within[node] = name
                    stack += [above for above, _ in node.next_functions if above is not None]

        if is_layer or is_whole:
            yield module.register_forward_pre_hook(on_call, with_kwargs=True)
            yield module.register_forward_hook(on_return)

    def _visit(self, end: Tensor) -> Node:
        """Puts what a tensor was computed from in order, and finds its sources."""
        stack = [first := _node(end)]
        while stack:
            node = stack[-1]
            if node not in self.above:
                self.above[node] = self._above(node)
                stack += [above for _, above in self.above[node] if above not in self.sources]
                continue
            stack.pop()
            if node not in self.sources:
                self.saved[node] = [(x, _node(x) if x.requires_grad else None) for x in _saved(node)]
                self.sources[node] = self._sources(node)
                self.order.append(node)
        return first

    def _above(self, node: Node) -> list[tuple[int, Node]]:
        if type(node) is _AccumulateGrad:
            joined = self.joined.get(id(cast(Any, node).variable))
            return [] if joined is None else [(0, joined)]
        return [(i, above) for i, (above, _) in enumerate(node.next_functions) if above is not None]

    def _sources(self, node: Node) -> frozenset[_Leaf]:
        if not self.above[node]:
            return frozenset({self.leaves.get(id(cast(Any, node).variable), _INPUT)})
        sources = frozenset[_Leaf]().union(*(self.sources[above] for _, above in self.above[node]))
        # What a layer returns is an activity, even if it was computed from parameters alone.
        return sources | {_INPUT} if node in self.returned or self._looks_up(node) else sources

    def _looks_up(self, node: Node) -> bool:
        """Whether the node takes from parameters what indices say: an embedding. Indices have no gradient."""
        return all(_are_parameters(self.sources[above]) for _, above in self.above[node]) and any(
            computed is None and not _is_continuous(x) for x, computed in self.saved[node]
        )

    def _ways(self, kind: Literal["vertex", "parameter"]) -> _Ways:
        """By node and by the leaf where ways up from it end, what is read on all of these ways.

        Those to vertices are the relaxation's, (1), those to parameters the update's, (2).
        """
        ways: dict[Node, dict[_Leaf, _Uses]] = {}
        for node in self.order:
            found: dict[_Leaf, _Uses] = {}
            ways[node] = found
            if not self.above[node]:
                found |= {leaf: {} for leaf in self.sources[node] if leaf.kind == kind}
            for i, above in self.above[node]:
                if isinstance(node, _EITHER_WAY) and i != (0 if node.dropped[kind == "parameter"] else 1):
                    continue
                uses = self._uses(node, i, above) if ways[above] else {}
                for leaf, further in ways[above].items():
                    found[leaf] = found.get(leaf, {}) | uses | further
        return ways

    def _uses(self, node: Any, i: int, above: Node) -> _Uses:
        """What a node's backward reads to send the error on along its edge i."""
        within = self.within.get(node, "")
        if isinstance(node, _EITHER_WAY):
            return {_Use("dropped", within): None} if i == 0 else {}
        if isinstance(node, _SEND_BACK):
            # The layer computes from a detached input, so the activity beside its weights is on the other edge.
            if i == 0:
                return self._presynaptic(node.next_functions[1][0], within)
            rule = node.layer.feedback_rule
            return {_Use(rule, f"{self.names[node.layer]}.{'weight' if rule == 'sign' else 'feedback'}"): None}
        operation = node.name().partition("Backward")[0]
        uses: _Uses = {}
        saved = self.saved[node]
        measures = "BatchNorm" in operation and getattr(node, "_saved_training", True)
        # Instance norm is PyTorch's batch norm of a batch that is part of the channels.
        if measures and not isinstance(self.modules.get(within), nn.modules.instancenorm._InstanceNorm):
            uses[_Use("minibatch", within or _spoken(operation))] = None
        if operation in _LINEAR or ("BatchNorm" in operation and not measures):
            is_square = [n for n, _ in node.next_functions].count(above) > 1
            saved = [(x, computed) for x, computed in saved if computed is not above or is_square]
        if _are_parameters(self.sources[above]):  # not the error's way on, but the parameter's branch
            for _, computed in saved:
                if computed not in (None, node) and not _are_parameters(self.sources[computed]):
                    uses |= self._presynaptic(computed, within)
            return uses | {_Use("input", "input"): None} if self._looks_up(node) else uses
        function = _Use("derivative", within or _spoken(operation), within=within)
        if operation in _SELECTIONS:
            uses[function._replace(moves=_move(self.sources[above]))] = None
        for x, computed in saved:
            sources = frozenset[_Leaf]() if computed is None else self.sources.get(computed, self.sources[node])
            if weights := self._weights(x, sources):
                is_gain = operation in _GAINS or "Norm" in operation
                uses |= {_Use("gain" if is_gain else "weight", name): None for name in weights}
            elif sources:
                uses[function._replace(moves=_move(sources))] = None
        return uses

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
            elif not self.above[node]:
                (leaf,) = self.sources[node]
                if leaf.kind != "parameter":
                    uses[_Use(leaf.kind, leaf.name, leaf.kind == "vertex")] = None
            else:
                stack += [above for _, above in reversed(self.above[node])]
        return uses

    def states(self) -> Iterator[Reads]:
        """(1): a row for every vertex."""
        ways = self._ways("vertex")
        for vertex in self.vertices:
            children, uses = self._children(ways, [_Leaf("vertex", vertex.name)])
            # As in `Graph.initial_states`: an output that no vertex reads is held at its error.
            held = id(vertex.leaf) in self.clamped and set(children) <= self.ends.keys()
            own = () if held else ("own x",)
            yield self._reads(f"x of {vertex.name}", 1, own, children, uses)

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
        starts = {f"x of {vertex.name}": node for vertex, node in self.vertices.items()} | self.ends
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
                case "learned" | "random":
                    weights.append(f"{name}, {'learned' if use.kind == 'learned' else 'fixed'}")
                case "minibatch":
                    non_local.append(f"minibatch: {name}")
                case "dropped":
                    derivative.append(f"f' of {name} dropped")
                case "derivative":
                    where = self._where(use, equation, layer)
                    derivative.append(f"f' of {name} {where}")
                    if where == "at x̄":
                        non_local.append(f"memory of x̄: f' of {name}")
                case _:
                    stored = use.moves and self.frozen.update_activity
                    what = f"output of {name}" if use.kind == "output" else name
                    if use.kind == "vertex":
                        what = f"{'x̄' if stored else 'x'} of {name}"
                    elif use.moves:
                        what += " at x̄" if stored else " at x"
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
        if equation == 1:
            return "at x̄" if self.frozen.relaxation_derivative else "at x"
        # What is within the layer itself is taken with the presynaptic activity, see `Graph.update`.
        within = derivative.within == layer
        return "at x̄" if (self.frozen.update_activity if within else self.frozen.update_derivative) else "at x"


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
    return [x for x in pytree.tree_leaves(kept) if isinstance(x, Tensor)]


def _traced(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if _is_continuous(x) else x


def _is_continuous(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _are_parameters(sources: frozenset[_Leaf]) -> bool:
    return all(leaf.kind == "parameter" for leaf in sources)


def _move(sources: frozenset[_Leaf]) -> bool:
    return any(leaf.kind == "vertex" for leaf in sources)


# --------------------------------------------------------------------------------------------------------- the table


def _table(rows: Sequence[Sequence[Sequence[str]]]) -> list[str]:
    """Rows of cells of entries, each entry on a line of its own; the widest columns give way until a line fits."""
    widths = [max([_width(entry) for cell in cells for entry in cell]) for cells in zip(*rows, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > _LINE:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in rows:
        cells = [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            padded = [part + " " * (width - _width(part)) for part, width in zip(parts, widths, strict=True)]
            lines.append("  ".join(padded).rstrip())
        if row is rows[0]:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
    return lines


def _wrapped(entries: Sequence[str], width: int) -> list[str]:
    # textwrap knows no letters without width, such as the bar of x̄: one that it takes for a letter stands for both.
    narrow = [entry.replace("x̄", _X_BAR) for entry in entries]
    lines = [line for entry in narrow for line in textwrap.wrap(entry, width, subsequent_indent="  ")]
    return [line.replace(_X_BAR, "x̄") for line in lines]


def _width(text: str) -> int:
    """Columns on a terminal."""
    return len(text.replace("x̄", _X_BAR))


_X_BAR = "\ue000"
