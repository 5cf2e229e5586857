"""Bad input gets an error that names the parameter, the value received and what is allowed."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from relaxprop import (
    PAPER,
    ActivationRelaxation,
    ClosedForm,
    Continuous,
    Equilibrium,
    Euler,
    Frozen,
    NonFiniteStateError,
    alignment,
    convergence,
    steps_to_converge,
)
from relaxprop.solvers import Solver
from tests.compare import backward, gradients, refuses, squares
from tests.problems import NOTHING, A, C, mlp, name_of

# ------------------------------------------------------------------------------------------------------------- solvers

OF_STEPS: list[Callable[..., object]] = [
    Euler,
    ClosedForm,
    lambda step_size: steps_to_converge(5, step_size, 0.1),
]


@pytest.mark.parametrize("make", OF_STEPS, ids=["Euler", "ClosedForm", "steps_to_converge"])
@pytest.mark.parametrize("value", [0, 0.0, -0.1, 2, 2.0, 2.5, math.inf, -math.inf, math.nan, np.float64(3)])
def test_step_sizes_outside_the_range(make: Callable[..., object], value: float) -> None:
    with refuses(ValueError, "step_size", "(0, 2)", repr(value)):
        make(step_size=value)


@pytest.mark.parametrize("make", OF_STEPS, ids=["Euler", "ClosedForm", "steps_to_converge"])
@pytest.mark.parametrize("value", ["0.1", None, True, 1j, [0.1], torch.tensor(0.1)])
def test_step_sizes_that_are_no_number(make: Callable[..., object], value: object) -> None:
    with refuses(TypeError, "step_size", "(0, 2)", repr(value)):
        make(step_size=value)


@pytest.mark.parametrize("make", [Euler, ClosedForm])
def test_numbers_of_steps(make: Callable[..., object]) -> None:
    for few in (0, -1, np.int64(0)):
        with refuses(ValueError, "num_steps", "at least 1", repr(few)):
            make(num_steps=few)
    for value in (2.5, 10.0, math.nan, "10", True):
        with refuses(TypeError, "num_steps", "integer", repr(value)):
            make(num_steps=value)


def test_depths() -> None:
    with refuses(ValueError, "depth", "at least 1", "0"):
        steps_to_converge(0, 0.1, 0.1)
    with refuses(TypeError, "depth", "integer", "1.5"):
        steps_to_converge(1.5, 0.1, 0.1)  # type: ignore[arg-type]


def test_tolerances() -> None:
    makers: list[Callable[[Any], object]] = [lambda t: Euler(tolerance=t), lambda t: steps_to_converge(5, 0.1, t)]
    for make in makers:
        for value in (0, 0.0, 1, 1.0, -0.1, 2.0, math.nan, math.inf):
            with refuses(ValueError, "tolerance", "(0, 1)", repr(value)):
                make(value)
        for wrong in ("0.1", True, 1j):
            with refuses(TypeError, "tolerance", "(0, 1)", repr(wrong)):
                make(wrong)
    with refuses(TypeError, "tolerance", "(0, 1)", "None"):
        steps_to_converge(5, 0.1, None)  # type: ignore[arg-type]


def test_durations() -> None:
    for value in (0, -1.0, math.inf, math.nan):
        with refuses(ValueError, "duration", "positive and finite", repr(value)):
            Continuous(value)
    wrong: Any
    for wrong in ("1", None, True, 1j):
        with refuses(TypeError, "duration", "positive", repr(wrong)):
            Continuous(wrong)


@pytest.mark.parametrize("value", ["random", "Sequential", "", None, 3, ["sequential"]])
def test_orders(value: Any) -> None:
    three = ("order", "'simultaneous'", "'sequential'", "'asynchronous'", repr(value))
    with refuses(ValueError, *three):
        Euler(order=value)
    with refuses(ValueError, *three):
        steps_to_converge(5, 0.1, 0.1, order=value)
    with refuses(ValueError, *three[:3], repr(value)):
        ClosedForm(order=value)


def test_the_closed_form_has_no_asynchronous_order() -> None:
    with refuses(ValueError, "order", "'simultaneous', 'sequential'", "'asynch"):
        ClosedForm(order="asynchronous")


def test_misspelt_keywords() -> None:
    wrong: dict[str, Any] = {"stepsize": 0.1}
    for make in (Euler, ClosedForm, Continuous, Equilibrium, lambda **k: ActivationRelaxation(mlp(2, 2, 2), **k)):
        with refuses(TypeError, "stepsize"):
            make(**wrong)


def test_options_of_a_solver_are_keywords() -> None:
    make: Any = Euler
    with refuses(TypeError, "positional"):
        make(0.1, 100, "sequential")
    make = ClosedForm
    with refuses(TypeError, "positional"):
        make(0.1, 100, "sequential")
    make = ActivationRelaxation
    with refuses(TypeError, "positional"):
        make(mlp(2, 2, 2), Euler())


@pytest.mark.parametrize("solver", [Euler(), ClosedForm(), Continuous()], ids=name_of)
def test_solvers_are_immutable_values(solver: Any) -> None:
    name = next(iter(solver.__dataclass_fields__))
    with pytest.raises(FrozenInstanceError):
        setattr(solver, name, 0.5)
    assert solver == type(solver)()
    assert len({solver, type(solver)()}) == 1


def test_numbers_of_other_kinds_are_welcome() -> None:
    assert Euler(1, 5).step_size == 1
    assert steps_to_converge(5, np.float64(0.1), np.float64(0.1)) == steps_to_converge(5, 0.1, 0.1)
    network, x = mlp(3, 4, 2).double(), torch.randn(2, 3).double()
    for solver in (ClosedForm(np.float64(0.9), np.int64(80)), Euler(1, np.int64(3))):  # type: ignore[arg-type]
        found, exact = gradients(ActivationRelaxation(network, solver=solver), (x,)), gradients(network, (x,))
        assert all(torch.allclose(g, found[name]) for name, g in exact.items())  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- wrapper


def wrap(module: Any = None, **options: Any) -> ActivationRelaxation:
    return ActivationRelaxation(mlp(3, 4, 2) if module is None else module, **options)


def test_what_is_wrapped() -> None:
    for wrong, name in ((squares, "function"), (nn.Linear, "type"), ("mlp", "str"), (torch.ones(1), "Tensor")):
        with refuses(TypeError, "module", "torch.nn.Module", name):
            wrap(wrong)
    with refuses(TypeError, "module", "ActivationRelaxation already"):
        wrap(wrap())
    with refuses(TypeError, "module", "ActivationRelaxation already"):
        wrap(nn.Sequential(wrap(), nn.Tanh()))


def test_solver_of_the_wrapper() -> None:
    for wrong, shown in ((ClosedForm, "ClosedForm"), ("euler", "'euler'"), (None, "None"), (0.1, "0.1")):
        with refuses(TypeError, "solver", "Euler", "Equilibrium", shown):
            wrap(solver=wrong)


def test_output_rules() -> None:
    for wrong in ("free", "Clamped", None, 3):
        with refuses(ValueError, "output", "'clamped'", "'relaxed'", repr(wrong)):
            wrap(output=wrong)


def test_vertices() -> None:
    allowed = ("vertices", "'activations'", "'modules'", "iterable")
    with refuses(ValueError, *allowed, "'layers'"):
        wrap(vertices="layers")
    with refuses(ValueError, *allowed, "''"):
        wrap(vertices="")
    with refuses(TypeError, *allowed, "int"):
        wrap(vertices=3)
    with refuses(TypeError, *allowed, "None"):
        wrap(vertices=None)
    with refuses(TypeError, *allowed, "Tanh"):
        wrap(vertices=nn.Tanh())
    with refuses(TypeError, "vertices", "modules", "'1'"):
        wrap(vertices=["1"])
    with refuses(ValueError, "vertices", "Tanh", "not part of", "Sequential"):
        wrap(vertices=[nn.Tanh()])


def test_no_vertex_found() -> None:
    linear = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(4, 2))
    with refuses(ValueError, "'activations'", "no vertex", "Sequential", "vertices='modules'"):
        wrap(linear)
    with refuses(ValueError, "vertices", "no vertex", "vertices='modules'"):
        wrap(linear, vertices=[])


def test_a_model_that_calls_none_of_its_vertices_is_told_so() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act = nn.Linear(3, 2), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x))

    model = ActivationRelaxation(Functional())
    with pytest.warns(UserWarning, match="none of the vertices .act, …. was called.*vertices='modules'"):
        model(torch.randn(2, 3))


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


@pytest.mark.parametrize("solver", [ClosedForm(), Euler(), Equilibrium()], ids=name_of)
def test_second_derivatives(solver: Solver) -> None:
    loss = squares(wrap(solver=solver)(torch.randn(2, 3)))
    with refuses(RuntimeError, "create_graph", "second derivative"):
        backward(loss, create_graph=True)


@pytest.mark.parametrize("solver", [ClosedForm(), Equilibrium()], ids=name_of)
def test_transforms_that_differentiate_by_themselves(solver: Solver) -> None:
    model, x = ActivationRelaxation(mlp(3, 4, 2), solver=solver), torch.zeros(2, 3)
    with refuses(RuntimeError, "torch.func", "loss.backward()", "wrapper.module"):
        torch.func.vmap(model)(x)
    with refuses(RuntimeError, "torch.func"):
        torch.func.grad(lambda z: squares(model(z)))(x)
    with refuses(RuntimeError, "torch.func"):
        torch.func.vjp(model, x)
    # Where there is nothing to train, nothing would relax anyway.
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(model)(x), model(x))
    model.requires_grad_(False)
    assert torch.equal(torch.func.vmap(model)(x), model(x))
    with refuses(RuntimeError, "torch.func"):
        torch.func.grad(lambda z: squares(model(z)))(x)


class InAnObject(nn.Module):
    """Its result is in an object, in the place that ``wrap`` gives it."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.wrap = mlp(3, 4, 2), wrap

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.wrap(self.net(x)))


def test_a_result_where_nothing_can_be_put_in_its_place() -> None:
    module = InAnObject(lambda y: (y,))
    with refuses(TypeError, "SimpleNamespace.logits[0]", "register", "Equilibrium()"):
        wrap(module, solver=PAPER)(torch.randn(2, 3))
    assert wrap(module, solver=Equilibrium())(torch.randn(2, 3)).logits[0].requires_grad  # nothing is cut


@pytest.mark.parametrize("output", ["clamped", "relaxed"])
def test_a_result_in_an_object_is_put_in_its_place(output: Any) -> None:
    module, x = InAnObject(lambda y: [y, 2 * y]), torch.randn(2, 3)

    def gradients(model: nn.Module) -> list[Tensor]:
        result = model(x).logits
        return list(torch.autograd.grad(squares(result[0]) + squares(result[1]), list(model.parameters())))

    exact = gradients(module)
    for a, b in zip(gradients(wrap(module, solver=ClosedForm(0.9, 400), output=output)), exact, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(gradients(wrap(module, solver=Euler(0.1, 2), output=output))[0], exact[0], rtol=0.1)


def test_the_modules_own_errors_come_through() -> None:
    for model in (mlp(3, 4, 2), wrap()):
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            model(torch.randn(2, 5))
        with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
            model(torch.randn(2, 3), y=1)


def test_diagnostics() -> None:
    plain, x = mlp(3, 4, 2), torch.randn(2, 3)
    diagnostics: list[Any] = [alignment, convergence]
    for diagnose in diagnostics:
        with refuses(TypeError, "model", "ActivationRelaxation", "Sequential"):
            diagnose(plain, squares, x)
        with refuses(TypeError, "loss_fn", "scalar", "(2, 2)"):
            diagnose(wrap(), lambda y: y, x)
        with refuses(TypeError, "loss_fn", "scalar", "float"):
            diagnose(wrap(), lambda y: 3.0, x)
    for solver in (Equilibrium(), Continuous()):
        with refuses(ValueError, "solver", "Euler("):
            convergence(wrap(solver=solver), squares, x)


# ------------------------------------------------------------------------------------------------ states that overflow


def exploding() -> tuple[nn.Sequential, Tensor]:
    """Three layers that multiply by 2e13, from an input small enough for the activities 2e-24, 4e-11, 8e2."""
    network = nn.Sequential()
    for _ in range(3):
        network.extend([nn.Linear(2, 2, bias=False), nn.ReLU()])
    network.append(nn.Linear(2, 1, bias=False))
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.weight, 1e13)
    return network, torch.full((1, 2), 1e-37)


@pytest.mark.parametrize(
    "solver", [Euler(1.0, 5), ClosedForm(1.0, 5), ClosedForm(0.5, 5), Euler(0.5, 5), Euler(0.5, 5, tolerance=0.1)]
)
def test_overflow_names_the_vertex_and_the_step(solver: Solver) -> None:
    """The last state rises to 1e13 in step 1, the one above it to 2e26 in step 2, the next to 4e39 in step 3."""
    network, x = exploding()
    with pytest.raises(NonFiniteStateError, match=r"vertex '1'.*step 3") as caught:
        backward(wrap(network, solver=solver)(x).sum())
    assert caught.value.vertex == "1"
    assert caught.value.step == 3


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_overflow_in_sequence_comes_in_the_first_step(order: Any) -> None:
    network, x = exploding()
    for solver in (Euler(0.9, 1, order=order), ClosedForm(0.9, 1, order=order)):
        model = wrap(network, solver=solver)
        if order == "simultaneous":  # one step moves nothing by more than one layer
            backward(model(x).sum())
            continue
        with pytest.raises(NonFiniteStateError) as caught:
            backward(model(x).sum())
        assert (caught.value.vertex, caught.value.step) == ("1", 1)


@pytest.mark.parametrize("measure_residual", [False, True])
def test_overflow_at_equilibrium_names_the_vertex(measure_residual: bool) -> None:
    network, x = exploding()
    model = wrap(network, solver=Equilibrium(), measure_residual=measure_residual)
    with pytest.raises(NonFiniteStateError, match="vertex '1'") as caught:
        backward(model(x).sum())
    assert caught.value.step is None


def test_an_input_that_is_not_a_number() -> None:
    x = torch.tensor([[1.0, math.nan, 1.0]])
    with_steps: tuple[Solver, ...] = (Euler(), PAPER)
    for solver in with_steps:
        with pytest.raises(NonFiniteStateError, match=r"vertex '1'.*start") as caught:
            backward(squares(wrap(mlp(3, 4, 4, 2), solver=solver)(x)))
        assert (caught.value.vertex, caught.value.step) == ("1", 0)
    for solver in (Continuous(), ClosedForm(), Equilibrium()):
        with pytest.raises(NonFiniteStateError) as caught:
            backward(squares(wrap(mlp(3, 4, 4, 2), solver=solver)(x)))
        assert (caught.value.vertex in ("1", "3"), caught.value.step) == (True, None)


def test_an_infinite_loss_gradient() -> None:
    x = torch.ones(1, 3)
    for solver in (Euler(), PAPER):
        with pytest.raises(NonFiniteStateError) as caught:
            backward((math.inf * wrap(mlp(3, 4, 4, 2), solver=solver)(x)).sum())
        assert (caught.value.vertex, caught.value.step) == ("3", 1)
    with pytest.raises(NonFiniteStateError):
        backward((math.inf * wrap(mlp(3, 4, 4, 2), solver=Equilibrium())(x)).sum())


def test_a_large_sum_of_finite_states_is_no_overflow() -> None:
    network, x = mlp(2, 4000, 1), torch.zeros(1, 2)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(network.get_parameter("2.weight"), 1e36)  # 4000 states of 1e36 add up to infinity
    for solver in (Euler(1.0, 2), ClosedForm(), Equilibrium()):
        model = wrap(network, solver=solver)
        backward(model(x).sum())
        assert model.last_relaxation is not None


@pytest.mark.parametrize("solver", [Euler(), ClosedForm(), Equilibrium(), Continuous()], ids=name_of)
def test_infinities_may_pass(solver: Solver) -> None:
    model = wrap(solver=solver, check_finite=False)
    backward((math.inf * model(torch.ones(1, 3))).sum())
    assert not all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_refused_backward_pass_leaves_no_gradients() -> None:
    model = wrap(solver=PAPER)
    with pytest.raises(NonFiniteStateError):
        backward((math.inf * model(torch.ones(1, 3))).sum())
    assert all(p.grad is None for p in model.parameters())


def test_the_error_goes_between_processes() -> None:
    for step in (None, 0, 3):
        error = NonFiniteStateError("net.3", step)
        twin = pickle.loads(pickle.dumps(error))
        assert type(twin) is NonFiniteStateError
        assert isinstance(twin, FloatingPointError)
        assert (str(twin), twin.vertex, twin.step) == (str(error), "net.3", step)
        assert "'net.3'" in str(twin)
