r"""What every update reads: a claim of biological plausibility, checked on the user's own model.

    (1)  dx_i/dt = −x_i + Σ_j W^T (f' ⊙ x_j)         its own state; states, derivatives and weights of the children j
    (2)  ΔW ∝ (W_+^T (f' ⊙ x_j)) x^T                 the same of what reads the layer, and the presynaptic activity

Not seen: what is computed from activities without a gradient (``x * (x > 0)`` reads a mask).
Not judged: weights shared by places (convolution) or by moments (a layer that is called again), which make an update a
sum over them; an error sent on to the model's input; how a loss outside of the model makes the error of the output.
Source: Millidge et al., arXiv 2010.06219, sections 3 and 4, whose simplifications take these entries away one by one.

May import: frozen, html, inspect.model, inspect.walk, rule, rules.base, sight, solvers, vertices, wrapper.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import zip_longest
from typing import Any

import torch

from relaxprop.frozen import ALL_FROZEN, Frozen
from relaxprop.html import table
from relaxprop.inspect.model import check_model, undisturbed
from relaxprop.inspect.walk import KINDS, RELAXATION, Reads, Walk, Words
from relaxprop.rule import LearningRule, rule_of
from relaxprop.rules.base import Described, Rule
from relaxprop.sight import uncompiled
from relaxprop.solvers import SOLVERS, Solver
from relaxprop.vertices import are_operations, named_parts
from relaxprop.wrapper import ActivationRelaxation

_NOTHING_FROZEN = Frozen(relaxation_derivative=False, update_derivative=False, update_activity=False)
_LINE = 100  # columns of a printed table
_TITLES = ("update", "eq.", "reads", "weights", "derivative", "not local")


@dataclass(frozen=True)
class Locality:
    """What every update of a model reads; ``print`` shows it as a table, and so do notebooks.

    Attributes:
        rows: those of (1), in the order of the feedforward pass, then those of (2), in the order of the model's layers.
        schedule: in which order the states are updated, and what that takes.
        legend: what the letters of the rows mean.
    """

    rows: tuple[Reads, ...]
    schedule: str
    legend: str = "x: current state, x̄: stored activity, pre: presynaptic"

    @property
    def non_local(self) -> set[str]:
        """The kinds of what is not local, of `KINDS`."""
        return {entry.partition(":")[0] for row in self.rows for entry in row.non_local}

    def __str__(self) -> str:
        titles = [(title,) for title in _TITLES]
        rows = [
            [row.update.split(", "), (f"({row.equation})",), row.activities, row.weights, row.derivative, row.non_local]
            for row in self.rows
        ]
        return "\n".join([*_table([titles, *rows]), "", *_wrapped(self._notes(), _LINE)])

    def _repr_html_(self) -> str:
        rows = [
            (row.update, f"({row.equation})", row.activities, row.weights, row.derivative, row.non_local)
            for row in self.rows
        ]
        return f"{table(rows, _TITLES)}\n<p>{'<br>'.join(map(escape, self._notes()))}</p>"

    def _notes(self) -> list[str]:
        notes = [f"{kind}: {why}" for kind, why in KINDS.items() if kind in self.non_local]
        return [self.legend, f"schedule: {self.schedule}", *notes]


def describe_locality(model: LearningRule, *inputs: Any, **kwargs: Any) -> Locality:
    r"""Lists for every update of (1) and (2) what it reads, and what of that is not local.

        (1)  dx_i/dt = −x_i + Σ_{j∈Chi(i)} x_j ∂x_j/∂x_i     a row for every vertex i
        (2)  ∂L/∂W = Σ_j (∂x_j/∂W)^T x_j                     a row for every module with own parameters

    Learned backwards weights, equation (3), have a row of their own. Another rule's states have rows of their own, its
    weights those of (2). All is found in one forward pass in the model's
    current mode, with the loss taken to depend on every output. The model, its state and random
    generators stay as they are.

    Args:
        model: the wrapped module.
        inputs: the model's arguments; a target is not needed.
        kwargs: its keyword arguments.

    Raises:
        TypeError: if ``model`` is not wrapped.
        ValueError: if its vertices are operations, of which a layer has several, a part of it is scripted, it has lazy
            modules that have not seen an input yet, or it is a rule of your own that does not say what it reads.
        RuntimeError: within ``torch.inference_mode()``.
    """
    check_model(model, LearningRule)
    described = model.locality if isinstance(model, Rule) else None
    if described is None and not isinstance(model, ActivationRelaxation):
        name = rule_of(type(model)).__name__
        raise ValueError(f"{name} does not say what its states read: give the class a property locality")
    for module, name in named_parts(model.module).items():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"describe_locality cannot see into the scripted module {name!r}: describe the model as it was before "
                "it was scripted"
            )
    if are_operations(model.settings.vertices):
        raise ValueError(
            "describe_locality goes from layer to layer, got a model with vertices='operations': wrap its module "
            "(model.module) with vertices='modules' or 'activations'"
        )
    try:
        with undisturbed(model), torch.enable_grad(), uncompiled:
            if described is not None:
                return _of_rule(model, described, inputs, kwargs)
            walk = Walk(model, inputs, kwargs, model.settings.frozen)
            return Locality((*walk.states(), *walk.layers()), _schedule(model.settings.solver))
    except TypeError as error:  # an argument is missing
        if not (inputs or kwargs):
            error.add_note("describe_locality(model, *inputs) runs one forward pass: pass it what the model reads")
        raise


def _of_rule(model: LearningRule, described: Described, inputs: Any, kwargs: Any) -> Locality:
    """The rows of a rule beside Activation Relaxation, none of which remembers what has changed since."""
    frozen, words, legend = _NOTHING_FROZEN, Words(activity="x̄"), "x: state, x̄: activity, pre: presynaptic"
    if described.moves:
        words = Words("v", ("own v", "own ε"), "ε", "v")
        legend = "v: current activity, ε: its difference to what predicts it, pre: presynaptic"
    elif described.broadcast is None:
        frozen, words = ALL_FROZEN, RELAXATION
    walk = Walk(model, inputs, kwargs, frozen, words)
    states = list(walk.states())
    if described.broadcast is not None:
        states = [row if _is_held(row) else _fed(row.update, *described.broadcast) for row in states]
    layers = [replace(row, non_local=(*row.non_local, *described.of_updates)) for row in walk.layers()]
    return Locality((*states, *layers), described.schedule, legend)


def _is_held(row: Reads) -> bool:
    """Whether a state is the output's own error."""
    return all(read.startswith("∂L/∂output") for read in row.activities) and not (row.weights or row.derivative)


def _fed(update: str, what: str, kind: str) -> Reads:
    """A state that comes directly through weights of its own."""
    return Reads(update, 1, (what,), (f"feedback of {update.removeprefix('x of ')}, fixed",), (), (f"{kind}: {what}",))


def _schedule(solver: Solver) -> str:
    """In the solver's own words; words that a user's class has inherited are said to be its base's."""
    kind = type(solver)
    words = solver.schedule
    base = next(c for c in kind.__mro__ if "schedule" in vars(c))
    return (
        words if base is kind or kind in SOLVERS.values() else f"{kind.__name__}, by its base {base.__name__}: {words}"
    )


# --------------------------------------------------------------------------------------------------------- the table


def _table(rows: Sequence[Sequence[Sequence[str]]]) -> list[str]:
    """Rows of cells of entries, each entry on a line of its own; the widest columns give way until a line fits."""
    widths = [max([_width(entry) for cell in cells for entry in cell]) for cells in zip(*rows, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > _LINE:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in rows:
        cells = [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            padded = [part + " " * (width - _width(part)) for part, width in zip(parts, widths, strict=True)]
            lines.append("  ".join(padded).rstrip())
        if row is rows[0]:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
    return lines


def _wrapped(entries: Sequence[str], width: int) -> list[str]:
    # textwrap knows no letters without width, such as the bar of x̄: one that it takes for a letter stands for both.
    narrow = [entry.replace("x̄", _X_BAR) for entry in entries]
    lines = [line for entry in narrow for line in textwrap.wrap(entry, width, subsequent_indent="  ")]
    return [line.replace(_X_BAR, "x̄") for line in lines]


def _width(text: str) -> int:
    """Columns on a terminal."""
    return len(text.replace("x̄", _X_BAR))


_X_BAR = "\ue000"
