"""Training steps by every rule, and the parts of them whose cost is known.

May import: frozen, public names, solvers, vertices, lab.bench.measuring, lab.bench.problems, lab.rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relaxprop import PAPER, ActivationRelaxation, Euler, Frozen
from relaxprop.frozen import ALL_FROZEN
from relaxprop.lab.bench.measuring import BASELINE, Step, ratio, training_step
from relaxprop.lab.bench.problems import Problem
from relaxprop.lab.rules import OTHERS, called, wrap
from relaxprop.solvers import SOLVERS as LIBRARY
from relaxprop.solvers import Solver
from relaxprop.vertices import Granularity, find_vertices

OWN = "ar"
RULES = (OWN, *OTHERS)
PAPERS_SOLVER = "paper"
SOLVERS: dict[str, Solver] = {  # of Activation Relaxation, by name
    **{name: kind() for name, kind in LIBRARY.items()},
    "euler": Euler(0.1, 100),  # the paper's steps one by one
    PAPERS_SOLVER: PAPER,
}
USUAL = ("equilibrium", "closed-form", PAPERS_SOLVER, "euler")
EULER_STEPS = 10  # of which the mean is taken
RULE_STEPS = 10  # of predictive coding, and of each phase of equilibrium propagation
UPDATES = {"b": Frozen(update_derivative=False), "d": Frozen(update_activity=False)}  # the paper's conditions


def label(solver: Solver) -> str:
    """Its name with its sizes."""
    sizes = [vars(solver).get(name) for name in ("step_size", "num_steps", "duration")]
    shown = ", ".join(str(size) for size in sizes if size is not None) if sizes[1:] != [None, None] else ""
    return f"{type(solver).__name__}({shown})"


def rule_label(rule: str) -> str:
    """A rule's class, with its sizes and with what its name in the lab says."""
    other, options = OTHERS[rule], _options(rule)
    sizes = [options[name] for name in ("step_size", "num_steps") if name in options]
    usual = {field.name: field.default for field in fields(other.settings)}
    said = [value for name, value in other.fixed.items() if value != usual[name]]
    return f"{other.wrapper.__name__}({', '.join(map(str, [*said, *sizes]))})"


def _options(rule: str) -> dict[str, Any]:
    other = OTHERS[rule]
    return other.complete({"num_steps": RULE_STEPS} if "num_steps" in other.options else {})


def check_names(rules: Sequence[str], solvers: Sequence[str]) -> None:
    """Refuse what is not known.

    Raises:
        ValueError: if there is no such rule or solver.
    """
    for what, names, known in (("rule", rules, RULES), ("solver", solvers, SOLVERS)):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{what} must be one of {', '.join(known)}, got {unknown[0]!r}")


def relaxation_step(
    problem: Problem,
    solver: Solver | None,
    *,
    vertices: Granularity = "activations",
    frozen: Frozen = ALL_FROZEN,
    check_finite: bool = True,
) -> Step:
    """A training step of Activation Relaxation; of backpropagation where there is no solver."""
    trained = problem.network
    if solver is not None:
        trained = ActivationRelaxation(
            trained, solver=solver, vertices=vertices, frozen=frozen, check_finite=check_finite
        )
    return training_step(problem.network, lambda: problem.loss(trained(problem.inputs), problem.targets))


def all_steps(
    problem: Problem,
    rules: Sequence[str],
    solvers: Sequence[str],
    vertices: Granularity = "activations",
    *,
    check_finite: bool = True,
) -> dict[str, Step]:
    """A training step of backpropagation and of every rule, by its name in the tables.

    Args:
        rules: of ``RULES``.
        solvers: of ``SOLVERS``, for Activation Relaxation.
        vertices: what relaxes.
        check_finite: whether a step looks at what it computes.

    Raises:
        ValueError: if a rule or a solver is unknown, the network has no such vertices, or a rule cannot train it.
    """
    check_names(rules, solvers)
    chosen = [SOLVERS[name] for name in solvers] if OWN in rules else []
    steps = {BASELINE: relaxation_step(problem, None)}
    common: dict[str, Any] = {"vertices": vertices, "check_finite": check_finite}
    steps |= {label(solver): relaxation_step(problem, solver, **common) for solver in chosen}
    return steps | {rule_label(rule): _other(problem, rule, common) for rule in rules if rule != OWN}


def _other(problem: Problem, rule: str, common: Mapping[str, Any]) -> Step:
    trained = wrap(rule, problem.network, _options(rule), problem.loss, seed=0, **common)
    more, loss_of = called(rule, problem.loss, problem.targets, problem.targets)
    return training_step(problem.network, lambda: loss_of(trained(problem.inputs, **more)))


class Part(NamedTuple):
    """What a part of a training step costs beside its least work.

    Attributes:
        what: the part.
        least: what it takes at least.
        step: its name among the steps, and how many times it is done there.
        beside: the names of the steps that are its least work.
    """

    what: str
    least: str
    step: tuple[str, int]
    beside: tuple[str, ...]

    def ratio(self, times: Mapping[str, list[float]]) -> float:
        """Median of the ratios in the same round."""
        return ratio(times, self.step[0], *self.beside, per=self.step[1])


def parts(problem: Problem, rules: Sequence[str], *, compile_steps: bool = False) -> tuple[dict[str, Step], list[Part]]:
    """Steps of Euler and conditions of the update, and the passes that are the least which they take.

    Their names are those of the other steps where the same is done: of PAPER's and Euler's training step.

    Args:
        problem: the network, which has vertices.
        rules: of ``RULES``.
        compile_steps: whether unfrozen steps are measured by ``torch.compile`` too.
    """
    kept = replace(problem, network=deepcopy(problem.network))  # whose weights are not written over by any update
    network = kept.network
    vertices = find_vertices(network, "activations")

    def forward() -> tuple[Tensor, list[Tensor]]:
        activities: list[Tensor] = []
        handles = [m.register_forward_hook(lambda m, args, y: activities.append(y)) for m in vertices]
        output = network(problem.inputs)
        for handle in handles:
            handle.remove()
        return problem.loss(output, problem.targets), activities

    def forward_and_backward() -> None:
        loss, activities = forward()
        torch.autograd.grad(loss, activities)

    kept_loss, kept_activities = forward()
    both = "a forward and an activation-only backward pass"
    paper, euler = label(PAPER), label(SOLVERS["euler"])
    steps = {
        "forward": lambda: network(problem.inputs),
        "backward": lambda: torch.autograd.grad(kept_loss, kept_activities, retain_graph=True),
        both: forward_and_backward,
        "Euler steps": _euler_steps(kept, ALL_FROZEN),
        "unfrozen Euler steps": _euler_steps(kept, Frozen(relaxation_derivative=False)),
        **{f"condition {name}": relaxation_step(problem, PAPER, frozen=frozen) for name, frozen in UPDATES.items()},
    }
    found = [
        Part(f"a training step of {euler}", f"one of {paper}", (euler, 1), (paper,)),
        Part("a step of Euler", "an activation-only backward pass", ("Euler steps", EULER_STEPS), ("backward",)),
        Part("a step of Euler, the derivative unfrozen", both, ("unfrozen Euler steps", EULER_STEPS), (both,)),
    ]
    if compile_steps:
        compiled, unfrozen = "compiled Euler steps", "unfrozen Euler steps"
        steps[compiled] = _euler_steps(kept, Frozen(relaxation_derivative=False), compiled=True)
        found.append(Part("the same by torch.compile", both, (compiled, EULER_STEPS), (both,)))
        found.append(Part("the same by torch.compile", "one that is not compiled", (compiled, 1), (unfrozen,)))
    for name in UPDATES:
        step, least = f"condition {name}", f"one of {paper} and a forward pass"
        found.append(Part(f"a training step under {step}", least, (step, 1), (paper, "forward")))
    for rule, phases in (("pc", 1), ("ep", 2)):
        if rule in rules:
            shown = rule_label(rule)
            what = f"a step of {shown}, with its share of the training step"
            found.append(Part(what, both, (shown, phases * RULE_STEPS), (both,)))
    return steps, found


def _euler_steps(problem: Problem, frozen: Frozen, *, compiled: bool = False) -> Step:
    model = ActivationRelaxation(problem.network, solver=PAPER.replay(), frozen=frozen)
    if compiled:
        model.compile_steps()
    for _ in range(2):  # the first pass learns where copies are needed
        recording = model.record([problem.inputs])
    (output,) = recording.graph.outputs
    leaf = output.detach().requires_grad_()
    recording.graph.drive_outputs([*torch.autograd.grad(problem.loss(leaf, problem.targets), leaf)])
    euler, initial = PAPER.replay(), recording.graph.initial_states()

    def step() -> None:
        for _ in islice(euler.trajectory(recording.graph, initial), EULER_STEPS):
            pass

    return step
