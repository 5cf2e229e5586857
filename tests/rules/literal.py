"""A literal form of (2) on any module: the sum of the local losses ⟨x_i, f_i⟩ and L, by plain hooks and plain autograd.

Each vertex's output is handed on detached, so that nothing passes it; then Σ_i ⟨x_i, output_i⟩ + L is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from relaxprop.vertices import find_vertices
from tests.compare import Gradients, backward
from tests.problems import Problem

# By the names of the vertices, in the order of their calls, with ∂L/∂(outputs) joined by sample: the states x_i.
StatesOf = Callable[[Mapping[str, Tensor], Tensor], Mapping[str, Tensor]]


def local_gradients(problem: Problem, states_of: StatesOf) -> Gradients:
    """By the names that `tests.compare.gradients` uses."""
    module, inputs = problem.build()
    names = find_vertices(module, problem.vertices)
    outputs: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def cut(part: nn.Module, _args: Any, output: Tensor) -> Tensor:
        name = names[part]
        calls[name] = calls.get(name, 0) + 1
        outputs[name if calls[name] == 1 else f"{name}#{calls[name]}"] = output
        return output.detach().requires_grad_().clone()  # which the model may write into

    for part in names:
        part.register_forward_hook(cut)
    given = [x.detach().requires_grad_() if x.is_floating_point() else x for x in pytree.tree_leaves(inputs)]
    inputs = pytree.tree_unflatten(given, pytree.tree_structure(inputs))
    torch.manual_seed(2)
    result = module(*inputs)
    parts = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
    loss = problem.loss(result)
    errors = [g for g in torch.autograd.grad(loss, parts, retain_graph=True, allow_unused=True) if g is not None]
    joined = torch.cat([g.reshape(len(g), -1) for g in errors], 1)
    activities = {name: y.detach() for name, y in outputs.items()}
    states = states_of(activities, joined)
    backward(loss + sum((outputs[name] * x).sum() for name, x in states.items()))
    found: Gradients = {f"input {i}": x.grad for i, x in enumerate(x for x in given if x.is_floating_point())}
    return found | {name: p.grad for name, p in module.named_parameters()}


def per_sample(errors: Tensor, B: Tensor) -> Tensor:
    """Σ_k e_k B_k for one sample after the other."""
    states: list[Tensor] = []
    for e in errors:
        total = torch.zeros_like(B[0])
        for k, number in enumerate(e):
            total = total + number * B[k]
        states.append(total)
    return torch.stack(states)
