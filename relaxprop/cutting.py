"""One run of a model, its graph cut at every vertex.

A forward hook on each vertex's module, or a function mode that sees every operation, keeps the tensor that was computed
there and hands a detached stand-in on in its place. In the feedforward pass the stand-in has the tensor's own value, x̄;
where something is not frozen the model is run again with the stand-ins set to the states.

May import: derivatives, graph, kept, nested, operations, replay, sight, unrelaxed, vertices, _pytorch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from relaxprop._pytorch import LEAF_OVERWRITTEN, arrived_hooks, hooks_registered, is_checkpointed, is_view, version
from relaxprop.derivatives import recorded_switches
from relaxprop.graph import Layer, Linearisation, Vertex
from relaxprop.kept import mark
from relaxprop.nested import (
    map_requiring_grad,
    map_tensors,
    rebuilt,
    replace_within,
    tensors_in,
    tensors_requiring_grad,
)
from relaxprop.operations import EachOperation
from relaxprop.replay import Calls
from relaxprop.sight import Sight, hooked_unseen, refuse_nested_differentiation
from relaxprop.unrelaxed import inside
from relaxprop.vertices import Hooked

_NOTHING = nullcontext()
_WORDS = (bool, str)


class Cut(NamedTuple):
    """Where the graph of a model is cut, in every run of a pass.

    Attributes:
        modules: those whose outputs are vertices, with their names.
        operations: whether every operation is one.
        output: whether the model's output is one too.
        inputs: whether the model's inputs are.
        layers: the modules whose outputs are noted.
        reruns: whether the model may be run again at other activities.
        reports: whether it is noted what is computed within the modules that are vertices.
    """

    modules: Mapping[nn.Module, str]
    operations: bool = False
    output: bool = False
    inputs: bool = False
    layers: Sequence[nn.Module] = ()
    reruns: bool = False
    reports: bool = False


class _CutVertex(NamedTuple):
    """A vertex as it was cut.

    Attributes:
        vertex: which.
        version: of its output, then.
        handed: what the model goes on with.
        in_place: whether its module has returned what it was given.
    """

    vertex: Vertex
    version: int
    handed: HandedOn
    in_place: bool


@dataclass
class Writes:
    """What earlier passes have shown of a model's writes in place, so that only what is written to is copied.

    A model may write in place into what a vertex handed on (``ReLU(inplace=True)``, ``x += y``). Autograd forbids that
    on a leaf, and it would change x̄. So the first outputs of a module are handed on as copies, and if one was written
    to, the later ones too.

    Attributes:
        into: by the origin of a stand-in, whether it was written to.
        into_views: whether a layer's output that is a view is. It loses its place in the graph then, unless it is a
            copy.
        repeated: whether a pass was run again at its own activities and found to be the same.
        replays: whether steps are done by their operations alone (`replay`): not where one could not be written down,
            or had another outcome than the model's.
        compared: the kinds of steps (`replay.Program.kind`) whose outcome was the model's.
        compiler: what compiles these operations, as the user has asked for (`compiled`); None: nobody has.
        draws: whether a pass that is to be run again has drawn random numbers.
        watched: how the last pass began. One that begins likewise need not be watched for what the model would see
            wrongly of itself (`Sight`): with as many hooks, in the same mode, told the same.
    """

    into: dict[str, bool] = field(default_factory=dict)
    into_views: bool = True
    repeated: bool = False
    replays: bool = True
    compared: set[int] = field(default_factory=set)
    compiler: Any = None
    draws: bool = False
    watched: object = None

    def learn(self, run: Run) -> None:
        """Notes what a finished run has written to."""
        self.watched = run.begins
        for handed in run.handed_on.values():
            if handed.overwritten or handed.origin not in self.into:
                self.into[handed.origin] = handed.overwritten
        if run.cut.layers:
            self.into_views = any(x.overwritten for x in run.noted)


class HandedOn(NamedTuple):
    """What the rest of the model reads: of a vertex, of an input, of a layer."""

    origin: str  # the name of the vertex's module, "input", or ""
    tensor: Tensor
    stand_in: Tensor  # for a layer the tensor itself
    version: int

    @classmethod
    def by_layer(cls, output: Tensor) -> HandedOn:
        return cls("", output, output, version(output))

    @property
    def overwritten(self) -> bool:
        """Whether it has to be a copy: it was written to, or has hooks, which are not the vertex's own."""
        return version(self.tensor) != self.version or bool(arrived_hooks(self.tensor))


class Arguments:
    """A model's arguments, with stand-ins for the inputs that gradients are wanted for, or that relax.

    Attributes:
        inputs: by the id of its stand-in, each such input and the stand-in.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, relax: bool = False) -> None:
        self.args, self.kwargs = args, kwargs
        self.inputs: dict[int, tuple[Tensor, Tensor]] = {}
        self._stand_ins: dict[int, Tensor] = {}  # by the id of the input: one that is given twice is the same
        for x in [x for given in (*args, *kwargs.values()) for x in tensors_in(given)]:
            if (x.requires_grad or (relax and x.is_floating_point())) and id(x) not in self._stand_ins:
                self._stand_ins[id(x)] = stand_in = _with_attributes_of(x, x.detach().requires_grad_())
                self.inputs[id(stand_in)] = x, stand_in

    @contextmanager
    def handed_on(self, hand_on: Callable[[Tensor], Tensor]) -> Iterator[tuple[Sequence[Any], Mapping[str, Any]]]:
        """Within it, the arguments hold in the inputs' places what ``hand_on`` makes of their stand-ins, and so do the
        lists and dicts that the caller has given: the model may write into them.

        Raises:
            RuntimeError: if such a list or dict is given to another thread's pass at this time.
        """
        if not self.inputs:
            yield self.args, self.kwargs
            return
        handed: dict[int, Tensor] = {}
        known: dict[int, Tensor] = {}

        def replaced(x: Tensor) -> Tensor:
            if id(x) not in self._stand_ins:
                return x
            if id(x) not in handed:
                handed[id(x)] = given = hand_on(self._stand_ins[id(x)])
                known[id(given)] = known[id(self._stand_ins[id(x)])] = x
            return handed[id(x)]

        containers: dict[int, Any] = {}
        replace_within(lambda x: x, (*self.args, *self.kwargs.values()), containers)
        with _lent_to_one_thread(containers, self._stand_ins):
            try:
                seen: dict[int, Any] = {}
                yield (
                    [replace_within(replaced, x, seen) for x in self.args],
                    {name: replace_within(replaced, x, seen) for name, x in self.kwargs.items()},
                )
            finally:
                own: dict[int, Any] = {}
                for x in containers.values():
                    replace_within(lambda x: known.get(id(x), x), x, own)

    def options(self) -> object:
        """What among the arguments may tell the model what to do, rather than with what: names, flags and words."""
        given = [*self.args, *self.kwargs.values()]
        return [*self.kwargs, *[x if isinstance(x, _WORDS) else None for x in given]]

    def copied(self) -> Arguments:
        """The same tensors in lists and dicts of their own, which the model may write into, as into arrays of NumPy."""
        twin, copies = Arguments((), {}), dict[int, Any]()
        twin.args = [rebuilt(x, copies, arrays=True) for x in self.args]
        twin.kwargs = {name: rebuilt(x, copies, arrays=True) for name, x in self.kwargs.items()}
        twin.inputs, twin._stand_ins = self.inputs, self._stand_ins
        return twin


_lent: dict[int, tuple[int]] = {}  # by the ids of lists and dicts that hold stand-ins now, the thread that holds them


@contextmanager
def _lent_to_one_thread(containers: Mapping[int, Any], inputs: Collection[int]) -> Iterator[None]:
    """Within it, those of the containers that hold any of the inputs are this thread's own."""
    holder, mine = (get_ident(),), list[int]()
    try:
        for key, container in containers.items():
            holds = any(id(x) in inputs for x in tensors_in(container))
            found = _lent.setdefault(key, holder) if holds else _lent.get(key, holder)
            if found != holder:
                raise RuntimeError(
                    "a list or dict that holds inputs which require grad is given to a pass in another thread at the "
                    "same time: give each thread a list of its own"
                )
            if holds and found is holder:
                mine.append(key)
        yield
    finally:
        for key in mine:
            del _lent[key]


class Run:
    """One call of a model, its graph cut at the vertices.

    Args:
        cut: where.
        writes: what is handed on as a copy.
        recorded: the vertices of the feedforward pass, where this is another run.
        values: of these vertices, in their order; by default what the model computes.
        written_down: where the operations of the run are written down, if they are.

    Attributes:
        vertices: in the order in which they were computed.
        shown: the tensors of the result that require grad, each once, and what the model wrote into inputs; without
            inputs that it hands back as they are.
        outputs: what stands for these in the graph.
        written: the inputs that the model wrote into, and what it made of each, which is among ``shown``.
        calls: how often each vertex's module, or each operation, was called.
        within: the operations within the modules that are vertices, where the cut reports.
        other_hooks: whether hooks were registered that are not on tensors, where that was watched.
    """

    def __init__(
        self,
        cut: Cut,
        writes: Writes,
        recorded: Sequence[Vertex] = (),
        values: Sequence[Tensor] | None = None,
        written_down: Calls | None = None,
    ) -> None:
        self.cut = cut
        self.writes = writes
        self.recorded = recorded
        self.values = values
        self.written_down = written_down
        self.vertices: list[Vertex] = []
        self.shown: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.written: list[tuple[Tensor, Tensor]] = []
        self.layers: list[Layer] = []
        self.noted: list[HandedOn] = []
        self.switches: list[Node] = []
        self.calls: dict[str, int] = {}
        self.within: set[Node] = set()
        self.handed_on: dict[int, HandedOn] = {}  # by the id of the tensor
        self.model = ""  # the name of its class
        self.begins: object = None
        self.other_hooks = False
        self._cuts: list[_CutVertex] = []
        self._module: ref[nn.Module]

    def call(self, module: nn.Module, arguments: Arguments) -> Any:
        """The model's result."""
        self._module, self.model = ref(module), type(module).__name__
        registered = hooks_registered()
        self.begins = registered, module.training, arguments.options()
        cut = self.cut
        # A layer's output is noted before it is cut, where the layer is a vertex too.
        layers = Hooked(cut.layers, self._note_layer, self) if cut.layers else _NOTHING
        operations = EachOperation(self._cut_operation, model=self.model) if cut.operations else _NOTHING
        sight = None
        if self.begins != self.writes.watched and not torch.compiler.is_compiling():  # where no mode can be entered
            sight = Sight(self.model, lambda: {id(v.stand_in) for v in self.vertices}, partial(self._given, arguments))
        down = self.written_down
        cut_output = self._cut_output if down is None else down.aside(self._cut_output)
        token = recorded_switches.set(self.switches)
        try:
            with (
                arguments.handed_on(self._hand_on_input) as (args, kwargs),
                layers,
                Hooked(cut.modules, cut_output, self),
                down or _NOTHING,
                sight or _NOTHING,
                operations,
            ):
                result = module(*args, **kwargs)
                if arguments.inputs:  # afterwards the caller's own lists hold the caller's own inputs
                    result = rebuilt(result, {})
            if sight is not None:
                # Other threads register hooks too.
                self.other_hooks = sight.reads_nodes and hooks_registered() - registered > sight.hooks
            elif hooks_registered() != registered:
                activities = [x for v in self.vertices for x in (v.output, v.stand_in)]
                hooked_unseen(self.model, activities, arguments.inputs.values())
        except RuntimeError as error:
            if LEAF_OVERWRITTEN in str(error):
                self.writes.into.update(dict.fromkeys(self.writes.into, True))
                error.add_note(
                    "the model wrote in place into an activity that it has only read so far; from now on it gets "
                    "copies, so repeat the pass"
                )
            raise
        finally:
            recorded_switches.reset(token)
        if arguments.inputs:
            self.written = self._written(arguments)
            result = map_tensors(lambda x: x if (own := self._given(arguments, x)) is None else own, result)
        shown = {id(x): x for x in tensors_requiring_grad(result)}
        if arguments.inputs:
            for x, _ in arguments.inputs.values():  # which its gradient reaches without this pass
                shown.pop(id(x), None)
            shown |= {id(x): x for _, x in self.written}
        if cut.output:
            part = itertools.count()
            relaxed = {key: self._vertex(x, "output", f"output[{next(part)}]") for key, x in shown.items()}
            result = map_requiring_grad(lambda x: relaxed.get(id(x), x), result)
            shown = {id(x): x for x in relaxed.values()}
        self.shown = [*shown.values()]
        self.outputs = [self._own(x) for x in self.shown]
        self._refuse_aliases()
        return result

    def _refuse_aliases(self) -> None:
        """Refuse a model that has what a vertex's module returned under another name too, and writes into one of the
        two: the other one does not change with it, as the graph is cut between them.

        Raises:
            ValueError: if it has.
        """
        for vertex, then, handed, in_place in self._cuts:
            output, was_written = vertex.output, version(handed.tensor) != handed.version
            in_one_memory = handed.tensor is handed.stand_in  # so that a write into either is counted in both
            if version(output) == then or (in_one_memory and was_written):
                hidden = in_place and was_written and self._is_read(output)
            else:  # or was it another part of the same memory?
                hidden = was_written or not torch.equal(output.detach(), handed.tensor.detach())
            if not hidden:
                continue
            raise ValueError(
                f"{self.model} writes in place into what the vertex {vertex.name!r} has computed, and reads it under "
                "another name too (the module has returned its own input, a view of it, or one tensor twice): let the "
                "model write into a copy (x = x + y for x += y, inplace=False), or pass solver=Equilibrium(), which "
                "cuts nothing in training"
            )

    def _is_read(self, output: Tensor) -> bool:
        """Whether anything was computed from the vertex's output before the cut."""
        if self.begins == self.writes.watched:
            return False  # it has been looked at
        ends = [get_gradient_edge(x).node for x in (*self.outputs, *self.shown, *(c.vertex.output for c in self._cuts))]
        seen, stack = set[Node](), [node for node in ends if node is not output.grad_fn]
        while stack:
            node = stack.pop()
            for source, _ in node.next_functions:
                if source is output.grad_fn:
                    return True
                if source is not None and source not in seen:
                    seen.add(source)
                    stack.append(source)
        return False

    def _written(self, arguments: Arguments) -> list[tuple[Tensor, Tensor]]:
        """The inputs that the model wrote into, as the caller knows them, and what it made of them.

        Raises:
            ValueError: if the model is to be run again on them, or has made something else of them than numbers.
        """
        found = []
        for handed in self.handed_on.values():
            if id(handed.stand_in) not in arguments.inputs or version(handed.tensor) == handed.version:
                continue
            given, _ = arguments.inputs[id(handed.stand_in)]
            what = f"{self.model} writes in place into an input of shape {tuple(given.shape)}"
            if self.cut.reruns:
                raise ValueError(
                    f"frozen: {what}, so it cannot be run again on it, as what is unfrozen needs: let the model work "
                    "on a copy (x = x.clone())"
                )
            if handed.tensor.shape != given.shape or not handed.tensor.requires_grad:
                raise ValueError(f"{what} and changes more than its numbers: let it work on a copy (x = x.clone())")
            found.append((given, handed.tensor))
        return found

    def linearisation(self) -> Linearisation:
        """Where this run takes its Jacobians, by the vertices of the feedforward pass."""
        of = self.recorded or self.vertices
        return Linearisation(dict(zip(of, self.vertices, strict=True)), self.outputs, self.layers, self.switches)

    def _hand_on_input(self, x: Tensor) -> Tensor:
        if self.cut.inputs:
            return self._vertex(x, "input", f"input[{len(self.vertices)}]")
        return self._hand_on(x, "input")

    def _note_layer(self, module: nn.Module, args: Any, output: Any) -> Any:
        output = map_tensors(self._note, output)
        own = frozenset(map(id, module.parameters()))
        self.layers += [Layer(own, get_gradient_edge(x)) for x in tensors_requiring_grad(output)]
        return output

    def _note(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x
        if x.is_leaf:  # a parameter as it is: a view is an operation
            x = x.view_as(x)
        if is_view(x):
            x = x.clone() if self.writes.into_views else x
            self.noted.append(HandedOn.by_layer(x))
        return x

    def _cut_operation(self, output: Tensor, operation: str) -> Tensor:
        # Which call of an operation is written to may change with every pass, in a loop of changing length.
        return self._vertex(output, operation, self._called(operation))

    def _called(self, origin: str) -> str:
        self.calls[origin] = call = self.calls.get(origin, 0) + 1
        return origin if call == 1 else f"{origin}#{call}"

    def _cut_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.cut.reports:
            self.within |= inside(args, output)
        origin = self.cut.modules[module]
        name = self._called(origin)
        if isinstance(output, Tensor):
            return self._vertex(output, origin, name, in_place=any(x is output for x in args))
        part = itertools.count()
        handed: dict[int, Tensor] = {}  # what is returned twice stays the same

        def cut(x: Tensor) -> Tensor:
            if id(x) not in handed:
                handed[id(x)] = self._vertex(x, origin, f"{name}[{next(part)}]")
            return handed[id(x)]

        return map_tensors(cut, output)

    def _vertex(self, output: Tensor, origin: str, name: str, *, in_place: bool = False) -> Tensor:
        if not output.requires_grad:
            return output  # it was computed from nothing that is trained
        if (handed := self.handed_on.get(id(output))) is not None and not handed.overwritten:
            return output  # it is a vertex already
        value = output
        if self.values is not None:
            place = len(self.vertices)
            recorded = self.recorded[place] if place < len(self.values) else None
            if recorded is None or (recorded.name, recorded.stand_in.shape) != (name, output.shape):
                raise other_path()
            value = self.values[place]
        if self.cut.reruns and is_checkpointed():
            raise ValueError(
                "frozen: what torch.utils.checkpoint computes again in the backward pass is not at the current states: "
                "leave checkpointing out where something is unfrozen"
            )
        refuse_nested_differentiation(self.model)
        stand_in = _with_attributes_of(output, value.detach().requires_grad_())
        vertex = Vertex(name, output, stand_in)
        self.vertices.append(vertex)
        tensor = self._hand_on(stand_in, origin)
        if self.values is None:
            self._cuts.append(_CutVertex(vertex, version(output), self.handed_on[id(tensor)], in_place))
        return tensor

    def _hand_on(self, stand_in: Tensor, origin: str) -> Tensor:
        if self.values is None:  # no user ever sees what a later run computes
            mark(stand_in, origin, self._module)
        copied = self.writes.into.get(origin, True)
        tensor = _with_attributes_of(stand_in, stand_in.clone()) if copied else stand_in
        self.handed_on[id(tensor)] = HandedOn(origin, tensor, stand_in, version(tensor))
        if self.written_down is not None:
            is_vertex = bool(self.vertices) and self.vertices[-1].stand_in is stand_in
            self.written_down.hands_on(tensor, vertex=is_vertex)
        return tensor

    def _given(self, arguments: Arguments, x: Tensor) -> Tensor | None:
        """The user's tensor where this is an input, as it was handed on."""
        handed = self.handed_on.get(id(x))
        if handed is None or handed.overwritten or id(handed.stand_in) not in arguments.inputs:
            return None
        return arguments.inputs[id(handed.stand_in)][0]

    def _own(self, output: Tensor) -> Tensor:
        """The vertex's own stand-in where the output is an untouched copy of it."""
        handed = self.handed_on.get(id(output))
        return output if handed is None or handed.overwritten else handed.stand_in


def _with_attributes_of(tensor: Tensor, stand_in: Tensor) -> Tensor:
    """The stand-in, with what a model has noted on the tensor as attributes of its own."""
    if not torch.compiler.is_compiling() and (own := vars(tensor)):  # a compiler traces no such thing
        vars(stand_in).update(own)
    return stand_in


def other_path() -> RuntimeError:
    """The error of a model that does other things when it is run again."""
    return RuntimeError(
        "frozen: run again at the current states, the model took another path than in the feedforward pass (other "
        "modules, or other shapes), so no Jacobian stands for the same vertex: a model whose path depends on its "
        "activities needs everything frozen"
    )
