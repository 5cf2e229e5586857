r"""How far a relaxation phase has converged: what is left of its initial state, and the gradient's error step by step.

Nothing here changes the model, as in `inspect.alignment`.

May import: derivatives, feedback, frozen, graph, inspect.alignment, inspect.model, kept, solvers, transients,
update, variants, wrapper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relaxprop.derivatives import restored
from relaxprop.feedback import symmetric
from relaxprop.frozen import ALL_FROZEN
from relaxprop.graph import Graph, States
from relaxprop.inspect.alignment import numbers
from relaxprop.inspect.model import LossFunction, SamePass, check_loss_function, check_model, scalar, undisturbed
from relaxprop.kept import refuse_reading
from relaxprop.solvers import Euler, Solver
from relaxprop.transients import discrete_hops
from relaxprop.update import gradients
from relaxprop.variants import Variant
from relaxprop.wrapper import ActivationRelaxation


def certificate(model: ActivationRelaxation, *inputs: Any, **kwargs: Any) -> dict[str, float]:
    """What the initial state weighs in every vertex at the end of the relaxation phase, before it is run.

    A vertex with h vertices between it and the output on the longest path is reached by ``A^k x̄`` for k ≤ h, so there
    are left ``Σ_{k≤h} |c_k|`` (in expectation where the order is asynchronous): 0 is the exact gradient, 1 the initial
    state. A clamped output starts at its gradient: it has 0 and does not count as one of the h. The number
    depends on the schedule and the graph alone. Where activities are larger than gradients the error
    relative to the gradient is larger than this weight by as much: `convergence` measures that one.

    Args:
        model: the wrapped module. An `Euler` with a tolerance is taken to use all its steps.
        inputs: the model's arguments.
        kwargs: its keyword arguments.

    Returns:
        By the vertex's name, those next to the output first.

    Raises:
        TypeError: if ``model`` is not wrapped.
        ValueError: if the relaxation's derivative is not frozen, so that the states are no weighted sum, or the model
            has lazy modules that have not seen an input yet.
        RuntimeError: within ``torch.inference_mode()``.
    """
    check_model(model)
    if not model.settings.frozen.relaxation_derivative:
        raise ValueError(
            f"the weight of the initial state is known before the relaxation only where its derivative is frozen, got "
            f"a model with frozen={model.settings.frozen}: compare the outcome by alignment"
        )
    with undisturbed(model), torch.enable_grad():
        recording = model.record(inputs, kwargs)
    graph = recording.graph
    held = graph.held()
    weights = np.cumsum(np.abs(model.settings.solver.hops(graph.depth).initial))
    nearest_first = sorted(graph.heights(held).items(), key=lambda item: (item[0] not in held, item[1]))
    return {v.name: 0.0 if v in held else float(weights[height]) for v, height in nearest_first}


@dataclass(frozen=True)
class Convergence:
    """Distance to backpropagation's gradient over the relaxation phase.

    Attributes:
        solver: the solver whose steps were followed.
        depth: D, the number of vertices on the longest path.
        measured: by parameter name, ``‖g_n − g*‖ / ‖g*‖`` after n = 0, 1, …, num_steps steps; shape (num_steps + 1,).
        predicted: the same from the hop distribution, ``g_n − g* = Σ_k c_k(n) E_k + E``, without taking a step (E_k:
            what ``A^k (x̄ − x*)`` contributes to the gradient; E: how far the gradient at x* is from backpropagation's,
            which is rounding but for backwards weights and dropped derivatives). For an asynchronous order, of the
            expected gradient.
    """

    solver: Euler
    depth: int
    measured: Mapping[str, NDArray[np.float64]]
    predicted: Mapping[str, NDArray[np.float64]]


def convergence(
    model: ActivationRelaxation, loss_fn: LossFunction, *inputs: Any, solver: Solver | None = None, **kwargs: Any
) -> Convergence:
    """The distance of every parameter's gradient to backpropagation's, step by step, measured and predicted.

    Args:
        model: the wrapped module.
        loss_fn: maps the model's result to a scalar loss.
        inputs: the model's arguments.
        solver: whose steps to follow, to the last (a tolerance does not stop them); by default the model's own.
        kwargs: the model's keyword arguments, but for one of the name ``solver``.

    Returns:
        Curves by the parameter's name in the plain module, without those whose gradient is zero.

    Raises:
        TypeError: if ``model`` is not wrapped, ``loss_fn`` is no function, or the loss is not a scalar.
        ValueError: if no solver is given and the model's own has no steps to follow, if not everything is frozen,
            where the gradient is not a sum over hops, if no parameter requires a gradient, or if the model has lazy
            modules that have not seen an input yet.
        RuntimeError: if the passes differ, since the model keeps a state where it is not put back, or within
            ``torch.inference_mode()``.
    """
    check_model(model)
    check_loss_function(loss_fn)
    frozen = model.settings.frozen
    if frozen != ALL_FROZEN:
        raise ValueError(
            f"convergence follows the relaxation with everything frozen, got a model with frozen={frozen}: wrap "
            "its module (model.module) without frozen, or compare the outcome by alignment"
        )
    followed = model.settings.solver if solver is None else solver
    euler = followed if isinstance(followed, Euler) else followed.replay() if isinstance(followed, Solver) else None
    if euler is None:
        raise ValueError(f"solver: {followed} has no steps to follow, pass solver=Euler(step_size, num_steps)")
    with undisturbed(model), torch.enable_grad():
        elsewhere = any(isinstance(m, Variant) for m in model.module.modules())
        return _follow(euler, *_driven_graph(model, loss_fn, inputs, kwargs), elsewhere=elsewhere)


def _follow(
    euler: Euler, graph: Graph, parameters: dict[str, Tensor], exact: dict[str, Tensor], *, elsewhere: bool
) -> Convergence:
    """The curves of a graph whose outputs are driven, for parameters by name and backpropagation's gradients.

    ``elsewhere``: whether the states go to another limit than backpropagation's gradients.
    """
    initial = graph.initial_states()
    scale = {name: float(numbers(exact[name]).norm()) for name in parameters}

    def gradients_of(states: States, driven: bool) -> dict[str, Tensor]:
        found = gradients(graph, states, list(parameters.values()), driven=driven)
        pairs = zip(parameters.items(), found, strict=True)
        return {name: torch.zeros_like(p) if g is None else _dense(g) for (name, p), g in pairs}

    measured: dict[str, list[float]] = {name: [] for name in parameters}
    followed = (states for states, _ in euler.trajectory(graph, initial))
    for states in (initial, *islice(followed, euler.steps(graph.depth))):
        for name, g in gradients_of(states, True).items():
            measured[name].append(float(numbers(g - exact[name]).norm()) / scale[name])

    # x_n − x* = Σ_k c_k A^k (x̄ − x*), so a Gram matrix of the D contributions holds every norm for all n.
    limit = graph.sweep(lambda _, arriving: arriving)
    difference = {v: initial[v] - x for v, x in limit.items()}
    contributions: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for _ in range(graph.depth):
        for name, g in gradients_of(difference, False).items():
            contributions[name].append(g)
        difference = graph.transport(difference)
    steps = range(euler.steps(graph.depth) + 1)
    c = np.stack([discrete_hops(graph.depth, euler.step_size, n, euler.order).initial for n in steps])
    if elsewhere:
        c = np.column_stack([c, np.ones(len(c))])
        for name, g in gradients_of(limit, True).items():
            contributions[name].append(g - exact[name])
    predicted = {}
    for name, parts in contributions.items():
        gram = _gram_matrix(parts)
        predicted[name] = np.sqrt(np.maximum(np.einsum("nk,kl,nl->n", c, gram, c), 0)) / scale[name]
    return Convergence(euler, graph.depth, {n: np.array(m) for n, m in measured.items()}, predicted)


def _dense(gradient: Tensor) -> Tensor:
    """An embedding may give its gradient without the zeros."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def _gram_matrix(parts: Sequence[Tensor]) -> NDArray[np.float64]:
    """Of gradients, in double precision, but only of a few numbers at a time: all of them are depth times as many as
    the parameters."""
    gram = np.zeros((len(parts), len(parts)))
    columns = [torch.split(part.flatten(), _COLUMNS) for part in parts]
    for block in zip(*columns, strict=True):
        rows = torch.stack([numbers(column) for column in block])
        gram += (rows @ rows.T).cpu().numpy()
    return gram


_COLUMNS = 1 << 12


def _driven_graph(
    model: ActivationRelaxation, loss_fn: LossFunction, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Graph, dict[str, Tensor], dict[str, Tensor]]:
    """A recorded pass with ∂L/∂(outputs) set; parameters by name, and their gradients by backpropagation.

    Parameters whose gradient is zero are left out.
    """
    same_pass = SamePass(model)
    with undisturbed(model), symmetric(model.module), restored(model.module):
        names = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        with same_pass():
            result = model.module(*inputs, **kwargs)
        if not names:
            raise ValueError("no parameter of the model requires a gradient, so there is none to follow")
        found = torch.autograd.grad(scalar(loss_fn(result)), list(names.values()), allow_unused=True)
    dense = {name: _dense(g) for name, g in zip(names, found, strict=True) if g is not None}
    exact = {name: g for name, g in dense.items() if g.count_nonzero()}
    with same_pass():
        recording = model.record(inputs, kwargs)
    outputs = [output.detach().requires_grad_() for output in recording.graph.outputs]
    loss = scalar(loss_fn(recording.replaced(outputs)))
    refuse_reading(loss, recording.graph)
    recording.graph.drive_outputs(torch.autograd.grad(loss, outputs, allow_unused=True))
    return recording.graph, {name: names[name] for name in exact}, exact
