"""Learning rules, each a module that stands in another's place: one loop trains one network by all of them.

May import: rules.base, wrapper.
"""

from relaxprop.rules.base import Phase, Rule, RuleSettings
from relaxprop.wrapper import ActivationRelaxation

__all__ = ["ActivationRelaxation", "Phase", "Rule", "RuleSettings"]
