"""The paper's figures, and what else is compared in their way: conditions, sizes, settings.

May import: public names, lab.experiments.conditions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from relaxprop import (
    Frozen,
)
from relaxprop.lab.experiments.conditions import BASELINES, Condition, Experiment

FigureName = Literal["demo", "figure1", "figure2", "figure3", "appendix-c", "graphs"]
# Figures 1 and 3 (the paper, section 4.1).
UNFROZEN = BASELINES | {
    "a": Condition("f'(W x) in the relaxation", frozen=Frozen(relaxation_derivative=False)),
    "b": Condition("f'(W x) in the update", frozen=Frozen(update_derivative=False)),
    "c": Condition("f'(W x) in both", frozen=Frozen(relaxation_derivative=False, update_derivative=False)),
    "d": Condition("presynaptic x in the update", frozen=Frozen(update_activity=False), claim="destroyed"),
}
# Figure 2 and Appendix C.
SIMPLIFIED = BASELINES | {
    "ψ-conv": Condition("learned ψ in convolutions", feedback={"convolutional": "learned"}),
    "ψ-fc": Condition("learned ψ in linear layers", feedback={"fully_connected": "learned"}),
    "ψ": Condition("learned ψ everywhere", feedback={"all": "learned"}),
    "f'-conv": Condition("no f' in convolutions", dropped={"convolutional": "both"}),
    "f'-fc": Condition("no f' in linear layers", dropped={"fully_connected": "both"}),
    "f'": Condition("no f' anywhere", dropped={"all": "both"}),
    "ψ-f'": Condition("learned ψ, no f' anywhere", feedback={"all": "learned"}, dropped={"all": "both"}),
    "random": Condition("fixed random feedback", feedback={"all": "random"}, claim="worse"),
}
# The paper calls it an anomaly of this data set.
SIMPLIFIED_SVHN = SIMPLIFIED | {"f'": replace(SIMPLIFIED["f'"], claim="worse")}
# Deep graphs, of which every operation is a vertex, need more steps than the paper's networks. So many leave nothing of
# the initial state at depth 60, and the closed form is one sweep.
OPERATIONS = {"vertices": "operations", "solver_options": {"step_size": 0.5, "num_steps": 300}}
TRANSFORMER = {"model": "transformer", "loss": "cross-entropy", "optimizer": "adam", "learning_rate": 1e-3}
RESNET = TRANSFORMER | {"model": "resnet"}
EXPERIMENTS: dict[FigureName, Experiment] = {
    "demo": Experiment("every condition on scikit-learn's digits", {"digits": UNFROZEN}, seeds=3, epochs=8),
    "figure1": Experiment("the paper's Figure 1", {"mnist": UNFROZEN}),
    "figure2": Experiment("the paper's Figure 2", {"cifar10": SIMPLIFIED}, model="cnn"),
    "figure3": Experiment("the paper's Figure 3", {"fashion_mnist": UNFROZEN}),
    "appendix-c": Experiment("the paper's Appendix C", {"cifar100": SIMPLIFIED, "svhn": SIMPLIFIED_SVHN}, model="cnn"),
    "graphs": Experiment(
        "training on other graphs (Appendix A)",
        {"docstrings": BASELINES, "cifar10": BASELINES},
        seeds=3,
        epochs=5,
        settings={"docstrings": OPERATIONS | TRANSFORMER, "cifar10": OPERATIONS | RESNET},
    ),
}
