"""Train PyTorch networks by Activation Relaxation. Equations: `relaxprop.relaxation`."""

from relaxprop.derivatives import drop_derivatives
from relaxprop.diagnostics import Alignment, Convergence, alignment, certificate, convergence, feedback_alignment
from relaxprop.feedback import use_feedback
from relaxprop.frozen import Frozen
from relaxprop.locality import Locality, describe_locality
from relaxprop.relaxation import ActivationRelaxation, NonFiniteStateError
from relaxprop.solvers import ClosedForm, Continuous, Equilibrium, Euler, Relaxation
from relaxprop.transients import steps_to_converge

__version__ = "0.1.0"

__all__ = [
    "ActivationRelaxation",
    "Alignment",
    "ClosedForm",
    "Continuous",
    "Convergence",
    "Equilibrium",
    "Euler",
    "Frozen",
    "Locality",
    "NonFiniteStateError",
    "Relaxation",
    "alignment",
    "certificate",
    "convergence",
    "describe_locality",
    "drop_derivatives",
    "feedback_alignment",
    "steps_to_converge",
    "use_feedback",
]
