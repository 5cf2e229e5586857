"""A run, described completely.

May import: feedback, public names, recording, solvers, vertices, wrapper, lab.data, lab.models, lab.rules.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from relaxprop import (
    PAPER,
    Frozen,
)
from relaxprop.feedback import FeedbackRule
from relaxprop.lab.data import check_spelling
from relaxprop.lab.models import Dropped, ModelName, Part
from relaxprop.lab.rules import OTHERS, Rule
from relaxprop.recording import InitialState
from relaxprop.solvers import SOLVERS, Solver
from relaxprop.vertices import Granularity
from relaxprop.wrapper import check_together

FORMAT = 1
"""Raised whenever the same description comes to give other results."""

PAPERS_STEPS = {"step_size": PAPER.step_size, "num_steps": PAPER.num_steps}
Loss = Literal["squared-error", "cross-entropy"]
OptimizerName = Literal["sgd", "adam"]
Precision = Literal["fp32", "bf16"]


# What a rule without a relaxation phase has in the places of its description.
_WITHOUT_SOLVER = {"solver": "closed-form", "solver_options": {}, "initial": "feedforward", "frozen": Frozen()}


def default_solver(frozen: Frozen) -> str:
    """The paper's 100 steps of 0.1: in closed form where the relaxation is linear, else simulated."""
    return "closed-form" if frozen.relaxation_derivative else "euler"


class RunConfig(BaseModel):
    """A run, described completely: the same description gives the same metrics.

    The defaults are the paper's settings (arXiv 2010.06219, section 3).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = Field(default=FORMAT, ge=1, le=FORMAT)  # of the code that computes it
    dataset: Annotated[str, AfterValidator(check_spelling)] = "digits"  # as `data.load` knows it
    data: str | None = None  # the data set's digest
    model: ModelName = "mlp"
    rule: Rule = "ar"
    solver: str = "closed-form"  # a name of `SOLVERS`
    solver_options: dict[str, float | int | str | None] = Field(default_factory=dict)
    rule_options: dict[str, float | int | bool | str | None] = Field(
        default_factory=dict
    )  # of a rule of `rules.OTHERS`
    vertices: Granularity = "activations"
    initial: InitialState = "feedforward"
    frozen: Frozen = Frozen()
    feedback: dict[Part, FeedbackRule] = Field(default_factory=dict)  # by part of the network, as `models.build`
    dropped: dict[Part, Dropped] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0, lt=2**63)
    epochs: int = Field(default=30, ge=1)
    validation: int = Field(default=0, ge=0)  # training images held out, on which is measured in the test images' place
    enlarged: int = Field(default=1, ge=1)  # how often each pixel is repeated, in height and in width
    signed_inputs: bool = False  # scaled to [−1, 1], not [0, 1]
    batch_size: int = Field(default=64, ge=1)
    left_out: int = Field(default=0, ge=0)  # minibatches at the end of training and test data
    loss: Loss = "squared-error"  # summed over minibatch and outputs
    optimizer: OptimizerName = "sgd"
    learning_rate: float = Field(default=0.0005, gt=0, allow_inf_nan=False)
    convolutional_factor: float = Field(default=1, gt=0, allow_inf_nan=False)  # of the convolutions' learning rate
    alignment_every: int = Field(default=0, ge=0)  # minibatches from one `AlignmentSample` to the next; 0: never
    precision: Precision = "fp32"  # of forward pass and relaxation; bf16 under autocast
    threads: int = Field(default=1, ge=1)  # of the processor, in which order sums are taken depends on them

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Fills the solver and its defaults in, so that a run has one description; backpropagation has no solver."""
        if not isinstance(values, dict):
            return values
        try:
            return cls._complete(values)
        except TypeError as error:  # which pydantic would let through
            raise ValueError(str(error)) from error

    @classmethod
    def _complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        rule = values.get("rule")
        if rule == "backprop":
            unused = {"vertices": "activations", "feedback": {}, "dropped": {}, "alignment_every": 0}
            return values | _WITHOUT_SOLVER | {"rule_options": {}} | unused
        parts = values.get("feedback", {})
        if isinstance(parts, dict):  # their order is that of the random draws
            parts = {part: parts[part] for part in sorted(parts) if parts[part] != "symmetric"}
        if (other := OTHERS.get(str(rule))) is not None:
            if parts and not other.transports:
                raise ValueError(f"feedback has no effect on {other.title}, whose errors pass no layer: leave it out")
            options = other.complete(values.get("rule_options", {}))
            return values | _WITHOUT_SOLVER | {"rule_options": options, "feedback": parts}
        if values.get("rule_options"):
            raise ValueError(f"rule_options are of the rules {', '.join(OTHERS)}: leave them out with rule {rule!r}")
        frozen = values.get("frozen") or Frozen()
        frozen = frozen if isinstance(frozen, Frozen) else Frozen(**frozen)
        name = values.get("solver") or default_solver(frozen)
        kind = SOLVERS.get(name)
        if kind is None:
            *others, last = map(repr, SOLVERS)
            raise ValueError(f"solver must be {', '.join(others)} or {last}, got {name!r}")
        given = values.get("solver_options", {})
        papers = {name: value for name, value in PAPERS_STEPS.items() if name in kind.__dataclass_fields__}
        solver = kind(**papers | given)
        check_together(solver, values.get("vertices", "activations"), frozen)
        return values | {"solver": name, "solver_options": vars(solver), "frozen": frozen, "feedback": parts}

    def build_solver(self) -> Solver:
        """The solver that the description names."""
        return SOLVERS[self.solver](**self.solver_options)

    @property
    def id(self) -> str:
        """A readable name, unique to the description without its number of epochs: a longer run continues a shorter."""
        # What is not used is not mentioned, so that a new switch leaves the runs without it their names.
        added = (
            "feedback", "dropped", "signed_inputs", "convolutional_factor", "alignment_every", "vertices", "loss",
            "optimizer", "initial", "precision", "threads", "rule_options", "validation", "enlarged",
        )  # fmt: skip
        fields = type(self).model_fields
        unused = {name for name in added if getattr(self, name) == fields[name].get_default(call_default_factory=True)}
        if self.format == 1:  # whose descriptions had no number yet
            unused.add("format")
        content = self.model_dump_json(exclude={"epochs", *unused})
        digest = hashlib.sha256(content.encode()).hexdigest()[:10]
        return f"{self.dataset}-{self.model}-{self.rule}-seed{self.seed}-{digest}"
