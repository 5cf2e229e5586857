"""States that overflow: the error, and where it is looked for.

May import: graph, solvers, _pytorch.
"""

from __future__ import annotations

import cmath
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor

from relaxprop._pytorch import at_end_of_backward, backward_pass, has_no_numbers, is_batched
from relaxprop.graph import Graph, States
from relaxprop.solvers import Solver


class NonFiniteStateError(FloatingPointError):
    """A state became infinite or not-a-number in the relaxation phase.

    Attributes:
        vertex: the name of the vertex.
        step: the step after which its state was not finite (0: before the first); None if the solver has no steps.
        advice: what to do, where that is not a solver's; else None.
    """

    def __init__(self, vertex: str, step: int | None, advice: str | None = None) -> None:
        self.vertex = vertex
        self.step = step
        self.advice = advice
        super().__init__(vertex, step, advice)

    def __str__(self) -> str:
        masked = "start from zero (initial='zero') or pass solver=Equilibrium()"
        if self.step == 0 and self.advice is None:
            return (
                f"the state of vertex {self.vertex!r} is not finite when the relaxation starts: the model computes an "
                f"infinite activity there, as a mask of −∞ does; {masked}"
            )
        when = "" if self.step is None else f" after step {self.step}"
        if self.advice is not None:
            return f"the state of vertex {self.vertex!r} is not finite{when}: {self.advice}"
        return (
            f"the state of vertex {self.vertex!r} is not finite{when}: look at the loss, lower the learning rate or "
            "the step size; where a mask puts activities at the end of their type's range, "
            f"{masked}; check_finite=False lets infinities propagate"
        )


class DivergedError(FloatingPointError):
    """The states of a phase have run away from rest: the energy that they should lower has risen.

    Attributes:
        before: the energy at the feedforward pass.
        after: the energy at the end of the phase.
    """

    def __init__(self, before: float, after: float, advice: str) -> None:
        self.before = before
        self.after = after
        self.advice = advice
        super().__init__(before, after, advice)

    def __str__(self) -> str:
        return f"the energy rose from {self.before:.4g} to {self.after:.4g} over the phase: {self.advice}"


def in_float16(tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is in float16, whose range is so small that gradients are scaled to fit it: then an
    infinity is for the scaler, which leaves the step out and scales by less."""
    return torch.float16 in [x.dtype for x in tensors]


def check_finite(graph: Graph, states: States, solver: Solver) -> None:
    """Refuse states that are infinite or not a number, but for what a gradient scaler looks after (`in_float16`).

    Raises:
        NonFiniteStateError: if there is one; it names the vertex and the step where the first one was.
    """
    overflowed = _overflowed(graph, states)
    if overflowed is None:
        return
    step = None
    if (euler := solver.replay()) is not None:
        x = graph.initial_states()
        trajectory = (following for following, _ in euler.trajectory(graph, x))
        for step, following in enumerate((x, *islice(trajectory, euler.steps(graph.depth)))):
            if (first := _first_not_finite(following)) is not None:
                raise NonFiniteStateError(first, step)
    raise NonFiniteStateError(overflowed, step)


def check_states(graph: Graph, states: States, advice: str, step: int | None = None) -> None:
    """As `check_finite`, for states that no solver has found.

    Raises:
        NonFiniteStateError: if one is not finite; it names the vertex and the step, and gives the advice.
    """
    if (overflowed := _overflowed(graph, states)) is not None:
        raise NonFiniteStateError(overflowed, step, advice)


def _overflowed(graph: Graph, states: States) -> str | None:
    """The first vertex whose state is not finite, but for what a gradient scaler looks after."""
    overflowed = _first_not_finite(states)
    if overflowed is None or in_float16([*graph.outputs, *(v.stand_in for v in graph.vertices)]):
        return None
    return overflowed


def _first_not_finite(states: States) -> str | None:
    # A finite sum has finite terms: only where it is not, a closer look is needed.
    if cmath.isfinite(sum(_numbers([x.sum() for x in states.values()]))):
        return None
    return next((v.name for v, x in states.items() if not x.isfinite().all()), None)


def _numbers(scalars: Sequence[Tensor]) -> list[complex]:
    """What stands in tensors of one number each, in any order; each device is waited for once."""
    if not any(is_away(x) for x in scalars):
        return [x.item() for x in scalars]
    alike: dict[object, list[Tensor]] = {}
    for x in scalars:
        alike.setdefault((x.device, x.dtype), []).append(x)
    return [number for group in alike.values() for number in torch.stack(group).tolist()]


def is_away(x: Tensor) -> bool:
    """Whether the processor has to wait for what a tensor holds, as another device is still computing it."""
    return x.device.type != "cpu"


class GradientCheck:
    """Refuses gradients that are infinite or not a number, in one backward pass after the other.

    On the processor at once, at the first vertex that is reached; on other devices when the pass ends, so that they are
    waited for once and not at every vertex.
    """

    def __init__(self) -> None:
        self._pass = -1
        self._away: list[tuple[str, Tensor]] = []  # in this pass, by the vertex's name, whether all is finite

    def __call__(self, vertex: str, x: Tensor | None) -> None:
        """Look at a gradient; None where the loss reads another part of an operation only.

        Raises:
            NonFiniteStateError: if it is not finite; the error names the vertex.
        """
        if x is None or is_batched(x) or has_no_numbers(x):
            return
        if is_away(x):
            if (now := backward_pass()) != self._pass:  # the last may have ended by an error
                self._pass, self._away = now, []
                at_end_of_backward(self._end)
            self._away.append((vertex, x.isfinite().all()))
        elif not cmath.isfinite(x.sum().item()) and not x.isfinite().all():
            raise NonFiniteStateError(vertex, None)

    def _end(self) -> None:
        looked_at, self._away, self._pass = self._away, [], -1
        if not all(_numbers([finite for _, finite in looked_at])):
            raise NonFiniteStateError(next(vertex for vertex, finite in looked_at if not finite), None)
