"""What all learning rules have in common: a module that stands in another's place, and whose ``loss.backward()`` is a
rule. What is refused, warned of and kept on the way there does not depend on the rule.

May import: _pytorch, compiled, cutting, graph, kept, nested, probe, transparent, unconverged, update, vertices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd.graph import Node

from relaxprop._pytorch import (
    in_transform,
    is_capturing,
    is_compiled,
    is_exporting,
    is_tracing,
    not_in_a_whole_graph,
    run_uncompiled,
)
from relaxprop.compiled import StepCompiler
from relaxprop.cutting import Writes
from relaxprop.graph import Graph
from relaxprop.kept import is_read_beside
from relaxprop.nested import tensors_reached
from relaxprop.probe import check_repeatable
from relaxprop.transparent import Transparent
from relaxprop.unconverged import warn_user
from relaxprop.update import Update
from relaxprop.vertices import Granularity, are_operations, find_vertices, named_parts


class LearningRule(Transparent):
    """Wraps ``module``: ``loss.backward()`` fills ``.grad`` by a learning rule.

    Args:
        module: any module.
        settings: what the rule is told; a frozen record with ``vertices``.

    Attributes:
        module: the plain module.
        settings: what the rule was told; it may be set anew between two passes, as a whole.

    Raises:
        TypeError: if ``module`` is not a module, is already wrapped, or has to be outside of the wrapper, or the
            settings that are set are another rule's.
        ValueError: if no vertex is found.
    """

    _record_name: ClassVar[str] = "last_phase"  # of the attribute that tells what the last backward pass did
    _probes: ClassVar[bool] = False  # whether every backward is taken more than once, so that it has to allow for it

    settings: Any
    _writes: Writes
    _told: bool  # whether a pass of these settings has been looked at, and what is to be told was
    _measured: bool  # likewise a relaxation phase
    _read_beside: bool  # whether a loss has read more of a pass than the result
    _compiled_by: dict[str, Any] | None = None  # options of torch.compile, for what steps compute
    _probed: set[int]  # the sizes of graphs that allow for products, see `probe`

    def __init__(self, module: nn.Module, settings: Any) -> None:
        refuse_outer(module, type(self))
        super().__init__(module)
        self._keep_record(None)
        self._configure(settings)

    def _configure(self, settings: Any) -> None:
        kind = type(vars(self).get("settings", settings))
        if not isinstance(settings, kind):
            raise TypeError(f"settings must be a {kind.__name__}(…), as wrapper.settings is, got {shown(settings)}")
        find_vertices(self.module, settings.vertices)
        # Past nn.Module's own way to set attributes, which is slow and looks for parameters.
        vars(self).update(settings=settings, **self._of_first_pass())

    def _of_first_pass(self) -> dict[str, Any]:
        """What the first pass of a setting starts from: nothing is known of the model, and nothing was told."""
        writes = Writes(compiler=None if self._compiled_by is None else StepCompiler(self._compiled_by))
        return {"_writes": writes, "_told": False, "_measured": False, "_read_beside": False, "_probed": set()}

    def __getstate__(self) -> dict[str, Any]:
        # A copy's first pass is to be looked at as any other's.
        return super().__getstate__() | self._of_first_pass()

    def compile_steps(self, **options: Any) -> None:
        """Compile what each step computes of the states, by ``torch.compile``.

        The compiler fuses operations on single elements, and its own loops take the place of PyTorch's kernels: that
        is slower on the paper's networks, and can be faster where a step has many such operations. Measure it. The
        states are equal to rounding. Compiling takes some seconds in the first pass of a setting, and for every other
        shape of a minibatch. Where a model is more than calls of PyTorch (`replay`), it runs in every step as before,
        and a warning says so.

        Args:
            options: of ``torch.compile``, such as ``mode`` and ``backend``.

        Raises:
            ValueError: if no step of this rule computes anything of the model at the states: nothing would be compiled.
            TypeError, RuntimeError: if ``torch.compile`` does not know an option, or the backend.
        """
        if not self._steps_run_model:
            raise ValueError(
                f"compile_steps: no step of {rule_of(type(self)).__name__} with these settings runs the model, so that "
                "there is nothing to compile: leave it out, or unfreeze the relaxation's derivative before, as in "
                "Frozen(relaxation_derivative=False)"
            )
        StepCompiler(options)  # refuses what cannot be, before anything is changed
        vars(self)["_compiled_by"] = options
        self._configure(self.settings)

    @property
    def _steps_run_model(self) -> bool:
        """Whether steps compute something of the model at the states, so that it can be compiled."""
        return False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "settings":
            self._configure(value)
        else:
            super().__setattr__(name, value)

    @not_in_a_whole_graph(
        "a relaxation phase cannot be part of one compiled graph: leave fullgraph=True out, or compile the plain module"
    )
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own result."""
        if not torch.is_grad_enabled() or is_tracing() or is_exporting():
            return self._plain(*args, **kwargs)
        if is_capturing():
            self._refuse_capture()
        return run_uncompiled(type(self)._forward, self, args, kwargs)

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        """What a call returns, computed by the module as it is: its gradients are backpropagation's."""
        return self.module(*args, **kwargs)

    def _forward(self, args: Any, kwargs: Any) -> Any:
        """The module's result, its tensors attached to what makes the gradients."""
        raise NotImplementedError

    def _refuse_surroundings(self, args: Any, kwargs: Any) -> None:
        if not self._told:
            refuse_outer(self.module, rule_of(type(self)))  # it may have been put there since
        if in_transform():
            refuse_transforms(self.module, args, kwargs)

    def _refuse_capture(self) -> None:
        """Refuse what a CUDA graph would leave out: it repeats what was launched, and decides nothing.

        Raises:
            RuntimeError: if the settings want a look at values, or nobody has looked at the model yet.
        """
        if self.settings.check_finite:
            raise RuntimeError(
                "check_finite=True looks at the states of every backward pass, which a CUDA graph cannot: set "
                "wrapper.settings = dataclasses.replace(wrapper.settings, check_finite=False) before the capture, and "
                "look at the loss after a replay"
            )
        if not self._told:
            raise RuntimeError(_WARM_UP)

    def _probe_and_solve(self, solve: Callable[[Graph], Any], update: Update, graph: Graph) -> Any:
        """The first phase of a setting, and of a graph of another size: whether the model allows for one."""
        if is_capturing():
            raise RuntimeError(_WARM_UP)
        if not self._probes or check_repeatable(self.module, update):
            self._probed.add(graph.size)
        return solve(graph)

    def _is_read_beside(self, phase: Node, graph: Graph) -> bool:
        """As `is_read_beside`; what a loss has read once, later passes look for."""
        if found := is_read_beside(phase, graph):
            vars(self)["_read_beside"] = True
        return found

    def _warn_of_compiled(self, graph: Graph) -> None:
        """What was compiled, and used, before it was wrapped runs past the hooks of the modules within."""
        parts = named_parts(self.module)
        compiled = [name for module, name in parts.items() if is_compiled(module)]
        if not compiled:
            return
        recorded = {v.name.partition("[")[0].partition("#")[0] for v in graph.recorded}
        chosen = find_vertices(self.module, self.settings.vertices).values()
        for part in compiled:
            missed = [name for name in chosen if name.startswith(f"{part}.") and name not in recorded]
            if missed:
                warn_user(
                    f"the compiled module {part!r} runs past its vertices ({', '.join(missed[:3])}), which do not "
                    "relax: it was compiled before it was wrapped. Call torch.compiler.reset() before the first pass, "
                    "or leave it uncompiled"
                )

    def _keep_record(self, found: Any) -> None:
        vars(self)[self._record_name] = found


_WARM_UP = (
    "the first pass of a setting looks at the model, which a CUDA graph cannot: run some training steps on a side "
    "stream before the capture, with an input of the same shape, as PyTorch's documentation of CUDA graphs does"
)


def rule_of(kind: type) -> type:
    """The class of a rule that the class of a wrapper was made for."""
    return getattr(kind, "_wrapper", kind)


def shown(value: object) -> str:
    """As messages show it: classes and functions by their names."""
    return getattr(value, "__name__", repr(value))


def refuse_outer(module: object, rule: type) -> None:
    """Refuse what has to be outside of the wrapper, or cannot be wrapped.

    Raises:
        TypeError: if it is; the error names the class and the right order.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    for name, part in module.named_modules():
        kinds = {kind.__name__ for kind in type(part).__mro__}
        what = f"the part {name!r} of module is" if name else "module is"
        if isinstance(part, LearningRule):
            known = rule_of(type(part)).__name__
            raise TypeError(f"{what} {_article(known)} {known} already: wrap the plain module once")
        for kind in kinds & {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"}:
            raise TypeError(
                f"{what} a {kind}, whose hooks would see each product of the relaxation phase, and not the gradients: "
                f"wrap the plain module, then pass the wrapper on, {kind}({rule.__name__}(…))"
            )
        if not name and "FSDPModule" in kinds:
            raise TypeError(
                f"{what} sharded by fully_shard, which would then gather it within each product of the relaxation "
                "phase: wrap the plain module, then call fully_shard on the wrapper"
            )
        if "LightningModule" in kinds:
            raise TypeError(
                f"{what} a LightningModule, whose training_step Lightning calls, and not its forward, so that nothing "
                f"would relax: wrap the network within it, self.network = {rule.__name__}(network)"
            )


def _article(name: str) -> str:
    return "an" if name[0] in "AEIOU" else "a"


def tell_missing(
    vertices: Granularity | Iterable[nn.Module], called: bool, uncalled: Sequence[str], unrelaxed: Sequence[str] = ()
) -> None:
    """Warns the user of vertices that were expected of a pass, if any is missing."""
    if are_operations(vertices):
        if not called and unrelaxed:
            warn_user(
                "vertices='operations' finds no operation in the forward pass, so nothing relaxes and this is "
                f"backpropagation: PyTorch announces nothing of what happens in {', '.join(unrelaxed)}; pass "
                "vertices='modules', or call these parts as plain Python, neither scripted nor within an "
                "autograd.Function"
            )
    elif not called:
        warn_user(
            f"none of the vertices ({', '.join(uncalled[:3])}, …) was called in the forward pass, so nothing relaxes "
            "and this is backpropagation: does the model call functions in their place? Pass vertices='modules' or the "
            "submodules whose outputs should relax"
        )
    elif uncalled and not isinstance(vertices, str):
        warn_user(
            f"the model did not call {', '.join(uncalled)} in the forward pass, so no vertex relaxes there: does it "
            "call a function, or the module's forward, in its place? Leave it out of vertices, or let the model call "
            "the module"
        )


def refuse_transforms(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Refuse the transforms of torch.func where there is something to differentiate by.

    Raises:
        RuntimeError: if a gradient would pass through the transform.
    """
    if any(x.requires_grad for x in (*module.parameters(), *tensors_reached((args, kwargs)))):
        raise RuntimeError(
            "within a transform of torch.func (vmap, grad, …) the relaxation phase would not run: call the wrapper "
            "outside of it and loss.backward(), or transform the plain module (wrapper.module)"
        )


def kept_vertices(vertices: Granularity | Iterable[nn.Module]) -> Granularity | Iterable[nn.Module]:
    """The vertices as settings keep them: an iterator would be used up, and a ModuleList can be changed."""
    if isinstance(vertices, nn.ModuleList) or (
        isinstance(vertices, Iterable) and not isinstance(vertices, str | nn.Module)
    ):
        return tuple(vertices)
    return vertices
