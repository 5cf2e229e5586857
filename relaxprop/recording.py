"""Records a model's feedforward pass: a `Graph` cut at the vertices, and what equation (2) takes from it.

May import: _pytorch, cutting, frozen, graph, kept, nested, rerun, sight, unrelaxed, update, vertices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from relaxprop._pytorch import has_no_numbers
from relaxprop.cutting import Arguments, Cut, Run, Writes
from relaxprop.frozen import ALL_FROZEN, Frozen
from relaxprop.graph import Graph
from relaxprop.kept import note_handed_out, refuse_earlier
from relaxprop.nested import map_requiring_grad
from relaxprop.rerun import Rerun
from relaxprop.sight import changing, hooked, warn_of_other_hooks
from relaxprop.unrelaxed import operations, scripted
from relaxprop.update import Update
from relaxprop.vertices import Granularity, are_operations, choose_vertices, find_layers, named_parts

OutputRule = Literal["clamped", "relaxed"]
InitialState = Literal["feedforward", "zero"]


class Recording(NamedTuple):
    """A recorded forward pass.

    Attributes:
        graph: its `Graph`.
        update: equation (2) on it.
        result: the model's result, its tensors still attached to the graph.
        given: the tensors that a gradient is wanted for, as the user knows them: inputs, then parameters.
        shown: one for each output of the graph: the tensors in the result that require grad, and what the model wrote
            into inputs. The user gets their numbers, where a write that PyTorch does not count (``x.data``) makes these
            differ from x̄.
        written: the inputs that were written into, as the user knows them, and what was made of each.
        called: whether any vertex's module, or any operation that is a vertex, was called.
        uncalled: the names of the vertices' modules that were not.
        unrelaxed: these, and the names of scripted parts and nonlinear operations that no vertex stands for; only where
            it is asked for, or where every operation should be a vertex and none is.
    """

    graph: Graph
    update: Update
    result: Any
    given: list[Tensor]
    shown: list[Tensor]
    written: list[tuple[Tensor, Tensor]]
    called: bool
    uncalled: Sequence[str]
    unrelaxed: tuple[str, ...] | None

    def replaced(self, outputs: Sequence[Tensor]) -> Any:
        """The model's result with these in the place of ``shown``."""
        instead = {id(x): y for x, y in zip(self.shown, outputs, strict=True)}
        return map_requiring_grad(lambda x: instead.get(id(x), x), self.result)

    def handed_out(self, outputs: Sequence[Tensor]) -> Any:
        """The same for the user, whose inputs have what the model wrote into them, as it would have without a cut."""
        note_handed_out(outputs)
        own = {id(x): given for given, x in self.written}
        pairs = zip(self.shown, outputs, strict=True)
        return self.replaced([own[id(x)].copy_(y) if id(x) in own else y for x, y in pairs])


def record(
    module: nn.Module,
    vertices: Granularity | Iterable[nn.Module],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    initial: InitialState = "feedforward",
    output: OutputRule = "clamped",
    frozen: Frozen = ALL_FROZEN,
    writes: Writes | None = None,
    report_unrelaxed: bool = False,
    parts: Mapping[nn.Module, str] | None = None,
) -> Recording:
    """One forward pass, to be called with gradients enabled.

    Args:
        module: the model.
        vertices: as `find_vertices` takes them.
        args: the model's; tensors that require grad are inputs that gradients are wanted for.
        kwargs: likewise.
        initial: where the states start: "feedforward" at x̄, "zero" at zero.
        output: "clamped" holds the output at ∂L/∂x^L, "relaxed" makes it one more vertex.
        frozen: what the relaxation phase and the update take from this pass, and what from another at the states.
        writes: what earlier passes have shown of the model; this pass adds to it.
        report_unrelaxed: whether to look for what did not relax.
        parts: the names of the model's parts, if they are others than `named_parts` gives them.

    Raises:
        TypeError: if the model's result holds tensors in an object that PyTorch cannot take apart.
        ValueError: if the model read an activity that it kept from an earlier pass, differentiates across a cut, or
            computes shapes without numbers.
        RuntimeError: if something is unfrozen, but the model cannot be run again as it was.
    """
    kwargs = kwargs or {}
    writes = writes or Writes()
    parts = parts or named_parts(module)
    runs_again = frozen != ALL_FROZEN
    cut = Cut(
        modules=choose_vertices(module, parts, vertices),
        operations=are_operations(vertices),
        output=output == "relaxed",
        inputs=not frozen.input,
        layers=find_layers(module) if frozen.splits_update else (),
        reruns=runs_again,
        reports=report_unrelaxed,
    )
    arguments = Arguments(args, kwargs, relax=cut.inputs)
    rerun = Rerun(module, arguments, cut, writes, (args, kwargs)) if runs_again else None
    run = Run(cut, writes)
    looking = hooked(parts, cut.modules, each=cut.operations)
    with (
        nullcontext() if rerun is None else rerun.watching(run),
        changing(looking, parts) if looking else nullcontext(),
    ):
        result = run.call(module, arguments)
        _refuse_shapes(run)
    if run.other_hooks and not looking:  # a full backward hook is one on a node, which PyTorch places
        warn_of_other_hooks(run.model)
    writes.learn(run)
    stored = run.linearisation()
    if rerun is not None:
        rerun.passed(run.vertices, stored)
    graph = Graph(
        stored,
        clamped=output == "clamped",
        from_zero=initial == "zero",
        masked=cut.operations,
        linearise=None if frozen.relaxation_derivative else rerun,
    )
    stand_ins = arguments.inputs
    inputs = [pair for key, pair in stand_ins.items() if key in graph.read and pair[0].requires_grad]
    trained = {key: tensor for key, tensor in graph.read.items() if key not in stand_ins}
    parameters = list(trained.values())
    for leaf in parameters:
        refuse_earlier(module, leaf)
    modules = cut.modules
    uncalled = [name for name in modules.values() if name not in run.calls] if len(run.calls) < len(modules) else []
    looks = report_unrelaxed or (cut.operations and not run.calls)
    return Recording(
        graph,
        Update(graph, frozen, [stand_in for _, stand_in in inputs], parameters, rerun),
        result,
        given=[given for given, _ in inputs] + parameters,
        shown=run.shown,
        written=run.written,
        called=bool(run.calls),
        uncalled=uncalled,
        unrelaxed=(*uncalled, *scripted(parts, modules), *_operations(run)) if looks else None,
    )


def _refuse_shapes(run: Run) -> None:
    """Refuse a pass that has computed shapes alone, of which no phase makes gradients.

    Raises:
        ValueError: if it has.
    """
    if any(has_no_numbers(x) for x in run.outputs) and not torch.compiler.is_compiling():
        raise ValueError(
            f"{run.model} computes shapes without numbers (on the device meta, or within FakeTensorMode), and a phase "
            "looks at the numbers that it relaxes: move model and inputs to a real device, or use the plain module "
            "(wrapper.module); ActivationRelaxation takes them where it needs no cut, as by default"
        )


def _operations(run: Run) -> list[str]:
    """The nonlinear operations of a run that no vertex stands for."""
    cut = [v.output for v in run.vertices]
    return operations([*run.outputs, *cut], run.within | {x.grad_fn for x in cut})
