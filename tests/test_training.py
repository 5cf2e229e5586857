"""The wrapper in the life of a PyTorch user: what works with a plain module works with a wrapped one."""

import copy
import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from relaxprop import ActivationRelaxation, ClosedForm, Equilibrium, Euler, Frozen, use_feedback
from relaxprop.solvers import Solver
from tests.compare import (
    Gradients,
    assert_same,
    assert_same_gradients,
    backward,
    both,
    gradients,
    of_parameters,
    squares,
)
from tests.problems import PROBLEMS, SOLVERS, Problem, mlp, name_of, regularised, twins

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=name_of)

# One that needs no states and one that has them.
two_solvers = pytest.mark.parametrize("solver", [Equilibrium(), ClosedForm(0.9, 100)], ids=name_of)


def watch(tensor: Any, hook: Callable[[Tensor], Any]) -> None:
    """``tensor.register_hook(hook)``, which PyTorch has left without types."""
    tensor.register_hook(hook)


# ------------------------------------------------------------------------------------------------------ gradient flow


@every_solver
def test_gradients_accumulate(solver: Solver) -> None:
    xs = torch.randn(3, 2, 4).double()

    def use(model: nn.Module) -> None:
        for x in xs:
            backward(squares(model(x)))

    both(*twins(solver, 4, 5, 5, 2), use)


@every_solver
def test_a_gradient_that_was_no_number_before_is_not_taken_for_a_hooks_doing(solver: Solver) -> None:
    """After a step that went wrong, without zero_grad()."""
    plain, model = twins(solver, 4, 5, 5, 2)
    x = torch.randn(2, 4).double()
    for network in (plain, model):
        first = next(network.parameters())
        first.grad = torch.full_like(first, math.nan)
        backward(squares(network(x)))
        assert first.grad is not None
        assert first.grad.isnan().all()
        first.grad = None
    assert_same_gradients(of_parameters(model.module), of_parameters(plain))


@two_solvers
def test_the_model_may_be_applied_to_its_own_result(solver: Solver) -> None:
    x = torch.randn(2, 4).double()
    both(*twins(solver, 4, 5, 4), lambda model: backward(squares(model(model(x)))))


@every_solver
def test_layers_before_and_after_the_wrapper_train_too(solver: Solver) -> None:
    before, after = nn.Linear(3, 4).double(), nn.Linear(2, 2).double()
    plain, model = twins(solver, 4, 5, 5, 2)
    x = torch.randn(2, 3).double()
    found = []
    for middle in (plain, model):
        for layer in (before, after):
            layer.zero_grad()
        backward(squares(after(torch.tanh(middle(torch.tanh(before(x)))))))
        outside = {f"{i}.{n}": p.grad for i, layer in enumerate((before, after)) for n, p in layer.named_parameters()}
        found.append(outside | of_parameters(getattr(middle, "module", middle)))
    assert_same_gradients(found[1], found[0])


@every_solver
def test_an_input_may_be_the_only_thing_trained(solver: Solver) -> None:
    plain, model = twins(solver, 4, 5, 5, 2)
    plain.requires_grad_(False)
    model.requires_grad_(False)
    x = torch.randn(2, 4).double()
    assert_same_gradients(gradients(model, (x,)), gradients(plain, (x,)))


@every_solver
def test_frozen_parameters_get_none_and_pass_gradients_on(solver: Solver) -> None:
    x = torch.randn(2, 4).double()
    for frozen in ({"2.weight", "2.bias"}, {"0.weight", "0.bias"}, {"0.bias", "4.weight"}):
        plain, model = twins(solver, 4, 5, 5, 2)
        for module in (plain, model.module):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name not in frozen)
        backward(squares(model(x)))
        backward(squares(plain(x)))
        found = of_parameters(model.module)
        assert_same_gradients(found, of_parameters(plain))
        assert {name for name, g in found.items() if g is None} == frozen


@every_solver
def test_unused_parameters_get_none(solver: Solver) -> None:
    problem = next(p for p in PROBLEMS if p.name == "nested")
    found = problem.gradients(solver)
    assert {name for name, g in found.items() if g is None} == {"other.weight", "other.bias"}


@every_solver
def test_only_the_gradients_asked_for(solver: Solver) -> None:
    plain, model = twins(solver, 4, 5, 5, 2)
    x = torch.randn(2, 4).double()
    expected = torch.autograd.grad(squares(plain(x)), [plain.get_parameter("2.weight")])
    found = torch.autograd.grad(squares(model(x)), [model.get_parameter("2.weight")])
    assert_same(found[0], expected[0])
    assert all(p.grad is None for p in model.parameters())


@every_problem
def test_no_output_gradient_where_the_loss_ignores_the_model(problem: Problem) -> None:
    module, inputs = problem.build()
    model = ActivationRelaxation(module, vertices=problem.vertices)
    model(*inputs)
    backward(torch.ones(1, requires_grad=True).sum())
    assert all(p.grad is None for p in module.parameters())
    assert model.last_relaxation is None


# --------------------------------------------------------------------------------------------------------------- hooks


@two_solvers
def test_forward_hooks_run_once_and_may_replace_the_result(solver: Solver) -> None:
    x = torch.randn(2, 4).double()
    calls: dict[int, list[str]] = {}

    def use(model: nn.Module) -> None:
        seen = calls.setdefault(id(model), [])
        layers = list(getattr(model, "module", model).children())

        def before(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            seen.append("before")
            return (2 * args[0],)

        def after(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            seen.append("after")
            return output + 1

        for layer in layers:
            layer.register_forward_pre_hook(before)
            layer.register_forward_hook(after)
        backward(squares(model(x)))
        assert seen == ["before", "after"] * len(layers)

    both(*twins(solver, 4, 5, 5, 2), use)


@every_solver
def test_parameter_hooks_run_once_with_the_final_gradient(solver: Solver) -> None:
    x = torch.randn(2, 4).double()
    plain, model = twins(solver, 4, 5, 5, 2)
    expected = {name: g for name, g in gradients(plain, (x,)).items() if not name.startswith("input")}
    model.zero_grad()
    seen: dict[str, list[Tensor]] = {name: [] for name in expected}
    accumulated: dict[str, list[Tensor]] = {name: [] for name in expected}
    for name, parameter in model.module.named_parameters():

        def hook(gradient: Tensor, name: str = name) -> Tensor:
            seen[name].append(gradient.clone())
            return 2 * gradient

        def post(parameter: Tensor, name: str = name) -> None:
            assert parameter.grad is not None
            accumulated[name].append(parameter.grad.clone())

        watch(parameter, hook)
        cast(Any, parameter).register_post_accumulate_grad_hook(post)
    backward(squares(model(x)))
    for name, gradient in expected.items():
        assert gradient is not None
        assert len(seen[name]) == len(accumulated[name]) == 1
        assert_same(seen[name][0], gradient, name)
        assert_same(accumulated[name][0], 2 * gradient, name)
    doubled = {name: None if g is None else 2 * g for name, g in expected.items()}
    assert_same_gradients(of_parameters(model.module), doubled)


@every_problem
def test_parameter_hooks_leave_the_gradients_alone(problem: Problem) -> None:
    module, inputs = problem.build()
    names: list[str] = []
    for name, parameter in module.named_parameters():
        # As of any autograd.Function, a parameter that only an unused output reads has its hook called with None.
        def hook(gradient: Tensor | None, name: str = name) -> None:
            if gradient is not None:
                names.append(name)

        watch(parameter, hook)
    model = ActivationRelaxation(module, solver=ClosedForm(0.9, 100), vertices=problem.vertices)
    found = gradients(model, inputs, problem.loss)
    assert_same_gradients(found, problem.gradients())
    trained = {name for name, g in found.items() if g is not None and not name.startswith("input")}
    assert sorted(names) == sorted(trained)


@two_solvers
def test_hooks_on_the_output_and_on_the_input_see_their_gradients(solver: Solver) -> None:
    found = []
    for model in twins(solver, 4, 5, 5, 2):
        x = torch.ones(2, 4).double().requires_grad_()
        output = model(x)
        seen: list[Tensor] = []
        watch(x, seen.append)
        watch(output, seen.append)
        output.retain_grad()
        backward(squares(output))
        assert output.grad is not None
        found.append([*seen, output.grad])
    for ours, expected in zip(found[1], found[0], strict=True):
        assert_same(ours, expected)


# ---------------------------------------------------------------------------------------------- optimisers, precision


@pytest.mark.parametrize(
    "optimiser",
    [lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), lambda p: torch.optim.Adam(p, 0.01)],
    ids=["SGD", "Adam"],
)
@two_solvers
def test_training_at_equilibrium_follows_backpropagation(solver: Solver, optimiser: Any) -> None:
    plain, model = twins(solver, 4, 8, 8, 2)
    x, target = torch.randn(16, 4).double(), torch.randn(16, 2).double()
    losses = []
    for network in (plain, model):
        steps = optimiser(network.parameters())
        for _ in range(20):
            steps.zero_grad()
            loss = nn.functional.mse_loss(network(x), target)
            backward(loss)
            steps.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same(ours.detach(), expected.detach(), tolerance=1e-8)


def test_training_with_the_papers_schedule_learns() -> None:
    model = ActivationRelaxation(mlp(2, 16, 16, 1))
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    exclusive_or = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(200):
        optimiser.zero_grad()
        backward(((model(x) - exclusive_or) ** 2).sum())
        optimiser.step()
    assert (model(x) - exclusive_or).abs().max().item() < 0.1


@two_solvers
def test_gradients_may_be_clipped(solver: Solver) -> None:
    x = torch.randn(2, 4).double()

    def use(model: nn.Module) -> None:
        backward(squares(model(x)))
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    both(*twins(solver, 4, 5, 5, 2), use)


@every_solver
def test_autocast_to_bfloat16(solver: Solver) -> None:
    torch.manual_seed(0)
    plain = mlp(8, 16, 16, 4)
    model, x = ActivationRelaxation(copy.deepcopy(plain), solver=solver), torch.randn(4, 8)
    for network in (plain, model):
        with torch.autocast("cpu", torch.bfloat16):
            output = network(x)
            loss = squares(output.float())
        assert output.dtype == torch.bfloat16
        backward(loss)
    found, expected = of_parameters(model.module), of_parameters(plain)
    assert all(g is not None and g.dtype == torch.float32 for g in found.values())
    assert_same_gradients(found, expected, tolerance=2e-2)


@every_solver
def test_bfloat16_weights(solver: Solver) -> None:
    module, x = mlp(8, 16, 16, 4).bfloat16(), torch.randn(4, 8).bfloat16()
    found = gradients(ActivationRelaxation(module, solver=solver), (x,))
    assert_same_gradients(found, gradients(module, (x,)))


def test_half_precision_activities_relax_in_float32() -> None:
    """Steps of 0.001 are below bfloat16's resolution, so states kept in it would never move."""
    module, x = mlp(4, 8, 8, 2), torch.randn(16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(
            ActivationRelaxation(module, solver=ClosedForm(0.001, 700)), (x,), lambda y: squares(y.float())
        )
        found = gradients(ActivationRelaxation(module, solver=Euler(0.001, 700)), (x,), lambda y: squares(y.float()))
    for name, gradient in expected.items():
        assert gradient is not None
        assert (actual := found[name]) is not None  # noqa: RUF018
        assert_same(actual.float(), gradient.float(), name, tolerance=5e-2)


@every_solver
def test_complex_weights(solver: Solver) -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            first, second = (nn.Linear(4, n, dtype=torch.complex128) for n in (4, 2))
            self.net = nn.Sequential(first, nn.Tanh(), second)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.net(x.to(torch.complex128))
            return output.abs()

    module, x = Waves(), torch.randn(2, 4).double()

    def real(found: Gradients) -> Gradients:
        return {name: None if g is None else torch.view_as_real(g + 0j) for name, g in found.items()}

    found = real(gradients(ActivationRelaxation(module, solver=solver), (x,)))
    assert_same_gradients(found, real(gradients(module, (x,))))


@two_solvers
def test_dropout_and_batch_norm_are_those_of_the_feedforward_pass(solver: Solver) -> None:
    plain = regularised().double()
    model = ActivationRelaxation(copy.deepcopy(plain), solver=solver)
    x = torch.randn(6, 4).double()

    def use(model: nn.Module) -> None:
        torch.manual_seed(4)
        for _ in range(3):
            backward(squares(model(x)))

    both(plain, model, use)
    for ours, expected in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, expected)
    model.eval()
    plain.eval()
    assert torch.equal(model(x), plain(x))
    both(plain, model, lambda m: backward(squares(m(x))))


def test_relaxing_draws_nothing_from_the_random_state_unless_asynchronous() -> None:
    for solver in (Euler(0.3, 4), ClosedForm(), Equilibrium()):
        _, model = twins(solver, 4, 5, 5, 2)
        state = torch.random.get_rng_state()
        backward(squares(model(torch.ones(2, 4).double())))
        assert torch.equal(torch.random.get_rng_state(), state)


def in_parallel(model: nn.Module, x: Tensor, store: Path) -> Gradients:
    """Gradients by DistributedDataParallel, which all-reduces every parameter that it sees."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        backward(squares(parallel(x)))
        # The group goes last. What lets go of it last joins Gloo's threads, which need Python's lock to let go of the
        # gradients; only the group's own Python object gives the lock free for that, `parallel` would keep it for ever.
        seen = weakref.ref(parallel)
        del parallel
        gc.collect()
        assert seen() is None
    finally:
        torch.distributed.destroy_process_group()
    return of_parameters(model)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    plain, model = twins(ClosedForm(0.9, 100), 4, 5, 5, 2)
    x = torch.randn(2, 4).double()
    backward(squares(plain(x)))
    found = in_parallel(model, x, tmp_path / "store")
    assert_same_gradients(found, of_parameters(plain))


def test_distributed_data_parallel_sees_learned_feedback_under_every_condition(tmp_path: Path) -> None:
    network, x = use_feedback(mlp(4, 5, 5, 2).double(), "learned"), torch.randn(2, 4).double()
    for i, name in enumerate(("relaxation_derivative", "update_derivative", "update_activity")):
        alone, together = (
            ActivationRelaxation(copy.deepcopy(network), solver=Euler(0.3, 9), frozen=Frozen(**{name: False}))
            for _ in range(2)
        )
        backward(squares(alone(x)))
        found = in_parallel(together, x, tmp_path / f"store{i}")
        assert sum("feedback" in parameter for parameter in found) == 3
        assert_same_gradients(found, of_parameters(alone))
