"""A rule of one's own is one class: it trains, it is right, and it has all that surrounds a rule."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from relaxprop import ActivationRelaxation, alignment, describe_locality, rules
from tests.compare import assert_same_gradients, backward, of_parameters, refuses, squares
from tests.literal import affine, weight
from tests.problems import PROBLEMS, Problem, mlp, name_of
from tests.rules import own_rule
from tests.rules.own_rule import SpikingErrors


def test_it_is_one_class_of_some_forty_lines() -> None:
    source = inspect.getsource(own_rule).partition("@dataclass")[2]
    assert len([line for line in source.splitlines() if line.strip()]) <= 40


def test_its_gradients_are_those_of_its_formula() -> None:
    torch.manual_seed(0)
    network = mlp(5, 8, 7, 3).double()
    x = torch.randn(6, 5).double()
    backward(squares(SpikingErrors(network, gain=0.2, threshold=0.05)(x)))
    h1 = torch.tanh(affine(network[0], x))
    h2 = torch.tanh(affine(network[2], h1))
    e = 2 * (affine(network[4], h2) - 0.3)

    def spike(arriving: torch.Tensor) -> torch.Tensor:
        return torch.where(arriving.abs() > 0.05, 0.2 * arriving.sign(), torch.zeros(()).double())

    x2 = spike(e @ weight(network[4]))
    d2 = (1 - h2**2) * x2
    d1 = (1 - h1**2) * spike(d2 @ weight(network[2]))
    assert bool(d1.count_nonzero())
    assert_same_gradients(
        of_parameters(network),
        {
            "0.weight": d1.T @ x, "0.bias": d1.sum(0), "2.weight": d2.T @ h1, "2.bias": d2.sum(0),
            "4.weight": e.T @ h2, "4.bias": e.sum(0),
        },
    )  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_it_runs_on_every_graph(problem: Problem) -> None:
    module, inputs = problem.build()
    model = SpikingErrors(module, vertices=problem.vertices)
    backward(problem.loss(model(*inputs)))
    assert model.last_phase is not None
    assert model.last_phase.depth == problem.depth


def test_it_trains_and_is_inspected() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(60, 4), torch.arange(60) % 3
    x[torch.arange(60), labels] += 2
    model = SpikingErrors(mlp(4, 16, 16, 3), gain=0.02, threshold=0.0)
    found = alignment(model, lambda y: functional.cross_entropy(y, labels), x)
    assert found["4.weight"].cosine == pytest.approx(1)
    assert 0 < found["0.weight"].cosine < 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        loss = functional.cross_entropy(model(x), labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_it_says_what_its_states_read() -> None:
    network, x = mlp(4, 16, 16, 3), torch.ones(2, 4)
    with refuses(ValueError, "SpikingErrors does not say what its states read", "a property locality"):
        describe_locality(SpikingErrors(network), x)

    class Described(SpikingErrors):
        @property
        def locality(self) -> rules.Described:
            return rules.Described("spikes pass once", of_updates=("two phases: made up",))

    found, like = describe_locality(Described(network), x), describe_locality(ActivationRelaxation(network), x)
    assert found.schedule == "spikes pass once"
    # Its errors take the way of Activation Relaxation's, at the stored activities.
    assert [(r.update, r.activities, r.weights, r.derivative) for r in found.rows] == [
        (r.update, r.activities, r.weights, r.derivative) for r in like.rows
    ]
    assert found.non_local == like.non_local | {"two phases"}


def test_its_settings_are_checked() -> None:
    with refuses(ValueError, "gain must be > 0 and threshold ≥ 0, got -1 and 0.01"):
        SpikingErrors(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), gain=-1)
    with refuses(ValueError, "gain must be > 0"):
        SpikingErrors(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), gain=math.nan)
