"""What may be changed in place between the forward and the backward pass, and what is noticed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relaxprop import ActivationRelaxation, ClosedForm, Equilibrium, Euler
from relaxprop.solvers import Solver
from tests.compare import assert_same_gradients, backward, gradients, of_parameters, squares
from tests.problems import mlp, name_of, twins

# One that needs no states and one that has them.
two_solvers = pytest.mark.parametrize("solver", [Equilibrium(), ClosedForm(0.9, 100)], ids=name_of)


@pytest.mark.parametrize("output", ["clamped", "relaxed"])
@pytest.mark.parametrize("solver", [Equilibrium(), ClosedForm(), ClosedForm(0.3, 4), Euler(0.3, 4)], ids=str)
def test_the_output_may_be_changed_in_place(solver: Solver, output: Any) -> None:
    module, x = mlp(4, 5, 5, 2).double(), torch.randn(2, 4).double()
    model = ActivationRelaxation(module, solver=solver, output=output)

    def in_place(y: Tensor) -> Tensor:
        y += 1
        y /= 2
        return squares(y)

    for _ in range(3):  # the first pass is recorded with more care than those after it
        changed = gradients(model, (x,), in_place)
        assert_same_gradients(changed, gradients(model, (x,), lambda y: squares((y + 1) / 2)))


@pytest.mark.parametrize("solver", [Equilibrium(), ClosedForm(0.3, 4), Euler(0.3, 4)], ids=name_of)
def test_an_activity_that_is_returned_may_be_changed_in_place(solver: Solver) -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.f, self.g, self.head = nn.Linear(4, 3), nn.SiLU(), nn.Tanh(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.f(self.first(x))
            return h, self.head(self.g(h.relu()))

    model = ActivationRelaxation(Hidden().double(), solver=solver)
    x = torch.randn(2, 4).double()

    def in_place(result: tuple[Tensor, Tensor]) -> Tensor:
        h, y = result
        h *= 3
        return squares(h) + squares(y)

    for _ in range(3):
        changed = gradients(model, (x,), in_place)
        assert_same_gradients(
            changed, gradients(model, (x,), lambda result: squares(3 * result[0]) + squares(result[1]))
        )


def test_the_input_may_be_changed_in_place_where_pytorch_allows_it() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(4, 5, 4)

        def forward(self, x: Tensor) -> Tensor:
            x += 1
            output: Tensor = self.net(x)
            return output

    module = Sums().double()
    model = ActivationRelaxation(module, solver=Equilibrium())
    x, y = (torch.ones(2, 4).double() for _ in range(2))
    backward(squares(model(x)))
    found = of_parameters(module)
    module.zero_grad(set_to_none=True)
    backward(squares(module(y)))
    assert torch.equal(x, y)
    assert_same_gradients(found, of_parameters(module))


@two_solvers
def test_weights_changed_before_the_backward_pass_are_noticed(solver: Solver) -> None:
    plain, model = twins(solver, 4, 5, 5, 2)
    for network in (plain, model):
        loss = squares(network(torch.randn(2, 4).double()))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            backward(loss)
