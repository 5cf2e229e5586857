"""The learning rules by name, as a run's description has them: what each is told, and how its loss is called.

A new rule is an entry in `OTHERS`.

May import: public names, rule, rules.direct, rules.predictive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from relaxprop import DirectFeedback, EquilibriumPropagation, PredictiveCoding
from relaxprop.rule import LearningRule
from relaxprop.rules.direct import DirectFeedbackSettings
from relaxprop.rules.predictive import EnergySettings, NudgedSettings

OtherRule = Literal["pc", "ep", "dfa", "drtp"]
Rule = Literal["ar", "backprop", OtherRule]
LossFunction = Callable[[Tensor, Tensor], Tensor]
_COMMON = {"vertices", "check_finite", "keep_states"}


class Other(NamedTuple):
    """A rule beside Activation Relaxation and backpropagation.

    Attributes:
        title: its name in words.
        wrapper: its class.
        settings: whose fields are what it is told.
        fixed: of these, what its name says.
        defaults: where the run's are not the library's.
        loss_within: whether it computes the loss itself.
        draws: whether it draws weights of its own, from the run's seed.
        reads_labels: whether it reads the labels beside the input.
        transports: whether errors pass the layers' weights, so that there may be other backwards weights.
    """

    title: str
    wrapper: Callable[..., LearningRule]
    settings: type
    fixed: Mapping[str, Any] = {}
    defaults: Mapping[str, Any] = {}
    loss_within: bool = False
    draws: bool = False
    reads_labels: bool = False
    transports: bool = False

    @property
    def options(self) -> list[str]:
        """The names of what it can be told."""
        return [f.name for f in fields(self.settings) if f.name not in _COMMON | {"seed"} | set(self.fixed)]

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options with their defaults, so that a run has one description.

        Raises:
            TypeError, ValueError: if an option is unknown, or its value is not possible.
        """
        if unknown := [name for name in given if name not in self.options]:
            raise ValueError(f"{unknown[0]} has no effect on {self.title}, which takes {', '.join(self.options)}")
        made = self.settings(**{**self.defaults, **given})
        return {name: getattr(made, name) for name in self.options}


_DIRECT = {"std": 0.05}  # as the weights of the paper's networks start
OTHERS: dict[str, Other] = {
    "pc": Other("strict predictive coding", PredictiveCoding, EnergySettings, loss_within=True, transports=True),
    "ep": Other("equilibrium propagation", EquilibriumPropagation, NudgedSettings, loss_within=True, transports=True),
    "dfa": Other(
        "direct feedback alignment", DirectFeedback, DirectFeedbackSettings, {"error": "output"}, _DIRECT, draws=True
    ),
    "drtp": Other(
        "direct random target projection", DirectFeedback, DirectFeedbackSettings, {"error": "target"}, _DIRECT,
        draws=True, reads_labels=True,
    ),
}  # fmt: skip


def wrap(
    rule: str, network: nn.Module, options: Mapping[str, Any], loss_fn: LossFunction, *, seed: int, **common: Any
) -> LearningRule:
    """The network, trained by the rule.

    Args:
        options: as `Other.complete` gives them.
        loss_fn: maps the network's output and the targets to the loss.
        seed: of feedback that is drawn.
        common: ``vertices`` and ``check_finite``.
    """
    other = OTHERS[rule]
    loss = [loss_fn] if other.loss_within else []
    drawn = {"seed": seed} if other.draws else {}
    return other.wrapper(network, *loss, **other.fixed, **options, **drawn, **common)


def called(
    rule: str, loss_fn: LossFunction, targets: Tensor, labels: Tensor
) -> tuple[dict[str, Any], Callable[[Any], Tensor]]:
    """What a network that is trained by the rule is called with beside its input, and the loss of what it returns."""
    other = OTHERS.get(rule)
    if other is not None and other.loss_within:
        return {"target": targets}, lambda loss: loss
    more = {"target": labels} if other is not None and other.reads_labels else {}
    return more, lambda output: loss_fn(output, targets)
