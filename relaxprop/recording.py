"""Records a model's forward pass as a `Graph`: finds the modules whose outputs are vertices and cuts there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

# PyTorch has no public name for its nested structures; Hugging Face registers its output classes with this one.
from torch.utils import _pytree as pytree

from relaxprop.graph import Graph, Vertex

Granularity = Literal["activations", "modules"]
OutputRule = Literal["clamped", "relaxed"]


def find_vertices(module: nn.Module, vertices: Granularity | Iterable[nn.Module]) -> dict[nn.Module, str]:
    """The modules whose outputs are vertices, with their names in ``module``.

    Args:
        vertices: "activations" (the paper's layers: modules of a class that is defined in a file of activations, as
            ``torch.nn.modules.activation`` and ``transformers.activations``), "modules" (every module without
            submodules), or an iterable of submodules.

    Raises:
        ValueError: an unknown word, a module that is not part of ``module``, or no vertex found.
        TypeError: anything else.
    """
    names = {submodule: name or type(submodule).__name__ for name, submodule in module.named_modules()}
    if isinstance(vertices, str):
        if vertices == "activations":
            found = {m: name for m, name in names.items() if _is_activation(m)}
        elif vertices == "modules":
            found = {m: name for m, name in names.items() if not any(m.children())}
        else:
            raise ValueError(
                f"vertices must be 'activations', 'modules' or an iterable of the model's submodules, got {vertices!r}"
            )
    else:
        if not isinstance(vertices, Iterable) or (isinstance(vertices, nn.Module) and vertices not in names):
            raise TypeError(
                "vertices must be 'activations', 'modules' or an iterable of the model's submodules, "
                f"got {type(vertices).__name__}"
            )
        chosen = list(vertices)
        for submodule in chosen:
            if not isinstance(submodule, nn.Module):
                raise TypeError(f"vertices must hold modules, got {submodule!r}")
            if submodule not in names:
                raise ValueError(
                    f"vertices holds a {type(submodule).__name__} that is not part of the {type(module).__name__}"
                )
        found = {m: names[m] for m in chosen}
    if not found:
        raise ValueError(
            f"vertices={vertices!r} finds no vertex in {type(module).__name__}: pass vertices='modules' (the output of "
            "every module without submodules) or an iterable of the submodules whose outputs should relax"
        )
    return found


def _is_activation(module: nn.Module) -> bool:
    home = type(module).__module__.rpartition(".")[2]
    return home in ("activation", "activations") and not isinstance(module, nn.MultiheadAttention)


class Recorder:
    """Runs a model's forward pass and returns its `Graph`.

    Args:
        output: "clamped" holds the output at ∂L/∂x^L, "relaxed" makes it one more vertex.
    """

    def __init__(self, output: OutputRule = "clamped") -> None:
        self.output = output
        # A model may write in place into what a vertex handed on (ReLU(inplace=True), x += y). Autograd forbids that
        # on a leaf, and it would change x̄. So the first pass hands on copies and sees which are written to; later
        # passes copy those.
        self.overwritten: set[str] | None = None

    def record(
        self,
        module: nn.Module,
        vertices: Mapping[nn.Module, str],
        parameters: Sequence[nn.Parameter],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Graph, Any]:
        """One forward pass.

        Args:
            vertices: as from `find_vertices`.
            parameters: the model's, as from `trained_parameters`.
            args, kwargs: the model's; tensors in them that require grad are inputs that gradients are wanted for.

        Returns:
            The graph, and the model's result with its tensors still attached to the graph. In ``graph.trained`` the
            inputs come first, then the parameters.
        """
        with torch.enable_grad():
            return _Pass(self, vertices).run(module, parameters, args, dict(kwargs or {}))


class _Pass:
    """One recorded forward pass."""

    def __init__(self, recorder: Recorder, names: Mapping[nn.Module, str]) -> None:
        self.recorder = recorder
        self.names = names
        self.vertices: list[Vertex] = []
        self.calls: dict[str, int] = {}
        self.handed_on: dict[int, _HandedOn] = {}  # by the id of the tensor

    def run(
        self, module: nn.Module, parameters: Sequence[nn.Parameter], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Graph, Any]:
        inputs: list[Tensor] = []

        def detached(x: Tensor) -> Tensor:
            if not x.requires_grad:
                return x
            inputs.append(x.detach().requires_grad_())
            return self._hand_on(f"input {len(inputs)}", inputs[-1])

        args = [map_tensors(detached, x) for x in args]
        kwargs = {name: map_tensors(detached, x) for name, x in kwargs.items()}
        replacements = _stand_ins(module, parameters)
        handles = [m.register_forward_hook(self._cut_output) for m in self.names]
        try:
            if replacements:
                result = torch.func.functional_call(module, replacements, tuple(args), kwargs)
            else:
                result = module(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if self.recorder.output == "relaxed":
            result = map_tensors(lambda x: self._vertex("output", x), result)
        outputs = [self._leaf(x) for x in tensors_requiring_grad(result)]
        stand_in = {id(module.get_parameter(name)): alias for name, alias in replacements.items()}
        trained = [*inputs, *(stand_in.get(id(p), p) for p in parameters)]
        graph = Graph(self.vertices, outputs, trained, clamped=self.recorder.output == "clamped")
        if self.recorder.overwritten is None:
            graph.check_trained()
        written = {handed.name for handed in self.handed_on.values() if handed.overwritten}
        self.recorder.overwritten = (self.recorder.overwritten or set()) | written
        return graph, result

    def _cut_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        name = self.names[module]
        self.calls[name] = call = self.calls.get(name, 0) + 1
        if call > 1:
            name = f"{name}#{call}"
        if isinstance(output, Tensor):
            return self._vertex(name, output)
        part = itertools.count()
        return map_tensors(lambda x: self._vertex(f"{name}[{next(part)}]", x), output)

    def _vertex(self, name: str, output: Tensor) -> Tensor:
        if not output.requires_grad:
            return output  # nothing that is trained lies above it
        if (handed := self.handed_on.get(id(output))) is not None and not handed.overwritten:
            return output  # it is a vertex already
        leaf = output.detach().requires_grad_()
        self.vertices.append(Vertex(name, output, leaf))
        return self._hand_on(name, leaf)

    def _hand_on(self, name: str, leaf: Tensor) -> Tensor:
        overwritten = self.recorder.overwritten
        copy = overwritten is None or name in overwritten
        handed = leaf.clone() if copy else leaf
        self.handed_on[id(handed)] = _HandedOn(name, handed, leaf, handed._version)
        return handed

    def _leaf(self, output: Tensor) -> Tensor:
        """The vertex's own leaf where the output is an untouched copy of it."""
        handed = self.handed_on.get(id(output))
        return output if handed is None or handed.overwritten else handed.leaf


class _HandedOn(NamedTuple):
    """What the rest of the model reads of a vertex or of an input."""

    name: str
    tensor: Tensor
    leaf: Tensor
    version: int

    @property
    def overwritten(self) -> bool:
        return self.tensor._version != self.version


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


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that require grad."""
    return [p for p in module.parameters() if p.requires_grad]


def _stand_ins(module: nn.Module, parameters: Sequence[nn.Parameter]) -> dict[str, Tensor]:
    """Aliases, by name, of the parameters that carry hooks.

    A hook on a parameter (gradient clipping, logging) must see the final gradient once. It would also run whenever a
    gradient of that very tensor is taken within the relaxation phase, so there an alias takes its place.
    """
    hooked = {id(p): p.detach().requires_grad_() for p in parameters if cast(Any, p)._backward_hooks}
    return {name: hooked[id(p)] for name, p in module.named_parameters() if id(p) in hooked} if hooked else {}
