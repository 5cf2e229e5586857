r"""Activation Relaxation: backpropagation's gradients from local dynamics.

Notation: x̄_i is vertex i's activity in the feedforward pass, x_i its state in the relaxation phase (same shape,
other meaning: it converges to a gradient), Chi(i) the vertices that read i directly, L the loss.

    (1)  dx_i/dt = −x_i + Σ_{j∈Chi(i)} x_j ∂x_j/∂x_i |_x̄        relaxation phase, started at x_i = x̄_i
    (2)  ∂L/∂W^l = (f'(W^l x̄^l) ⊙ x^{l+1}) x̄^{lT}               weight update, at the end of the phase

The paper derives (1) for layers ``x^{l+1} = f(W^l x^l)``, where the sum is ``W^{lT} (f'(W^l x̄^l) ⊙ x^{l+1})``, and
states it for any directed acyclic graph in its equation (7). At equilibrium ``x_i = ∂L/∂x_i``.

`ActivationRelaxation` below runs (1) and (2) where PyTorch would run backpropagation. Where the pieces are:
`graph` applies the sum in (1) to all vertices at once, `solvers` integrates (1), `vertices` finds what relaxes and
`recording` cuts the graph there.
Source: Millidge, Tschantz, Seth, Buckley, arXiv 2010.06219, section 2 and Algorithm 1.
"""

from __future__ import annotations

import cmath
import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from relaxprop.derivatives import differs_by_phase
from relaxprop.frozen import ALL_FROZEN, Frozen
from relaxprop.graph import Gradients, Graph, States
from relaxprop.operations import EachOperation
from relaxprop.recording import OutputRule, Recorder, Recording, map_tensors, tensors_requiring_grad
from relaxprop.solvers import ClosedForm, Equilibrium, Relaxation, Solver, at_equilibrium, check_solves
from relaxprop.transients import steps_to_converge
from relaxprop.vertices import Granularity, Hooked, are_operations, find_vertices, named_parts


class NonFiniteStateError(FloatingPointError):
    """A state became infinite or not-a-number in the relaxation phase.

    Attributes:
        vertex: name of the vertex.
        step: the step after which it was so (0: already at its start); None if the solver has no steps.
    """

    def __init__(self, vertex: str, step: int | None) -> None:
        self.vertex = vertex
        self.step = step
        super().__init__(vertex, step)

    def __str__(self) -> str:
        when = "" if self.step is None else f" after step {self.step}" if self.step else " when the relaxation starts"
        return (
            f"the state of vertex {self.vertex!r} is not finite{when}: look at the loss, lower the learning rate or "
            "the step size; a gradient scaler, which copes with infinities itself, wants check_finite=False"
        )


DEFAULT = ClosedForm()
REVERSE_MODE = at_equilibrium(vertices=None, depth=None)  # the record of a graph that was not cut
UNCONVERGED = 0.1  # weight of the initial state from which on the default's user is warned


class ActivationRelaxation(nn.Module):
    r"""Trains ``module`` by Activation Relaxation: ``loss.backward()`` runs (1), then (2), instead of backpropagation.

        (1)  dx_i/dt = −x_i + Σ_{j∈Chi(i)} x_j ∂x_j/∂x_i |_x̄        relaxation phase, started at x_i = x̄_i
        (2)  ∂L/∂W^l = (f'(W^l x̄^l) ⊙ x^{l+1}) x̄^{lT}               weight update, at the end of the phase

    (Millidge et al., arXiv 2010.06219, Algorithm 1; a state x_i has the shape of its activity x̄_i.)

    Everything else stays as it is: the loss, the optimiser, the training loop. The state dictionary is that of
    ``module``, without a prefix (``named_parameters`` have the prefix ``module.``, as of any part). In evaluation
    (``torch.no_grad()``) the module is called directly.

    The initial state of the relaxation phase is the feedforward activity, whatever the loss's scale. So with a finite
    number of steps, dividing a loss by a number (for gradient accumulation, or as a mean instead of a sum) makes what
    is left of the initial state weigh more beside the gradient; ``last_relaxation.remaining`` says how much is left.

    A hook on an activity, and a full backward hook on a submodule, belongs to its Jacobian: it runs in every product
    with A. A loss that reads an activity which ``module`` keeps and does not return is refused by ``loss.backward()``.

    The arguments are attributes, which may be set anew between two passes.

    Args:
        module: any module; its result may be nested in tuples, lists, dicts, or be the loss itself.
        solver: how (1) is integrated: `ClosedForm` (default: Algorithm 1 with the paper's 100 steps of 0.1),
            `Euler`, `Continuous`, `Equilibrium`.
        vertices: what relaxes: "activations" (outputs of activation modules, the paper's layers), "modules" (outputs of
            all modules without submodules), "operations" (results of all operations, in functional code too: the
            paper's Appendix A; where an attention mask has put scores at −∞ or the least number there is, their states
            start at 0), or an iterable of submodules of ``module``.
        frozen: which feedforward quantities (1) and (2) keep, by default all: the paper's conditions a to d (`Frozen`).
            Each quantity that is not kept costs forward passes: one per update, and one per step where the
            relaxation's derivative is not.
        output: "clamped" holds the output at ∂L/∂x^L as in Algorithm 1; "relaxed" lets it relax there like any vertex.
        check_finite: raise `NonFiniteStateError` when a state overflows. False leaves infinities to propagate, as a
            gradient scaler for float16 expects.
        measure_residual: measure, at the price of one more product with A, how far the final states are from
            equilibrium (``last_relaxation.residuals``).

    Attributes:
        last_relaxation: the `Relaxation` record of the latest backward pass, None before the first.

    Raises:
        TypeError: ``module`` is no module or already wrapped, or an option has the wrong type; in the forward pass,
            tensors in an object that PyTorch cannot take apart.
        ValueError: an unknown option, a solver that needs the relaxation's derivative frozen, or no vertex is found; in
            the forward pass, ``module`` reads a tensor that requires grad and is neither its parameter nor its input,
            or cannot be run again, as what is unfrozen needs.
        NonFiniteStateError: in the backward pass, see ``check_finite``.
        RuntimeError: in the forward pass, within a transform of torch.func that gradients go through; in the backward
            pass, if a second derivative is asked for (``create_graph=True``), or if the loss reads an activity that
            ``module`` did not return; where something is unfrozen, if a parameter or an input was changed in place
            since the forward pass, or the model takes another path.
    """

    solver: Solver
    vertices: Granularity | Iterable[nn.Module]
    frozen: Frozen
    output: OutputRule
    check_finite: bool
    measure_residual: bool
    _recorder: Recorder

    def __init__(
        self,
        module: nn.Module,
        *,
        solver: Solver = DEFAULT,
        vertices: Granularity | Iterable[nn.Module] = "activations",
        frozen: Frozen = ALL_FROZEN,
        output: OutputRule = "clamped",
        check_finite: bool = True,
        measure_residual: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        if any(isinstance(m, ActivationRelaxation) for m in module.modules()):
            raise TypeError("module is, or contains, an ActivationRelaxation already: wrap the plain module once")
        self.module = module
        self.frozen = frozen
        self.solver = solver
        self.vertices = vertices
        self.output = output
        self.check_finite = check_finite
        self.measure_residual = measure_residual
        self.last_relaxation: Relaxation | None = None
        self._warned = False
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        """Settings are checked whenever they are set, as in the constructor, and hold from the next pass on."""
        check = _SETTINGS.get(name)
        if check is None:
            super().__setattr__(name, value)
            return
        settings = vars(self)  # past nn.Module's own way, which would make a ModuleList of vertices a submodule
        settings[name] = check(self, value)
        if "output" in settings and name in ("output", "frozen"):
            settings["_recorder"] = Recorder(self.output, self.frozen)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own result."""
        if not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        # PyTorch has no public name for "is this inside of vmap, grad or another transform?"
        if torch._C._are_functorch_transforms_active():
            _refuse_transforms(self.module, args, kwargs)
        if isinstance(self.solver, Equilibrium) and self._is_reverse_mode():
            return self._reverse_mode(args, kwargs)
        recording = self._recorder.record(self.module, self.vertices, args, kwargs)
        if not recording.graph.outputs:
            return recording.result
        outputs = iter(_attach(self, recording, *recording.given))
        return map_tensors(lambda x: next(outputs) if x.requires_grad else x, recording.result)

    def _is_reverse_mode(self) -> bool:
        """Whether the gradients at equilibrium are those of one reverse sweep."""
        return not (self._recorder.runs_again or self.measure_residual or differs_by_phase(self.module))

    def _reverse_mode(self, args: Any, kwargs: Any) -> Any:
        """At equilibrium ``x = ∂L/∂x``, which PyTorch's own reverse sweep brings to every vertex of an uncut graph."""
        vertices = find_vertices(self.module, self.vertices) if self.check_finite else {}

        def watch(tensor: Tensor, name: str) -> Tensor:
            tensor.register_hook(partial(_refuse_overflow, name))  # type: ignore[no-untyped-call]
            return tensor

        def at_vertex(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in tensors_requiring_grad(output):
                if tensor.grad_fn is not None:  # else it outlives this pass, and a hook on it would too
                    watch(tensor, vertices[module])

        def at_output(gradient: Tensor) -> None:
            _refuse_second_derivative()
            _keep_record(self, REVERSE_MODE)

        each = self.check_finite and are_operations(self.vertices)
        with Hooked(vertices, at_vertex), EachOperation(watch, cuts=False) if each else nullcontext():
            result = self.module(*args, **kwargs)
        for tensor in {id(t): t for t in tensors_requiring_grad(result)}.values():
            if tensor.grad_fn is not None:
                tensor.register_hook(at_output)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        vertices, parts = self.vertices, named_parts(self.module)
        # A module that was chosen may have been replaced since, which the next pass will refuse.
        names = [vertices] if isinstance(vertices, str) else [parts.get(m, type(m).__name__) for m in vertices]
        frozen = "" if self.frozen == ALL_FROZEN else f", frozen={self.frozen}"
        return f"solver={self.solver}, vertices={', '.join(names)}, output={self.output}{frozen}"

    # The wrapper adds no state of its own, so a checkpoint of the plain module fits, and the other way round.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own state dictionary."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads a state dictionary of the module's own kind."""
        return self.module.load_state_dict(state_dict, strict=strict, assign=assign)


def _checked_solver(wrapper: ActivationRelaxation, solver: Any) -> Solver:
    if not isinstance(solver, Solver):
        raise TypeError(
            "solver must be one of ClosedForm(…), Euler(…), Continuous(…), Equilibrium(), "
            f"got {getattr(solver, '__name__', repr(solver))}"
        )
    check_solves(solver, wrapper.frozen)
    return solver


def _checked_frozen(wrapper: ActivationRelaxation, frozen: Any) -> Frozen:
    if not isinstance(frozen, Frozen):
        raise TypeError(f"frozen must be a Frozen(…), got {getattr(frozen, '__name__', repr(frozen))}")
    if "vertices" in vars(wrapper):  # else the constructor goes on to check them against this
        check_solves(wrapper.solver, frozen)
        check_update(wrapper.vertices, frozen)
    return frozen


def _checked_vertices(wrapper: ActivationRelaxation, vertices: Any) -> Granularity | Iterable[nn.Module]:
    # An iterator would be used up.
    if isinstance(vertices, nn.ModuleList) or (
        isinstance(vertices, Iterable) and not isinstance(vertices, str | nn.Module)
    ):
        vertices = tuple(vertices)
    find_vertices(wrapper.module, vertices)
    check_update(vertices, wrapper.frozen)
    return cast("Granularity | Iterable[nn.Module]", vertices)


def _checked_output(_: ActivationRelaxation, output: Any) -> OutputRule:
    if output not in get_args(OutputRule):
        raise ValueError(f"output must be 'clamped' or 'relaxed', got {output!r}")
    return cast(OutputRule, output)


def _checked_switch(name: str, _: ActivationRelaxation, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


_SETTINGS: dict[str, Callable[[ActivationRelaxation, Any], Any]] = {
    "solver": _checked_solver,
    "vertices": _checked_vertices,
    "frozen": _checked_frozen,
    "output": _checked_output,
    "check_finite": partial(_checked_switch, "check_finite"),
    "measure_residual": partial(_checked_switch, "measure_residual"),
}


def _refuse_transforms(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Refuse the transforms of torch.func where there is something to differentiate by.

    Raises:
        RuntimeError: it is so.
    """
    if any(x.requires_grad for x in (*module.parameters(), *tensors_requiring_grad((args, kwargs)))):
        raise RuntimeError(
            "within a transform of torch.func (vmap, grad, …) the relaxation phase would not run: call the wrapper "
            "outside of it and loss.backward(), or transform the plain module (wrapper.module)"
        )


def check_update(vertices: Granularity | Iterable[nn.Module], frozen: Frozen) -> None:
    """Refuse an update whose factors are taken at different activities where no update has both factors.

    Raises:
        ValueError: it is so.
    """
    if are_operations(vertices) and frozen.splits_update:
        raise ValueError(
            "vertices='operations' has a vertex between each weight and the nonlinearity that follows, so no update "
            f"reads both a derivative and a presynaptic activity, and frozen={frozen} has no meaning there: freeze or "
            "unfreeze update_derivative and update_activity together, or pass vertices='activations'"
        )


def _add_prefix(wrapper: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Where the wrapper is a part of a larger model, that model's loading looks for its child's full name."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[f"{prefix}module.{key[len(prefix) :]}"] = state_dict.pop(key)


_EMPTY = torch.empty(0)


class _RelaxationPhase(torch.autograd.Function):
    """The model as one node of PyTorch's graph, with (1) and (2) as its backward pass."""

    @staticmethod
    def forward(ctx: Any, wrapper: ActivationRelaxation, recording: Recording, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        # Not the recording: with it the user's own result would live on.
        ctx.of = wrapper, wrapper.solver, recording.graph, recording.inputs, recording.parameters
        # Saved only so that PyTorch itself refuses a second backward pass without retain_graph.
        ctx.save_for_backward(_EMPTY)
        # The user may write into an output in place. Where that is a vertex, or a view of one, its memory holds x̄.
        pairs = zip(recording.shown, recording.graph.outputs, strict=True)
        return tuple([x.detach().clone() if o.is_leaf or o._is_view() else x.detach() for x, o in pairs])

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor | None) -> Any:
        _refuse_second_derivative()
        ctx.saved_tensors  # noqa: B018 (see forward)
        wrapper, solver, graph, inputs, parameters = ctx.of
        # PyTorch has no public name for "will this graph be used again?"
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        if not keep:
            ctx.of = None
        graph.drive_outputs(output_gradients)
        return None, None, *_relax(wrapper, solver, graph, inputs, parameters, retain_graph=keep)


# ``_RelaxationPhase.apply`` without what it does first for torch.func, at half of its price.
_attach: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _RelaxationPhase).apply


def _relax(
    wrapper: ActivationRelaxation,
    solver: Solver,
    graph: Graph,
    inputs: list[Tensor],
    parameters: list[Tensor],
    *,
    retain_graph: bool,
) -> Gradients:
    states, record = solver.solve(graph)  # (1)
    if wrapper.check_finite:
        check_finite(graph, states, solver)
    if wrapper.measure_residual:
        record = replace(record, residuals=_residuals(graph, states))
    _keep_record(wrapper, record)
    if solver is DEFAULT and record.remaining is not None and record.remaining > UNCONVERGED and not wrapper._warned:
        wrapper._warned = True
        enough = steps_to_converge(graph.depth, 0.5, 1e-3)
        warnings.warn(
            f"100 steps of 0.1 leave {record.remaining:.0%} of the initial state in a graph of depth {graph.depth}, so "
            f"gradients near the input are far from backpropagation's: pass solver=ClosedForm(0.5, {enough}), which "
            "leaves 0.1 %, or ClosedForm(0.1, 100) to have it so",
            stacklevel=2,
        )
    return graph.update(states, inputs, parameters, retain_graph=retain_graph)  # (2)


def _keep_record(wrapper: ActivationRelaxation, record: Relaxation) -> None:
    vars(wrapper)["last_relaxation"] = record  # past nn.Module's own way to set attributes, which looks for parameters


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True asks for a second derivative, and the relaxation phase gives first derivatives "
            "only: call backward() without create_graph, or differentiate the plain module (wrapper.module)"
        )


def _residuals(graph: Graph, states: States) -> dict[str, float]:
    """``‖A x + s − x‖ / ‖A x + s‖`` by vertex name; 0 where there is nothing to relax to and nothing left."""
    drive = graph.drive(states)
    residuals = {}
    for vertex, x in states.items():
        distance, size = float((drive[vertex] - x).norm()), float(drive[vertex].norm())
        residuals[vertex.name] = distance / size if size else math.inf if distance else 0.0
    return residuals


def check_finite(graph: Graph, states: States, solver: Solver) -> None:
    """Refuse states that are infinite or not a number.

    Raises:
        NonFiniteStateError: names the first vertex and step where it was so.
    """
    overflowed = _first_not_finite(states)
    if overflowed is None:
        return
    step = None
    if (euler := solver.replay()) is not None:
        x = graph.initial_states()
        trajectory = (following for following, _ in euler.trajectory(graph, x))
        for step, following in enumerate((x, *islice(trajectory, euler.num_steps))):
            if (first := _first_not_finite(following)) is not None:
                raise NonFiniteStateError(first, step)
    raise NonFiniteStateError(overflowed, step)


def _first_not_finite(states: States) -> str | None:
    # A finite sum has finite terms: only where it is not, a closer look is needed. All sums are under way before the
    # first is read, so that a GPU is waited for once.
    sums = [x.sum() for x in states.values()]
    if cmath.isfinite(sum([total.item() for total in sums])):
        return None
    return next((v.name for v, x in states.items() if not x.isfinite().all()), None)


def _refuse_overflow(vertex: str, x: Tensor | None) -> None:  # None: the loss reads another part of an operation only
    if x is not None and not cmath.isfinite(x.sum().item()) and not x.isfinite().all():
        raise NonFiniteStateError(vertex, None)
