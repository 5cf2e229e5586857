"""Backwards weights (equation 3) and dropped derivatives (equation 4)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from relaxprop import (
    ActivationRelaxation,
    ClosedForm,
    Equilibrium,
    Euler,
    alignment,
    drop_derivatives,
    feedback_alignment,
    mirror_weights,
    use_feedback,
)
from relaxprop.feedback import FeedbackRule
from relaxprop.solvers import Solver
from tests.compare import assert_literal, assert_same, backward, gradients, squares
from tests.literal import LiteralChain, backwards, relax
from tests.problems import Branches, mlp

SOLVERS: tuple[Solver, ...] = (
    ClosedForm(0.3, 9),
    Euler(0.3, 9),
    ClosedForm(0.3, 9, order="sequential"),
    Euler(0.3, 9, order="sequential"),
    Equilibrium(),
)
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=str)
every_rule = pytest.mark.parametrize("rule", ["learned", "mirror", "random", "sign", "fixed-sign"])


def cnn() -> Any:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.Tanh(), nn.Conv2d(4, 4, 3, padding="same", dilation=2),
        nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3),
    ).double()  # fmt: skip


def signals() -> Any:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding="valid"), nn.Tanh(), nn.Conv1d(4, 4, 2, bias=False), nn.Tanh(), nn.Flatten(),
        nn.Unflatten(1, (4, 1, 1, 5)), nn.Conv3d(4, 2, (1, 1, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2),
    ).double()  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(4, 6, 5, 5, 3).double(), (3, 4)),
    "cnn": (cnn, (3, 2, 8, 8)),
    "signals": (signals, (3, 2, 8)),
    "branches": (lambda: Branches().double(), (3, 4)),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def synaptic(module: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)}


# ------------------------------------------------------------------------------------------------- backwards weights


@every_rule
@every_solver
def test_feedback_is_equation_3(rule: FeedbackRule, solver: Solver) -> None:
    network, z = use_feedback(mlp(4, 6, 5, 5, 3).double(), rule), torch.randn(3, 4).double()
    literal = LiteralChain(network, z)
    literal.B = [backwards(layer) for layer in literal.layers]
    steps = (0.3, 9, solver.order) if isinstance(solver, ClosedForm | Euler) else (1.0, 3, "simultaneous")
    expected = literal.gradients(relax(literal, *steps))
    found = gradients(ActivationRelaxation(network, solver=solver), (z,))
    assert_literal(found, expected)
    if rule == "learned":  # Δψ = ΔW
        for name in synaptic(network):
            assert_literal({name: found[f"{name}.feedback"]}, {name: expected[f"{name}.weight"]})


@every_network
@every_solver
def test_random_feedback_set_to_the_weights_is_exact(name: str, solver: Solver) -> None:
    make, shape = NETWORKS[name]
    plain, x = make(), torch.randn(shape).double()
    expected = gradients(ActivationRelaxation(copy.deepcopy(plain), solver=solver), (x,))
    use_feedback(plain, "random")
    for layer in synaptic(plain).values():
        layer.feedback.copy_(layer.weight.detach())
    assert_literal(gradients(ActivationRelaxation(plain, solver=solver), (x,)), expected)
    assert_literal(gradients(ActivationRelaxation(use_feedback(plain, "symmetric"), solver=solver), (x,)), expected)


@every_network
def test_feedback_of_zero_stops_the_error(name: str) -> None:
    make, shape = NETWORKS[name]
    network, x = use_feedback(make(), "random"), torch.randn(shape).double()
    for layer in synaptic(network).values():
        layer.feedback.zero_()
    found = gradients(ActivationRelaxation(network, solver=Equilibrium()), (x,))
    readouts = {"mlp": ("6",), "cnn": ("8",), "signals": ("9",), "branches": ("P", "Q")}[name]
    for key, gradient in found.items():
        assert gradient is not None
        assert bool(gradient.count_nonzero()) == key.startswith(readouts), key


def test_learned_feedback_is_a_parameter_and_random_feedback_a_buffer() -> None:
    network: Any = use_feedback(mlp(3, 4, 2), "learned")
    assert {n for n, _ in network.named_parameters()} == {
        f"{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias", "feedback")
    }
    again: Any = use_feedback(mlp(3, 4, 2), "learned")
    again.load_state_dict(network.state_dict())
    assert torch.equal(again[0].feedback, network[0].feedback)
    use_feedback(network, "random")
    assert "0.feedback" in network.state_dict()
    assert "0.feedback" not in dict(network.named_parameters())
    use_feedback(network, "symmetric")
    assert set(network.state_dict()) == set(mlp(3, 4, 2).state_dict())
    assert type(network[0]) is nn.Linear


def test_the_start_of_the_backwards_weights_is_independent_and_of_the_weights_size() -> None:
    layer = use_feedback(nn.Linear(300, 300), "learned")
    psi, W = layer.feedback, layer.weight.detach()
    assert isinstance(psi, Tensor)
    psi = psi.detach()
    assert float(psi.std() / W.std()) == pytest.approx(1, abs=0.02)
    assert abs(float(torch.corrcoef(torch.stack([psi.flatten(), W.flatten()]))[0, 1])) < 0.02


@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_weight_decay_aligns_learned_feedback_and_nothing_else_does(decay: float) -> None:
    """Equal gradients leave W − ψ as it is; decay λ shrinks it by 1 − ηλ a step (Kolen and Pollack)."""
    network: Any = use_feedback(mlp(4, 5, 3).double(), "learned")
    x, steps, eta = torch.randn(8, 4).double(), 60, 0.05
    before = (network[0].weight - network[0].feedback).detach()
    model = ActivationRelaxation(network, solver=ClosedForm(0.5, 30))
    optimizer = torch.optim.SGD(network.parameters(), lr=eta, weight_decay=decay)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(squares(model(x)))
        optimizer.step()
    after = (network[0].weight - network[0].feedback).detach()
    assert_same(after, before * (1 - eta * decay) ** steps, tolerance=1e-9)


def test_clipping_does_not_act_twice() -> None:
    network: Any = use_feedback(mlp(4, 5, 3).double(), "learned")
    backward(100 * squares(ActivationRelaxation(network)(torch.randn(8, 4).double())))
    W, psi = network[0].weight.grad, network[0].feedback.grad
    assert W.data_ptr() != psi.data_ptr()
    expected = W.clone()
    torch.nn.utils.clip_grad_norm_([network[0].weight], 1e-3)
    assert torch.equal(psi, expected)


# PyTorch 2.10 says so wherever its profiler starts.
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_no_transport_computes_a_weight_gradient() -> None:
    """The weight gradient of a layer is the one matrix product with its input: counted over 50 steps."""
    network, x = use_feedback(mlp(4, 5, 6, 3).double(), "learned"), torch.randn(7, 4).double()
    model = ActivationRelaxation(network, solver=Euler(0.1, 50))
    for _ in range(2):  # products that only show whether they repeat themselves; the second pass hands on fewer copies
        backward(squares(model(x)))
    loss = squares(model(x))
    with torch.profiler.profile(record_shapes=True) as profile:
        backward(loss)
    products = [event.input_shapes for event in profile.events() if event.name == "aten::mm"]
    assert products.count([[5, 7], [7, 4]]) == 1
    assert products.count([[6, 7], [7, 5]]) == 1


@every_rule
def test_feedback_is_copied_pickled_and_shown(rule: FeedbackRule) -> None:
    network, x = use_feedback(cnn(), rule), torch.randn(2, 2, 8, 8).double()
    assert repr(network).count(f"feedback={rule}") == 4
    expected = gradients(ActivationRelaxation(network), (x,))
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert_literal(gradients(ActivationRelaxation(twin), (x,)), expected)


def test_unbatched_and_many_dimensional_inputs() -> None:
    cases: list[tuple[Any, tuple[int, ...]]] = [
        (nn.Conv2d(2, 3, 3), (2, 5, 5)),
        (nn.Linear(4, 3), (2, 5, 4)),
        (nn.Linear(4, 3), (4,)),
    ]
    for layer, shape in cases:
        x = torch.randn(shape).double().requires_grad_()
        layer = layer.double()
        (expected,) = torch.autograd.grad(squares(layer(x)), x)
        use_feedback(layer, "random")
        layer.feedback.copy_(layer.weight.detach())
        assert_same(torch.autograd.grad(squares(layer(x)), x)[0], expected)


def test_feedback_under_autocast() -> None:
    network, x = use_feedback(mlp(16, 32, 16, 4), "random"), torch.randn(8, 16)
    for layer in synaptic(network).values():
        layer.feedback.copy_(layer.weight.detach())
    plain = use_feedback(copy.deepcopy(network), "symmetric")
    found = []
    for module in (network, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = squares(ActivationRelaxation(module)(x).float())
        backward(loss)
        found.append([p.grad for p in module.parameters()])
    for a, b in zip(*found, strict=True):
        assert_same(a, b, tolerance=5e-2)


class Gated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid() * 2


class Named(nn.Linear):
    """A subclass that changes nothing in the forward pass."""


def test_a_subclass_without_a_forward_pass_of_its_own_is_as_safe_as_its_base() -> None:
    layer = use_feedback(Named(3, 2), "random")
    assert isinstance(layer, Named)
    assert "feedback=random" in repr(layer)
    assert type(use_feedback(layer, "symmetric")) is Named


@pytest.mark.parametrize(
    ("module", "rule", "error", "parts"),
    [
        (nn.Linear(2, 2), "hebbian", ValueError, ("rule", "'learned'", "'symmetric'", "'hebbian'")),
        (nn.Tanh(), "random", ValueError, ("no Linear or Conv", "Tanh")),
        ([nn.Linear(2, 2)], "random", TypeError, ("module", "list")),
        (nn.Sequential(Gated(2, 2)), "random", ValueError, ("'0'", "Gated", "forward pass of its own")),
        (nn.MultiheadAttention(4, 2), "random", ValueError, ("MultiheadAttention", "without calling")),
        (nn.Conv2d(1, 1, 3, padding_mode="circular"), "random", ValueError, ("padding_mode", "circular", "zeros")),
        (nn.Conv1d(1, 1, 4, padding="same"), "random", ValueError, ("padding='same'", "even")),
        (nn.LazyLinear(3), "random", ValueError, ("before its first forward pass",)),
        (nn.Linear(2, 2, dtype=torch.complex64), "random", ValueError, ("its weight is complex", "skip=(Linear,)")),
        (nn.Conv2d(1, 1, 3, dtype=torch.complex64), "sign", ValueError, ("its weight is complex", "skip=(Conv2d,)")),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else str(x),
)
def test_feedback_is_refused_where_it_would_not_be_right(
    module: nn.Module, rule: FeedbackRule, error: type[Exception], parts: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        use_feedback(module, rule)
    for part in parts:
        assert part in str(caught.value)


def test_a_look_at_a_weight_does_not_iterate_what_computes_it() -> None:
    network = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 2))
    network(torch.randn(3, 6))

    def vectors() -> list[Tensor]:
        return [x.clone() for name, x in network.named_buffers() if "parametrizations" in name]

    before = vectors()
    assert len(before) == 2
    rules: list[FeedbackRule] = ["learned", "mirror", "random", "fixed-sign", "batch-sign", "sign"]
    for rule in rules:
        use_feedback(network, rule)
        feedback_alignment(network)
        if rule == "mirror":
            mirror_weights(network)
    assert all(map(torch.equal, vectors(), before))
    assert network.training
    assert all(m.training for m in network.modules())
    network(torch.randn(3, 6))  # as ever
    assert not all(map(torch.equal, vectors(), before))


def test_mirrors_learn_where_nothing_else_is_recorded() -> None:
    network = use_feedback(mlp(4, 5, 3), "mirror")
    twin = copy.deepcopy(network)
    torch.manual_seed(3)
    mirror_weights(network)
    torch.manual_seed(3)
    with torch.inference_mode():
        mirror_weights(twin)
    assert_same(twin.get_buffer("0.feedback"), network.get_buffer("0.feedback"))
    backward(ActivationRelaxation(twin)(torch.randn(2, 4)).sum())


def test_learned_backwards_weights_of_a_shared_weight_have_their_own_layers_gradient() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    network = use_feedback(nn.Sequential(first, nn.Tanh(), second))
    parts: Any = network
    assert parts[0].weight is parts[2].weight
    backward(squares(ActivationRelaxation(network)(torch.randn(3, 4))))
    assert_same(parts[0].weight.grad, parts[0].feedback.grad + parts[2].feedback.grad)


# ----------------------------------------------------------------------------------------------- dropped derivatives


@pytest.mark.parametrize("relaxation", [True, False])
@pytest.mark.parametrize("update", [True, False])
@every_solver
def test_dropped_derivatives_are_equation_4(relaxation: bool, update: bool, solver: Solver) -> None:
    network, z = mlp(4, 6, 5, 5, 3).double(), torch.randn(3, 4).double()
    literal = LiteralChain(network, z)
    ones = [torch.ones_like(slope) for slope in literal.relaxing]
    literal.relaxing, literal.updating = (
        ones if relaxation else literal.relaxing,
        ones if update else literal.updating,
    )
    drop_derivatives(network, relaxation=relaxation, update=update)
    steps = (0.3, 9, solver.order) if isinstance(solver, ClosedForm | Euler) else (1.0, 3, "simultaneous")
    expected = literal.gradients(relax(literal, *steps))
    assert_literal(gradients(ActivationRelaxation(network, solver=solver), (z,)), expected)


@every_network
def test_dropping_the_derivative_of_an_identity_is_exact(name: str) -> None:
    make, shape = NETWORKS[name]
    network, x = make(), torch.randn(shape).double()
    for module in network.modules():
        for child_name, child in module.named_children():
            if isinstance(child, nn.Tanh):
                setattr(module, child_name, nn.Hardtanh(-1e9, 1e9))
    expected = gradients(ActivationRelaxation(network), (x,))
    for relaxation, update in ((True, True), (True, False), (False, True)):
        drop_derivatives(network, relaxation=relaxation, update=update)
        assert_literal(gradients(ActivationRelaxation(network), (x,)), expected)


def test_feedback_and_dropped_derivatives_compose() -> None:
    network, z = mlp(4, 6, 5, 5, 3).double(), torch.randn(3, 4).double()
    drop_derivatives(use_feedback(network, "learned"), update=False)
    literal = LiteralChain(network, z)
    literal.B = [backwards(layer) for layer in literal.layers]
    literal.relaxing = [torch.ones_like(slope) for slope in literal.relaxing]
    expected = literal.gradients(relax(literal, 0.3, 9, "simultaneous"))
    assert_literal(gradients(ActivationRelaxation(network, solver=ClosedForm(0.3, 9)), (z,)), expected)


def test_dropped_derivatives_are_undone_copied_pickled_and_shown() -> None:
    network, x = cnn(), torch.randn(2, 2, 8, 8).double()
    plain = gradients(ActivationRelaxation(network), (x,))
    drop_derivatives(network, update=False)
    assert repr(network).count("dropped derivative in relaxation") == 3
    dropped = gradients(ActivationRelaxation(network), (x,))
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert_literal(gradients(ActivationRelaxation(twin), (x,)), dropped)
    drop_derivatives(network, relaxation=False, update=False)
    assert type(network[1]) is nn.Tanh
    assert_literal(gradients(ActivationRelaxation(network), (x,)), plain)


def test_an_in_place_activation_may_drop_its_derivative() -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace), nn.Linear(4, 2)).double()
        found.append(gradients(ActivationRelaxation(drop_derivatives(network)), (torch.ones(2, 3).double(),)))
    assert_literal(found[1], found[0])


def test_what_drops_in_one_place_only_needs_a_relaxation_phase() -> None:
    network = drop_derivatives(mlp(3, 4, 2), update=False)
    with pytest.raises(RuntimeError, match="cannot tell apart: call it within ActivationRelaxation"):
        network(torch.randn(2, 3))
    with torch.no_grad():
        network(torch.randn(2, 3))


@pytest.mark.parametrize(
    ("module", "options", "error", "parts"),
    [
        (nn.Linear(2, 2), {}, ValueError, ("no activation module", "Linear")),
        (torch.tanh, {}, TypeError, ("module",)),
        (nn.Tanh(), {"update": 1}, TypeError, ("update", "True or False", "1")),
        (nn.Sequential(nn.Softmax(1)), {}, ValueError, ("'0'", "Softmax", "elementwise")),
        (nn.PReLU(), {}, ValueError, ("PReLU", "parameters")),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else getattr(x, "__name__", str(x)),
)
def test_dropping_is_refused_where_it_has_no_meaning(
    module: nn.Module, options: dict[str, bool], error: type[Exception], parts: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        drop_derivatives(module, **options)
    for part in parts:
        assert part in str(caught.value)


# -------------------------------------------------------------------------------------------------------- diagnostics


def test_alignment_compares_with_backpropagation_itself() -> None:
    """Feedback alignment turns the gradients below the output, and leaves the output layer's alone."""
    network, x = mlp(6, 20, 20, 3).double(), torch.randn(5, 6).double()
    exact = gradients(network, (x,))
    drop_derivatives(use_feedback(network, "random"))
    found = alignment(ActivationRelaxation(network, solver=Equilibrium()), squares, x)
    assert found["4.weight"].cosine == pytest.approx(1)
    assert found["0.weight"].cosine < 0.9
    relaxed = gradients(ActivationRelaxation(network, solver=Equilibrium()), (x,))
    a, b = relaxed["0.weight"], exact["0.weight"]
    assert a is not None
    assert b is not None
    assert found["0.weight"].cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()))
    assert repr(network).count("feedback=random") == 3
    assert repr(network).count("dropped derivative") == 2
