"""The base of the learning rules: one method makes a rule, and all that surrounds it is there."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from relaxprop import ActivationRelaxation, NonFiniteStateError
from relaxprop.graph import Graph, States
from relaxprop.rules import Phase, Rule, RuleSettings
from tests.compare import (
    Gradients,
    assert_same,
    assert_same_gradients,
    backward,
    gradients,
    of_parameters,
    refuses,
    squares,
)
from tests.literal import affine
from tests.problems import PROBLEMS, Problem, activity_gradients, mlp, name_of


class Sweep(Rule):
    """Backpropagation as a rule: every state is ∂L/∂x."""

    def solve(self, graph: Graph) -> tuple[States, Phase]:
        states = graph.sweep(lambda _, arriving: arriving)
        return states, Phase(len(states), graph.depth, products=2)


@dataclass(frozen=True)
class ScaleSettings(RuleSettings):
    """Of `Scale`."""

    factor: float = 1.0


class Scale(Rule):
    """Every state is the activity times a number."""

    def __init__(self, module: nn.Module, **settings: Any) -> None:
        super().__init__(module, ScaleSettings(**settings))

    def solve(self, graph: Graph) -> tuple[States, Phase]:
        states = {v: v.stand_in.detach() * self.settings.factor for v in graph.vertices}
        return states, Phase(len(states), graph.depth)


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_a_rule_whose_states_are_the_gradients_is_backpropagation(problem: Problem) -> None:
    module, inputs = problem.build()
    wrapped = Sweep(module, RuleSettings(vertices=problem.vertices, keep_states=True))
    assert_same_gradients(gradients(wrapped, inputs, problem.loss), problem.gradients())
    phase = wrapped.last_phase
    assert phase is not None
    assert phase.depth == problem.depth
    assert phase.states is not None
    expected = [x for x in activity_gradients(problem) if x is not None]
    if problem.name in ("mlp", "residual"):  # where each module is called once and is needed
        for state, gradient in zip(phase.states.values(), expected, strict=True):
            assert_same(state, gradient)


def test_the_update_reads_the_next_vertexs_state_and_its_own_input_alone() -> None:
    torch.manual_seed(0)
    network = mlp(3, 4, 2).double()
    x = torch.randn(5, 3).double()
    backward(squares(Scale(network, factor=2.0)(x)))
    h = torch.tanh(affine(network[0], x))
    error = 2 * (affine(network[2], h) - 0.3)
    delta = (1 - h**2) * 2 * h  # f' times the state
    expected: Gradients = {"0.weight": delta.T @ x, "0.bias": delta.sum(0)}
    assert_same_gradients(of_parameters(network), expected | {"2.weight": error.T @ h, "2.bias": error.sum(0)})


def test_a_rule_stands_in_the_modules_place() -> None:
    network = mlp(3, 4, 2)
    model = Scale(network, factor=0.5)
    assert isinstance(model, nn.Sequential)
    assert isinstance(model, Rule)
    assert model.state_dict().keys() == network.state_dict().keys()
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert repr(model).startswith("Scale(\n  factor=0.5, vertices=activations\n")
    x = torch.randn(2, 3)
    with torch.no_grad():
        assert torch.equal(model(x), network(x))
    backward(model(x).sum())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin, Scale)
        assert twin.settings == model.settings
        twin.zero_grad()
        backward(twin(x).sum())
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            assert torch.equal(ours.grad, theirs.grad)


def test_settings_are_checked_whenever_they_are_set() -> None:
    model = Scale(mlp(3, 4, 2), factor=2.0)
    model.settings = replace(model.settings, factor=3.0)
    assert model.settings.factor == 3
    with refuses(TypeError, "settings must be a ScaleSettings(…)", "RuleSettings("):
        model.settings = RuleSettings()
    with refuses(TypeError, "keep_states must be True or False, got 1"):
        Scale(mlp(3, 4, 2), keep_states=1)
    with refuses(ValueError, "vertices='activations' finds no vertex in Linear"):
        Scale(nn.Linear(2, 2))


def test_what_cannot_be_wrapped_is_refused_by_name() -> None:
    network = mlp(3, 4, 2)
    with refuses(TypeError, "module must be a torch.nn.Module, got int"):
        Sweep(3)  # type: ignore[arg-type]
    with refuses(TypeError, "module is a Scale already: wrap the plain module once"):
        Sweep(Scale(network))
    with refuses(TypeError, "module is a Scale already"):
        ActivationRelaxation(Scale(network))
    with refuses(TypeError, "the part '0' of module is an ActivationRelaxation already"):
        Sweep(nn.Sequential(ActivationRelaxation(network)))
    with refuses(TypeError, "settings must be a RuleSettings(…)", "got {'factor': 2}"):
        Sweep(network, {"factor": 2})  # type: ignore[arg-type]
    with refuses(NotImplementedError, "Rule has no method solve(graph)"):
        backward(Rule(network)(torch.randn(2, 3)).sum())


def test_a_state_that_is_not_finite_is_refused_by_name() -> None:
    model = Scale(mlp(3, 4, 2), factor=float("inf"))
    with refuses(NonFiniteStateError, "'1'", "lower the learning rate"):
        backward(model(torch.randn(2, 3)).sum())
    model.settings = replace(model.settings, check_finite=False)
    backward(model(torch.randn(2, 3)).sum())
