"""An experiment: conditions side by side, from the same start and on the same minibatches; the runs that it is.

May import: feedback, frozen, public names, recording, lab.config, lab.models, lab.results, lab.rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from relaxprop import (
    Frozen,
)
from relaxprop.feedback import FeedbackRule
from relaxprop.frozen import ALL_FROZEN
from relaxprop.lab.config import RunConfig
from relaxprop.lab.models import Dropped, ModelName, Part
from relaxprop.lab.results import BASELINE, REFERENCE, Compared
from relaxprop.lab.rules import Rule
from relaxprop.recording import InitialState


@dataclass(frozen=True)
class Condition(Compared):
    """One curve of a figure, and how its runs are described."""

    rule: Rule = "ar"
    frozen: Frozen = ALL_FROZEN
    feedback: Mapping[Part, FeedbackRule] = field(default_factory=dict)
    dropped: Mapping[Part, Dropped] = field(default_factory=dict)
    as_coded: bool = False
    initial: InitialState = "feedforward"


@dataclass(frozen=True)
class Experiment:
    """A figure's protocol.

    Attributes:
        conditions: by data set.
        settings: fields of `RunConfig` that are not the paper's, by data set.
    """

    title: str
    conditions: Mapping[str, Mapping[str, Condition]]
    seeds: int = 10
    epochs: int = 30
    model: ModelName = "mlp"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, dataset: str) -> Mapping[str, Condition]:
        """The conditions on a data set; on one that the figure does not have, those of its first."""
        return self.conditions.get(dataset) or next(iter(self.conditions.values()))


BASELINES = {
    REFERENCE: Condition("Backpropagation", rule="backprop"),
    BASELINE: Condition("Activation Relaxation", versus=REFERENCE),
}


def in_version(
    experiment: Experiment, *, as_coded: bool = False, initial: InitialState = "feedforward", beside: bool = False
) -> Experiment:
    """The experiment in another version than the paper's text.

    Args:
        as_coded: as the authors' code has it, see `condition_runs`.
        initial: where the states start.
        beside: after the conditions as the paper's text has them, each compared with that. Where the version changes
            nothing, as a start does for backpropagation, there is one condition for both.

    Raises:
        ValueError: ``beside`` without another version.
    """
    named = [*(["as coded"] if as_coded else []), *([f"from {initial}"] if initial != "feedforward" else [])]
    if not named:
        if beside:
            raise ValueError("beside needs another version: the code's, or another start")
        return experiment
    version = ", ".join(named)

    def added(conditions: Mapping[str, Condition]) -> dict[str, Condition]:
        changed = [name for name in conditions if as_coded or conditions[name].rule != "backprop"]
        names = {name: f"{name}, {version}" if name in changed and beside else name for name in conditions}
        versions = {
            names[name]: replace(
                conditions[name],
                title=f"{conditions[name].title}, {version}"
                if beside and name in BASELINES
                else conditions[name].title,
                versus=names[conditions[name].versus],
                beside=name if beside else None,
                as_coded=as_coded,
                initial=initial,
            )
            for name in changed
        }
        return {**conditions, **versions} if beside else {name: versions.get(name, conditions[name]) for name in names}

    conditions = {dataset: added(own) for dataset, own in experiment.conditions.items()}
    title = f"{experiment.title}, {version}{' and as written' if beside else ''}"
    return replace(experiment, title=title, conditions=conditions)


def condition_runs(
    experiment: Experiment,
    dataset: str,
    *,
    seeds: int,
    epochs: int,
    data: str | None = None,
    as_coded: bool = False,
    only: Sequence[str] = (),
    alignment_every: int = 0,
) -> list[tuple[str, RunConfig]]:
    """The runs with the names of their conditions: per seed the same initial weights and minibatches in all of them.

    ``only`` names conditions to which the baselines are added, and other versions of them; by default all.

    ``as_coded`` takes the authors' code where it differs from the paper's text on purpose: vertices are updated in
    sequence from the output towards the input, the last two minibatches are left out, d relaxes the input too, and the
    CNN has the code's sizes, inputs in [−1, 1] and twice the learning rate in its convolutions. Not taken: the code's
    defects, and its bound of 50 on the convolutions' steps.
    """
    values = {"model": experiment.model, "dataset": dataset, "data": data, "epochs": epochs}
    values |= {"alignment_every": alignment_every} | dict(experiment.settings.get(dataset, {}))
    if experiment.settings and dataset not in experiment.settings:
        raise ValueError(f"dataset must be one of {', '.join(experiment.settings)} in this experiment, got {dataset!r}")
    conditions = experiment.of(dataset)
    if unknown := [name for name in only if name not in conditions]:
        raise ValueError(f"condition must be one of {', '.join(conditions)}, got {unknown[0]!r}")
    return [
        (name, _run(condition, as_coded or condition.as_coded, seed=seed, **values))
        for seed in range(seeds)
        for name, condition in conditions.items()
        if not only or {name, condition.beside} & {*only, *BASELINES}
    ]


def _run(condition: Condition, as_coded: bool, **values: Any) -> RunConfig:
    values |= {name: getattr(condition, name) for name in ("rule", "frozen", "feedback", "dropped", "initial")}
    return RunConfig(**(as_the_code_has_it(values) if as_coded else values))


def as_the_code_has_it(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `RunConfig` as the authors' code has them, where it differs from the paper's text on purpose."""
    found = dict(values)
    if found["model"] == "cnn":
        found |= {"model": "cnn-as-coded", "signed_inputs": True, "convolutional_factor": 2.0}
    found |= {"left_out": 2, "solver_options": {"order": "sequential"} | found.get("solver_options", {})}
    if not found["frozen"].update_activity:
        found["frozen"] = replace(found["frozen"], input=False)
    return found


def condition_of(config: RunConfig, conditions: Mapping[str, Condition]) -> str | None:
    """The name of the condition that a run was computed under, whatever else it was; None where it is none of them."""
    for name, condition in conditions.items():
        # As the authors' code has condition d, the input relaxes too.
        frozen = replace(condition.frozen, input=config.frozen.input or condition.frozen.update_activity)
        if (config.rule, config.frozen, config.feedback, config.dropped) == (
            condition.rule,
            frozen,
            condition.feedback,
            condition.dropped,
        ):
            return name
    return None
