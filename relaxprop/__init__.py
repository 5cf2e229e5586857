"""Train PyTorch networks by Activation Relaxation. Equations: `relaxprop.relaxation`."""

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

__version__ = "0.1.0"

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
