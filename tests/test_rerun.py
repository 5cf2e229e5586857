"""What is not frozen, on any model: its forward pass runs again at the current states.

The oracle is `literal_gradients`, a slow loop for any model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from relaxprop import ActivationRelaxation, ClosedForm, Continuous, Equilibrium, Euler, Frozen
from relaxprop.sight import Sight
from relaxprop.solvers import Solver
from tests.compare import assert_same, assert_same_gradients, backward, gradients, squares
from tests.literal_by_hooks import literal_gradients
from tests.problems import (
    COMBINATIONS,
    CONDITIONS,
    NOTHING,
    PROBLEMS,
    A,
    B,
    C,
    D,
    OwnLoss,
    Problem,
    Unrolled,
    mlp,
    name_of,
)

EULER = Euler(0.3, 4)

every_combination = pytest.mark.parametrize("frozen", COMBINATIONS, ids=name_of)
every_condition = pytest.mark.parametrize("frozen", CONDITIONS, ids=name_of)


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


# ------------------------------------------------------------------------------------------------------- unusual models


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


# ------------------------------------------------------------------------------------------------------ kinds of models


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


# ------------------------------------------------------------------------------------------------------------- refusals


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


@every_condition
def test_no_later_run_is_watched(frozen: Frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no hook was registered since, nothing is to be found that the feedforward pass has not shown."""
    entered, enter = list[Sight](), Sight.__enter__

    def counted(sight: Sight) -> Sight:
        entered.append(sight)
        return enter(sight)

    monkeypatch.setattr(Sight, "__enter__", counted)
    model, x = ActivationRelaxation(mlp(4, 6, 2), solver=EULER, frozen=frozen), torch.randn(5, 4)
    for _ in range(3):
        backward(squares(model(x)))
    # The split update hooks nodes, in public, which counts: the next feedforward pass is watched again.
    assert len(entered) == (3 if frozen.splits_update else 1)
