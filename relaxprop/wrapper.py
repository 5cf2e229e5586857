"""The wrapper: a module whose ``loss.backward()`` runs Activation Relaxation, and its settings.

What relaxes and how is not here: `relaxation` has the equations, `recording` the recorded pass. Here is what a model
needs around them: settings that are checked whole, the shortcut at equilibrium, and what is told after a relaxation
phase. What all learning rules have in common is `rule`, how a wrapper stands in the module's place `transparent`.

May import: _pytorch, derivatives, finite, frozen, graph, kept, nested, operations, recording, relaxation, rule,
solved, solvers, unconverged, vertices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, get_args

from torch import Tensor, nn

from relaxprop._pytorch import hook_arrived, in_transform
from relaxprop.derivatives import differs_by_phase
from relaxprop.finite import GradientCheck, check_finite, in_float16
from relaxprop.frozen import ALL_FROZEN, Frozen
from relaxprop.graph import Graph, States
from relaxprop.kept import is_read_beside
from relaxprop.nested import tensors_in, tensors_reached
from relaxprop.operations import EachOperation
from relaxprop.recording import InitialState, OutputRule, Recording, record
from relaxprop.relaxation import RelaxationPhase, refuse_second_derivative
from relaxprop.rule import LearningRule, kept_vertices, shown, tell_missing
from relaxprop.solved import checked
from relaxprop.solvers import (
    SOLVERS,
    ClosedForm,
    Continuous,
    Euler,
    Relaxation,
    Solver,
    at_equilibrium,
    check_solves,
    solver_names,
)
from relaxprop.unconverged import tell
from relaxprop.vertices import Granularity, Hooked, are_operations, choose_vertices, named_parts

UNTIL_CONVERGED = ClosedForm()
REVERSE_MODE = at_equilibrium(vertices=None, depth=None)  # the record of a graph that was not cut


@dataclass(frozen=True)
class Settings:
    """How a wrapped model relaxes; the arguments of `ActivationRelaxation`, checked together.

    Raises:
        TypeError: if an option has the wrong type.
        ValueError: if an option is unknown, or options exclude one another.
    """

    solver: Solver = UNTIL_CONVERGED
    vertices: Granularity | Iterable[nn.Module] = "activations"
    frozen: Frozen = ALL_FROZEN
    initial: InitialState = "feedforward"
    output: OutputRule = "clamped"
    check_finite: bool = True
    measure_residual: bool = False
    keep_states: bool = False
    report_unrelaxed: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver must be one of {solver_names()}, got {shown(self.solver)}")
        if not isinstance(self.frozen, Frozen):
            raise TypeError(f"frozen must be a Frozen(…), got {shown(self.frozen)}")
        if self.initial not in get_args(InitialState):
            raise ValueError(f"initial must be 'feedforward' or 'zero', got {self.initial!r}")
        if self.output not in get_args(OutputRule):
            raise ValueError(f"output must be 'clamped' or 'relaxed', got {self.output!r}")
        for name in ("check_finite", "measure_residual", "keep_states", "report_unrelaxed"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        object.__setattr__(self, "vertices", kept_vertices(self.vertices))
        check_together(self.solver, self.vertices, self.frozen)

    @cached_property
    def needs_no_cut(self) -> bool:
        """Whether one reverse sweep gives the gradients, unless a derivative is dropped in (1) or (2) only."""
        asked = self.measure_residual or self.keep_states or self.report_unrelaxed
        return self.solver.is_limit and self.frozen == ALL_FROZEN and not asked


def check_together(solver: Solver, vertices: Granularity | Iterable[nn.Module], frozen: Frozen) -> None:
    """Refuse settings that exclude one another.

    Raises:
        ValueError: if the solver needs the relaxation's derivative frozen, or the factors of an update are taken at
            different activities where no update has both factors.
    """
    check_solves(solver, linear=frozen.relaxation_derivative)
    if are_operations(vertices) and frozen.splits_update:
        raise ValueError(
            "vertices='operations' has a vertex between each weight and the nonlinearity that follows, so no update "
            f"reads both a derivative and a presynaptic activity, and frozen={frozen} has no meaning there: freeze or "
            "unfreeze update_derivative and update_activity together, or pass vertices='activations'"
        )


_SETTINGS = {field.name for field in fields(Settings)}


class ActivationRelaxation(LearningRule):
    r"""Trains ``module`` by Activation Relaxation: ``loss.backward()`` runs (1), then (2), instead of backpropagation.

        (1)  dx_i/dt = −x_i + Σ_{j∈Chi(i)} x_j ∂x_j/∂x_i |_x̄        relaxation phase, started at x_i = x̄_i
        (2)  ∂L/∂W^l = (f'(W^l x̄^l) ⊙ x^{l+1}) x̄^{lT}               weight update, at the end of the phase

    (Millidge et al., arXiv 2010.06219, Algorithm 1; a state x_i has the shape of its activity x̄_i.)

    Everything else stays as it is: the loss, the optimiser, the training loop. The wrapper stands in the module's place
    (`transparent`): it has the names of its parameters and submodules, its attributes and methods, its signature, and
    its class. What relaxes is what a call of the wrapper computes; a method that calls submodules directly is
    backpropagation's. In evaluation (``torch.no_grad()``) the module is called directly, and so it is where
    ``torch.jit.trace`` or ``torch.export`` follows.

    By default the phase relaxes until converged: for as many steps as leave no more than rounding of the initial state,
    so that the gradients are backpropagation's. After a given number of steps something of the initial state is left.
    That is the feedforward activity, whatever the loss's scale; so dividing a loss by a number (for gradient
    accumulation, or as a mean instead of a sum) makes it weigh more beside the gradient. The first backward pass of a
    setting measures that, and an `UnconvergedWarning` tells where it is much.

    A hook on an activity, or a full backward hook on a submodule, that changes the gradient belongs to the Jacobian: it
    runs in every product with A. One that only looks is refused, as is a full backward hook on a vertex. A loss that
    reads an activity which ``module`` keeps and does not return is refused by ``loss.backward()``.

    The arguments are attributes, which may be set anew between two passes. Where the module has an attribute of the
    same name (``output``), the name is the module's: ``settings`` has them all, and may be set as a whole
    (``dataclasses.replace(model.settings, output="relaxed")``).

    Args:
        module: any module; its result may be nested in tuples, lists, dicts, or be the loss itself.
        solver: how (1) is integrated: `ClosedForm` (default: Algorithm 1 until converged), `PAPER` (its 100 steps of
            0.1, as in the paper's experiments), `Euler`, `Continuous`, `Equilibrium`.
        vertices: what relaxes: "activations" (outputs of activation modules, the paper's layers), "modules" (outputs of
            all modules without submodules), "operations" (results of all operations, in functional code too: the
            paper's Appendix A; where an attention mask has put scores at −∞ or the least number there is, their states
            start at 0), or an iterable of submodules of ``module``.
        frozen: which feedforward quantities (1) and (2) keep, by default all: the paper's conditions a to d (`Frozen`).
            Each quantity that is not kept costs forward passes: one per update, and one per step where the
            relaxation's derivative is not.
        initial: where the states start: "feedforward" at the activities, ``x_0 = x̄`` (the paper), or "zero". From zero
            the states are linear in ∂L/∂x^L: after n steps they are the prediction errors of predictive coding with
            fixed predictions after n + 1 (Millidge, Tschantz, Buckley, arXiv 2006.04182).
        output: "clamped" holds the output at ∂L/∂x^L as in Algorithm 1; "relaxed" lets it relax there like any vertex.
        check_finite: raise `NonFiniteStateError` when a state overflows. Where activities or outputs are in float16,
            infinities propagate to the gradients in any case: a gradient scaler looks for them there.
        measure_residual: measure, at the price of one more product with A, how far the final states are from
            equilibrium (``last_relaxation.residuals``).
        keep_states: keep the final states (``last_relaxation.states``), for plots and for rules of your own.
        report_unrelaxed: look in every pass for what does not relax (``last_relaxation.unrelaxed``): an ``F.relu``
            beside activation modules, a vertex that the model does not call.

    Attributes:
        module: the plain module.
        settings: the arguments, a frozen record.
        last_relaxation: the `Relaxation` record of the latest backward pass, None before the first.

    Raises:
        TypeError: if ``module`` is not a module, is already wrapped, or has to be outside of the wrapper
            (``DistributedDataParallel``, ``fully_shard``, a ``LightningModule``), or if an option has the wrong type;
            in the forward pass, if the result has tensors in an object that PyTorch cannot take apart.
        ValueError: if an option is unknown, a solver needs the relaxation's derivative frozen, or no vertex is found;
            in the forward pass, if ``module`` reads an activity that it has kept from an earlier pass, differentiates
            by itself across a vertex, or cannot be run again, as what is unfrozen needs.
        NonFiniteStateError: in the backward pass, if a state is not finite (``check_finite``).
        RuntimeError: in the forward pass, if a gradient would pass through a transform of torch.func, or if something
            is unfrozen and ``module`` keeps a state that cannot be put back before it runs again; in the backward pass,
            if a second derivative is asked for (``create_graph=True``), or if the loss reads an activity that
            ``module`` did not return; where something is unfrozen, if a parameter or an input was changed in place
            since the forward pass, or the model takes another path.
    """

    # Settings: reading and setting them goes through `settings`.
    solver: Solver
    vertices: Granularity | Iterable[nn.Module]
    frozen: Frozen
    initial: InitialState
    output: OutputRule
    check_finite: bool
    measure_residual: bool
    keep_states: bool
    report_unrelaxed: bool

    _record_name = "last_relaxation"
    _probes = True

    settings: Settings
    last_relaxation: Relaxation | None

    def __init__(
        self,
        module: nn.Module,
        *,
        solver: Solver = UNTIL_CONVERGED,
        vertices: Granularity | Iterable[nn.Module] = "activations",
        frozen: Frozen = ALL_FROZEN,
        initial: InitialState = "feedforward",
        output: OutputRule = "clamped",
        check_finite: bool = True,
        measure_residual: bool = False,
        keep_states: bool = False,
        report_unrelaxed: bool = False,
    ) -> None:
        super().__init__(
            module,
            Settings(
                solver, vertices, frozen, initial, output, check_finite, measure_residual, keep_states, report_unrelaxed
            ),
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Settings are checked whole whenever one is set, and hold from the next pass on."""
        if name == "settings":
            self._configure(value)
        elif name not in _SETTINGS:
            super().__setattr__(name, value)
        elif not hasattr(self.module, name):
            self._configure(replace(self.settings, **{name: value}))
        elif isinstance(value, nn.Module | Tensor):
            super().__setattr__(name, value)
        else:
            raise AttributeError(
                f"{name!r} is a setting of ActivationRelaxation and an attribute of {type(self.module).__name__}: set "
                f"wrapper.settings = dataclasses.replace(wrapper.settings, {name}=…), or wrapper.module.{name}"
            )

    def __getattr__(self, name: str) -> Any:
        if name in _SETTINGS and "settings" in vars(self) and not hasattr(self.module, name):
            return getattr(self.settings, name)
        return super().__getattr__(name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_SETTINGS})

    def _forward(self, args: Any, kwargs: Any) -> Any:
        self._refuse_surroundings(args, kwargs)
        settings = self.settings
        if settings.needs_no_cut:
            parts = named_parts(self.module)
            if not differs_by_phase(parts):
                return self._reverse_mode(parts, args, kwargs)
        recording = self.record(args, kwargs)
        if not recording.graph.outputs:
            return recording.result
        if not self._told:
            vars(self)["_told"] = True
            tell_missing(settings.vertices, recording.called, recording.uncalled, recording.unrelaxed or ())
        solve: Callable[[Graph], Any] = settings.solver.solve
        if type(settings.solver) not in SOLVERS.values():
            solve = partial(checked, solve=solve, record=Relaxation, name=f"{type(settings.solver).__name__}.solve")
        first = recording.graph.size not in self._probed
        if first:
            solve = partial(self._probe_and_solve, solve, recording.update)
            self._warn_of_compiled(recording.graph)
        report = settings.report_unrelaxed
        relaxed = partial(self._relaxed, unrelaxed=recording.unrelaxed) if report else self._relaxed
        beside = self._is_read_beside if first or self._read_beside else partial(is_read_beside, always=False)
        outputs = RelaxationPhase.apply(recording.update, solve, relaxed, beside, recording.shown, *recording.given)  # type: ignore[no-untyped-call]
        return recording.handed_out(outputs)

    @property
    def _steps_run_model(self) -> bool:
        return not self.settings.frozen.relaxation_derivative

    def _refuse_capture(self) -> None:
        super()._refuse_capture()
        settings, solver = self.settings, self.settings.solver
        if settings.measure_residual:
            what = "measure_residual=True reads what is left of each phase"
        elif getattr(solver, "tolerance", None) is not None:
            what = f"solver={solver} reads after every step whether to stop"
        elif isinstance(solver, Euler) and solver.order == "asynchronous":
            what = f"solver={solver} draws the vertices of every step, and each replay would have the same ones"
        elif isinstance(solver, Continuous) and not settings.frozen.relaxation_derivative:
            what = f"solver={solver}, unfrozen, is integrated outside of PyTorch"
        else:
            return
        raise RuntimeError(
            f"{what}, which a CUDA graph cannot: train without torch.cuda.graph, or pass a solver of fixed steps such "
            "as Euler(0.1, 100)"
        )

    def record(self, args: Any, kwargs: Any = None) -> Recording:
        """The module's forward pass, recorded as for training."""
        settings = self.settings
        return record(
            self.module,
            settings.vertices,
            args,
            kwargs,
            initial=settings.initial,
            output=settings.output,
            frozen=settings.frozen,
            writes=self._writes,
            report_unrelaxed=settings.report_unrelaxed,
        )

    def _relaxed(
        self, graph: Graph, states: States, relaxation: Relaxation, unrelaxed: tuple[str, ...] | None = None
    ) -> None:
        """What follows a relaxation phase, before the weight update."""
        settings = self.settings
        if settings.check_finite:
            check_finite(graph, states, settings.solver)
        if settings.measure_residual:
            relaxation = replace(relaxation, residuals=_residuals(graph, states))
        if settings.keep_states:
            kept = {v.name: states[v].detach().clone() for v in graph.recorded if v in states}
            relaxation = replace(relaxation, states=kept)
        if unrelaxed is not None:
            relaxation = replace(relaxation, unrelaxed=unrelaxed)
        self._keep_record(relaxation)
        if not self._measured:
            vars(self)["_measured"] = True
            if relaxation.remaining and not relaxation.converged:  # neither is known of a nonlinear relaxation
                tell(settings.solver, graph, states)

    def _reverse_mode(self, parts: Mapping[nn.Module, str], args: Any, kwargs: Any) -> Any:
        """At equilibrium ``x = ∂L/∂x``, which PyTorch's own reverse sweep brings to every vertex of an uncut graph."""
        settings = self.settings
        look = settings.check_finite or not self._told
        vertices = choose_vertices(self.module, parts, settings.vertices) if look else {}
        called: set[nn.Module] = set()
        scaled = False  # whether infinities are left to a gradient scaler
        check = GradientCheck()

        def look_at(name: str, x: Tensor | None) -> None:
            if not scaled:
                check(name, x)

        def watch(tensor: Tensor, name: str) -> Tensor:
            nonlocal scaled
            if in_transform():  # nobody knows what a transform of torch.func makes of a hook
                return tensor
            scaled = scaled or in_float16([tensor])
            hook_arrived(tensor, partial(look_at, name))
            return tensor

        def at_vertex(module: nn.Module, args: Any, output: Any) -> None:
            called.add(module)
            for tensor in tensors_reached(output) if settings.check_finite else ():
                if tensor.grad_fn is not None:  # else it outlives this pass, and a hook on it would too
                    watch(tensor, vertices[module])

        def at_output(gradient: Tensor) -> None:
            refuse_second_derivative()
            self._keep_record(REVERSE_MODE)

        each = settings.check_finite and are_operations(settings.vertices)
        with Hooked(vertices, at_vertex), EachOperation(watch) if each else nullcontext():
            result = self.module(*args, **kwargs)
        given = {id(x) for x in tensors_in((args, kwargs))}  # an input that is handed back stays the caller's
        outputs = {id(x): x for x in tensors_reached(result) if id(x) not in given}
        scaled = scaled or in_float16(outputs.values())
        if outputs and not self._told:
            vars(self)["_told"] = True
            if vertices:
                uncalled = [name for module, name in vertices.items() if module not in called]
                tell_missing(settings.vertices, bool(called), uncalled)
        for tensor in outputs.values():
            if tensor.grad_fn is not None:
                hook_arrived(tensor, at_output)
        return result

    def extra_repr(self) -> str:
        settings, parts = self.settings, named_parts(self.module)
        vertices = settings.vertices
        # A module that was chosen may have been replaced since, which the next pass will refuse.
        names = [vertices] if isinstance(vertices, str) else [parts.get(m, type(m).__name__) for m in vertices]
        frozen = "" if settings.frozen == ALL_FROZEN else f", frozen={settings.frozen}"
        initial = "" if settings.initial == "feedforward" else f", initial={settings.initial}"
        return f"solver={settings.solver}, vertices={', '.join(names)}, output={settings.output}{initial}{frozen}"


def _residuals(graph: Graph, states: States) -> dict[str, float]:
    """``‖A x + s − x‖ / ‖A x + s‖`` by vertex name; 0 where there is nothing to relax to and nothing left."""
    drive = graph.drive(states)
    residuals = {}
    for vertex, x in states.items():
        distance, size = float((drive[vertex] - x).norm()), float(drive[vertex].norm())
        residuals[vertex.name] = distance / size if size else math.inf if distance else 0.0
    return residuals
