"""A literal slow loop for any model, which shares no code with the library's relaxation.

It cuts a model at its vertices and at its layers with hooks of its own, and takes every Jacobian by plain autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from relaxprop import Frozen
from relaxprop.vertices import find_layers, find_vertices
from tests.compare import Gradients
from tests.problems import Problem


@dataclass
class Cut:
    """One run of a model, cut at the inputs, at every vertex and, if so asked, behind every layer."""

    inputs: list[Tensor]
    outputs: list[Tensor]  # of the vertices, attached to what computed them
    leaves: list[Tensor]  # what the rest of the model reads of them
    layers: list[Tensor]
    results: list[Tensor]
    result: Any


def cut(
    problem: Problem,
    module: nn.Module,
    inputs: Any,
    input_values: Sequence[Tensor] = (),
    values: Sequence[Tensor] = (),
    *,
    behind_layers: bool = False,
) -> Cut:
    run = Cut([], [], [], [], [], None)

    def at_input(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        value = input_values[len(run.inputs)] if input_values else x
        run.inputs.append(value.detach().clone().requires_grad_())
        return run.inputs[-1].clone()

    def at_vertex(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        value = values[len(run.outputs)] if values else output
        run.outputs.append(output.clone())
        run.leaves.append(value.detach().clone().requires_grad_())
        return run.leaves[-1].clone()

    def at_layer(_module: nn.Module, _args: Any, output: Any) -> Any:
        def noted(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            run.layers.append(x.clone())
            # A leaf, so that the vertices behind it still have something to be trained above them.
            return x.detach().requires_grad_().clone() if behind_layers else run.layers[-1].clone()

        return pytree.tree_map(noted, output)

    handles = [m.register_forward_hook(at_layer) for m in find_layers(module)]
    handles += [m.register_forward_hook(at_vertex) for m in find_vertices(module, problem.vertices)]
    buffers = [(m, name, b.clone()) for m in module.modules() for name, b in m.named_buffers(recurse=False)]
    torch.manual_seed(2)
    arguments = pytree.tree_map(lambda x: at_input(x) if isinstance(x, Tensor) else x, tuple(inputs))
    run.result = module(*arguments)
    for owner, name, value in buffers:
        setattr(owner, name, value)
    for handle in handles:
        handle.remove()
    run.results = [x for x in pytree.tree_leaves(run.result) if isinstance(x, Tensor) and x.requires_grad]
    return run


def products(of: Sequence[Tensor], by: Sequence[Tensor], pushed: Sequence[Tensor | None]) -> list[Tensor]:
    pairs = [(y, g) for y, g in zip(of, pushed, strict=True) if g is not None and y.requires_grad]
    found = torch.autograd.grad([y for y, _ in pairs], list(by), [g for _, g in pairs], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(by, found, strict=True)]


def literal_gradients(problem: Problem, frozen: Frozen, step_size: float = 0.3, num_steps: int = 4) -> Gradients:
    """Algorithm 1 with simultaneous steps, every Jacobian where ``frozen`` says."""
    module, inputs = problem.build()
    stored = cut(problem, module, inputs)
    ends = [x.detach().requires_grad_() for x in stored.results]
    given = iter(ends)
    loss = problem.loss(
        pytree.tree_map(lambda x: next(given) if isinstance(x, Tensor) and x.requires_grad else x, stored.result)
    )
    driven = list(torch.autograd.grad(loss, ends, allow_unused=True))
    n = len(stored.inputs)
    x = [leaf.detach() for leaf in (*stored.inputs, *stored.leaves)]
    if problem.ends_in_vertex:
        assert driven[0] is not None
        x[-1] = driven[0]
    # A vertex, or an input, that the loss does not depend on keeps its activity.
    reached = [False] * len(x)
    for _ in x:
        pairs = [(y, y.detach()) for y, r in zip(stored.outputs, reached[n:], strict=True) if r]
        pairs += [(y, g) for y, g in zip(stored.results, driven, strict=True) if g is not None]
        ends_of_paths = torch.autograd.grad(
            [y for y, _ in pairs],
            [*stored.inputs, *stored.leaves],
            [g for _, g in pairs],
            allow_unused=True,
            retain_graph=True,
        )
        reached = [r or g is not None for r, g in zip(reached, ends_of_paths, strict=True)]

    def run(behind_layers: bool = False) -> Cut:
        return cut(problem, module, inputs, x[:n] if not frozen.input else (), x[n:], behind_layers=behind_layers)

    def stored_run(behind_layers: bool = False) -> Cut:
        return cut(problem, module, inputs, behind_layers=behind_layers)

    def pushed(states: Sequence[Tensor]) -> list[Tensor | None]:
        return [*[y if r else None for y, r in zip(states[n:], reached[n:], strict=True)], *driven]

    def drive(at: Cut) -> list[Tensor]:
        return products([*at.outputs, *at.results], [*at.inputs, *at.leaves], pushed(x))

    def moves(i: int) -> bool:
        if problem.ends_in_vertex and i == len(x) - 1:
            return False
        return reached[i] and (i >= n or not frozen.input)

    for _ in range(num_steps):
        d = drive(stored_run() if frozen.relaxation_derivative else run())
        x = [x_i + step_size * (d_i - x_i) if moves(i) else x_i for i, (x_i, d_i) in enumerate(zip(x, d, strict=True))]
    errors = x[:n]
    if frozen.input:
        errors = drive(stored_run() if frozen.relaxation_derivative else run())[:n]
    errors = [e if r else torch.zeros_like(e) for e, r in zip(errors, reached, strict=False)]
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    at = stored_run() if frozen.update_derivative else run()
    deltas = products([*at.outputs, *at.results], at.layers, pushed(x))
    behind = (stored_run if frozen.update_activity else run)(behind_layers=True)
    found = products(behind.layers, list(parameters.values()), deltas)
    gradients: Gradients = {f"input {i}": e for i, e in enumerate(errors)}
    return gradients | dict(zip(parameters, found, strict=True))
