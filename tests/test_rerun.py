"""What is not frozen, on any model: its forward pass runs again at the current states, and leaves no trace.

The oracle is `literal_gradients`, a slow loop for any model.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from relaxprop import ActivationRelaxation, ClosedForm, Continuous, Equilibrium, Euler, Frozen
from relaxprop.solvers import Solver
from tests.compare import (
    assert_literal,
    assert_same,
    assert_same_gradients,
    backward,
    gradients,
    largest_distance,
    squares,
)
from tests.literal_by_hooks import literal_gradients
from tests.problems import COMBINATIONS, PROBLEMS, OwnLoss, Problem, Unrolled, mlp, name_of

A = Frozen(relaxation_derivative=False)
B = Frozen(update_derivative=False)
C = Frozen(relaxation_derivative=False, update_derivative=False)
D = Frozen(update_activity=False)
NOTHING = Frozen(relaxation_derivative=False, update_derivative=False, update_activity=False)
EULER = Euler(0.3, 4)

every_combination = pytest.mark.parametrize("frozen", COMBINATIONS, ids=name_of)

every_condition = pytest.mark.parametrize("frozen", [A, B, C, D, NOTHING], ids=name_of)


# --------------------------------------------------------------------------------------------------------- the oracle


def assert_as_literal(problem: Problem, frozen: Frozen) -> None:
    expected = literal_gradients(problem, frozen)
    found = problem.gradients(EULER, frozen=frozen)
    for name, gradient in expected.items():
        assert gradient is not None
        actual = found[name]
        if actual is None:  # the loss does not depend on it
            assert not gradient.any(), name
        else:
            assert_same(actual, gradient, name)


# --------------------------------------------------------------------------------------------------- unusual models


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.f, self.g, self.norm = nn.Linear(3, 4), nn.GELU(), nn.Tanh(), nn.LayerNorm(4)
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(self.enter(x))
        h = h + self.attention(h, h, h)[0]
        output: Tensor = self.head(self.g(self.norm(h)))
        return output


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.f, self.head = nn.LSTM(3, 4, batch_first=True), nn.Tanh(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.f(self.cell(x)[0]))
        return output


class Tied(nn.Module):
    """The same parameter in two modules, both of which are called."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.f, self.head = nn.Embedding(6, 4), nn.Tanh(), nn.Linear(4, 6)
        self.head.weight = self.embedding.weight

    def forward(self, index: Tensor) -> Tensor:
        output: Tensor = self.head(self.f(self.embedding(index)))
        return output


class Scaled(nn.Module):
    """Parameters of its own around a layer and a vertex."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.f, self.scale = nn.Linear(4, 4), nn.Tanh(), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.f(self.inner(x)) * self.scale
        return output


class Placed(nn.Module):
    """As the embedding of a vision transformer: a projection, and places added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.places = nn.Linear(3, 4), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.project(x) + self.places
        return output


class Passes(nn.Module):
    """Has a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Pyramid(nn.Module):
    """Two heads that read the vertices one after the other; an input in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.f, self.g = nn.Linear(3, 4), nn.Linear(4, 4), nn.Tanh(), nn.Tanh()
        self.shallow, self.deep, self.extra = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        h = self.f(self.first(batch["x"]))
        k = self.g(self.second(h * batch["mask"]))
        return {"shallow": self.shallow(h), "deep": self.deep(k), "extra": self.extra(k)}


class TwoBranches(nn.Module):
    """A layer above all vertices that is read again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.f, self.middle, self.head = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        u = self.stem(x)
        output: Tensor = self.head(self.middle(self.f(u)) * u)
        return output


def partly_frozen() -> nn.Module:
    network = mlp(4, 5, 5, 5, 2)
    for parameter in [*network[0].parameters(), *network[4].parameters()]:
        parameter.requires_grad_(False)
    return network


def rectifiers(size: int) -> nn.Module:
    hidden = [nn.Linear(size, size), nn.ReLU(inplace=True), nn.Linear(size, size), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*hidden, nn.Linear(size, 2))


def matrix() -> tuple[Tensor]:
    return (torch.randn(3, 4),)


def sequence() -> tuple[Tensor]:
    return (torch.randn(2, 5, 3),)


def chain(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), *modules, nn.Linear(4, 2))


UNUSUAL = [
    Problem("attention", Attention, sequence, squares, depth=2),
    Problem("lstm", Recurrent, sequence, squares, depth=1),
    Problem("tied", Tied, lambda: (torch.tensor([0, 2, 2, 5]),), squares, depth=1),
    Problem("places", lambda: nn.Sequential(Placed(), nn.Tanh(), nn.Linear(4, 2)), sequence, squares, depth=1),
    Problem("scaled", lambda: chain(Scaled()), matrix, squares, depth=2),
    Problem("passes", lambda: chain(Passes(), nn.Linear(4, 4), Passes(), nn.Tanh()), matrix, squares, depth=2),
    Problem(
        "pyramid",
        Pyramid,
        lambda: ({"x": torch.randn(3, 3), "mask": torch.rand(3, 4)},),
        lambda result: squares(result["deep"]) + squares(result["shallow"]),
        depth=2,
    ),
    Problem("undriven", Pyramid, lambda: ({"x": torch.randn(3, 3), "mask": torch.rand(3, 4)},),
            lambda result: squares(result["shallow"]), depth=1),
    Problem("stem-read-twice", TwoBranches, matrix, squares, depth=1),
    Problem("partly-frozen", partly_frozen, matrix, squares, depth=3),
    Problem("rectifiers", lambda: rectifiers(4), matrix, squares, depth=2),
    Problem("rectified-sequence", lambda: rectifiers(3), sequence, squares, depth=2),
    Problem("two-linear-in-a-row", lambda: chain(nn.Linear(4, 5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4)),
            matrix, squares, depth=2),
    Problem("layer-norm", lambda: chain(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.SiLU()),
            matrix, squares, depth=2),
    Problem("prelu", lambda: chain(nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, 4), nn.PReLU()),
            matrix, squares, depth=3),
    Problem("weight-norm", lambda: chain(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh()),
            matrix, squares, depth=2),
    Problem("orthogonal", lambda: chain(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh()),
            matrix, squares, depth=2),
    Problem("spectral-norm", lambda: chain(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh()),
            matrix, squares, depth=2, mixes_samples=True),
    Problem("softmax-inside", lambda: chain(nn.Linear(4, 4), nn.Softmax(dim=1)), matrix, squares, depth=2),
]  # fmt: skip


@every_combination
@pytest.mark.parametrize("problem", [*PROBLEMS, *UNUSUAL], ids=name_of)
def test_on_any_model(problem: Problem, frozen: Frozen) -> None:
    assert_as_literal(problem, frozen)


@every_condition
def test_relaxed_output_is_one_more_vertex(frozen: Frozen) -> None:
    torch.manual_seed(1)
    module = nn.Sequential(*mlp(4, 5, 5, 2), nn.Identity()).double()
    z = torch.randn(3, 4).double()
    vertices = [m for m in module if isinstance(m, nn.Tanh | nn.Identity)]
    relaxed = gradients(ActivationRelaxation(module[:-1], solver=EULER, frozen=frozen, output="relaxed"), (z,))
    found = gradients(
        ActivationRelaxation(module, solver=EULER, frozen=frozen, vertices=vertices, output="relaxed"), (z,)
    )
    assert_same_gradients(relaxed, found)


# ------------------------------------------------------------------------------------------------------ surroundings


class Mask(nn.Module):
    """Dropout with masks that are given, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return x * self.masks[0]


def dropping() -> nn.Sequential:
    first, second = [nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5)], [nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.5)]
    return nn.Sequential(nn.Dropout(0.2), *first, *second, nn.Linear(6, 2))


@every_condition
@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_dropout_keeps_the_masks_of_the_feedforward_pass(frozen: Frozen, order: Any) -> None:
    module, z = dropping().double(), torch.randn(3, 4).double()
    masked = copy.deepcopy(module)
    for i in (0, 3, 6):
        masked[i] = Mask()

        def keep(dropout: Any, args: Any, output: Tensor, mask: Mask = masked[i]) -> None:  # type: ignore[assignment]
            scale = 1 / (1 - dropout.p)
            mask.masks.append(torch.where(output == 0, 0.0, scale).to(output))

        module[i].register_forward_hook(keep)
    solver = Euler(0.3, 4, order=order)
    found = gradients(ActivationRelaxation(module, solver=solver, frozen=frozen), (z,))
    assert_same_gradients(found, gradients(ActivationRelaxation(masked, solver=solver, frozen=frozen), (z,)))


@every_condition
@pytest.mark.parametrize("order", ["simultaneous", "asynchronous"])
def test_random_numbers_go_on_as_if_nothing_ran_again(frozen: Frozen, order: Any) -> None:
    def following(frozen: Frozen) -> Tensor:
        torch.manual_seed(1)
        module = dropping()
        model = ActivationRelaxation(module, solver=Euler(0.3, 3, order=order), frozen=frozen)
        backward(squares(model(torch.randn(3, 4))))
        return torch.rand(5)

    assert torch.equal(following(frozen), following(Frozen()))


def test_asynchronous_steps_draw_anew() -> None:
    # With η = 1 and one vertex, a step either leaves x̄ or sets ∂L/∂x: were every step the first one, one draw decided.
    module, z = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)), torch.randn(3, 4)
    model = ActivationRelaxation(module, solver=Euler(1.0, 40, order="asynchronous"), frozen=A)
    for seed in range(5):
        torch.manual_seed(seed)
        backward(squares(model(z)))
        found = [p.grad for p in module.parameters()]
        torch.manual_seed(seed)
        exact = torch.autograd.grad(squares(module(z)), list(module.parameters()))
        for gradient, expected in zip(found[2:], exact[2:], strict=True):
            assert gradient is not None
            assert_same(gradient, expected)
        model.zero_grad()


class FunctionalNorm(nn.Module):
    """Batch norm of a training batch, without buffers."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias = copy.deepcopy(norm.weight), copy.deepcopy(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        scaled = (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + 1e-5)
        output: Tensor = scaled * self.weight + self.bias
        return output


def normalised() -> nn.Sequential:
    first = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()]
    second = [nn.Linear(6, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Sigmoid()]
    return nn.Sequential(*first, *second, nn.Linear(5, 2)).double()


@every_condition
def test_batch_norm_is_that_of_the_batch(frozen: Frozen) -> None:
    module, z = normalised(), torch.randn(7, 4).double()
    plain = copy.deepcopy(module)
    plain[1], plain[5] = FunctionalNorm(module[1]), FunctionalNorm(module[5])
    found = gradients(ActivationRelaxation(module, solver=EULER, frozen=frozen), (z,))
    expected = gradients(ActivationRelaxation(plain, solver=EULER, frozen=frozen), (z,))
    # Zero but for rounding: batch norm takes the mean off again.
    assert_literal(found, {name: gradient for name, gradient in expected.items() if name != "0.bias"})


@every_condition
def test_batch_norm_counts_a_forward_pass_once(frozen: Frozen) -> None:
    module, once = normalised(), torch.randn(7, 4).double()
    plain, twice = copy.deepcopy(module), 3 * torch.randn(7, 4).double()
    own = [(name, id(b), b.data_ptr()) for name, b in module.named_buffers()]
    model = ActivationRelaxation(module, solver=EULER, frozen=frozen)
    loss = squares(model(once)) + 2 * squares(model(twice))
    plain(once)
    plain(twice)
    expected = {name: b.clone() for name, b in plain.named_buffers()}
    for _ in range(2):
        for name, buffer in module.named_buffers():
            assert torch.equal(buffer, expected[name]), name
        backward(loss, retain_graph=True)
    assert [(name, id(b), b.data_ptr()) for name, b in module.named_buffers()] == own
    found = [p.grad for p in module.parameters()]
    module.zero_grad()
    for z, factor in ((once, 1), (twice, 2)):
        for _ in range(2):
            backward(factor * squares(model(z)))
    for gradient, parameter in zip(found, module.parameters(), strict=True):
        assert gradient is not None
        assert parameter.grad is not None
        # A bias before batch norm gets nothing but rounding.
        assert_same(gradient, parameter.grad, tolerance=1e-11 if float(gradient.norm()) > 1e-9 else 1.0)


@every_condition
def test_batch_norm_in_evaluation(frozen: Frozen) -> None:
    module, z = normalised(), torch.randn(7, 4).double()
    module(3 * z + 1)
    plain = copy.deepcopy(module).eval()
    for i in (1, 5):
        norm: Any = plain[i]
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        affine = nn.Linear(len(scale), len(scale)).double()
        with torch.no_grad():
            affine.weight.copy_(torch.diag(scale))
            affine.bias.copy_(norm.bias - norm.running_mean * scale)
        plain[i] = affine
    found = gradients(ActivationRelaxation(module, solver=EULER, frozen=frozen).eval(), (z,))
    expected = gradients(ActivationRelaxation(plain, solver=EULER, frozen=frozen), (z,))
    compared = ("0.weight", "0.bias", "3.weight", "6.weight", "8.weight", "8.bias")
    assert_literal(found, {name: expected[name] for name in compared})


@every_condition
def test_mode_is_that_of_the_feedforward_pass(frozen: Frozen) -> None:
    module, z = dropping().double(), torch.randn(3, 4).double()
    module.append(nn.BatchNorm1d(2).double())
    expected = gradients(ActivationRelaxation(module, solver=EULER, frozen=frozen), (z,))
    model = ActivationRelaxation(module, solver=EULER, frozen=frozen)
    model.zero_grad()
    torch.manual_seed(2)
    loss = squares(model(z))
    model.eval()
    module[3].train()
    backward(loss)
    assert [m.training for m in module] == [i == 3 for i in range(len(module))]
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        gradient = expected[name]
        assert gradient is not None
        assert_same(parameter.grad, gradient, name)


@every_condition
@pytest.mark.parametrize("forward_is_half", [True, False])
def test_precision_is_that_of_the_feedforward_pass(frozen: Frozen, forward_is_half: bool) -> None:
    module, z, seen = mlp(4, 5, 5, 2), torch.randn(3, 4), list[torch.dtype]()
    module[2].register_forward_hook(lambda _m, _a, output: seen.append(output.dtype))
    model = ActivationRelaxation(module, solver=EULER, frozen=frozen)
    with torch.autocast("cpu", torch.bfloat16, enabled=forward_is_half):
        loss = squares(model(z).float())
    with torch.autocast("cpu", torch.bfloat16, enabled=not forward_is_half):
        backward(loss)
        assert torch.is_autocast_enabled("cpu") is not forward_is_half
    assert len(seen) > 1
    assert set(seen) == {torch.bfloat16 if forward_is_half else torch.float32}


@every_condition
def test_backward_within_autocast(frozen: Frozen) -> None:
    module, z = mlp(4, 5, 5, 2), torch.randn(3, 4)
    model = ActivationRelaxation(module, solver=EULER, frozen=frozen)
    found = []
    for within in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = squares(model(z).float())
            if within:
                backward(loss)
        if not within:
            backward(loss)
        found.append([p.grad for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None)


# ------------------------------------------------------------------------------------------------- what has changed


@every_condition
def test_what_was_changed_in_place_is_refused(frozen: Frozen) -> None:
    module, z = mlp(4, 5, 5, 2), torch.randn(3, 4)
    model = ActivationRelaxation(module, solver=EULER, frozen=frozen)
    for changed, what in ((module[2].weight, r"the parameter '2.weight'"), (z, r"an input of shape \(3, 4\)")):
        loss = squares(model(z))
        with torch.no_grad():
            changed.mul_(2)  # type: ignore[operator]
        with pytest.raises(RuntimeError, match=rf"(?s){what} was changed in place|modified by an inplace"):
            backward(loss)
    backward(squares(model(z)))


@every_condition
def test_a_model_that_writes_into_its_own_input_is_refused(frozen: Frozen) -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(4, 5, 2)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.net(x.mul_(2))
            return output

    model = ActivationRelaxation(Doubles(), solver=EULER, frozen=frozen)
    with pytest.raises(ValueError, match=r"writes in place into an input of shape \(3, 4\).*x = x.clone\(\)"):
        model(torch.randn(3, 4))


@every_condition
def test_an_output_that_the_user_writes_into(frozen: Frozen) -> None:
    class Shows(nn.Module):
        """Returns what a layer above all vertices computed, too."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.f, self.last = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            u = self.first(x)
            return u, self.last(self.f(u))

    module, z, found = Shows(), torch.randn(3, 4), []
    for write in (False, True):
        module.zero_grad()
        u, y = ActivationRelaxation(module, solver=EULER, frozen=frozen)(z)
        if write:
            u.mul_(100)
        backward(squares(y))
        found.append([p.grad for p in module.parameters()])
    for gradient, expected in zip(found[1], found[0], strict=True):
        assert gradient is not None
        assert expected is not None
        assert_same(gradient, expected)


@every_condition
def test_two_passes_and_two_backward_passes(frozen: Frozen) -> None:
    module, y, z = mlp(4, 5, 5, 2).double(), torch.randn(3, 4).double(), torch.randn(3, 4).double()
    model = ActivationRelaxation(module, solver=EULER, frozen=frozen)
    separate = [gradients(model, (x,)) for x in (y, z)]
    model.zero_grad()
    loss = squares(model(y)) + squares(model(z))
    for repetition in (1, 2):
        backward(loss, retain_graph=True)
        for name, parameter in module.named_parameters():
            first, second = (g[name] for g in separate)
            assert parameter.grad is not None
            assert first is not None
            assert second is not None
            assert_same(parameter.grad, repetition * (first + second), name)
    backward(loss)
    with pytest.raises(RuntimeError, match="retain_graph"):
        backward(loss)


# ---------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("solver", [EULER, ClosedForm(0.3, 4), Continuous(2.0), Equilibrium()], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_all_frozen_is_the_default(problem: Problem, solver: Solver) -> None:
    found, expected = problem.gradients(solver, frozen=Frozen(True, True, True, True)), problem.gradients(solver)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        actual = found[name]
        assert (actual is None and gradient is None) or torch.equal(actual, gradient)  # type: ignore[arg-type]


@pytest.mark.parametrize("frozen", [A, B, C], ids=name_of)
@pytest.mark.parametrize("solver", [EULER, Continuous(2.0)], ids=str)
def test_a_linear_network_has_one_derivative(frozen: Frozen, solver: Solver) -> None:
    def network() -> nn.Module:
        linear = [nn.Linear(4, 5), nn.Hardtanh(-1e9, 1e9), nn.Linear(5, 5), nn.Hardtanh(-1e9, 1e9)]
        return nn.Sequential(*linear, nn.Linear(5, 2))

    problem = Problem("linear", network, matrix, squares, depth=2)
    tolerance = 1e-6 if isinstance(solver, Continuous) else None
    assert_same_gradients(problem.gradients(solver, frozen=frozen), problem.gradients(solver), tolerance)
    changed = problem.gradients(solver, frozen=D)
    assert largest_distance(changed, problem.gradients(solver)) > 0.1  # the activity is another thing


def test_biases_have_no_presynaptic_activity() -> None:
    problem = PROBLEMS[0]
    found, expected = problem.gradients(EULER, frozen=D), problem.gradients(EULER)
    for name, gradient in expected.items():
        actual = found[name]
        assert actual is not None
        assert gradient is not None
        if "weight" not in name or name == "0.weight":  # nor does what reads the input change
            assert_same(actual, gradient, name)
        else:
            assert float((actual - gradient).norm()) > 1e-3 * float(gradient.norm()), name


# An output that is held does not start at its activity.
FREE = [problem for problem in PROBLEMS if not problem.ends_in_vertex and problem.name != "nested"]


@every_combination
@pytest.mark.parametrize("problem", FREE, ids=name_of)
def test_states_that_have_not_moved_are_activities(problem: Problem, frozen: Frozen) -> None:
    still = Euler(1e-9, 1)
    found, expected = problem.gradients(still, frozen=frozen), problem.gradients(still)
    # Unfrozen, an input's error is its state, not what drives it.
    compared = [n for n, g in expected.items() if g is not None and (frozen.input or not n.startswith("input"))]
    assert_literal(found, {name: expected[name] for name in compared}, 1e-7)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("solver", [ClosedForm(), ClosedForm(0.3, 4, order="sequential"), Equilibrium()], ids=str)
@pytest.mark.parametrize("frozen", [A, C, NOTHING], ids=name_of)
def test_solvers_of_a_linear_relaxation(solver: Solver, frozen: Frozen) -> None:
    with pytest.raises(ValueError, match=rf"{type(solver).__name__}.*relaxation_derivative=False.*Euler.*Continuous"):
        ActivationRelaxation(mlp(4, 5, 2), solver=solver, frozen=frozen)
    with pytest.raises(ValueError, match=r"ClosedForm.*Euler.*Continuous"):
        ActivationRelaxation(mlp(4, 5, 2), frozen=frozen)


def test_values_of_frozen() -> None:
    with pytest.raises(ValueError, match=r"input=False has no effect.*update_activity"):
        Frozen(input=False)
    for name in vars(Frozen()):
        for value in (0, None, "no", torch.tensor(True)):
            with pytest.raises(TypeError, match=f"{name} must be True or False"):
                Frozen(**{name: value})  # type: ignore[arg-type]
    wrong: list[Any] = [Frozen, True, False, None, "b"]
    for value in wrong:
        with pytest.raises(TypeError, match=r"frozen must be a Frozen\(…\)"):
            ActivationRelaxation(mlp(4, 5, 2), frozen=value)


class TiedByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.f = nn.Embedding(6, 4), nn.Tanh()

    def forward(self, index: Tensor) -> Tensor:
        return functional.linear(self.f(self.embedding(index)), self.embedding.weight)


class RawAround(nn.Module):
    """A parameter that is read above a vertex of the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.weight, self.head = nn.Tanh(), nn.Parameter(torch.randn(4, 6)), nn.Linear(4, 2)

    def forward(self, index: Tensor) -> Tensor:
        output: Tensor = self.head(self.f(functional.one_hot(index, 6).to(self.weight) @ self.weight.T))
        return output


class TiedInside(TiedByHand):
    """As by hand, with a layer behind: f' of the tanh between them is the derivative's, not the activity's."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 2)

    def forward(self, index: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(super().forward(index)))
        return output


@pytest.mark.parametrize("network", [TiedByHand, TiedInside, RawAround])
def test_update_that_cannot_be_split(network: Callable[[], nn.Module]) -> None:
    problem = Problem("tied by hand", network, lambda: (torch.tensor([0, 2, 2, 5]),), squares, depth=1)
    for frozen in (B, C, D):
        with pytest.raises(ValueError, match=r"shape \([46], [46]\).*freeze or unfreeze.*together"):
            problem.gradients(EULER, frozen=frozen)
    for frozen in (A, NOTHING):
        assert all(g is not None for g in problem.gradients(EULER, frozen=frozen).values())
    module, (index,) = problem.build()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.shape == (2, 4))
    if network is RawAround:  # what is not trained is not split
        ActivationRelaxation(module, solver=EULER, frozen=B)(index)


class Changes(nn.Module):
    """Takes another path as soon as the states are no longer near 1."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.f, self.head, self.way = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2), way
        self.wide, self.g, self.back, self.h = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh()

    def forward(self, x: Tensor) -> Any:
        x = x + 0 * self.first(x)
        h = self.f(x + 3)
        near = bool(h.mean() > 0.9)
        if self.way == "vertex" and not near:
            h = self.g(h)
        if self.way == "width" and not near:
            h = self.back(self.g(self.wide(h)))
        if self.way == "layer-again" and not near:
            h = self.first(h)
        y = self.head(self.h(h))
        if self.way == "output" and not near:
            return y, h
        if self.way == "shape" and not near:
            return y[:1]
        return (y,) if self.way == "output" else y


@every_condition
@pytest.mark.parametrize("way", ["vertex", "width", "output", "shape"])
def test_path_that_depends_on_the_activities(way: str, frozen: Frozen) -> None:
    model = ActivationRelaxation(Changes(way), solver=EULER, frozen=frozen)
    result = model(0.1 * torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="frozen: run again at the current states"):
        backward(squares(result[0] if way == "output" else result))


def test_a_layer_that_only_another_path_calls_again() -> None:
    # One vertex more or less would be refused; a layer is part of the Jacobian, as max-pooling's choice is.
    model = ActivationRelaxation(Changes("layer-again"), solver=EULER, frozen=NOTHING)
    backward(squares(model(0.1 * torch.randn(3, 4))))


# --------------------------------------------------------------------------------------------------- kinds of models


@every_condition
@pytest.mark.parametrize("solver", [EULER, ClosedForm(1.0, 20), Equilibrium()], ids=str)
@pytest.mark.parametrize("summed", [True, False])
def test_states_are_laid_out_as_activities(frozen: Frozen, solver: Solver, summed: bool) -> None:
    # A sum's gradient is an expanded number, and a layer's is laid out as it reads: ``view`` needs the activity's way.
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.f = nn.Conv1d(2, 3, 1), nn.Tanh()
            self.read, self.other = nn.Linear(3, 2), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.f(self.first(x)) if summed else self.f(self.first(x).transpose(1, 2)).transpose(1, 2)
            other = self.other(h.view(-1, 12))
            return self.read(h.sum(-1) if summed else h.transpose(1, 2)).sum(-1), other

    if not frozen.relaxation_derivative and not isinstance(solver, Euler):
        return
    model = ActivationRelaxation(Viewed(), solver=solver, frozen=frozen)
    backward(squares(model(torch.randn(3, 2, 4))[0]))


@every_condition
def test_lazy_modules(frozen: Frozen) -> None:
    module = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(2))
    model = ActivationRelaxation(module, solver=EULER, frozen=frozen)
    with pytest.raises(ValueError, match=r"lazy modules .* call the model once under torch.no_grad\(\)"):
        model(torch.randn(6, 4))
    module.eval()
    with torch.no_grad():
        model(torch.randn(6, 4))
    module.train()
    backward(squares(model(torch.randn(6, 4))))
    assert all(p.grad is not None for p in module.parameters())
    assert int(module[1].num_batches_tracked) == 1  # type: ignore[arg-type]


@every_condition
def test_inputs_that_were_made_for_inference(frozen: Frozen) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(4, 5, 2)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            output: Tensor = self.net(x) + shift
            return output

    with torch.inference_mode():
        shift = torch.randn(3, 2)
    backward(squares(ActivationRelaxation(Shifted(), solver=EULER, frozen=frozen)(torch.randn(3, 4), shift)))


@every_condition
def test_modules_called_by_a_direct_forward(frozen: Frozen) -> None:
    class Direct(nn.Module):
        def __init__(self, direct: bool) -> None:
            super().__init__()
            self.first, self.f, self.last, self.direct = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2), direct

        def forward(self, x: Tensor) -> Tensor:
            h = self.f(self.first(x))
            again = self.first.forward(h) if self.direct else self.first(h)
            output: Tensor = self.last(again)
            return output

    module, z = Direct(False).double(), torch.randn(3, 4).double()
    expected = gradients(ActivationRelaxation(module, solver=EULER, frozen=frozen), (z,))
    module.direct = True
    model = ActivationRelaxation(module, solver=EULER, frozen=frozen)
    if frozen.splits_update:
        with pytest.raises(ValueError, match="outside of a call"):
            gradients(model, (z,))
    else:
        assert_same_gradients(gradients(model, (z,)), expected)


@every_combination
def test_unrolled_in_time_with_every_solver(frozen: Frozen) -> None:
    # Each solver ends where its equation does: a long relaxation forgets how it was integrated.
    torch.manual_seed(1)
    module, z = Unrolled().double(), torch.randn(2, 4, 2).double()
    solvers: list[Solver] = [Euler(0.5, 60), Euler(0.5, 60, order="sequential"), Continuous(40.0)]
    found = [gradients(ActivationRelaxation(module, solver=s, frozen=frozen), (z,)) for s in solvers]
    for other in found[1:]:
        assert_same_gradients(other, found[0], 1e-5)


@every_condition
def test_own_loss_and_a_closed_over_target(frozen: Frozen) -> None:
    # Inside the model the loss is linearised at the states; outside it is given.
    module, z, target = OwnLoss(), torch.randn(3, 4), torch.tensor([0, 2, 1])
    backward(ActivationRelaxation(module, solver=EULER, frozen=frozen)(z, target))
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())


# ---------------------------------------------------------------------------------------------------------- the wrapper


@every_condition
def test_copies_and_print(frozen: Frozen) -> None:
    module, z = mlp(4, 5, 5, 2).double(), torch.randn(3, 4).double()
    model = ActivationRelaxation(module, solver=EULER, frozen=frozen)
    expected = gradients(model, (z,))
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)]
    for other in copies:
        assert other.frozen == frozen
        assert_same_gradients(gradients(other, (z,)), expected)
        assert repr(other) == repr(model)
    assert f"frozen={frozen}" in repr(model)
    assert "frozen" not in repr(ActivationRelaxation(module, frozen=Frozen()))


class Stem(nn.Module):
    def __init__(self, owner: list[Tensor]) -> None:
        super().__init__()
        self.weight, self.body, self.left = nn.Parameter(torch.randn(4)), nn.Sequential(nn.Linear(4, 4)), owner

    def forward(self, x: Tensor) -> Tensor:
        self.left[:] = [torch.sigmoid(x.sum(1, keepdim=True))]
        output: Tensor = self.body(x) * self.weight
        return output


class Gate(nn.Module):
    def __init__(self, left: list[Tensor]) -> None:
        super().__init__()
        self.left = left

    def forward(self, h: Tensor) -> Tensor:
        return h * self.left[0]


@every_condition
def test_layers_that_leave_something_behind_are_run_again(frozen: Frozen) -> None:
    left: list[Tensor] = []
    module = nn.Sequential(Stem(left), nn.Tanh(), Gate(left), nn.Linear(4, 2))
    model, inputs = ActivationRelaxation(module, solver=EULER, frozen=frozen), [torch.randn(3, 4) for _ in range(2)]
    together = torch.autograd.grad(sum(squares(model(z)) for z in inputs), list(module.parameters()))  # type: ignore[arg-type]
    alone = [torch.autograd.grad(squares(model(z)), list(module.parameters())) for z in inputs]
    for both, one, other in zip(together, *alone, strict=True):
        assert_same(both, one + other, tolerance=1e-5)
