"""Learning rules, each a module that stands in another's place: one loop trains one network by all of them.

May import: rules.base, rules.direct, rules.predictive, wrapper.
"""

from relaxprop.rules.base import Described, Phase, Rule, RuleSettings
from relaxprop.rules.direct import DirectFeedback
from relaxprop.rules.predictive import EquilibriumPropagation, PredictiveCoding
from relaxprop.wrapper import ActivationRelaxation

__all__ = [
    "ActivationRelaxation",
    "Described",
    "DirectFeedback",
    "EquilibriumPropagation",
    "Phase",
    "PredictiveCoding",
    "Rule",
    "RuleSettings",
]
