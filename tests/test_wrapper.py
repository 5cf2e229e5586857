"""What the wrapper is as a module: its result, its state, its options and its record."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relaxprop import PAPER, ActivationRelaxation, ClosedForm, Continuous, Equilibrium, Euler, Frozen, Relaxation
from relaxprop.solvers import Solver
from tests.compare import assert_same_gradients, backward, gradients, largest_distance, refuses, squares
from tests.literal import LiteralChain, relax
from tests.problems import (
    CONDITIONS,
    PROBLEMS,
    SOLVERS,
    STOPPED_EARLY,
    Branches,
    Problem,
    activity_gradients,
    mlp,
    name_of,
    regularised,
)

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=name_of)


class Larger(nn.Module):
    """A model with trained layers before and after the one in the middle."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.before, self.middle, self.after = nn.Linear(3, 4), middle, nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.after(torch.tanh(self.middle(torch.tanh(self.before(x)))))
        return output


def same_state(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


# -------------------------------------------------------------------------------------------------------------- result


@pytest.mark.parametrize("solver", [ClosedForm(), Equilibrium()], ids=name_of)
@every_problem
def test_the_result_is_the_modules_own(problem: Problem, solver: Solver) -> None:
    module, inputs = problem.build()
    model = ActivationRelaxation(copy.deepcopy(module), solver=solver, vertices=problem.vertices)
    for _ in range(2):
        torch.manual_seed(3)
        expected = module(*inputs)
        torch.manual_seed(3)
        torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=0)
    assert same_state(model, module)  # batch norm's statistics included


def test_results_keep_their_types_and_what_is_no_tensor() -> None:
    module, inputs = next(p for p in PROBLEMS if p.name == "nested").build()
    result = ActivationRelaxation(module)(*inputs)
    assert list(result) == ["hidden", "heads", "best", "none"]
    assert isinstance(result["heads"], tuple)
    assert isinstance(result["heads"][1], list)
    assert not result["best"].requires_grad
    assert result["none"] is None
    assert result["hidden"].requires_grad


def test_keyword_arguments_reach_the_module() -> None:
    module, (x, more) = next(p for p in PROBLEMS if p.name == "nested").build()
    torch.testing.assert_close(ActivationRelaxation(module)(more=more, x=x), module(x, more), rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_module_is_called_directly(mode: Any) -> None:
    calls: list[int] = []
    model = ActivationRelaxation(mlp(3, 4, 2)).eval()
    model.module.register_forward_hook(lambda module, *_: calls.append(len(module[1]._forward_hooks)))
    with mode():
        output = model(torch.randn(2, 3))
    assert calls == [0]  # none of ours
    assert output.grad_fn is None


def test_a_fully_frozen_module_is_called_directly() -> None:
    model = ActivationRelaxation(mlp(3, 4, 2).requires_grad_(False))
    assert not model(torch.randn(2, 3)).requires_grad
    x = torch.randn(2, 3, requires_grad=True)
    assert_same_gradients(gradients(model, (x,)), gradients(model, (x,)))


# --------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("make", [lambda: mlp(3, 4, 2), Branches, regularised])
def test_a_plain_state_loads_into_the_wrapper_and_back(make: Any) -> None:
    plain, other = make(), make()
    model = ActivationRelaxation(make())
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=True)
    assert same_state(model, plain)
    other.load_state_dict(model.state_dict(), strict=True)
    assert same_state(other, plain)


def test_the_state_goes_through_a_file() -> None:
    plain, model, file = regularised(), ActivationRelaxation(regularised()), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert same_state(model, plain)


def test_a_state_loads_where_the_wrapper_is_part_of_a_larger_model() -> None:
    plain, wrapped = Larger(mlp(4, 5, 2)), Larger(ActivationRelaxation(mlp(4, 5, 2)))
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    wrapped.load_state_dict(plain.state_dict(), strict=True)
    assert same_state(wrapped, plain)
    fresh = Larger(mlp(4, 5, 2))
    fresh.load_state_dict(wrapped.state_dict(), strict=True)
    assert same_state(fresh, plain)
    again = Larger(ActivationRelaxation(mlp(4, 5, 2)))
    state = wrapped.state_dict()
    keys = list(state)
    again.load_state_dict(state, strict=True)
    assert same_state(again, plain)
    assert list(state) == keys


def test_loading_names_missing_and_unexpected_keys() -> None:
    for model, prefix in (
        (ActivationRelaxation(mlp(4, 5, 2)), ""),
        (Larger(ActivationRelaxation(mlp(4, 5, 2))), "middle."),
    ):
        state = model.state_dict()
        del state[f"{prefix}0.bias"]
        with pytest.raises(RuntimeError, match=r"Missing key.*0\.bias"):
            model.load_state_dict(state)
        state = model.state_dict() | {f"{prefix}9.bias": torch.zeros(1)}
        with pytest.raises(RuntimeError, match=r"Unexpected key.*9\.bias"):
            model.load_state_dict(state)
        result = model.load_state_dict(state, strict=False)
        assert len(result.unexpected_keys) == 1
        assert not result.missing_keys


def test_loading_can_assign() -> None:
    plain, model = mlp(3, 4, 2), ActivationRelaxation(mlp(3, 4, 2))
    state = plain.state_dict()
    model.load_state_dict(state, assign=True)
    assert next(model.parameters()).data_ptr() == state["0.weight"].data_ptr()


@pytest.mark.parametrize("chosen", [False, True], ids=["activations", "chosen-modules"])
@pytest.mark.parametrize("way", ["deepcopy", "save"])
def test_a_wrapper_can_be_copied_and_saved_whole(way: str, chosen: bool) -> None:
    module, x = mlp(3, 4, 4, 2).double(), torch.randn(2, 3).double()
    vertices: Any = (module[1], module[2]) if chosen else "activations"
    model = ActivationRelaxation(module, solver=ClosedForm(0.3, 5), vertices=vertices)
    expected = gradients(model, (x,))
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert same_state(twin, model)
    assert twin.last_relaxation == model.last_relaxation
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_gradients(gradients(twin, (x,)), expected)


@pytest.mark.parametrize("frozen", CONDITIONS, ids=name_of)
def test_copies_and_print(frozen: Frozen) -> None:
    module, z = mlp(4, 5, 5, 2).double(), torch.randn(3, 4).double()
    model = ActivationRelaxation(module, solver=Euler(0.3, 4), frozen=frozen)
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


def test_dtype_and_mode_reach_the_module() -> None:
    model = ActivationRelaxation(regularised()).double().eval()
    assert all(p.dtype == torch.float64 for p in model.module.parameters())
    assert not model.module.training
    assert len(list(model.parameters())) == len(list(model.module.parameters()))


# ------------------------------------------------------------------------------------------------------------- options


@every_solver
@every_problem
def test_a_relaxed_output_is_one_more_vertex_and_ends_at_the_same_equilibrium(problem: Problem, solver: Solver) -> None:
    module, inputs = problem.build()
    model = ActivationRelaxation(module, solver=solver, vertices=problem.vertices, output="relaxed")
    assert_same_gradients(gradients(model, inputs, problem.loss), problem.gradients())
    assert model.last_relaxation is not None
    if not isinstance(solver, Equilibrium):
        assert model.last_relaxation.depth == problem.depth + (not problem.ends_in_vertex)


@pytest.mark.parametrize("solver", [Euler(0.3, 4), ClosedForm(0.3, 4)], ids=name_of)
def test_a_relaxed_output_starts_at_its_activity(solver: Solver) -> None:
    """The literal chain with one more state: x^L relaxes to the error from its feedforward value."""
    chain, z = mlp(4, 6, 5, 3).double(), torch.randn(3, 4).double()
    literal = LiteralChain(chain, z)
    error, x = literal.error, list(literal.activities)
    output = chain(z).detach()
    for _ in range(4):
        literal.error = output
        x = [x_i + 0.3 * (d - x_i) for x_i, d in zip(x, literal.drive(x), strict=True)]
        output = output + 0.3 * (error - output)
    literal.error = output
    model = ActivationRelaxation(chain, solver=solver, output="relaxed")
    assert_same_gradients(gradients(model, (z,)), literal.gradients(x))


def test_a_clamped_output_that_is_a_vertex_is_the_loss_gradient_from_the_start() -> None:
    module, x = nn.Sequential(*mlp(3, 4, 2), nn.Tanh()).double(), torch.randn(2, 3).double()
    clamped = gradients(ActivationRelaxation(module, solver=Euler(0.1, 1)), (x,))
    exact = gradients(module, (x,))
    relaxed = gradients(ActivationRelaxation(module, solver=Euler(0.1, 1), output="relaxed"), (x,))
    assert_same_gradients({"2.bias": clamped["2.bias"]}, {"2.bias": exact["2.bias"]})
    for found, name in ((clamped, "0.bias"), (relaxed, "0.bias"), (relaxed, "2.bias")):
        assert largest_distance({name: found[name]}, {name: exact[name]}) > 1e-3


def test_residuals_are_measured_only_when_asked_for() -> None:
    module, x = mlp(3, 4, 4, 2).double(), torch.randn(2, 3).double()
    model = ActivationRelaxation(module)
    gradients(model, (x,))
    assert model.last_relaxation is not None
    assert model.last_relaxation.residuals is None
    assert model.last_relaxation.residual is None


@pytest.mark.parametrize("solver", [Euler(0.3, 4), ClosedForm(0.3, 4)], ids=name_of)
def test_residuals_are_the_distance_to_equilibrium(solver: Solver) -> None:
    chain, z = mlp(4, 6, 5, 3).double(), torch.randn(3, 4).double()
    literal = LiteralChain(chain, z)
    x = list(literal.activities)
    for _ in range(4):
        x = [x_i + 0.3 * (d - x_i) for x_i, d in zip(x, literal.drive(x), strict=True)]
    expected = [float((d - x_i).norm() / d.norm()) for x_i, d in zip(x, literal.drive(x), strict=True)]
    model = ActivationRelaxation(chain, solver=solver, measure_residual=True)
    gradients(model, (z,))
    assert model.last_relaxation is not None
    assert model.last_relaxation.residuals == pytest.approx({"1": expected[0], "3": expected[1]}, rel=1e-9)
    assert model.last_relaxation.residual == pytest.approx(max(expected), rel=1e-9)


@every_solver
@every_problem
def test_residuals_vanish_at_equilibrium_and_do_not_change_the_gradients(problem: Problem, solver: Solver) -> None:
    module, inputs = problem.build()
    model = ActivationRelaxation(module, solver=solver, vertices=problem.vertices, measure_residual=True)
    assert_same_gradients(gradients(model, inputs, problem.loss), problem.gradients())
    assert model.last_relaxation is not None
    assert model.last_relaxation.residual is not None
    assert model.last_relaxation.residual < 1e-11
    assert model.last_relaxation.residuals is not None
    assert len(model.last_relaxation.residuals) == model.last_relaxation.vertices


def test_vertices_can_be_chosen_one_by_one() -> None:
    module, x = mlp(3, 4, 4, 4, 2).double(), torch.randn(2, 3).double()
    solver = Euler(1.0, 50, order="simultaneous")
    choices: list[tuple[Any, set[str]]] = [
        ((module[1], module[4]), {"1", "4"}),
        ((m for m in module if isinstance(m, nn.Linear)), {"0", "2", "4", "6"}),
        ("modules", {str(i) for i in range(7)}),
        ("activations", {"1", "3", "5"}),
    ]
    for vertices, names in choices:
        model = ActivationRelaxation(module, solver=solver, vertices=vertices, measure_residual=True)
        for _ in range(2):  # an iterator is used up only once
            assert_same_gradients(gradients(model, (x,)), gradients(module, (x,)))
        record = model.last_relaxation
        assert record is not None
        assert record.residuals is not None
        assert set(record.residuals) == names
        assert record.vertices == record.depth == len(names)


def test_a_submodule_chosen_as_vertex_may_have_submodules_of_its_own() -> None:
    module, x = nn.Sequential(mlp(3, 4, 4), mlp(4, 4, 2)).double(), torch.randn(2, 3).double()
    model = ActivationRelaxation(module, solver=ClosedForm(0.9, 100), vertices=[module[0]])
    assert_same_gradients(gradients(model, (x,)), gradients(module, (x,)))
    assert model.last_relaxation is not None
    assert model.last_relaxation.depth == 1


def test_a_subclass_of_an_activation_is_a_vertex() -> None:
    class Mine(nn.Tanh):
        pass

    network = nn.Sequential(nn.Linear(3, 4), Mine(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model = ActivationRelaxation(network, solver=PAPER)
    backward(squares(model(torch.randn(2, 3))))
    assert model.last_relaxation is not None
    assert model.last_relaxation.vertices == 2


def test_vertices_given_as_a_module_list_stay_out_of_the_state() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    module = Layers()
    larger = nn.Sequential(ActivationRelaxation(module, vertices=module.layers), nn.Linear(3, 1))
    larger.load_state_dict(larger.state_dict())
    assert len(larger.state_dict()) == 6
    with pytest.raises(TypeError, match=r"vertices must be .* got Sequential"):
        ActivationRelaxation(nn.Sequential(nn.Sequential(nn.Tanh())), vertices=nn.Sequential(nn.Tanh()))


def test_printing_shows_what_the_wrapper_does() -> None:
    text = repr(ActivationRelaxation(mlp(3, 4, 2), solver=Euler(0.2, 7, order="sequential"), output="relaxed"))
    for part in ("Euler(step_size=0.2, num_steps=7, order='sequential'", "activations", "relaxed", "Linear"):
        assert part in text


def test_a_model_prints_though_a_chosen_vertex_was_replaced() -> None:
    network = mlp(3, 4, 4, 2)
    model = ActivationRelaxation(network, vertices=[network[1], network[3]])
    assert "vertices=1, 3" in repr(model)
    network[3] = nn.ReLU()
    assert "vertices=1, Tanh" in repr(model)
    with pytest.raises(ValueError, match="a Tanh that is not part of the Sequential"):
        model(torch.zeros(2, 3))


# ------------------------------------------------------------------------------------------- options that are set later


def test_the_solver_may_change_between_passes() -> None:
    chain, z = mlp(4, 6, 5, 3).double(), torch.randn(3, 4).double()
    model, literal = ActivationRelaxation(chain), LiteralChain(chain, z)
    for n in (2, 5):
        model.solver = Euler(0.3, n)
        assert_same_gradients(gradients(model, (z,)), literal.gradients(relax(literal, 0.3, n, "simultaneous")))
    model.solver = Equilibrium()
    assert_same_gradients(gradients(model, (z,)), gradients(chain, (z,)))
    model.solver = PAPER
    expected = literal.gradients(relax(literal, 0.1, 100, "simultaneous"))
    assert_same_gradients(gradients(model, (z,)), expected)


def test_vertices_chosen_anew_hold_from_the_next_pass_on() -> None:
    torch.manual_seed(0)
    model = ActivationRelaxation(mlp(3, 4, 4, 2), solver=Euler(0.3, 4))
    x = torch.randn(5, 3)
    chosen = [model.module.get_submodule("1")]

    def vertices_that_relaxed() -> int | None:
        gradients(model, [x])
        assert model.last_relaxation is not None
        return model.last_relaxation.vertices

    for vertices, expected in (("activations", 2), ("modules", 5), (chosen, 1)):
        model.vertices = vertices  # type: ignore[assignment]
        assert vertices_that_relaxed() == expected
    model.vertices = nn.ModuleList([*chosen, model.module.get_submodule("3")])
    assert vertices_that_relaxed() == 2
    model.vertices = (m for m in model.module.children() if not isinstance(m, nn.Linear))
    for _ in range(2):
        assert vertices_that_relaxed() == 2


SETTINGS: list[dict[str, Any]] = [
    {"solver": Euler(0.3, 4)},
    {"frozen": Frozen(update_activity=False)},
    {"frozen": Frozen(update_derivative=False), "output": "relaxed"},
    {"output": "relaxed"},
    {"vertices": "modules"},
    {"solver": Euler(0.3, 4), "frozen": Frozen(relaxation_derivative=False)},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_that_are_set_later_are_those_of_a_new_wrapper(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network, x = mlp(3, 4, 4, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    model = ActivationRelaxation(network, solver=ClosedForm(0.3, 4))
    before = gradients(model, [x])
    for name, value in settings.items():
        setattr(model, name, value)
    found = gradients(model, [x])
    assert_same_gradients(
        found, gradients(ActivationRelaxation(network, **{"solver": ClosedForm(0.3, 4)} | settings), [x])
    )
    if list(settings) != ["solver"]:
        with pytest.raises(AssertionError):
            assert_same_gradients(found, before)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("solver", Euler, TypeError),
        ("frozen", None, TypeError),
        ("frozen", Frozen(relaxation_derivative=False), ValueError),  # the closed form cannot solve it
        ("output", "free", ValueError),
        ("vertices", "neurons", ValueError),
        ("vertices", [nn.Tanh()], ValueError),
        ("check_finite", 1, TypeError),
        ("measure_residual", None, TypeError),
    ],
)
def test_settings_that_are_set_later_are_checked_like_the_first(name: str, value: Any, error: Any) -> None:
    model = ActivationRelaxation(mlp(3, 4, 2))
    before = getattr(model, name)
    with refuses(error, "solver" if isinstance(value, Frozen) else name):
        setattr(model, name, value)
    assert getattr(model, name) is before


# -------------------------------------------------------------------------------------------------------------- record


@pytest.mark.parametrize("solver", SOLVERS + STOPPED_EARLY, ids=lambda s: f"{name_of(s)}-{s}")
def test_the_record_of_the_latest_backward_pass(solver: Solver) -> None:
    module, x = Branches().double(), torch.randn(2, 4).double()
    model = ActivationRelaxation(module, solver=solver)
    assert model.last_relaxation is None
    output = model(x)
    assert model.last_relaxation is None
    backward(squares(output))
    record = model.last_relaxation
    assert isinstance(record, Relaxation)
    assert record.vertices == (None if solver == Equilibrium() else 4)
    assert record.depth == (None if solver == Equilibrium() else 3)
    assert record.num_steps == getattr(solver, "num_steps", None)
    assert record.converged == (solver in SOLVERS)
    assert (record.remaining < 1e-15) == (solver in SOLVERS)
    assert record.transports >= 1
    with pytest.raises(AttributeError):
        record.depth = 1


@every_solver
@every_problem
def test_the_record_counts_the_vertices_that_relaxed(problem: Problem, solver: Solver) -> None:
    module, inputs = problem.build()
    model = ActivationRelaxation(module, solver=solver, vertices=problem.vertices)
    gradients(model, inputs, problem.loss)
    assert model.last_relaxation is not None
    # `Equilibrium` leaves the graph whole, and so has no vertices to count.
    count = sum(g is not None for g in activity_gradients(problem))
    assert model.last_relaxation.vertices == (None if isinstance(solver, Equilibrium) else count)


def test_the_record_tells_what_the_initial_state_still_weighs() -> None:
    """Three hops at most: the three first terms of Binomial(4, 0.3) and of Poisson(1.2)."""
    module, x = Branches().double(), torch.randn(2, 4).double()
    binomial = 0.7**4 + 4 * 0.3 * 0.7**3 + 6 * 0.3**2 * 0.7**2
    poisson = 2.718281828459045**-1.2 * (1 + 1.2 + 1.2**2 / 2)
    for solver, expected in ((ClosedForm(0.3, 4), binomial), (Euler(0.3, 4), binomial), (Continuous(1.2), poisson)):
        model = ActivationRelaxation(module, solver=solver)
        gradients(model, (x,))
        assert model.last_relaxation is not None
        assert model.last_relaxation.remaining == pytest.approx(expected, rel=1e-12)
    model = ActivationRelaxation(module, solver=Equilibrium())
    gradients(model, (x,))
    assert model.last_relaxation is not None
    assert model.last_relaxation.remaining == 0
