r"""What every update reads, so that a claim of biological plausibility can be checked.

    (1)  dx_i/dt = −x_i + Σ_{j∈Chi(i)} x_j ∂x_j/∂x_i        reads x_i, the children's x_j, weights, f'
    (2)  ∂L/∂W^l = (f'(W^l x̄^l) ⊙ x^{l+1}) x̄^{lT}           reads x^{l+1}, f', and the presynaptic activity

Which vertices, weights and derivatives these are is read off the computation graph of a forward pass. Local, for a
synapse, is what its two neurons have at the time: their states, and its own weight.
Source: Millidge et al., arXiv 2010.06219, sections 2 and 3.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils import _pytree as pytree

from relaxprop.diagnostics import check_model, undisturbed
from relaxprop.frozen import Frozen
from relaxprop.recording import Recorder, Recording, find_vertices, is_activation
from relaxprop.relaxation import ActivationRelaxation
from relaxprop.solvers import ClosedForm, Continuous, Equilibrium, Euler, Solver

NON_LOCAL = {
    "weight transport": "the error needs weights that only the synapses of the forward path have",
    "signs of weights": "the error needs the signs of weights that only the synapses of the forward path have",
    "memory": "the activity of the feedforward pass has to be kept while the state relaxes",
    "minibatch": "statistics of other samples",
}
SCHEDULES = {
    "simultaneous": "all vertices step together: a global clock",
    "sequential": "each vertex waits for those that read it: a global order",
    "asynchronous": "each vertex steps at times of its own: no clock",
}


@dataclass(frozen=True)
class Reads:
    """What one update reads.

    Attributes:
        update: what is updated: ``x of …``, the state of a vertex, or the name of a parameter.
        equation: 1, the relaxation phase, or 2, the weight update.
        activities: states (x), current; activities (x̄), stored from the feedforward pass.
        weights: what the error comes back through.
        derivative: f' of which activations, and where it is taken.
        non_local: keys of ``NON_LOCAL``.
    """

    update: str
    equation: Literal[1, 2]
    activities: tuple[str, ...]
    weights: tuple[str, ...]
    derivative: tuple[str, ...]
    non_local: tuple[str, ...]


@dataclass(frozen=True)
class Locality:
    """What all updates of a model read; ``print`` shows it as a table.

    Attributes:
        reads: in the order of the feedforward pass, states first.
        schedule: what the order of the updates asks for.
    """

    reads: tuple[Reads, ...]
    schedule: str

    @property
    def non_local(self) -> frozenset[str]:
        """All kinds of what is not local anywhere."""
        return frozenset(kind for reads in self.reads for kind in reads.non_local)

    def __str__(self) -> str:
        header = ("update", "reads", "through", "derivative", "not local")
        rows = [(r.update, *map(", ".join, (r.activities, r.weights, r.derivative, r.non_local))) for r in self.reads]
        widths = [max(map(_width, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell + " " * (n - _width(cell)) for cell, n in zip(row, widths, strict=True))
            for row in (header, *rows)
        ]
        notes = [f"{kind}: {why}" for kind, why in NON_LOCAL.items() if kind in self.non_local]
        return "\n".join(line.rstrip() for line in (*lines, "", f"schedule: {self.schedule}", *notes))


def _width(text: str) -> int:
    """Of a text on a terminal, where the macron of x̄ takes no room."""
    return sum(not unicodedata.combining(letter) for letter in text)


def describe_locality(model: ActivationRelaxation, *inputs: Any) -> Locality:
    """Lists what every update of the model reads, and what of it is not local.

    Args:
        model: the wrapped module, in the mode that it is trained in.
        inputs: its arguments; one sample will do.

    Raises:
        TypeError: ``model`` is not wrapped.
    """
    check_model(model)
    # Splitting the update is what makes a recording note the layers.
    recorder = Recorder(model.output, Frozen(update_activity=False, input=model.frozen.input))
    # An input that asks for a gradient leaves its trace in the graph.
    traced = pytree.tree_map(lambda x: _traced(x) if isinstance(x, Tensor) else x, inputs)
    with undisturbed(model), torch.enable_grad():
        recording = recorder.record(model.module, find_vertices(model.module, model.vertices), traced)
    return Locality(tuple(_Wiring(model, recording).reads()), _schedule(model.solver))


def _schedule(solver: Solver) -> str:
    if isinstance(solver, Euler | ClosedForm):
        return SCHEDULES[solver.order]
    if isinstance(solver, Continuous):
        return "continuous time: no clock"
    assert isinstance(solver, Equilibrium)
    return "one sweep from the output to the input: a global order"


def _traced(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if x.is_floating_point() else x


class _Wiring:
    """Which vertices and layers lead to which, by the names of their modules: calls of one are taken together."""

    def __init__(self, model: ActivationRelaxation, recording: Recording) -> None:
        graph = recording.graph
        self.frozen = model.frozen
        names = {module: name or type(module).__name__ for name, module in model.module.named_modules()}
        self.modules = {name: module for module, name in names.items()}
        self.leaves = {id(x): "input" for x in recording.trained[: recording.num_inputs]}
        self.leaves |= {id(v.leaf): _origin(v.name) for v in graph.recorded}
        self.layers: dict[Node, set[str]] = {}  # a module may return what another did
        for module, edge in graph.stored.layers:
            self.layers.setdefault(edge.node, set()).add(names[module])
        self.vertices = list(dict.fromkeys(_origin(v.name) for v in graph.recorded if v in graph.vertices))
        # What a vertex, or the output (""), was computed from, and what a layer was.
        self.ends, self.inner = dict[str, _Sources](), dict[str, _Sources]()
        for v in graph.recorded:
            self._trace(self.ends, _origin(v.name), [get_gradient_edge(v.output).node])
        for output in graph.outputs:
            self._trace(self.ends, "", [get_gradient_edge(output).node])
        for place, owners in self.layers.items():
            for name in owners:
                self._trace(self.inner, name, [above for above, _ in place.next_functions if above is not None])

    def _trace(self, found: dict[str, _Sources], name: str, stack: list[Node]) -> None:
        """Adds the vertices and layers that these nodes were computed from, other vertices not being crossed."""
        sources = found.setdefault(name, _Sources(set(), set()))
        seen = set(stack)
        while stack:
            node = stack.pop()
            sources.layers.update(self.layers.get(node, ()))
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self.leaves:
                sources.vertices.add(self.leaves[id(variable)])
            above = {n for n, _ in node.next_functions if n is not None} - seen
            seen |= above
            stack += above

    def reads(self) -> Iterator[Reads]:
        """What each update reads."""
        for i in self.vertices:
            children = [j for j, sources in self.ends.items() if i in sources.vertices]
            between = [m for j in children for m in self.ends[j].layers if i in self.inner[m].vertices]
            yield self._reads(f"x of {i}", 1, [f"x of {i}"], children, between)
        for name, sources in self.inner.items():
            layer = self.modules[name]
            children = [j for j, end in self.ends.items() if name in end.layers]
            between = [m for j in children for m in self.ends[j].layers if name in self.inner[m].layers and m != name]
            presynaptic = [self._activity(i) for i in sorted(sources.vertices, key=[*self.vertices, "input"].index)]
            for parameter, value in layer.named_parameters(name):
                if value.requires_grad:
                    own = [] if parameter.endswith("bias") else presynaptic  # a bias learns from the error alone
                    yield self._reads(parameter, 2, own, children, between, layer)

    def _activity(self, vertex: str) -> str:
        """The presynaptic activity of (2)."""
        if vertex == "input" and self.frozen.input:
            return "the input"
        return f"{'x̄' if self.frozen.update_activity else 'x'} of {vertex}"

    def _reads(
        self,
        update: str,
        equation: Literal[1, 2],
        own: list[str],
        children: Sequence[str],
        between: Sequence[str],
        layer: nn.Module | None = None,
    ) -> Reads:
        """A row, of what is sent down by the children through the layers in between."""
        weights, derivatives, non_local = [], [], set[str]()
        stored = self.frozen.relaxation_derivative if equation == 1 else self.frozen.update_derivative
        for name in sorted(set(between), key=[*self.inner].index):
            through, kind = _backwards_weights(name, self.modules[name])
            weights.append(through)
            non_local |= {kind} - {""}
        dropped = "dropped_in_relaxation" if equation == 1 else "dropped_in_update"
        for child in children:
            activation = self.modules.get(child)
            if activation is not None and is_activation(activation) and not getattr(activation, dropped, False):
                derivatives.append(f"f' of {child} at {'x̄' if stored else 'x'}")
        involved = [*(self.modules[name] for name in between), *([layer] if layer is not None else [])]
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in involved):
            non_local.add("minibatch")
        if any("x̄" in reading for reading in (*own, *derivatives)):
            non_local.add("memory")
        states = [f"x of {child}" if child else "∂L/∂x of the output" for child in children]
        return Reads(
            update,
            equation,
            tuple(dict.fromkeys([*own, *states])),
            tuple(weights),
            tuple(derivatives),
            tuple(kind for kind in NON_LOCAL if kind in non_local),
        )


class _Sources(NamedTuple):
    """What something is computed from."""

    vertices: set[str]
    layers: set[str]


def _origin(vertex: str) -> str:
    """The name of the module, without the number of the call and of the part of its result."""
    return vertex.partition("#")[0].partition("[")[0]


def _backwards_weights(name: str, layer: nn.Module) -> tuple[str, str]:
    """What carries an error back through a layer, and what is not local about it."""
    rule = getattr(layer, "feedback_rule", "symmetric")
    if rule == "sign":
        return f"signs of {name}.weight", "signs of weights"
    if rule in ("learned", "random"):
        return f"{name}.feedback" + (" (fixed)" if rule == "random" else ""), ""
    weights = [parameter for parameter, value in layer.named_parameters(name) if value.dim() > 1]
    if not weights:  # a gain or a bias for each channel belongs to the neuron itself
        return name, ""
    return ", ".join(f"{weight}, transposed" for weight in weights), "weight transport"
