"""Train PyTorch networks by Activation Relaxation. Equations: `relaxprop.relaxation`.

A name is imported when it is first asked for: PyTorch takes seconds, and what only reads records does without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relaxprop.derivatives import drop_derivatives
    from relaxprop.feedback import mirror_weights, use_feedback
    from relaxprop.finite import DivergedError, NonFiniteStateError
    from relaxprop.frozen import Frozen
    from relaxprop.inspect.alignment import Alignment, alignment, feedback_alignment
    from relaxprop.inspect.convergence import Convergence, certificate, convergence
    from relaxprop.inspect.locality import Locality, describe_locality
    from relaxprop.rules.direct import DirectFeedback
    from relaxprop.rules.predictive import EquilibriumPropagation, PredictiveCoding
    from relaxprop.solvers import PAPER, ClosedForm, Continuous, Equilibrium, Euler, Relaxation
    from relaxprop.transients import steps_to_converge
    from relaxprop.unconverged import UnconvergedWarning
    from relaxprop.wrapper import ActivationRelaxation

__version__ = "0.2.0"

__all__ = [
    "PAPER",
    "ActivationRelaxation",
    "Alignment",
    "ClosedForm",
    "Continuous",
    "Convergence",
    "DirectFeedback",
    "DivergedError",
    "Equilibrium",
    "EquilibriumPropagation",
    "Euler",
    "Frozen",
    "Locality",
    "NonFiniteStateError",
    "PredictiveCoding",
    "Relaxation",
    "UnconvergedWarning",
    "alignment",
    "certificate",
    "convergence",
    "describe_locality",
    "drop_derivatives",
    "feedback_alignment",
    "mirror_weights",
    "steps_to_converge",
    "use_feedback",
]

_ROOMS = {
    "derivatives": ["drop_derivatives"],
    "feedback": ["mirror_weights", "use_feedback"],
    "finite": ["DivergedError", "NonFiniteStateError"],
    "frozen": ["Frozen"],
    "inspect.alignment": ["Alignment", "alignment", "feedback_alignment"],
    "inspect.convergence": ["Convergence", "certificate", "convergence"],
    "inspect.locality": ["Locality", "describe_locality"],
    "rules.direct": ["DirectFeedback"],
    "rules.predictive": ["EquilibriumPropagation", "PredictiveCoding"],
    "solvers": ["PAPER", "ClosedForm", "Continuous", "Equilibrium", "Euler", "Relaxation"],
    "transients": ["steps_to_converge"],
    "unconverged": ["UnconvergedWarning"],
    "wrapper": ["ActivationRelaxation"],
}
_PARTS = {"inspect", "plots", "rules"}


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            found = globals()[name] = getattr(import_module(f"relaxprop.{room}"), name)
            return found
    if name in _PARTS:
        return import_module(f"relaxprop.{name}")
    raise AttributeError(f"module 'relaxprop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
