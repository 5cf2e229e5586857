"""Nothing of one pass leaks into the next or stays behind, and nothing of a part of a graph leaks into the whole."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from relaxprop import PAPER, ActivationRelaxation, ClosedForm, Equilibrium, Euler
from relaxprop.solvers import Solver
from tests.compare import assert_same, assert_same_gradients, backward, both, gradients, squares
from tests.problems import PROBLEMS, SOLVERS, STOPPED_EARLY, Branches, Problem, mlp, name_of, twins

every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=name_of)

# One that needs no states and one that has them.
two_solvers = pytest.mark.parametrize("solver", [Equilibrium(), ClosedForm(0.9, 100)], ids=name_of)


# ----------------------------------------------------------------------------------------------- several forward passes


@pytest.mark.parametrize("solver", STOPPED_EARLY, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_later_passes_are_like_the_first(problem: Problem, solver: Solver) -> None:
    """The first pass hands on copies, later ones do not: the gradient must not tell."""
    module, inputs = problem.build()
    buffers = [(b, b.clone()) for b in module.buffers()]
    model = ActivationRelaxation(module, solver=solver, vertices=problem.vertices)
    found = []
    for _ in range(3):
        for buffer, value in buffers:
            buffer.copy_(value)
        torch.manual_seed(2)
        found.append(gradients(model, inputs, problem.loss))
    assert_same_gradients(found[1], found[0])
    assert_same_gradients(found[2], found[0])


@every_solver
def test_several_forward_passes_before_one_backward_pass(solver: Solver) -> None:
    x, y = torch.randn(2, 2, 4).double()

    def use(model: nn.Module) -> None:
        first, second = model(x), model(y)
        model(x + y)  # a result that nobody uses
        backward(squares(first * second) + squares(second))

    both(*twins(solver, 4, 5, 5, 2), use)


@two_solvers
def test_forward_passes_may_be_undone_in_any_order(solver: Solver) -> None:
    x, y = torch.randn(2, 2, 4).double()

    def use(model: nn.Module) -> None:
        first, second = squares(model(x)), squares(model(y))
        backward(first)
        backward(second)

    both(*twins(solver, 4, 5, 5, 2), use)


@two_solvers
def test_a_later_pass_may_write_in_place_where_the_first_did_not(solver: Solver) -> None:
    class Recurrent(nn.Module):
        """Writes in place into each activity but the last, so a longer sequence writes into more of them."""

        def __init__(self) -> None:
            super().__init__()
            self.cell, self.f, self.read = nn.Linear(3, 3), nn.SiLU(), nn.Linear(3, 2)

        def forward(self, sequence: Tensor) -> Tensor:  # (T, batch, 3)
            h = self.f(self.cell(sequence[0]))
            for x in sequence[1:]:
                h += x
                h = self.f(self.cell(h))
            output: Tensor = self.read(h)
            return output

    plain = Recurrent().double()
    model = ActivationRelaxation(copy.deepcopy(plain), solver=solver)
    for length in (2, 5):
        sequence = torch.randn(length, 2, 3).double()
        assert_same_gradients(gradients(model, (sequence,)), gradients(plain, (sequence,)))


def test_a_hook_on_an_activity_acts_in_every_pass() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.act, self.above = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.below(x))
            h.register_hook(lambda g: 2 * g)
            output: Tensor = self.above(h)
            return output

    module, x = Hooked().double(), torch.randn(2, 3).double()
    expected = gradients(module, (x,))
    model = ActivationRelaxation(module, solver=ClosedForm(1.0, 5))
    for _ in range(3):
        assert_same_gradients(gradients(model, (x,)), expected)


def test_a_kept_activity_is_refused_in_every_pass() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.act, self.above = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.act(self.below(x))
            output: Tensor = self.above(self.kept)
            return output

    module, x = Keeps(), torch.randn(2, 3)
    model = ActivationRelaxation(module, solver=PAPER)
    for _ in range(2):
        backward(squares(model(x)))
    loss = squares(model(x)) + squares(module.kept)
    with pytest.raises(RuntimeError, match="return it from the model"):
        backward(loss)


@two_solvers
def test_an_activity_that_the_model_keeps_is_never_lost_in_silence(solver: Solver) -> None:
    class Keeps(nn.Module):
        """A penalty on an activity, as models keep them that balance or regularise."""

        penalty: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.first, self.f, self.head = nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.f(self.first(x))
            self.penalty = (h**2).sum()
            output: Tensor = self.head(h)
            return output

    module, x = Keeps().double(), torch.randn(2, 4).double()
    model = ActivationRelaxation(module, solver=solver)
    exact = gradients(module, (x,), lambda y: squares(y) + module.penalty)
    try:
        found = gradients(model, (x,), lambda y: squares(y) + module.penalty)
    except (RuntimeError, ValueError) as error:  # refused, and the way out is named
        assert "return" in str(error)  # noqa: PT017
    else:
        assert_same_gradients(found, exact)


# ---------------------------------------------------------------------------------------------- several backward passes


def test_a_second_backward_pass_is_refused_in_pytorchs_own_words() -> None:
    for model in (mlp(3, 4, 2), ActivationRelaxation(mlp(3, 4, 2))):
        loss = squares(model(torch.randn(2, 3)))
        backward(loss)
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            backward(loss)


@every_solver
def test_a_retained_graph_gives_the_same_gradient_again(solver: Solver) -> None:
    module, x = Branches().double(), torch.randn(2, 4).double()
    model = ActivationRelaxation(module, solver=solver)
    once = gradients(module, (x,))
    del once["input 0"]
    module.zero_grad()
    loss = squares(model(x))
    backward(loss, retain_graph=True)
    backward(loss, retain_graph=True)
    backward(loss)
    expected = {name: None if g is None else 3 * g for name, g in once.items()}
    assert_same_gradients({name: p.grad for name, p in module.named_parameters()}, expected)
    with pytest.raises(RuntimeError, match="second time"):
        backward(loss)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.act, self.deep, self.a, self.b = (
            nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.act(self.trunk(x))
        return self.a(self.act(self.deep(h))), self.b(h)


@pytest.mark.parametrize(
    "solver", [ClosedForm(0.9, 200), Euler(0.9, 200), Euler(0.9, 200, order="sequential")], ids=str
)
def test_the_loss_of_one_head_and_then_of_both(solver: Solver) -> None:
    """One recorded pass serves several losses (retain_graph), whichever outputs they depend on."""
    module, x = TwoHeads().double(), torch.randn(5, 3).double()
    parameters = list(module.parameters())
    found: list[tuple[Tensor | None, ...]] = []
    expected: list[tuple[Tensor | None, ...]] = []
    for model, gathered in ((ActivationRelaxation(module, solver=solver), found), (module, expected)):
        ya, yb = model(x)
        for loss in (squares(ya), squares(ya) + squares(yb), squares(yb), squares(yb) * 2 + squares(ya)):
            gathered.append(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
    for actual, exact in zip(found, expected, strict=True):
        for g, b in zip(actual, exact, strict=True):
            assert (g is None) == (b is None)
            if g is not None and b is not None:
                assert_same(g, b)


# ---------------------------------------------------------------------------------------------- what changed in between


def _replace_the_activation(network: nn.Sequential) -> None:
    network[1] = nn.Sigmoid()


def _append_to_a_part(network: nn.Sequential) -> None:
    part = network[2]
    assert isinstance(part, nn.Sequential)
    part.append(nn.Tanh())


def _take_an_activation_out(network: nn.Sequential) -> None:
    del network[1]


def _change_the_class(network: nn.Sequential) -> None:
    network[1].__class__ = nn.Identity  # no activation any more


def _take_nothing_out_and_replace_the_activation(network: nn.Sequential) -> None:
    del network[9:]  # PyTorch gives the module another dict of its children
    network[1] = nn.ReLU()


CHANGES = (
    _replace_the_activation,
    _append_to_a_part,
    _take_an_activation_out,
    _change_the_class,
    _take_nothing_out_and_replace_the_activation,
)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("solver", [ClosedForm(0.3, 4), Equilibrium()], ids=str)
def test_a_model_that_changed_between_passes_is_like_one_just_wrapped(
    change: Callable[[nn.Sequential], None], solver: Solver
) -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        layers = [nn.Linear(3, 3), nn.Tanh(), nn.Sequential(nn.Linear(3, 3)), nn.SiLU(), nn.Linear(3, 2)]
        return nn.Sequential(*layers).double()

    torch.manual_seed(1)
    x = torch.randn(5, 3, dtype=torch.float64)
    changed, afresh = network(), network()
    model = ActivationRelaxation(changed, solver=solver, measure_residual=True)
    gradients(model, [x])
    change(changed)
    change(afresh)
    wrapped = ActivationRelaxation(afresh, solver=solver, measure_residual=True)
    assert_same_gradients(gradients(model, [x]), gradients(wrapped, [x]))
    assert model.last_relaxation is not None
    assert wrapped.last_relaxation is not None
    assert model.last_relaxation.residuals is not None
    assert wrapped.last_relaxation.residuals is not None
    assert model.last_relaxation.residuals.keys() == wrapped.last_relaxation.residuals.keys()


def test_the_module_may_change_between_passes() -> None:
    plain, model = twins(ClosedForm(0.9, 100), 4, 5, 5, 2)
    x = torch.randn(2, 4).double()
    both(plain, model, lambda m: backward(squares(m(x))))
    torch.manual_seed(5)
    layers = [nn.Linear(2, 3).double(), nn.SiLU(inplace=True), nn.Linear(3, 2).double()]
    plain.extend(layers)
    assert isinstance(model.module, nn.Sequential)
    model.module.extend(copy.deepcopy(layers))
    plain.zero_grad()
    model.zero_grad()
    both(plain, model, lambda m: backward(squares(m(x))))
    assert model.last_relaxation is not None
    assert model.last_relaxation.depth == 3


# ---------------------------------------------------------------------------------------------------- what stays behind


def hook_counts(module: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules()]


@pytest.mark.parametrize("solver", [ClosedForm(), Equilibrium()], ids=name_of)
def test_no_hooks_stay_on_the_module(solver: Solver) -> None:
    module, x = mlp(3, 4, 4, 2), torch.randn(2, 3)
    before = hook_counts(module)
    model = ActivationRelaxation(module, solver=solver)
    assert hook_counts(module) == before
    output = model(x)
    assert hook_counts(module) == before
    backward(squares(output))
    assert hook_counts(module) == before
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5))
    assert hook_counts(module) == before
    assert_same_gradients(gradients(model, (x,)), gradients(ActivationRelaxation(module, solver=solver), (x,)))


@every_solver
def test_no_hooks_stay_on_tensors_that_outlive_the_pass(solver: Solver) -> None:
    class Returns(nn.Module):
        """Hands its input and a parameter out as they are."""

        def __init__(self) -> None:
            super().__init__()
            self.same, self.layer = nn.Identity(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = self.same(x)
            return x, self.layer(x), self.layer.weight

    x = torch.randn(2, 3, requires_grad=True)
    model = ActivationRelaxation(Returns(), solver=solver, vertices="modules")
    for _ in range(2):
        backward(sum((squares(y) for y in model(x)), torch.zeros(())))
    for tensor in (x, *model.parameters()):
        assert not cast(Any, tensor)._backward_hooks


@pytest.mark.parametrize("solver", SOLVERS, ids=name_of)
@pytest.mark.parametrize("ending", ["backward", "dropped"])
def test_the_recorded_graph_is_released(solver: Solver, ending: str) -> None:
    module, x = mlp(3, 4, 4, 2), torch.randn(2, 3)
    model, kept = ActivationRelaxation(module, solver=solver), list[weakref.ref[Tensor]]()
    for layer in module:
        layer.register_forward_hook(lambda _module, args, output: kept.extend(map(weakref.ref, (*args, output))))
    gc.collect()
    gc.disable()
    try:
        loss = squares(model(x))
        assert sum(ref() is not None for ref in kept) > 1
        if ending == "backward":
            backward(loss)
        else:
            del loss
        assert [ref() for ref in kept if ref() is not None and ref() is not x] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("solver", SOLVERS, ids=name_of)
def test_what_else_a_model_returns_is_the_users_alone(solver: Solver) -> None:
    class Activities:
        """A class whose tensors PyTorch cannot find; the user keeps the loss on it."""

        loss: Tensor | None = None

    class Returning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(3, 4, 4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Activities]:
            output: Tensor = self.net(x)
            return output, output.detach().clone(), Activities()

    model = ActivationRelaxation(Returning(), solver=solver)
    gc.collect()
    gc.disable()
    try:
        output, extra, activities = model(torch.randn(2, 3))
        loss, kept_extra = squares(output), weakref.ref(extra)
        del extra
        assert kept_extra() is None  # though the backward pass is still to come
        activities.loss, kept = loss, weakref.ref(activities)
        del output, loss, activities
        gc.collect()
        assert kept() is None
    finally:
        gc.enable()
