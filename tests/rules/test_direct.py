"""Direct feedback alignment, and its label-driven variant."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from relaxprop import NonFiniteStateError, use_feedback
from relaxprop._pytorch import run_backward
from relaxprop.rules import DirectFeedback
from tests.compare import (
    TOLERANCES,
    Gradients,
    assert_same,
    assert_same_gradients,
    backward,
    gradients,
    of_parameters,
    refuses,
    squares,
)
from tests.literal import affine, weight
from tests.problems import PROBLEMS, Problem, Unrolled, cnn, mlp, name_of
from tests.rules.literal import local_gradients, per_sample

BY_SAMPLES = [problem for problem in PROBLEMS if problem.name != "own-loss"]


def wrapped(problem: Problem, **options: object) -> tuple[DirectFeedback, tuple[object, ...]]:
    module, inputs = problem.build()
    return DirectFeedback(module, vertices=problem.vertices, **options), inputs  # type: ignore[arg-type]


def labelled() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(6, 5).double(), torch.tensor([0, 2, 1, 1, 0, 2])


# ------------------------------------------------------------------------------------------------------------ equations


@pytest.mark.parametrize("problem", BY_SAMPLES, ids=name_of)
def test_gradients_are_those_of_the_local_losses(problem: Problem) -> None:
    """On chains, branches, convolutions, recurrent and residual graphs."""
    model, inputs = wrapped(problem, seed=4)
    found = gradients(model, inputs, problem.loss)

    def states_of(activities: Mapping[str, Tensor], errors: Tensor) -> Mapping[str, Tensor]:
        states: dict[str, Tensor] = {}
        for name, activity in activities.items():
            if name in model.feedback:
                assert model.feedback[name].shape == (errors.shape[1], *activity.shape[1:])
                states[name] = per_sample(errors, model.feedback[name])
            else:  # the output itself, or what the loss does not depend on
                assert problem.ends_in_vertex or problem.name == "nested"
                states[name] = errors.view_as(activity)
        return states

    assert_same_gradients(found, local_gradients(problem, states_of))
    assert len(model.feedback) >= problem.depth - problem.ends_in_vertex


def test_with_the_chains_own_jacobians_it_is_backpropagation() -> None:
    """The law: B_i = ∂x^L/∂x_i of a linear chain."""
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 5), nn.Identity(), nn.Linear(5, 3)).double()
    x = torch.randn(7, 4).double()
    exact = gradients(chain, (x,))
    model = DirectFeedback(chain, vertices=[chain[1], chain[3]])
    last, middle = weight(chain[4]), weight(chain[2])
    model.feedback |= {"3": last.clone(), "1": last @ middle}
    assert_same_gradients(gradients(model, (x,)), exact)
    model.feedback["1"] = model.feedback["1"] * 1.1  # a law that can fail
    changed = gradients(model, (x,))["0.weight"]
    assert changed is not None
    assert exact["0.weight"] is not None
    assert_same(changed, 1.1 * exact["0.weight"])


def hand_made(network: nn.Sequential, x: Tensor, hidden: list[Tensor], error: Tensor) -> Gradients:
    """(2) for a perceptron with two hidden layers, given the states of the hidden layers and the output's error."""
    h1 = torch.tanh(affine(network[0], x))
    h2 = torch.tanh(affine(network[2], h1))
    d1, d2 = (1 - h1**2) * hidden[0], (1 - h2**2) * hidden[1]
    return {
        "0.weight": d1.T @ x, "0.bias": d1.sum(0), "2.weight": d2.T @ h1, "2.bias": d2.sum(0),
        "4.weight": error.T @ h2, "4.bias": error.sum(0),
    }  # fmt: skip


def descend(network: nn.Module, gradients: Gradients, rate: float) -> None:
    with torch.no_grad():
        for name, p in network.named_parameters():
            step = gradients[name]
            assert step is not None
            p.sub_(rate * step)


@pytest.mark.parametrize("variant", ["output", "target"])
def test_training_is_that_of_the_papers_formula(variant: str) -> None:
    """Ten steps of a perceptron with cross-entropy, by matrices alone: Nøkland's e = y − t, and Frenkel's −t."""
    x, labels = labelled()
    torch.manual_seed(0)
    network = mlp(5, 8, 7, 3).double()
    by_hand = copy.deepcopy(network)
    model = DirectFeedback(network, error=variant, seed=1)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    more = {"target": labels} if variant == "target" else {}
    losses = []
    for _ in range(10):
        loss = functional.cross_entropy(model(x, **more), labels, reduction="sum")
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        onehot = torch.eye(3).double()[labels]
        y = torch.softmax(affine(by_hand[4], torch.tanh(affine(by_hand[2], torch.tanh(affine(by_hand[0], x))))), 1)
        e = (y if variant == "output" else torch.zeros_like(y)) - onehot
        hidden = [e @ model.feedback[name] for name in ("1", "3")]
        descend(by_hand, hand_made(by_hand, x, hidden, y - onehot), 0.05)
    for (name, p), q in zip(network.named_parameters(), by_hand.parameters(), strict=True):
        assert_same(p.detach(), q.detach(), name)
    assert losses[-1] < losses[0]


def test_the_hidden_layers_of_drtp_do_not_read_the_loss() -> None:
    x, labels = labelled()
    torch.manual_seed(0)
    model = DirectFeedback(mlp(5, 8, 7, 3).double(), error="target")
    found = []
    for scale in (1.0, 3.0):
        model.zero_grad()
        backward(scale * functional.cross_entropy(model(x, target=labels), labels))
        found.append(of_parameters(model.module))
    for name, g in found[0].items():
        assert g is not None
        other = found[1][name]
        assert other is not None
        assert_same(other, 3 * g if name.startswith("4") else g, name)
    model.zero_grad()
    backward(functional.cross_entropy(model(x, target=functional.one_hot(labels, 3).double()), labels))
    assert_same_gradients(of_parameters(model.module), found[0])


def test_a_sample_does_not_see_its_batch_mates() -> None:
    problem = PROBLEMS[1]
    module, (x,) = problem.build()
    model = DirectFeedback(module, keep_states=True)
    backward(squares(model(x)))
    assert model.last_phase is not None
    together = model.last_phase.states
    backward(squares(model(x[1:])))
    alone = model.last_phase.states
    assert together is not None
    assert alone is not None
    for name, state in alone.items():
        assert_same(state[0], together[name][1])


# ----------------------------------------------------------------------------------------------------- what it costs


def test_it_costs_one_call_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = run_backward

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("relaxprop.graph.run_backward", counted)
    module, (x,) = PROBLEMS[1].build()
    model = DirectFeedback(module)
    backward(squares(model(x)))
    assert len(calls) == 1
    assert model.last_phase is not None
    assert (model.last_phase.products, model.last_phase.passes, model.last_phase.num_steps) == (1, 0, 0)
    assert (model.last_phase.vertices, model.last_phase.depth) == (3, 3)


# ----------------------------------------------------------------------------------------------------------- feedback


def test_feedback_is_fixed_by_the_seed_and_the_vertexs_name() -> None:
    def feedback(seed: int, noise: int) -> dict[str, Tensor]:
        torch.manual_seed(noise)
        model = DirectFeedback(mlp(5, 40, 50, 30), seed=seed)
        backward(squares(model(torch.randn(2, 5))))
        return model.feedback

    first, again, other = feedback(0, 1), feedback(0, 2), feedback(1, 1)
    assert first.keys() == {"1", "3"}
    for name, B in first.items():
        assert torch.equal(B, again[name])
        assert not torch.equal(B, other[name])
        assert float(B.std()) == pytest.approx(30**-0.5, rel=0.1)
    assert not torch.equal(first["1"][:, :40], first["3"][:, :40])


def test_feedback_does_not_change_while_the_network_learns_and_is_copied_with_it() -> None:
    module, (x,) = PROBLEMS[0].build()
    model = DirectFeedback(module, std=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(squares(model(x)))
    before = {name: B.clone() for name, B in model.feedback.items()}
    for _ in range(2):
        optimizer.step()
        backward(squares(model(x)))
    twin = copy.deepcopy(model)
    for name, B in before.items():
        assert torch.equal(model.feedback[name], B)
        assert torch.equal(twin.feedback[name], B)
    assert model.state_dict().keys() == module.state_dict().keys()


def test_the_layout_in_memory_changes_nothing() -> None:
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        module, (x,) = PROBLEMS[1].build()
        module.to(memory_format=layout)  # type: ignore[call-overload]
        found.append(gradients(DirectFeedback(module), (x.contiguous(memory_format=layout),)))
    assert_same_gradients(found[1], found[0])


def test_half_precision_by_autocast() -> None:
    module, (x,) = PROBLEMS[0].build(torch.float32)
    model, exact = DirectFeedback(module), DirectFeedback(copy.deepcopy(module))
    backward(squares(exact(x)))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    backward(squares(y.float()))
    for (name, p), q in zip(module.named_parameters(), exact.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert_same(p.grad, q.grad, name, 3 * TOLERANCES[torch.bfloat16])


def test_layers_between_two_vertices_use_their_backwards_weights() -> None:
    """Where two layers follow each other without a vertex, an error still passes a weight matrix."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    use_feedback(network, "random")
    x = torch.randn(5, 3).double()
    model = DirectFeedback(network, keep_states=True)
    backward(squares(model(x)))
    assert model.last_phase is not None
    assert model.last_phase.states is not None
    h = torch.tanh(affine(network[1], affine(network[0], x)))
    delta = (1 - h**2) * model.last_phase.states["2"]
    B = network[1].feedback
    assert isinstance(B, Tensor)
    grad = of_parameters(network)["0.weight"]
    assert grad is not None
    assert_same(grad, (delta @ B).T @ x)


# ---------------------------------------------------------------------------------------------------------- refusals


def test_options_outside_their_range_are_refused_by_name() -> None:
    network = mlp(3, 4, 2)
    with refuses(ValueError, "error must be 'output' or 'target', got 'both'"):
        DirectFeedback(network, error="both")  # type: ignore[arg-type]
    with refuses(TypeError, "seed must be an integer, got 0.5"):
        DirectFeedback(network, seed=0.5)  # type: ignore[arg-type]
    for std in (0.0, -1.0, float("inf"), float("nan")):
        with refuses(ValueError, "std must be positive and finite"):
            DirectFeedback(network, std=std)
    with refuses(TypeError, "std must be a positive number or None, got '1'"):
        DirectFeedback(network, std="1")  # type: ignore[arg-type]
    with refuses(ValueError, "vertices='operations'", "pass vertices='activations'"):
        DirectFeedback(network, vertices="operations")
    model = DirectFeedback(network)
    with refuses(ValueError, "std must be positive"):
        model.settings = replace(model.settings, std=-2.0)


def test_a_module_that_returns_its_loss_is_refused() -> None:
    problem = next(p for p in PROBLEMS if p.name == "own-loss")
    model, inputs = wrapped(problem)
    with refuses(ValueError, "returns one number, as a loss is", "compute the loss outside of it"):
        backward(model(*inputs))


def test_activities_that_are_not_by_samples_are_refused() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.f, self.read = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.f(self.enter(x.transpose(0, 1)))
            read: Tensor = self.read(h.mean(0))
            return read

    with refuses(ValueError, "vertex 'f' has shape (5, 2, 4)", "leave it out of vertices"):
        backward(DirectFeedback(TimeFirst())(torch.randn(2, 5, 3)).sum())


def test_outputs_of_changing_size_are_refused() -> None:
    model = DirectFeedback(Unrolled())
    backward(squares(model(torch.randn(2, 6, 2))))
    with refuses(ValueError, "feedback['f'] has shape (6, 5)", "this pass needs (4, 5)", "changing size"):
        backward(squares(model(torch.randn(2, 4, 2))))


def test_a_target_that_does_not_fit_is_refused() -> None:
    x, labels = labelled()
    model = DirectFeedback(mlp(5, 4, 3).double(), error="target")
    with refuses(ValueError, "no target was given: call model(x, target=labels)"):
        backward(squares(model(x)))
    with refuses(ValueError, "reads the target as a tensor, and got list"):
        backward(squares(model(x, target=[0, 1])))
    with refuses(ValueError, "the output has shape (6, 3), and target (5,) of torch.int64"):
        backward(squares(model(x, target=labels[:5])))
    with refuses(ValueError, "target must hold classes from 0 to 2, got 0 to 3"):
        backward(squares(model(x, target=torch.tensor([0, 1, 2, 3, 0, 1]))))
    with torch.no_grad():
        assert model(x, target=labels).shape == (6, 3)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Tanh()

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            y: Tensor = self.f(x) + target
            return y

    with refuses(ValueError, "DirectFeedback reads target=…, and Own.forward has an argument of that name"):
        DirectFeedback(Own(), error="target")


def test_feedback_that_is_not_finite_is_refused() -> None:
    model = DirectFeedback(cnn())
    x = torch.randn(2, 1, 10, 10)
    backward(squares(model(x)))
    model.feedback["4"].fill_(float("inf"))
    with refuses(NonFiniteStateError, "'4'"):
        backward(squares(model(x)))
