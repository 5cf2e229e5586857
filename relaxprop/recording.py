"""Records a model's forward pass as a `Graph`, cut at the results of the modules or operations that are vertices."""

from __future__ import annotations

import itertools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

# PyTorch has no public name for its nested structures; Hugging Face registers its output classes with this one.
from torch.utils import _pytree as pytree

from relaxprop.derivatives import Phase, current_phase
from relaxprop.frozen import ALL_FROZEN, Frozen
from relaxprop.graph import Graph, Layer, Linearisation, States, Vertex
from relaxprop.operations import EachOperation
from relaxprop.surroundings import Surroundings
from relaxprop.vertices import Granularity, Hooked, are_operations, does_as_its_class_says, find_layers, find_vertices

OutputRule = Literal["clamped", "relaxed"]
_NOTHING = nullcontext()


class Recording(NamedTuple):
    """A recorded forward pass.

    Attributes:
        graph: its `Graph`.
        result: the model's result, its tensors still attached to the graph.
        inputs: what stands in the graph for the inputs that require grad.
        parameters: those that the result was computed from.
        given: the tensors that a gradient is wanted for, as the user knows them: inputs, then parameters.
        shown: the tensors in the result that require grad, one for each output of the graph: what the user gets, where
            a write that PyTorch does not count (``x.data``) makes it differ from x̄.
    """

    graph: Graph
    result: Any
    inputs: list[Tensor]
    parameters: list[Tensor]
    given: list[Tensor]
    shown: list[Tensor]


class Recorder:
    """Runs a model's forward pass, its graph cut at the outputs of the given modules.

    Args:
        output: "clamped" holds the output at ∂L/∂x^L, "relaxed" makes it one more vertex.
        frozen: what the relaxation phase and the update take from this pass, and what from another at the states.
    """

    def __init__(self, output: OutputRule = "clamped", frozen: Frozen = ALL_FROZEN) -> None:
        self.output = output
        self.frozen = frozen
        self.runs_again = frozen != ALL_FROZEN
        # A model may write in place into what a vertex handed on (ReLU(inplace=True), x += y). Autograd forbids that
        # on a leaf, and it would change x̄. So a module's first outputs are handed on as copies, and if one was written
        # to, the later ones too.
        self.overwritten: dict[str, bool] = {}
        # A layer's output that is a view loses its place in the graph when it is written to, unless it is a copy.
        self.copies_views = True
        self.known: set[int] = set()  # ids of the model's parameters, to find a foreign tensor

    def record(
        self,
        module: nn.Module,
        vertices: Granularity | Iterable[nn.Module],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Recording:
        """One forward pass, to be called with gradients enabled.

        Args:
            module: the model.
            vertices: as `find_vertices` takes them.
            args: the model's; tensors that require grad are inputs that gradients are wanted for.
            kwargs: likewise.

        Raises:
            TypeError: the model's result holds tensors in an object that PyTorch cannot take apart.
            ValueError: the model read a tensor that requires grad and is neither a parameter nor an input; or its
                operations cannot be seen.
        """
        return _Pass(self, module, vertices, args, kwargs or {}).record()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"known": set()}  # ids mean nothing in a copy

    def check_trained(self, module: nn.Module, leaves: Mapping[int, Tensor]) -> None:
        """Refuse leaf tensors that are no parameters: no gradient could reach them."""
        if leaves.keys() <= self.known:
            return
        self.known = {id(p) for p in module.parameters()}
        for key, tensor in leaves.items():
            if key not in self.known:
                raise ValueError(
                    f"the model read a tensor of shape {tuple(tensor.shape)} that requires grad but is neither one "
                    "of its parameters nor one of its inputs, so no gradient can reach it: register it as an "
                    "nn.Parameter, pass it to the model as an argument, or detach it"
                )


class _Pass:
    """One forward pass: the recorded run of the model, and later ones at other activities."""

    def __init__(
        self,
        recorder: Recorder,
        module: nn.Module,
        vertices: Granularity | Iterable[nn.Module],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.recorder = recorder
        self.module = module
        self.names = find_vertices(module, vertices)
        self.operations = are_operations(vertices)
        self.layers = find_layers(module) if recorder.runs_again else ()
        self.phase = Phase()
        self.inputs: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the stand-in: the input, its stand-in
        self.args = [map_tensors(self._stand_in, x) for x in args]
        self.kwargs = {name: map_tensors(self._stand_in, x) for name, x in kwargs.items()}
        self.surroundings: Surroundings | None = None
        if recorder.runs_again:
            arguments = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.surroundings = Surroundings(module, arguments)

    def _stand_in(self, x: Tensor) -> Tensor:
        relaxes = not self.recorder.frozen.input and x.is_floating_point()
        if not x.requires_grad and not relaxes:
            return x
        alias = x.detach().requires_grad_()
        self.inputs[id(alias)] = x, alias
        return alias

    def record(self) -> Recording:
        run = _Run(self)
        result, outputs = run.call()
        if self.surroundings is not None:
            self.surroundings.passed()
            # Where operations are vertices, no layer is above all of them.
            self.constant = run.constant() if not (self.surroundings.draws or self.operations) else {}
            self.recorder.copies_views = any(x.overwritten for x in run.noted)
        if outputs and not run.calls and not self.operations:
            warnings.warn(
                f"none of the vertices ({', '.join(list(self.names.values())[:3])}, …) was called in the forward pass, "
                "so nothing relaxes and this is backpropagation: does the model call functions in their place? Pass "
                "vertices='modules' or the submodules whose outputs should relax",
                stacklevel=5,
            )
        overwritten = self.recorder.overwritten
        for handed in run.handed_on.values():
            if handed.overwritten or handed.origin not in overwritten:
                overwritten[handed.origin] = handed.overwritten
        self.stored = Linearisation({v: v for v in run.vertices}, outputs, run.layers)
        graph = Graph(
            self.stored,
            self.phase,
            clamped=self.recorder.output == "clamped",
            frozen=self.recorder.frozen,
            rerun=None if self.surroundings is None else self.rerun,
            masked=self.operations,
        )
        self.recorded = graph.recorded
        inputs = [pair for key, pair in self.inputs.items() if key in graph.read and pair[0].requires_grad]
        trained = {key: tensor for key, tensor in graph.read.items() if key not in self.inputs}
        self.recorder.check_trained(self.module, trained)
        parameters = list(trained.values())
        return Recording(
            graph,
            result,
            inputs=[alias for _, alias in inputs],
            parameters=parameters,
            given=[given for given, _ in inputs] + parameters,
            shown=tensors_requiring_grad(result),
        )

    def rerun(self, states: States) -> Linearisation:
        """The model run again, every vertex set to its state; a vertex without a state keeps its activity.

        Raises:
            RuntimeError: the model took another path than in the feedforward pass, or what it read has changed.
        """
        assert self.surroundings is not None
        run = _Run(self, [_laid_out_as(v.leaf, states[v]) if v in states else v.leaf for v in self.recorded])
        # What was written to since has to be computed again.
        constant = {m: calls for m, calls in self.constant.items() if not any(x.overwritten for x in calls)}
        with self.surroundings.restored(), _returning(constant), torch.enable_grad():
            _, outputs = run.call()
        stored = self.stored
        if (
            len(run.vertices) != len(self.recorded)
            or len(run.layers) != len(stored.layers)
            or [x.shape for x in outputs] != [x.shape for x in stored.outputs]
        ):
            raise _other_path()
        return Linearisation(dict(zip(self.recorded, run.vertices, strict=True)), outputs, run.layers)


class _Run:
    """One call of the model, its graph cut at the vertices.

    Args:
        values: of the vertices in their order; by default what the model computes.
    """

    def __init__(self, of: _Pass, values: Sequence[Tensor] | None = None) -> None:
        self.of = of
        self.values = values
        self.vertices: list[Vertex] = []
        self.layers: list[Layer] = []
        self.noted: list[_HandedOn] = []
        self.above: dict[nn.Module, list[_HandedOn]] = {}  # what layers returned before there was a vertex
        self.below: set[nn.Module] = set()  # the layers that were called later
        self.calls: dict[str, int] = {}
        self.handed_on: dict[int, _HandedOn] = {}  # by the id of the tensor

    def call(self) -> tuple[Any, list[Tensor]]:
        """The model's result, and the tensors in it that require grad."""
        of, recorder = self.of, self.of.recorder
        args = [map_tensors(self._input, x) for x in of.args] if of.inputs else of.args
        kwargs = {name: map_tensors(self._input, x) for name, x in of.kwargs.items()} if of.inputs else of.kwargs
        # A layer's output is noted before it is cut, where the layer is a vertex too.
        noted = of.layers if self.values is None or recorder.frozen.splits_update else ()
        layers = Hooked(noted, self._note_layer) if noted else _NOTHING
        operations = EachOperation(self._cut_operation) if of.operations else _NOTHING
        token = current_phase.set(of.phase)
        try:
            with layers, Hooked(of.names, self._cut_output), operations:
                result = of.module(*args, **kwargs)
        except RuntimeError as error:
            if "a leaf Variable that requires grad is being used in an in-place operation" in str(error):
                recorder.overwritten.update(dict.fromkeys(recorder.overwritten, True))
                error.add_note(
                    "the model wrote in place into an activity that it has only read so far; from now on it gets "
                    "copies, so repeat the pass"
                )
            raise
        finally:
            current_phase.reset(token)
        if recorder.output == "relaxed":
            part = itertools.count()
            result = map_tensors(lambda x: self._vertex(x, "output", f"output[{next(part)}]"), result)
        return result, [self._leaf(x) for x in tensors_requiring_grad(result)]

    def _input(self, x: Tensor) -> Tensor:
        if id(x) not in self.of.inputs:
            return x
        if not self.of.recorder.frozen.input:
            return self._vertex(x, "input", f"input[{len(self.vertices)}]")
        return self._hand_on(x, "input")

    def _note_layer(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.of.recorder.frozen.splits_update:
            output = map_tensors(self._note, output)
            self.layers += [Layer(module, get_gradient_edge(x)) for x in tensors_requiring_grad(output)]
        if self.values is None and (self.vertices or not isinstance(output, Tensor)):
            self.below.add(module)
        elif self.values is None:
            self.above.setdefault(module, []).append(_HandedOn.of_layer(output))
        return output

    def _note(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x
        if x.is_leaf:  # a parameter as it is: a view is an operation
            x = x.view_as(x)
        if x._is_view():
            x = x.clone() if self.of.recorder.copies_views else x
            self.noted.append(_HandedOn.of_layer(x))
        return x

    def constant(self) -> dict[nn.Module, list[_HandedOn]]:
        """What the layers above all vertices returned, call by call: no state changes it, so no later run needs to
        compute it again. These layers read the input, and are often the most expensive ones."""
        return {
            layer: returned
            for layer, returned in self.above.items()
            if layer not in self.below and does_as_its_class_says(layer)
        }

    def _cut_operation(self, output: Tensor, operation: str) -> Tensor:
        # Which call of an operation is written to may change with every pass, in a loop of changing length.
        return self._vertex(output, operation, self._called(operation))

    def _called(self, origin: str) -> str:
        self.calls[origin] = call = self.calls.get(origin, 0) + 1
        return origin if call == 1 else f"{origin}#{call}"

    def _cut_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        origin = self.of.names[module]
        name = self._called(origin)
        if isinstance(output, Tensor):
            return self._vertex(output, origin, name)
        part = itertools.count()
        return map_tensors(lambda x: self._vertex(x, origin, f"{name}[{next(part)}]"), output)

    def _vertex(self, output: Tensor, origin: str, name: str) -> Tensor:
        if not output.requires_grad:
            return output  # nothing that is trained lies above it
        if (handed := self.handed_on.get(id(output))) is not None and not handed.overwritten:
            return output  # it is a vertex already
        value = output
        if self.values is not None:
            place = len(self.vertices)
            recorded = self.of.recorded[place] if place < len(self.values) else None
            if recorded is None or (recorded.name, recorded.leaf.shape) != (name, output.shape):
                raise _other_path()
            value = self.values[place]
        if self.of.surroundings is not None and _is_checkpointed():
            raise ValueError(
                "frozen: what torch.utils.checkpoint computes again in the backward pass is not at the current states: "
                "leave checkpointing out where something is unfrozen"
            )
        leaf = value.detach().requires_grad_()
        self.vertices.append(Vertex(name, output, leaf))
        return self._hand_on(leaf, origin)

    def _hand_on(self, leaf: Tensor, origin: str) -> Tensor:
        if self.values is None:  # no user ever sees what a later run computes
            # As register_post_accumulate_grad_hook does, at less than half of its price.
            leaf._post_accumulate_grad_hooks = OrderedDict({0: _refuse_stray_gradient})
        tensor = leaf.clone() if self.of.recorder.overwritten.get(origin, True) else leaf
        self.handed_on[id(tensor)] = _HandedOn(origin, tensor, leaf, tensor._version)
        return tensor

    def _leaf(self, output: Tensor) -> Tensor:
        """The vertex's own leaf where the output is an untouched copy of it."""
        handed = self.handed_on.get(id(output))
        return output if handed is None or handed.overwritten else handed.leaf


@contextmanager
def _returning(returned: Mapping[nn.Module, list[_HandedOn]]) -> Iterator[None]:
    """Within it, calls of these modules return, one after the other, what is given."""
    handles = []
    for module, given in returned.items():
        called, outputs = list[bool](), iter(given)

        def announce(module: nn.Module, args: Any, called: list[bool] = called) -> None:
            called.append(True)

        def forward(
            *args: Any,
            own: Any = module.forward,
            called: list[bool] = called,
            outputs: Iterator[_HandedOn] = outputs,
            **kwargs: Any,
        ) -> Any:
            # Who calls forward directly was not noticed when the outputs were recorded either.
            stored = next(outputs, None) if called and called.pop() else None
            return own(*args, **kwargs) if stored is None else stored.tensor

        handles.append(module.register_forward_pre_hook(announce))
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, handle in zip(returned, handles, strict=True):
            handle.remove()
            vars(module).pop("forward", None)


def _laid_out_as(leaf: Tensor, state: Tensor) -> Tensor:
    """The state in an activity's type and memory layout, which the model may rely on (in ``view``)."""
    if state.dtype == leaf.dtype and state.stride() == leaf.stride():
        return state
    return torch.empty_like(leaf, requires_grad=False).copy_(state)


def _other_path() -> RuntimeError:
    return RuntimeError(
        "frozen: run again at the current states, the model took another path than in the feedforward pass (other "
        "modules, or other shapes), so no Jacobian stands for the same vertex: a model whose path depends on its "
        "activities needs everything frozen"
    )


class _HandedOn(NamedTuple):
    """What the rest of the model reads: of a vertex, of an input, of a layer."""

    origin: str  # the name of the vertex's module, "input", or ""
    tensor: Tensor
    leaf: Tensor  # for a layer the tensor itself
    version: int

    @classmethod
    def of_layer(cls, output: Tensor) -> _HandedOn:
        return cls("", output, output, output._version)

    @property
    def overwritten(self) -> bool:
        """Whether it has to be a copy: it was written to, or has hooks, which are not the vertex's own."""
        return self.tensor._version != self.version or bool(self.tensor._backward_hooks)


def _is_checkpointed() -> bool:
    # PyTorch has no public name for "what packs the tensors that are saved now?"
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def map_tensors(function: Callable[[Tensor], Tensor], nested: Any) -> Any:
    """``nested`` with every tensor in it replaced by what the function makes of it, in order."""
    if isinstance(nested, Tensor):  # the usual case, without the price of taking structures apart
        return function(nested)
    return pytree.tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, nested)


def tensors_requiring_grad(nested: Any) -> list[Tensor]:
    """The tensors in ``nested`` that require grad, in order.

    Raises:
        TypeError: there are such tensors in an object that PyTorch does not know how to take apart.
    """
    if isinstance(nested, Tensor):
        return [nested] if nested.requires_grad else []
    tensors = []
    for leaf in pytree.tree_leaves(nested):
        if isinstance(leaf, Tensor):
            if leaf.requires_grad:
                tensors.append(leaf)
        elif any(isinstance(x, Tensor) and x.requires_grad for x in getattr(leaf, "__dict__", {}).values()):
            raise TypeError(
                f"PyTorch does not know where the tensors of a {type(leaf).__name__} are: let the model take and "
                "return tensors, tuples, lists, dicts or named tuples, or register the class with "
                "torch.export.register_dataclass"
            )
    return tensors


def _refuse_stray_gradient(leaf: Tensor) -> None:
    leaf.grad = None
    raise RuntimeError(
        f"the loss reads an activity of shape {tuple(leaf.shape)} that the model kept to itself (on an attribute, say) "
        "and did not return, so the relaxation phase does not know of it: return it from the model, with the output"
    )
