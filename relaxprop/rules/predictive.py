r"""Strict predictive coding, and equilibrium propagation on its energy: activities move while the loss pulls at them.

    E(v) = ½ Σ_i ‖ε_i‖²,   ε_i = v_i − f_i(v),   F = E + L          v_i: the activity of vertex i, f_i: what computes it

    (a)  dv_i/dt = −∂F/∂v_i = −ε_i + Σ_j J_ji(v)^T ε_j − ∂L/∂v_i,   v_0 = x̄
    (b)  ∂F/∂W = −Σ_i (∂f_i/∂W)^T ε_i + ∂L/∂W                          what ``.grad`` gets, at the final v
    (c)  [∂F/∂W at +β − ∂F/∂W at −β] / 2β,   F = E ± β L               equilibrium propagation, centred

With x = −ε, (a) is ``dv/dt = x − (A(v) x + s(v))`` in the words of `graph`, and (b) is equation (2) at the states x: so
where the activities rest, x is what Activation Relaxation's states are, its Jacobians taken at v. Each step runs the
module once more, at the activities v, and takes one product with its Jacobians.
In (c) ``E = 0`` at β = 0, so that one phase gives the one-sided difference, ∂F/∂W at β, over β. Parameters that the
loss reads without a vertex between have ∂L/∂W at the moved activities in both.
Sources: Whittington and Bogacz 2017, Neural Computation 29 (strict predictive coding); Scellier and Bengio 2017,
Frontiers in Computational Neuroscience 11, and Laborieux et al. 2021, Frontiers in Neuroscience 15 (centred).

May import: finite, frozen, graph, nested, recording, rule, rules.base, transients, update, variants, vertices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn

from relaxprop.finite import DivergedError, check_states, in_float16
from relaxprop.frozen import Frozen
from relaxprop.graph import Gradients, Graph, Linearisation, States, vector_jacobian_product
from relaxprop.nested import tensors_in, tensors_reached
from relaxprop.recording import Recording, record
from relaxprop.rule import rule_of, shown
from relaxprop.rules.base import Described, Phase, Rule, RuleSettings, refuse_target_of_its_own
from relaxprop.transients import check_count, check_step_size
from relaxprop.update import Update, gradients
from relaxprop.variants import Variant
from relaxprop.vertices import Granularity, are_operations, find_vertices, named_parts

LossFunction = Callable[[Any, Any], Tensor]
_CLOCK = "simultaneous: all activities step together, by a global clock"
ADVICE = "lower the step size, the learning rate or the loss's scale"
# The module is run again at the moved activities: nothing stays as the feedforward pass left it.
_MOVING = Frozen(relaxation_derivative=False, update_derivative=False, update_activity=False)


@dataclass(frozen=True)
class EnergySettings(RuleSettings):
    """How the activities move.

    Raises:
        TypeError: if an option has the wrong type.
        ValueError: if an option is outside of its range.
    """

    step_size: float = 0.1
    num_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_step_size(self.step_size)
        check_count("num_steps", self.num_steps)
        if are_operations(self.vertices):
            raise ValueError(
                "vertices='operations' has vertices that are no layer's activity (a transposed weight, a view), which "
                "no prediction error moves: pass vertices='activations', 'modules' or submodules"
            )


@dataclass(frozen=True)
class NudgedSettings(EnergySettings):
    """How the activities are nudged.

    Raises:
        TypeError: if an option has the wrong type.
        ValueError: if an option is outside of its range.
    """

    beta: float = 0.01
    centred: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.beta, bool) or not isinstance(self.beta, Real):
            raise TypeError(f"beta must be a positive number, got {shown(self.beta)}")
        if not 0 < float(self.beta) < math.inf:
            raise ValueError(f"beta must be positive and finite, got {self.beta!r}")
        if not isinstance(self.centred, bool):
            raise TypeError(f"centred must be True or False, got {self.centred!r}")


class WithLoss(nn.Module):
    """A module and its loss as one module, which reads the target beside the module's arguments."""

    def __init__(self, network: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.network = network
        # Another run works on a copy of what a module keeps, but for functions: what a method is bound to, such as a
        # trainer with all that it holds, is not to be copied.
        self.loss_fn = (lambda *args: loss_fn(*args)) if isinstance(loss_fn, MethodType) else loss_fn

    def forward(self, *args: Any, target: Any, **kwargs: Any) -> Tensor:
        return self.loss_fn(self.network(*args, **kwargs), target)


class EnergyRule(Rule):
    """Base of the rules whose activities move by (a). They need the loss at moved activities, so it is within."""

    _probes = True
    _advice = ADVICE

    settings: EnergySettings
    loss_fn: LossFunction | None

    def __init__(self, module: nn.Module, loss_fn: LossFunction | None, settings: EnergySettings) -> None:
        super().__init__(module, settings)
        self._keep_loss_fn(loss_fn)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss_fn":
            self._keep_loss_fn(value)
            self._configure(self.settings)  # the next pass is the first with this loss
        else:
            super().__setattr__(name, value)

    def _keep_loss_fn(self, loss_fn: Any) -> None:
        """Keeps it as the wrapper's own, also where it is a module.

        Raises:
            TypeError: if it is neither callable nor None.
            ValueError: if the module has an argument ``target`` of its own.
        """
        if loss_fn is not None:
            if not callable(loss_fn):
                raise TypeError(f"loss_fn must map the module's result and the target to a loss, got {shown(loss_fn)}")
            refuse_target_of_its_own(self)
        vars(self)["loss_fn"] = loss_fn

    @property
    def _steps_run_model(self) -> bool:
        return True

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        if self.loss_fn is None or "target" not in kwargs:
            return self.module(*args, **kwargs)
        return WithLoss(self.module, self.loss_fn)(*args, **kwargs)

    def _forward(self, args: Any, kwargs: Any) -> Any:
        self._refuse_surroundings(args, kwargs)
        if self.loss_fn is not None and "target" not in kwargs:
            return self._output(args, kwargs)
        recording = self._recorded_with_loss(args, kwargs)
        moving = _Moving(self, recording.update)
        return self._handed_out(recording, moving.solve, moving)

    def record(self, args: Any, kwargs: Any = None) -> Recording:
        """The module's forward pass without the loss."""
        given = kwargs or {}
        if self.loss_fn is not None:
            given = {name: value for name, value in given.items() if name != "target"}
        return super().record(args, given)

    def _recorded_with_loss(self, args: Any, kwargs: Any) -> Recording:
        vertices = tuple(find_vertices(self.module, self.settings.vertices))
        within, parts = self.module, named_parts(self.module)
        if self.loss_fn is not None:
            within = WithLoss(self.module, self.loss_fn)
            parts = {**named_parts(within), **parts}  # the network's own names, and the loss's beside them
        try:
            return record(within, vertices, args, kwargs, frozen=_MOVING, writes=self._writes, parts=parts)
        except (RuntimeError, ValueError) as error:
            error.add_note(f"{rule_of(type(self)).__name__} runs the module again at every step's activities")
            raise

    def _output(self, args: Any, kwargs: Any) -> Any:
        """The module's own result, from which no gradient comes."""
        name = rule_of(type(self)).__name__

        def refuse(gradient: Tensor) -> None:
            raise RuntimeError(
                f"{name} needs the loss at moved activities, so it has to be computed within: call "
                "loss = model(x, target=…) and loss.backward()"
            )

        result = self.module(*args, **kwargs)
        given = {id(x) for x in tensors_in((args, kwargs))}  # an input that is handed back stays the caller's
        for tensor in tensors_reached(result):
            if tensor.grad_fn is not None and id(tensor) not in given:
                tensor.register_hook(refuse)  # type: ignore[no-untyped-call]
        return result

    def _probe_and_solve(self, solve: Callable[[Graph], Any], update: Update, graph: Graph) -> Any:
        try:
            return super()._probe_and_solve(solve, update, graph)
        except RuntimeError as error:
            said, found, _ = str(error).partition(": pass solver=")
            if not found:
                raise
            raise RuntimeError(f"{said}: {rule_of(type(self)).__name__} cannot train it") from error

    def _moved(self, moving: _Moving, graph: Graph) -> tuple[States, Phase]:
        """The final states x, and the record; the weight gradients are left with ``moving``."""
        raise NotImplementedError


class PredictiveCoding(EnergyRule):
    r"""Trains ``module`` by strict predictive coding: activities move down F = E + L, then the errors make the update.

        dv_i/dt = −ε_i + Σ_j J_ji(v)^T ε_j − ∂L/∂v_i,   ε_i = v_i − f_i(v),   v_0 = x̄
        ∂F/∂W = −Σ_i (∂f_i/∂W)^T ε_i + ∂L/∂W              at the final v

    (Whittington and Bogacz 2017.) The loss is needed at moved activities. So it is given, and the target with the
    input; or ``module`` returns its loss itself::

        model = PredictiveCoding(network, torch.nn.functional.cross_entropy)
        loss = model(x, target=labels)      # loss_fn(network(x), labels)
        loss.backward()                     # n steps, then .grad
        output = model(x)                   # the network's output, as ever

    The loss's scale is part of the rule: the larger it is, the farther the activities move from x̄. As it goes to zero,
    the gradient at rest goes to backpropagation's, with first order. For predictions that stay as the feedforward pass
    made them, take ``ActivationRelaxation(module, initial="zero")``. n steps cost n forward passes and n products.
    An activity that was computed from nothing that requires a gradient does not move: it is an input of the others. So
    the gradients of these change if the first layers are frozen.

    Args:
        module: any module. Without ``loss_fn`` it has to return its loss, alone or beside results without a gradient.
        loss_fn: maps the module's result and the target to the loss, a tensor of one number; None if it is within.
        step_size: η in (0, 2): ``v ← v + η dv/dt``. (a) is stable for smaller ones the larger the weights are.
        num_steps: n ≥ 1.
        vertices: what moves: "activations", "modules", or an iterable of submodules of ``module``.
        check_finite: raise `NonFiniteStateError` when a state overflows, and `DivergedError` when F has risen.
        keep_states: keep the final x = −ε (``last_phase.states``).

    Attributes:
        module: the plain module.
        settings: the arguments, a frozen record.
        loss_fn: as given.
        last_phase: the `Phase` record of the latest backward pass, None before the first.

    Raises:
        TypeError: if ``module`` is not a module or is already wrapped, or an option has the wrong type.
        ValueError: if an option is outside of its range, or no vertex is found; in the forward pass, if the module
            cannot be run again; in the backward pass, if the module has not returned a loss.
        NonFiniteStateError, DivergedError: in the backward pass, if the activities run away (``check_finite``).
        RuntimeError: in the forward pass, if the module cannot be run again as it was; in the backward pass, if it
            starts from the module's output and not from the loss.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFunction | None = None,
        *,
        step_size: float = 0.1,
        num_steps: int = 100,
        vertices: Granularity | Iterable[nn.Module] = "activations",
        check_finite: bool = True,
        keep_states: bool = False,
    ) -> None:
        super().__init__(module, loss_fn, EnergySettings(vertices, check_finite, keep_states, step_size, num_steps))

    @property
    def locality(self) -> Described:
        return Described(_CLOCK, moves=True)

    def _moved(self, moving: _Moving, graph: Graph) -> tuple[States, Phase]:
        rest = moving.descend(graph, self.settings)
        moving.gradients = moving.gradients_at(rest)
        return rest.states, moving.phase(graph, [rest])


class EquilibriumPropagation(EnergyRule):
    r"""Trains ``module`` by equilibrium propagation on the energy of predictive coding, E = ½ Σ ‖v_i − f_i(v)‖².

        [∂F/∂W at rest under +β − ∂F/∂W at rest under −β] / 2β,   F = E ± β L

    (Scellier and Bengio 2017; centred: Laborieux et al. 2021.) The free phase is the feedforward pass, at which E = 0.
    As β goes to zero the gradient goes to backpropagation's: with second order, one-sided with first. So small a β that
    the nudged activities differ from x̄ by rounding only gives noise; a loss averaged over a minibatch wants a larger
    one, for a loss of 64 samples 64 times as large as for their sum.

    The loss is given, and the target with the input, as for `PredictiveCoding`; or ``module`` returns its loss. A
    factor of the loss outside of it scales the gradient, and no activity. n steps cost n forward passes and n products
    in each of the two phases. Which activities do not move, `PredictiveCoding` says.

    Args:
        module: any module. Without ``loss_fn`` it has to return its loss, alone or beside results without a gradient.
        loss_fn: maps the module's result and the target to the loss, a tensor of one number; None if it is within.
        beta: β > 0, how strongly the loss nudges.
        centred: whether there is a phase at −β too.
        step_size: η in (0, 2) of each phase. It is stable for smaller ones the larger the weights are.
        num_steps: n ≥ 1, of each phase; what is not at rest then is not the gradient, see ``last_phase.residual``.
        vertices: what moves: "activations", "modules", or an iterable of submodules of ``module``.
        check_finite: raise `NonFiniteStateError` when a state overflows, and `DivergedError` when F has risen.
        keep_states: keep x = −ε over β, or the difference of the two over 2β (``last_phase.states``).

    Attributes:
        module: the plain module.
        settings: the arguments, a frozen record.
        loss_fn: as given.
        last_phase: the `Phase` record of the latest backward pass, None before the first.

    Raises:
        TypeError: if ``module`` is not a module or is already wrapped, or an option has the wrong type.
        ValueError: if an option is outside of its range, or no vertex is found; in the forward pass, if the module
            cannot be run again; in the backward pass, if the module has not returned a loss.
        NonFiniteStateError, DivergedError: in the backward pass, if the activities run away (``check_finite``).
        RuntimeError: in the forward pass, if the module cannot be run again as it was; in the backward pass, if it
            starts from the module's output and not from the loss.
    """

    settings: NudgedSettings

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFunction | None = None,
        *,
        beta: float = 0.01,
        centred: bool = True,
        step_size: float = 0.1,
        num_steps: int = 100,
        vertices: Granularity | Iterable[nn.Module] = "activations",
        check_finite: bool = True,
        keep_states: bool = False,
    ) -> None:
        settings = NudgedSettings(vertices, check_finite, keep_states, step_size, num_steps, beta, centred)
        super().__init__(module, loss_fn, settings)

    @property
    def locality(self) -> Described:
        if not self.settings.centred:
            return Described(f"{_CLOCK}; after a free phase, a signal to all of them switches the nudge on", moves=True)
        return Described(
            f"{_CLOCK}; a signal to all of them switches from one phase to the other",
            moves=True,
            of_updates=("two phases: +β and −β",),
        )

    def _moved(self, moving: _Moving, graph: Graph) -> tuple[States, Phase]:
        beta, given = float(self.settings.beta), graph.output_cotangents
        # A factor that a loss scaler puts on the loss is no part of the nudge.
        scale = _outer_factor(graph)
        signs = (1.0, -1.0) if self.settings.centred else (1.0,)
        share = scale / (beta * len(signs))
        states: dict[Any, Tensor] = {}
        total: list[Tensor | None] = []
        rests = []
        try:
            for sign in signs:
                graph.drive_outputs([None if g is None else g * (sign * beta / scale) for g in given])
                rest = moving.descend(graph, self.settings)
                found = moving.gradients_at(rest)
                total = _plus(total, found, sign * share)
                states = {v: states.get(v, 0) + x * (sign * share) for v, x in rest.states.items()}
                rests.append(rest._replace(states={}, at=graph.stored))
        finally:
            graph.drive_outputs(given)
        moving.gradients = tuple(total)
        return states, moving.phase(graph, rests)


def _outer_factor(graph: Graph) -> float:
    """What the loss is multiplied by outside; where there are several losses, the factor of the largest size."""
    return max([float(g) for g in graph.output_cotangents if g is not None], key=abs, default=1.0) or 1.0


def _plus(total: Sequence[Tensor | None], more: Gradients, factor: float) -> list[Tensor | None]:
    scaled = [None if g is None else g * factor for g in more]
    if not total:
        return scaled
    return [b if a is None else a if b is None else a + b for a, b in zip(total, scaled, strict=True)]


class _Rest(NamedTuple):
    """Where the activities have come to.

    Attributes:
        states: x = −ε.
        at: the module's Jacobians there.
        energy: E; None where it was not asked for.
        residual: as of `Phase`; likewise.
    """

    states: States
    at: Linearisation
    energy: float | None
    residual: float | None


class _Moving:
    """One recorded pass whose activities move: what `RelaxationPhase` takes for the weight update."""

    def __init__(self, rule: EnergyRule, update: Update) -> None:
        assert update.rerun is not None
        self.rule = rule
        self.graph = update.graph
        self.update = update
        self.rerun = update.rerun
        self.gradients: Gradients = ()
        # The user may write into the loss, in the memory that the graph has it in.
        self.losses = [y.detach().clone() if y.numel() == 1 else y for y in update.graph.outputs]

    def solve(self, graph: Graph) -> tuple[States, Phase]:
        _check_loss(graph, rule_of(type(self.rule)).__name__, has_loss_fn=self.rule.loss_fn is not None)
        return self.rule._moved(self, graph)

    def __call__(self, states: States, *, retain_graph: bool = True) -> Gradients:
        found, self.gradients = self.gradients, ()
        return found

    def descend(self, graph: Graph, settings: EnergySettings) -> _Rest:
        """(a), n steps of it."""
        eta, vertices = float(settings.step_size), graph.vertices

        def moved(at: Linearisation, activities: States) -> list[Tensor | None]:
            states = _errors(at, activities)
            return _moves(states, self._drive(graph, states, at))

        activities = {v: v.stand_in.detach().to(v.zeros().dtype) for v in vertices}
        # At x̄ all ε are 0.
        found: Sequence[Tensor | None] = _moves({v: v.zeros() for v in vertices}, self._drive(graph, {}, graph.stored))
        for step in range(settings.num_steps):
            if step:
                found = self.rerun.compute(activities, moved, "moves", graph.output_cotangents)
            steps = zip(activities.items(), found, strict=False)
            activities = {v: y if move is None else y.add(move, alpha=eta) for (v, y), move in steps}
        at = self.rerun(activities)
        states = _errors(at, activities)
        energy = residual = None
        if settings.check_finite:
            check_states(graph, states, ADVICE)
            energy = 0.5 * sum([float(x.abs().square().sum()) for x in states.values()])
            self._check_energy(graph, at, energy)
            sizes = [0.0 if x is None else float(x.norm()) for x in found]
            pairs = zip(sizes[: len(vertices)], sizes[len(vertices) :], strict=True)
            residual = max([a / b if b else math.inf if a else 0.0 for a, b in pairs], default=0.0)
        return _Rest(states, at, energy, residual)

    def _drive(self, graph: Graph, states: States, at: Linearisation) -> Gradients:
        """A(v) x + s(v); None where nothing arrives."""
        return vector_jacobian_product(graph.cotangents(states, at), [at.cuts[v].stand_in for v in graph.vertices])

    def _check_energy(self, graph: Graph, at: Linearisation, energy: float) -> None:
        """Refuse a phase in which F has risen, where (a) goes down F: not along other backwards weights.

        Raises:
            DivergedError: if it has.
        """
        if any(isinstance(m, Variant) for m in self.rule.module.modules()) or in_float16(graph.outputs):
            return
        before, after = (_loss(graph, outputs) for outputs in (self.losses, at.outputs))
        if not energy + after <= before + 1e-3 * abs(before):
            raise DivergedError(before, energy + after, ADVICE)

    def gradients_at(self, rest: _Rest) -> Gradients:
        """(b): of the inputs, then of the parameters."""
        inputs, parameters = self.update.inputs, self.update.parameters
        if inputs and rest.at.switches:  # an input's error is (a)'s
            errors = gradients(self.graph, rest.states, inputs, at=rest.at, in_update=False)
            return errors + gradients(self.graph, rest.states, parameters, at=rest.at)
        return gradients(self.graph, rest.states, [*inputs, *parameters], at=rest.at)

    def phase(self, graph: Graph, rests: Sequence[_Rest]) -> Phase:
        steps, phases = self.rule.settings.num_steps, len(rests)
        separate = bool(self.update.inputs and graph.stored.switches)
        energies = [rest.energy for rest in rests if rest.energy is not None]
        return Phase(
            len(graph.vertices),
            graph.depth,
            num_steps=steps,
            passes=phases * steps,
            products=phases * (steps + 1 + separate),
            energy=max(energies) if energies else None,
            residual=max([r.residual for r in rests if r.residual is not None], default=None),
        )


def _errors(at: Linearisation, activities: States) -> States:
    """x = −ε = f(v) − v."""
    return {v: at.cuts[v].output.detach() - y for v, y in activities.items()}


def _moves(states: States, drive: Gradients) -> list[Tensor | None]:
    """dv/dt at every vertex, and then the drive in it."""
    moves = [x if d is None else x - d.to(x.dtype) for x, d in zip(states.values(), drive, strict=True)]
    return [*moves, *drive]


def _loss(graph: Graph, outputs: Sequence[Tensor]) -> float:
    driven = zip(outputs, graph.output_cotangents, strict=True)
    return sum([float((y.detach() * g).real.sum()) for y, g in driven if g is not None])


def _check_loss(graph: Graph, name: str, *, has_loss_fn: bool) -> None:
    """Refuse a result that is no loss.

    Raises:
        ValueError: if it is none.
    """
    for y, g in zip(graph.outputs, graph.output_cotangents, strict=True):
        if g is not None and y.numel() != 1:
            shape = tuple(y.shape)
            if has_loss_fn:
                raise ValueError(f"loss_fn must return a loss of one number, got a tensor of shape {shape}")
            raise ValueError(
                f"{name} needs the loss at moved activities, and the module's result of shape {shape} is none: pass "
                f"{name}(module, loss_fn) and call model(x, target=…), or let the module return its loss"
            )
