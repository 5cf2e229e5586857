r"""Solvers of the relaxation phase: from the initial state x_0 towards ``x* = Σ_k A^k s = ∂L/∂x``.

    Euler        x ← x + η (A x + s − x), n times                            equations (1) and (7), step by step
    ClosedForm   x_n = Σ_{k<D} [ c_k A^k x_0 + d_k A^k s ]                   the same x_n in D − 1 products with A
    Continuous   x(T), the same sum with Poisson weights                     the differential equation itself
    Equilibrium  x* = s + A x*                                               the limit, one reverse sweep

Without a number of steps the first two relax "while not converged" (Algorithm 1): for the fewest steps after which the
initial state weighs no more than rounding in every vertex, as `transients` knows from the graph's depth.

A is applied by `Graph.transport`; c_k and d_k come from `transients`. Where the relaxation's derivative is not frozen,
A and s depend on x (`Graph.drive`): then `Euler` steps and `Continuous` integrates numerically.
A new solver is a class here and its name in `SOLVERS`, from which messages and the command line derive.
Source: Millidge et al., arXiv 2010.06219, Algorithm 1; the closed form is this project's own.

May import: graph, html, transients.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cache, lru_cache
from numbers import Real
from typing import ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relaxprop.graph import Graph, Linearisation, States, Vertex
from relaxprop.html import table
from relaxprop.transients import (
    UPDATE_PROBABILITY,
    Hops,
    Order,
    check_count,
    check_order,
    check_step_size,
    check_tolerance,
    continuous_hops,
    discrete_hops,
    steps_to_converge,
)

MAX_EVALUATIONS = 10_000  # of the drive, by numerical integration
# Weight of the initial state below which it is left out: rounding in double precision, whatever the states' type, since
# activities can be many orders of magnitude larger than gradients.
NEGLIGIBLE = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Relaxation:
    """What one relaxation phase did. Notebooks show it as a table.

    Attributes:
        vertices: number of vertices that relaxed; None where the limit was asked for and the graph was not cut.
        depth: D, the number of vertices on the longest path; None likewise.
        num_steps: n; None where the solver has no steps (`Continuous`, `Equilibrium`), or the depth is None.
        transports: products with A that were made; a sweep counts as one, as it visits every edge once.
        remaining: weight of the initial state's difference to the gradient in the vertex that is farthest from the
            output (in expectation where the order is asynchronous; at most so much where the output is a vertex). 0:
            the states are the gradient. None where the relaxation's derivative is not frozen: the states are no
            weighted sum then.
        converged: whether ``remaining`` is below the rounding of the states' type or, for `Euler` with a
            tolerance, whether the tolerance was reached; None where neither is known.
        residuals: by vertex name, ``‖A x + s − x‖ / ‖A x + s‖`` in the final state; None unless asked for with
            ``ActivationRelaxation(…, measure_residual=True)``.
        states: by vertex name, in the order of the feedforward pass, the final state, of its activity's shape; None
            unless asked for with
            ``ActivationRelaxation(…, keep_states=True)``.
        unrelaxed: what did not relax: vertices that the model did not call, scripted parts that are no vertices, and
            operations that no vertex stands for and that are not linear in each tensor that they read; None unless
            asked for with ``ActivationRelaxation(…, report_unrelaxed=True)``.
    """

    vertices: int | None
    depth: int | None
    num_steps: int | None
    transports: int
    remaining: float | None
    converged: bool | None
    residuals: Mapping[str, float] | None = None
    states: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)
    unrelaxed: tuple[str, ...] | None = None

    @property
    def residual(self) -> float | None:
        """The largest of ``residuals``; None unless asked for."""
        return None if self.residuals is None else max(self.residuals.values(), default=0.0)

    def _repr_html_(self) -> str:
        known: dict[str, object] = {
            "vertices": self.vertices,
            "depth": self.depth,
            "steps": self.num_steps,
            "products with A": self.transports,
            "left of the initial state": None if self.remaining is None else f"{self.remaining:.2g}",
            "converged": None if self.converged is None else "yes" if self.converged else "no",
            "largest residual": None if self.residual is None else f"{self.residual:.2g}",
            "did not relax": self.unrelaxed,
            "norms of the states": self.states
            and tuple(f"{name}: {float(x.detach().norm()):.3g}" for name, x in self.states.items()),
        }
        return table([row for row in known.items() if row[1] is not None])


@dataclass(frozen=True)
class Solver(ABC):
    """Finds the states at the end of a relaxation phase.

    Attributes:
        name: on the command line.
        only_linear: whether it needs the relaxation to be linear, its derivative frozen.
    """

    name: ClassVar[str]
    only_linear: ClassVar[bool] = False

    @abstractmethod
    def solve(self, graph: Graph) -> tuple[States, Relaxation]:
        """The states of all vertices of a graph whose outputs are driven, and the record of how they were found."""

    @abstractmethod
    def hops(self, depth: int) -> Hops:
        """c_k and d_k for k < depth at the end of the phase, where the relaxation is linear."""

    @property
    @abstractmethod
    def schedule(self) -> str:
        """In which order the states are updated, and what that takes, in words."""

    @property
    def is_limit(self) -> bool:
        """Whether the states are the limit x* to rounding, in whatever graph and from whatever start."""
        return False

    def replay(self) -> Euler | None:
        """The step-by-step solver of the same states, if there is one: it tells in which step a state overflowed."""
        return None


def planned_steps(depth: int, step_size: float, order: Order) -> int:
    """The fewest steps that leave no more than rounding of the initial state in a graph of this depth.

    That is double precision's, whatever the states' type, since activities can be many orders of magnitude larger than
    gradients. In an asynchronous order the weight is a mean over chance: there it is twice as many.
    """
    enough = steps_to_converge(max(depth, 1), float(step_size), NEGLIGIBLE, order=order)
    return 2 * enough if order == "asynchronous" else enough


def _check_num_steps(num_steps: object) -> None:
    if num_steps is not None:
        check_count("num_steps", num_steps)


_SCHEDULES: dict[Order, str] = {
    "simultaneous": "simultaneous: all states step together, by a global clock",
    "sequential": "sequential, towards the input: each layer waits for the one that reads it",
    "asynchronous": "asynchronous: no clock, each state is updated in a random half of the steps",
}


class _Stepped(Solver):
    """A solver whose states are those after n steps of one size."""

    step_size: float
    num_steps: int | None
    order: Order

    def steps(self, depth: int) -> int:
        """n for a graph of this depth."""
        return planned_steps(depth, self.step_size, self.order) if self.num_steps is None else int(self.num_steps)

    def hops(self, depth: int) -> Hops:
        return discrete_hops(depth, float(self.step_size), self.steps(depth), self.order)


@dataclass(frozen=True)
class Euler(_Stepped):
    """Algorithm 1, step by step: ``x ← x + η (A x + s − x)``.

    Args:
        step_size: η in (0, 2).
        num_steps: number of steps, ≥ 1; with a tolerance, at most so many. None (default): the fewest that leave no
            more than rounding of the initial state (`planned_steps`). Where the relaxation's derivative is not frozen,
            it is the same number. That was enough on perceptrons with tanh, and not with ReLU, where the derivative
            jumps and the states do not come to rest, however many steps there are (results/unfrozen).
        order: "simultaneous" updates all vertices at once (the paper's text), "sequential" each from its
            children's new states, from the output towards the input (the authors' code), "asynchronous" in each step a
            random half of the vertices (drawn from PyTorch's CPU generator, so ``torch.manual_seed`` fixes it).
        tolerance: stop as soon as ``‖A x + s − x‖ ≤ tolerance · ‖A x + s‖`` at every vertex, but not before the
            initial state's weight is down to the tolerance everywhere: deep in a graph, states can stand still
            for a while before the gradient has come by.

    Raises:
        TypeError, ValueError: if an argument has the wrong type or is outside its range.
    """

    name: ClassVar[str] = "euler"

    step_size: float = 0.1
    num_steps: int | None = None
    _: KW_ONLY
    order: Order = "simultaneous"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        check_step_size(self.step_size)
        _check_num_steps(self.num_steps)
        check_order(self.order)
        if self.tolerance is not None:
            check_tolerance(self.tolerance)

    def solve(self, graph: Graph) -> tuple[States, Relaxation]:
        states = graph.initial_states()
        num_steps, steps, reached = self.steps(graph.depth), 0, False
        earliest, rounding = math.inf, dict[Vertex, Tensor]()
        if self.tolerance is not None and graph.depth:
            earliest = steps_to_converge(graph.depth, float(self.step_size), self.tolerance, order=self.order)
            rounding = {v: torch.finfo(x.dtype).eps * x.norm() for v, x in states.items()}
        move: Callable[..., Tensor] = torch.lerp
        if graph.is_linear:
            states, move = {v: x.clone() for v, x in states.items()}, Tensor.lerp_  # in their own memory
        elif self.tolerance is None and self.order != "asynchronous":
            states, steps = self._after(graph, states, num_steps), num_steps

        def look(vertex: Vertex, drive: Tensor) -> None:
            nonlocal reached
            reached = reached and self._is_near(states[vertex], drive, rounding[vertex])

        while steps < num_steps and not reached:
            steps += 1
            reached = steps >= earliest  # unless a vertex is still too far
            states = self._step(graph, states, look, move)
        hops = discrete_hops(graph.depth, float(self.step_size), steps, self.order)
        record = _record(graph, states, hops, num_steps=steps, transports=steps)
        return states, record if self.tolerance is None else replace(record, converged=reached)

    def _after(self, graph: Graph, states: States, num_steps: int) -> States:
        """The last states of the `trajectory` of a nonlinear relaxation, of whose way nobody asks."""

        def step(at: Linearisation, states: States) -> list[Tensor]:
            def settle(vertex: Vertex, arriving: Tensor) -> Tensor:
                return torch.lerp(states[vertex], arriving, float(self.step_size))

            if self.order == "sequential":
                following = graph.sweep(settle, at)
            else:
                following = {v: settle(v, drive) for v, drive in graph.drive_at(at, states).items()}
            return [following[v] for v in graph.vertices]

        if not states:
            return states
        found = graph.compute(states, step, (self.order, self.step_size), num_steps)
        return cast(States, dict(zip(graph.vertices, found, strict=True)))

    def trajectory(self, graph: Graph, states: States) -> Iterator[tuple[States, States]]:
        """The states x_1, x_2, … without end, each with the drive ``A x + s`` that led to it."""
        while True:
            drive: States = {}
            states = self._step(graph, states, drive.__setitem__, torch.lerp)
            yield states, drive

    def _step(
        self, graph: Graph, states: States, look: Callable[[Vertex, Tensor], None], move: Callable[..., Tensor]
    ) -> States:
        """One step. ``look`` is shown a vertex and its drive before its state moves."""
        resting = set[Vertex]()
        if self.order == "asynchronous":
            drawn = (torch.rand(len(states)) >= UPDATE_PROBABILITY).tolist()
            resting = {v for v, rests in zip(graph.vertices, drawn, strict=True) if rests}

        def settle(vertex: Vertex, drive: Tensor) -> Tensor:
            look(vertex, drive)
            x = states[vertex]
            return x if vertex in resting else move(x, drive, float(self.step_size))

        if self.order == "sequential":
            return graph.sweep(settle, graph.linearise(states))
        return graph.advance(states, settle)

    def _is_near(self, x: Tensor, drive: Tensor, rounding: Tensor) -> bool:
        assert self.tolerance is not None
        return not (drive - x).norm() > torch.maximum(self.tolerance * drive.norm(), rounding)

    @property
    def schedule(self) -> str:
        return _SCHEDULES[self.order]

    def replay(self) -> Euler | None:
        return None if self.order == "asynchronous" else self


class _Linear(Solver):
    """The closed form of a linear schedule: a polynomial in A whose coefficients are hop probabilities."""

    def solve(self, graph: Graph) -> tuple[States, Relaxation]:
        check_solves(self, linear=graph.is_linear)
        hops = self.hops(graph.depth)
        if hops.largest <= NEGLIGIBLE:  # nothing of x_0 is left: x_n = x*
            states, transports = graph.equilibrium(), 1
        else:
            states, transports = _horner(graph, hops)
        return states, _record(graph, states, hops, num_steps=self.steps(graph.depth), transports=transports)

    def steps(self, depth: int) -> int | None:
        """n for a graph of this depth; None where the solver has no steps."""
        return None


def _horner(graph: Graph, hops: Hops) -> tuple[States, int]:
    """``Σ_k [ c_k A^k x_0 + d_k A^k s ]`` by Horner's rule: y ← A y + c_k x_0 + d_k s, for k from the last term to 0.

    After stage k there are k products with A to come, each a hop towards the input. So stage k leaves out the vertices
    with fewer than k vertices upstream: those nearest to the input, often the most expensive, are visited once.
    """
    source, initial = graph.source(), graph.initial_states()
    if graph.from_zero:  # where only what is held at ∂L/∂x^L is not zero
        initial = {v: initial[v] for v in graph.held()}
    y: States = {}  # those that are not zero
    for k in reversed(range(len(hops.terms))):
        c, d = hops.terms[k]
        active = graph.with_upstream(k)
        y = graph.transport(y, active) if y else {}
        if c:
            for v in active:
                if v in initial:
                    y[v] = torch.add(y[v], initial[v], alpha=c) if v in y else initial[v] * c
        if d:
            for v, s in source.items():
                if v.upstream >= k:
                    y[v] = torch.add(y[v], s, alpha=d) if v in y else s * d
    return {v: y[v] if v in y else v.zeros() for v in graph.vertices}, len(hops.terms) - 1


@dataclass(frozen=True)
class ClosedForm(_Stepped, _Linear):
    """The states after ``num_steps`` Euler steps, to rounding, in at most D − 1 products with A (D: the graph's depth).

    Where nothing of the initial state is left, one reverse sweep replaces them. That is so by default, "while not
    converged" in Algorithm 1: whatever the loss's scale, the gradients are backpropagation's. The paper's experiments
    take 100 steps of 0.1: `PAPER`.

    Args:
        step_size: η in (0, 2).
        num_steps: number of steps, ≥ 1. None (default): the fewest that leave no more than rounding of the initial
            state, as the graph's depth says (`steps_to_converge`).
        order: "simultaneous" (the paper's text) or "sequential" (the authors' code).

    Raises:
        TypeError, ValueError: if an argument has the wrong type or is outside its range.
    """

    name: ClassVar[str] = "closed-form"
    only_linear: ClassVar[bool] = True

    step_size: float = 0.1
    num_steps: int | None = None
    _: KW_ONLY
    order: Order = "simultaneous"

    def __post_init__(self) -> None:
        check_step_size(self.step_size)
        _check_num_steps(self.num_steps)
        check_order(self.order, ("simultaneous", "sequential"))

    @property
    def is_limit(self) -> bool:
        return self.num_steps is None

    @property
    def schedule(self) -> str:
        return f"closed form; {_SCHEDULES[self.order]}"

    def replay(self) -> Euler:
        return Euler(self.step_size, self.num_steps, order=self.order)


@dataclass(frozen=True)
class Continuous(_Linear):
    """The differential equation ``dx/dt = −x + A x + s`` itself, solved up to time ``duration``.

    Exactly, by a sum with Poisson weights, where the relaxation's derivative is frozen; else numerically, on the CPU
    and with one step size for all samples, to the square root of the states' rounding.

    Args:
        duration: T > 0, in units of the relaxation's time constant; n steps of η correspond to T = n η.

    Raises:
        TypeError, ValueError: if the duration is not a positive, finite number.
    """

    name: ClassVar[str] = "continuous"

    duration: float = 10.0

    def __post_init__(self) -> None:
        if isinstance(self.duration, bool) or not isinstance(self.duration, Real):
            raise TypeError(f"duration must be a positive number, got {self.duration!r}")
        if not 0 < float(self.duration) < math.inf:
            raise ValueError(f"duration must be positive and finite, got {self.duration!r}")

    def hops(self, depth: int) -> Hops:
        return continuous_hops(depth, self.duration)

    @property
    def schedule(self) -> str:
        return "continuous time: no clock"

    def solve(self, graph: Graph) -> tuple[States, Relaxation]:
        return super().solve(graph) if graph.is_linear else self._integrate(graph)

    def _integrate(self, graph: Graph) -> tuple[States, Relaxation]:
        """The nonlinear equation, by SciPy's adaptive Runge-Kutta method of order 5(4).

        The error allowed per step is the square root of the states' rounding, relative to each state or to the output's
        gradient, so that neither rounding nor the loss's scale steers the step.

        Raises:
            RuntimeError: if the derivative jumps along the way, so that the steps become too many.
        """
        from scipy.integrate import solve_ivp  # here, as few need it and it takes a third of a second to import

        initial = graph.initial_states()
        if not initial:
            return {}, _record(graph, {}, None, num_steps=None, transports=0)
        real = {v: _as_real(x) for v, x in initial.items()}
        sizes = [x.numel() for x in real.values()]

        def unpacked(y: NDArray[np.float64]) -> States:
            parts = torch.split(torch.from_numpy(y), sizes)
            states = {v: part.view_as(x).to(x) for (v, x), part in zip(real.items(), parts, strict=True)}
            return {v: torch.view_as_complex(x) if initial[v].is_complex() else x for v, x in states.items()}

        def packed(states: States) -> NDArray[np.float64]:
            return torch.cat([_as_real(states[v]).double().flatten().cpu() for v in initial]).numpy()

        evaluations = itertools.count(1)

        def derivative(_: float, y: NDArray[np.float64]) -> NDArray[np.float64]:
            if next(evaluations) > MAX_EVALUATIONS:
                raise RuntimeError(
                    f"{self}: the integration took more than {MAX_EVALUATIONS} evaluations; with an unfrozen "
                    "derivative that jumps (max-pooling, ReLU) the relaxation phase can slide along the jump, where "
                    "the step size goes to zero: use Euler(step_size, num_steps), or a smooth model"
                )
            return packed(graph.drive(unpacked(y))) - y

        allowed = math.sqrt(max(torch.finfo(x.dtype).eps for x in initial.values()))
        with np.errstate(all="ignore"):  # what overflows is found below
            path = solve_ivp(
                derivative, (0.0, float(self.duration)), packed(initial), t_eval=[float(self.duration)],
                rtol=allowed, atol=allowed * (graph.output_scale() or 1),
            )  # fmt: skip
        # Where the integration gave up the states have run away: they are no number.
        end = path.y[:, -1] if path.success else np.full(sum(sizes), np.nan)
        states = unpacked(end)
        return states, _record(graph, states, None, num_steps=None, transports=int(path.nfev))


@dataclass(frozen=True)
class Equilibrium(Solver):
    """The limit of every schedule, ``x* = s + A x* = ∂L/∂x``, by one sweep from the output towards the input.

    On a graph that is not cut, that sweep is reverse-mode differentiation: `ActivationRelaxation` leaves it to PyTorch.
    """

    name: ClassVar[str] = "equilibrium"
    only_linear: ClassVar[bool] = True

    def solve(self, graph: Graph) -> tuple[States, Relaxation]:
        check_solves(self, linear=graph.is_linear)
        states = graph.equilibrium()
        return states, at_equilibrium(len(graph.vertices), graph.depth)

    @property
    def schedule(self) -> str:
        return "equilibrium: the limit of every schedule, found in one sweep towards the input"

    def hops(self, depth: int) -> Hops:
        return Hops(np.zeros(depth), np.ones(depth))

    @property
    def is_limit(self) -> bool:
        return True


def at_equilibrium(vertices: int | None, depth: int | None) -> Relaxation:
    """The record of states that one sweep has brought to equilibrium."""
    return Relaxation(vertices, depth, num_steps=None, transports=1, remaining=0.0, converged=True)


PAPER = ClosedForm(0.1, 100)
"""The setting of the paper's experiments: 100 steps of 0.1, enough for the summed squared error on shallow networks."""

SOLVERS: dict[str, type[Solver]] = {kind.name: kind for kind in (ClosedForm, Euler, Continuous, Equilibrium)}


def solver_names(*, nonlinear: bool = False) -> str:
    """The solvers as a message lists them; where ``nonlinear``, those that solve a nonlinear relaxation."""
    kinds = [kind.__name__ for kind in SOLVERS.values() if not (nonlinear and kind.only_linear)]
    return ", ".join(f"{name}(…)" for name in kinds)


def check_solves(solver: Solver, *, linear: bool) -> None:
    """Refuse a solver that needs a linear relaxation where it is not.

    Raises:
        ValueError: if it is not; the error names the solver, and those that can be used.
    """
    if solver.only_linear and not linear:
        raise ValueError(
            f"solver={solver} sums powers of one linear operator, but with relaxation_derivative=False the Jacobians "
            f"follow the states and the relaxation is not linear: pass one of {solver_names(nonlinear=True)}"
        )


def _as_real(x: Tensor) -> Tensor:
    """Complex numbers as pairs."""
    return torch.view_as_real(x) if x.is_complex() else x


@cache
def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _record(graph: Graph, states: States, hops: Hops | None, *, num_steps: int | None, transports: int) -> Relaxation:
    remaining = converged = None
    if hops is not None and graph.is_linear:
        remaining = hops.remaining
        converged = remaining <= min([_rounding(x.dtype) for x in states.values()], default=0.0)
    return _relaxation(len(graph.vertices), graph.depth, num_steps, transports, remaining, converged)


_relaxation = lru_cache(typed=True)(Relaxation)  # in training all phases are alike
