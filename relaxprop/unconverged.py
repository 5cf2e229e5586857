"""What a finite relaxation phase has left of its initial state: measured in the first pass of a setting, and told.

May import: graph, solvers.
"""

from __future__ import annotations

import math
import sys
import warnings

from relaxprop.graph import Graph, States
from relaxprop.solvers import Solver, planned_steps

NOTABLE = 0.1  # share of a final state from which on the user is warned
STEP_SIZE = 0.1  # of the number of steps that the warning names, where the solver has none


class UnconvergedWarning(UserWarning):
    """A final state of the relaxation phase is far from the gradient, since the phase has not converged."""


def shares(graph: Graph, states: States) -> dict[str, float]:
    """``‖x − x*‖ / ‖x‖`` of every final state x, by vertex name: what in it is left of the initial state, and not the
    gradient x*.

    One sweep finds x*, so that this can be told of every solver of a linear relaxation, whatever its start and order.
    """
    exact = graph.sweep(lambda _, arriving: arriving)
    found = {}
    for vertex, x in states.items():
        # Brought to about 1: what is left of a mask's least number is so large that its norm is not a number any more.
        scale = float(x.abs().max()) if x.numel() else 0.0
        difference, size = float(((x - exact[vertex]) / (scale or 1)).norm()), float((x / (scale or 1)).norm())
        share = difference / size if size else float(difference > 0)
        found[vertex.name] = share if math.isfinite(share) else 1.0
    return found


def tell(solver: Solver, graph: Graph, states: States) -> None:
    """Warns the user where a final state is far from the gradient.

    The remedies follow from the hop distribution: so many steps leave nothing but rounding of any initial state.
    """
    name, share = max(shares(graph, states).items(), key=lambda item: item[1], default=("", 0.0))
    if not share > NOTABLE:
        return
    step_size = float(getattr(solver, "step_size", STEP_SIZE))
    steps = planned_steps(graph.depth, step_size, "simultaneous")
    warn_user(
        f"{share:.0%} of the final state of vertex {name!r} is left of the initial state, and is not the gradient: "
        f"{solver} does not converge in this graph of depth {graph.depth}, so that the gradients from there to the "
        "input are far from backpropagation's, the farther the smaller the loss is (a mean instead of a sum). Pass "
        f"solver=Equilibrium(), or relax until converged: ClosedForm() or Euler({step_size:g}), which takes {steps} "
        "steps here. If the transient is what you study, filter relaxprop.UnconvergedWarning",
        UnconvergedWarning,
    )


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning at the user's own line: the first that is neither this library's nor PyTorch's."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("relaxprop", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
