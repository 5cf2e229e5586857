"""The base of the learning rules beside Activation Relaxation: a rule is a class with one method.

`Rule.solve` is given the recorded pass, a `Graph` that is cut at every vertex and whose outputs are driven by ∂L/∂x^L,
and returns a state x_i for every vertex: what takes the place of ∂L/∂x_i. The weights then get, by one call of
PyTorch's engine, what equation (2) makes of the states:

    (2)  ∂L/∂W → Σ_j (∂x_j/∂W)^T x_j          over the vertices j, and the outputs, that read W

An error never passes a vertex there, so that a layer's update reads the state of the next vertex and its own input.

May import: finite, graph, kept, recording, relaxation, rule, solved, vertices.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from relaxprop.finite import check_states
from relaxprop.graph import Graph, States
from relaxprop.kept import is_read_beside
from relaxprop.recording import Recording, record
from relaxprop.relaxation import RelaxationPhase
from relaxprop.rule import LearningRule, kept_vertices, rule_of, shown, tell_missing
from relaxprop.solved import checked
from relaxprop.vertices import Granularity, named_parts


@dataclass(frozen=True)
class Phase:
    """What a learning rule did in one backward pass.

    Attributes:
        vertices: number of vertices that got a state.
        depth: number of vertices on the longest path.
        num_steps: steps of the states; 0 where they are found at once.
        passes: forward passes of the module beyond the user's own.
        products: calls of PyTorch's engine, each a product with Jacobians; the weight update is one.
        energy: E = ½ Σ ‖ε_i‖² in the end, where the rule has an energy and ``check_finite`` is on; of two phases the
            larger.
        residual: ``‖A x + s − x‖ / ‖A x + s‖`` before the last step, the largest of all vertices, likewise.
        states: by vertex name, in the order of the feedforward pass, the final state, of its activity's shape; None
            unless asked for with ``keep_states=True``.
    """

    vertices: int
    depth: int
    num_steps: int = 0
    passes: int = 0
    products: int = 1
    energy: float | None = None
    residual: float | None = None
    states: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class RuleSettings:
    """What every rule can be told; a rule's own settings derive from it.

    Args:
        vertices: as of `ActivationRelaxation`: "activations", "modules", "operations", or an iterable of submodules.
        check_finite: raise `NonFiniteStateError` when a state overflows.
        keep_states: keep the final states (``last_phase.states``).

    Raises:
        TypeError: if an option is neither True nor False.
    """

    vertices: Granularity | Iterable[nn.Module] = "activations"
    check_finite: bool = True
    keep_states: bool = False

    def __post_init__(self) -> None:
        for name in ("check_finite", "keep_states"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        object.__setattr__(self, "vertices", kept_vertices(self.vertices))


class Described(NamedTuple):
    """What `describe_locality` says of a rule.

    Attributes:
        schedule: in which order the states are updated, and what that takes.
        broadcast: for a rule whose states come directly from somewhere, from what, and the kind of what is not local in
            that ("error broadcast", "target broadcast"); None where errors go from vertex to vertex.
        moves: whether the activities themselves move, by such errors.
        of_updates: what is not local in every weight update, as ``kind: what``.
    """

    schedule: str
    broadcast: tuple[str, str] | None = None
    moves: bool = False
    of_updates: tuple[str, ...] = ()


class Rule(LearningRule):
    """Base of the learning rules: wraps ``module``, and ``loss.backward()`` fills ``.grad`` by the rule.

    A rule of your own is a class that derives from this one and has a method `solve`; its options are the fields of a
    frozen dataclass that derives from `RuleSettings`. The wrapper stands in the module's place: parameters, names,
    attributes and class are the module's (`transparent`).

    Args:
        module: any module; its result may be nested in tuples, lists and dicts.
        settings: what the rule is told; by default `RuleSettings()`.

    Attributes:
        module: the plain module.
        settings: what the rule was told; it may be set anew between two passes, as a whole.
        last_phase: the `Phase` record of the latest backward pass, None before the first.

    Raises:
        TypeError: if ``module`` is not a module, is already wrapped, or has to be outside of the wrapper, or
            ``settings`` is no `RuleSettings`; in the backward pass, if `solve` does not return states and a `Phase`.
        ValueError: if no vertex is found; in the backward pass, if a vertex has no state, or one that is not like its
            activity.
        NonFiniteStateError: in the backward pass, if a state is not finite (``check_finite``).
    """

    _advice: ClassVar[str] = "look at the loss, and lower the learning rate"  # where a state is not finite
    last_phase: Phase | None

    def __init__(self, module: nn.Module, settings: RuleSettings | None = None) -> None:
        if settings is not None and not isinstance(settings, RuleSettings):
            raise TypeError(f"settings must be a RuleSettings(…) or of a class that derives from it, got {settings!r}")
        super().__init__(module, RuleSettings() if settings is None else settings)

    @property
    def locality(self) -> Described | None:
        """What the rule's updates read, for `describe_locality`; None where the rule does not say."""
        return None

    def solve(self, graph: Graph) -> tuple[States, Phase]:
        """The state of each of ``graph.vertices``, and the record of how they were found.

        Args:
            graph: the recorded pass. ``graph.output_cotangents`` are ∂L/∂(outputs), ``graph.transport(states)`` is
                ``A x``, one product with every local Jacobian; ``v.stand_in`` is a vertex's activity x̄_v.
        """
        name = rule_of(type(self)).__name__
        raise NotImplementedError(f"{name} has no method solve(graph) of its own, which gives every vertex its state")

    def _forward(self, args: Any, kwargs: Any) -> Any:
        self._refuse_surroundings(args, kwargs)
        recording = self.record(args, kwargs)
        return self._handed_out(recording, self._solve, recording.update)

    def _solve(self, graph: Graph) -> tuple[States, Phase]:
        return checked(graph, self.solve, Phase, f"{rule_of(type(self)).__name__}.solve")

    def record(self, args: Any, kwargs: Any = None) -> Recording:
        """The module's forward pass, recorded as for training."""
        return record(self.module, self.settings.vertices, args, kwargs, writes=self._writes)

    def _handed_out(self, recording: Recording, solve: Callable[[Graph], Any], update: Any) -> Any:
        """The result of a recorded pass, its tensors attached to a node whose backward pass is the rule."""
        if not recording.graph.outputs:
            return recording.result
        if not self._told:
            vars(self)["_told"] = True
            tell_missing(self.settings.vertices, recording.called, recording.uncalled, recording.unrelaxed or ())
        if first := recording.graph.size not in self._probed:
            solve = partial(self._probe_and_solve, solve, recording.update)
            self._warn_of_compiled(recording.graph)
        beside = self._is_read_beside if first or self._read_beside else partial(is_read_beside, always=False)
        outputs = RelaxationPhase.apply(update, solve, self._finished, beside, recording.shown, *recording.given)  # type: ignore[no-untyped-call]
        return recording.handed_out(outputs)

    def _finished(self, graph: Graph, states: States, phase: Phase) -> None:
        """What follows a phase, before the weight update."""
        if self.settings.check_finite:
            check_states(graph, states, self._advice)
        if self.settings.keep_states:
            kept = {v.name: states[v].detach().clone() for v in graph.recorded if v in states}
            phase = replace(phase, states=kept)
        self._keep_record(phase)

    def extra_repr(self) -> str:
        settings, parts = self.settings, named_parts(self.module)
        chosen = settings.vertices
        # A module that was chosen may have been replaced since, which the next pass will refuse.
        names = [chosen] if isinstance(chosen, str) else [parts.get(m, type(m).__name__) for m in chosen]
        own = {name: value for name, value in vars(settings).items() if name not in _COMMON}
        return ", ".join([*(f"{name}={shown(value)}" for name, value in own.items()), f"vertices={', '.join(names)}"])


_COMMON = RuleSettings.__dataclass_fields__.keys()


def refuse_target_of_its_own(rule: LearningRule) -> None:
    """Refuse a module that has an argument ``target`` where the rule reads one.

    Raises:
        ValueError: if it has.
    """
    if "target" in inspect.signature(type(rule).forward).parameters:  # which is the module's own
        kind = type(rule.module).__name__
        raise ValueError(
            f"{rule_of(type(rule)).__name__} reads target=…, and {kind}.forward has an argument of that name: rename "
            "the argument, or wrap a part of the module"
        )
