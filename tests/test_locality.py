"""`describe_locality` against tables written by hand, and against what single states reach through the graph."""

import copy
import warnings
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from relaxprop import (
    ActivationRelaxation,
    ClosedForm,
    Continuous,
    Equilibrium,
    Euler,
    Frozen,
    Locality,
    describe_locality,
    drop_derivatives,
    use_feedback,
)
from relaxprop.feedback import FeedbackRule
from relaxprop.inspect.walk import Reads
from relaxprop.solvers import Solver
from relaxprop.update import gradients as weight_gradients
from tests.compare import backward, random_states, squares
from tests.problems import PROBLEMS, Branches, Nested, Problem, Shared, Unrolled, mlp, name_of, regularised


def report(module: nn.Module, *inputs: Any, **options: Any) -> Locality:
    return describe_locality(ActivationRelaxation(module, **options), *inputs)


def by_update(found: Locality) -> dict[str, Reads]:
    """Rows by the state's or by the first parameter's name."""
    rows = {row.update.partition(",")[0]: row for row in found.rows}
    assert len(rows) == len(found.rows)
    return rows


def chain(**options: Any) -> dict[str, Reads]:
    """x^1 = tanh(W^0 z), x^3 = tanh(W^2 x^1), output W^4 x^3."""
    return by_update(report(mlp(3, 4, 4, 2), torch.randn(2, 3), **options))


def state(name: str, children: tuple[str, ...], weights: tuple[str, ...] = (), *more: tuple[str, ...]) -> Reads:
    derivative, non_local = (*more, (), ())[:2]
    return Reads(f"x of {name}", 1, ("own x", *children), weights, derivative, non_local)


def layer(name: str, activities: tuple[str, ...], *more: tuple[str, ...]) -> Reads:
    derivative, non_local = (*more, (), ())[:2]
    return Reads(f"{name}.weight, {name}.bias", 2, activities, (), derivative, non_local)


# ------------------------------------------------------------------------------------------------------- by hand

BASELINE = (
    state(
        "1",
        ("x of 3",),
        ("2.weight, transposed",),
        ("f' of 3 at x̄",),
        ("weight transport: 2.weight", "memory of x̄: f' of 3"),
    ),
    state("3", ("∂L/∂output",), ("4.weight, transposed",), (), ("weight transport: 4.weight",)),
    layer("0", ("pre: input", "x of 1"), ("f' of 1 at input",)),
    layer("2", ("pre: x̄ of 1", "x of 3"), ("f' of 3 at x̄",), ("memory of x̄: f' of 3", "memory of x̄: x̄ of 1")),
    layer("4", ("pre: x̄ of 3", "∂L/∂output"), (), ("memory of x̄: x̄ of 3",)),
)


def test_the_baseline_transports_the_weights_of_every_layer_but_the_first() -> None:
    found = report(mlp(3, 4, 4, 2), torch.randn(2, 3))
    assert found.rows == BASELINE
    assert found.non_local == {"weight transport", "memory of x̄"}
    transported = {entry for row in found.rows for entry in row.non_local if entry.startswith("weight transport")}
    assert transported == {"weight transport: 2.weight", "weight transport: 4.weight"}


@pytest.mark.parametrize("condition", "abcd")
def test_conditions_take_their_quantity_at_the_current_states(condition: Literal["a", "b", "c", "d"]) -> None:
    frozen = {
        "a": Frozen(relaxation_derivative=False),
        "b": Frozen(update_derivative=False),
        "c": Frozen(relaxation_derivative=False, update_derivative=False),
        "d": Frozen(update_activity=False),
    }[condition]
    rows, f_3, x_1 = chain(frozen=frozen, solver=Euler(0.1, 10)), "memory of x̄: f' of 3", "memory of x̄: x̄ of 1"
    in_1, in_2 = ("x" if condition in letters else "x̄" for letters in ("ac", "bc"))
    assert rows["x of 1"].derivative == (f"f' of 3 at {in_1}",)
    assert rows["x of 1"].non_local == ("weight transport: 2.weight", *([f_3] if in_1 == "x̄" else []))
    assert rows["2.weight"].derivative == (f"f' of 3 at {in_2}",)
    presynaptic = "x of 1" if condition == "d" else "x̄ of 1"
    assert rows["2.weight"].activities == (f"pre: {presynaptic}", "x of 3")
    assert rows["2.weight"].non_local == (*([f_3] if in_2 == "x̄" else []), *([] if condition == "d" else [x_1]))
    # What the first layer reads of the feedforward pass is there all the time.
    assert rows["0.weight"] == BASELINE[2]


def test_an_unfrozen_input_is_a_vertex() -> None:
    rows = chain(frozen=Frozen(update_activity=False, input=False))
    assert rows["x of input[0]"] == state(
        "input[0]",
        ("x of 1",),
        ("0.weight, transposed",),
        ("f' of 1 at x̄",),
        ("weight transport: 0.weight", "memory of x̄: f' of 1"),
    )
    assert rows["0.weight"].activities == ("pre: x of input[0]", "x of 1")
    assert rows["0.weight"].non_local == ("memory of x̄: f' of 1",)


@pytest.mark.parametrize(
    ("rule", "weights", "non_local"),
    [
        ("learned", "{}.feedback, learned", ()),
        ("mirror", "{}.feedback, mirrored in phases of noise", ()),
        ("random", "{}.feedback, fixed", ()),
        ("sign", "signs of {}.weight", ("weight signs: {}.weight",)),
        ("symmetric", "{}.weight, transposed", ("weight transport: {}.weight",)),
    ],
)
def test_backwards_weights(rule: FeedbackRule, weights: str, non_local: tuple[str, ...]) -> None:
    found = report(use_feedback(mlp(3, 4, 4, 2), rule), torch.randn(2, 3))
    rows = by_update(found)
    for update, above, remembered in (("x of 1", "2", ("memory of x̄: f' of 3",)), ("x of 3", "4", ())):
        assert rows[update].weights == (weights.format(above),)
        assert rows[update].non_local == (*(entry.format(above) for entry in non_local), *remembered)
    # ψ is updated by what W is updated by: Δψ = ΔW.
    assert [row for row in found.rows if row.equation == 2 and "feedback" not in row.update] == list(BASELINE[2:])
    assert ("2.feedback" in rows) == (rule == "learned")
    for n in ("0", "2", "4") if rule == "learned" else ():
        w, psi = rows[f"{n}.weight"], rows[f"{n}.feedback"]
        assert (w.activities, w.weights, w.derivative, w.non_local) == (
            (psi.activities, psi.weights, psi.derivative, psi.non_local)
        )


@pytest.mark.parametrize(
    ("rule", "magnitudes"),
    [("fixed-sign", "2.feedback, fixed"), ("batch-sign", "magnitudes of 2, drawn in every pass")],
)
def test_signs_with_magnitudes_of_their_own(rule: FeedbackRule, magnitudes: str) -> None:
    row = by_update(report(use_feedback(mlp(3, 4, 4, 2), rule), torch.randn(2, 3)))["x of 1"]
    assert row.weights == ("signs of 2.weight", magnitudes)
    assert row.non_local == ("weight signs: 2.weight", "memory of x̄: f' of 3")


@pytest.mark.parametrize("relaxation", [True, False])
@pytest.mark.parametrize("update", [True, False])
def test_dropped_derivatives(relaxation: bool, update: bool) -> None:
    network = drop_derivatives(mlp(3, 4, 4, 2), relaxation=relaxation, update=update)
    rows = by_update(report(network, torch.randn(2, 3)))
    assert rows["x of 1"].derivative == ("f' of 3 dropped" if relaxation else "f' of 3 at x̄",)
    assert rows["2.weight"].derivative == ("f' of 3 dropped" if update else "f' of 3 at x̄",)
    assert rows["0.weight"].derivative == ("f' of 1 dropped" if update else "f' of 1 at input",)
    assert ("memory of x̄: f' of 3" in rows["x of 1"].non_local) == (not relaxation)
    assert ("memory of x̄: f' of 3" in rows["2.weight"].non_local) == (not update)


def test_all_simplifications_leave_only_the_memory_of_the_presynaptic_activity() -> None:
    network = drop_derivatives(use_feedback(mlp(3, 4, 4, 2), "learned"))
    found = report(network, torch.randn(2, 3))
    assert found.non_local == {"memory of x̄"}
    for name, row in by_update(found).items():
        remembered = {"2": ("memory of x̄: x̄ of 1",), "4": ("memory of x̄: x̄ of 3",)}
        assert row.non_local == remembered.get(name[0], ())
    # Condition d takes even that away (and destroys performance).
    assert report(network, torch.randn(2, 3), frozen=Frozen(update_activity=False)).non_local == set()


def test_branches() -> None:
    """a = tanh(V z), b = tanh(W a), c = tanh(W b + a), d = tanh(U a), output P (c + d) + Q b."""
    rows = by_update(report(Branches(), torch.randn(3, 4)))
    assert rows["x of f_a"] == state(
        "f_a",
        ("x of f_b", "x of f_c", "x of f_d"),
        ("W.weight, transposed", "U.weight, transposed"),
        ("f' of f_b at x̄", "f' of f_c at x̄", "f' of f_d at x̄"),
        (
            *("weight transport: W.weight", "weight transport: U.weight"),
            *("memory of x̄: f' of f_b", "memory of x̄: f' of f_c", "memory of x̄: f' of f_d"),
        ),
    )
    assert rows["x of f_b"].activities == ("own x", "x of f_c", "∂L/∂output")
    assert rows["x of f_b"].weights == ("W.weight, transposed", "Q.weight, transposed")
    for name in ("c", "d"):
        assert rows[f"x of f_{name}"].activities == ("own x", "∂L/∂output")
        assert rows[f"x of f_{name}"].weights == ("P.weight, transposed",)
    assert rows["W.weight"].activities == ("pre: x̄ of f_a", "pre: x̄ of f_b", "x of f_b", "x of f_c")
    assert rows["P.weight"].activities == ("pre: x̄ of f_c", "pre: x̄ of f_d", "∂L/∂output")
    assert rows["Q.weight"].activities == ("pre: x̄ of f_b", "∂L/∂output")
    assert rows["V.weight"].activities == ("pre: input", "x of f_a")
    assert all(row.weights == () for row in rows.values() if row.equation == 2)


def test_a_shared_layer_names_all_its_partners() -> None:
    rows = by_update(report(Shared(), torch.randn(3, 4)))
    assert list(rows) == ["x of layer.1", "x of layer.1#2", "x of layer.1#3", "layer.0.weight"]
    assert rows["x of layer.1"].activities == ("own x", "x of layer.1#2")
    assert rows["x of layer.1#3"] == state("layer.1#3", ("∂L/∂output",))
    row = rows["layer.0.weight"]
    assert set(row.activities) == {
        *("pre: input", "pre: x̄ of layer.1", "pre: x̄ of layer.1#2"),
        *("x of layer.1", "x of layer.1#2", "x of layer.1#3"),
    }
    assert set(row.derivative) == {"f' of layer.1 at input", "f' of layer.1 at x̄"}


def test_an_unrolled_network_names_all_moments() -> None:
    rows = by_update(report(Unrolled(), torch.randn(2, 3, 2)))
    assert rows["x of f#2"].activities == ("own x", "x of f#3", "∂L/∂output")
    assert rows["x of f#2"].weights == ("recur.weight, transposed", "read.weight, transposed")
    assert rows["x of f#3"].weights == ("read.weight, transposed",)
    assert rows["enter.weight"].activities == ("pre: input", "x of f", "x of f#2", "x of f#3")
    # The first moment's h is a constant, which is nothing to read.
    assert set(rows["recur.weight"].activities) == {*("pre: x̄ of f", "pre: x̄ of f#2", "x of f", "x of f#2", "x of f#3")}
    assert set(rows["read.weight"].activities) == {"pre: x̄ of f", "pre: x̄ of f#2", "pre: x̄ of f#3", "∂L/∂output"}


class Skip(nn.Module):
    """h = tanh(W x), k = h + tanh(U h + x), output k + h."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.U, self.f, self.g = nn.Linear(3, 3), nn.Linear(3, 3), nn.Tanh(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(self.W(x))
        output: Tensor = h + self.g(self.U(h) + x) + h
        return output


def test_a_skip_connection_reads_no_weights() -> None:
    found = report(Skip(), torch.randn(2, 3))
    rows = by_update(found)
    assert rows["x of g"] == state("g", ("∂L/∂output",))
    assert rows["x of f"].activities == ("own x", "x of g", "∂L/∂output")
    assert rows["x of f"].weights == ("U.weight, transposed",)
    assert rows["x of f"].non_local == ("weight transport: U.weight", "memory of x̄: f' of g")


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_in_training_reads_other_samples(training: bool) -> None:
    """Layers 0, 4, 8; batch norms 1, 5; vertices 2, 6."""
    found = report(regularised().train(training), torch.randn(6, 4))
    rows = by_update(found)
    assert ("minibatch" in found.non_local) == training
    in_training = ("minibatch: 5",) if training else ()
    assert rows["x of 2"].weights == ("5.weight, a gain", "4.weight, transposed")
    assert rows["x of 2"].derivative == ("f' of 6 at x̄", *(("f' of 5 at x̄",) if training else ()))
    for update in ("x of 2", "4.weight", "5.weight"):
        assert tuple(entry for entry in rows[update].non_local if entry.startswith("minibatch")) == in_training
    assert rows["0.weight"].non_local == (("minibatch: 1",) if training else ())
    for update in ("x of 6", "8.weight"):
        assert not any(entry.startswith("minibatch") for entry in rows[update].non_local)
    assert rows["1.weight"].activities == ("pre: output of 0", "x of 2")
    assert rows["5.weight"].activities == ("pre: output of 4 at x̄", "x of 6")
    assert ("memory of x̄: output of 4 at x̄" in rows["5.weight"].non_local) is True


def test_instance_norm_reads_its_own_sample_only() -> None:
    network = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Tanh(), nn.InstanceNorm1d(3), nn.Flatten(), nn.Linear(12, 2))
    found = report(network, torch.randn(5, 2, 4))
    assert "minibatch" not in found.non_local
    assert "f' of 2 at x̄" in by_update(found)["x of 1"].derivative


def test_layers_between_vertices_are_named() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    rows = by_update(report(network, torch.randn(2, 3)))
    assert rows["x of 2"].weights == ("4.weight, transposed", "3.weight, transposed")
    assert rows["0.weight"].weights == ("1.weight, transposed",)
    assert rows["0.weight"].non_local == ("weight transport: 1.weight",)
    assert rows["1.weight"].activities == ("pre: output of 0", "x of 2")
    assert rows["4.weight"].activities == ("pre: output of 3 at x̄", "∂L/∂output")


def test_max_pooling_has_a_derivative_that_is_not_dropped() -> None:
    network = nn.Sequential(nn.Conv1d(1, 2, 1), nn.Tanh(), nn.MaxPool1d(2), nn.Conv1d(2, 2, 1), nn.Tanh(), nn.Flatten())
    rows = by_update(report(drop_derivatives(network), torch.randn(2, 1, 4)))
    derivative = rows["x of 1"].derivative
    assert derivative[0] == "f' of 4 dropped"
    assert derivative[1:] == ("f' of 2 at x̄",)
    assert "memory of x̄: f' of 2" in rows["x of 1"].non_local
    assert rows["3.weight"].derivative == ("f' of 4 dropped",)


def test_vertices_at_every_module() -> None:
    found = report(mlp(3, 4, 2), torch.randn(2, 3), vertices="modules")
    assert found.rows == (
        state("0", ("x of 1",), (), ("f' of 1 at x̄",), ("memory of x̄: f' of 1",)),
        state("1", ("x of 2",), ("2.weight, transposed",), (), ("weight transport: 2.weight",)),
        Reads("x of 2", 1, ("∂L/∂output",), (), (), ()),  # held
        layer("0", ("pre: input", "x of 0")),
        layer("2", ("pre: x̄ of 1", "x of 2"), (), ("memory of x̄: x̄ of 1",)),
    )


def test_a_relaxed_output_is_a_vertex() -> None:
    rows = chain(output="relaxed")
    assert rows["x of output[0]"] == state("output[0]", ("∂L/∂output",))
    assert rows["x of 3"].activities == ("own x", "x of output[0]")
    assert rows["4.weight"].activities == ("pre: x̄ of 3", "x of output[0]")


def test_several_outputs_have_names() -> None:
    inputs = torch.randn(3, 3), {"y": torch.randn(3, 2), "scale": torch.rand(3, 1)}
    rows = by_update(report(Nested(), *inputs))
    assert rows["x of f"].activities == ("own x", "x of g", "∂L/∂output[0]", "∂L/∂output[2]")
    assert rows["x of f"].weights == ("middle.weight, transposed", "other.weight, transposed")
    assert rows["head.weight"].activities == ("pre: x̄ of g", "∂L/∂output[1]")
    assert rows["other.weight"].activities == ("pre: x̄ of f", "∂L/∂output[2]")


def test_the_loss_within_the_model_is_not_linear() -> None:
    problem = next(p for p in PROBLEMS if p.name == "own-loss")
    module, inputs = problem.build()
    rows = by_update(report(module, *inputs))
    assert rows["x of net.3"].derivative == ("f' of log_softmax at x̄",)


def test_tokens_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.f = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Tanh()

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.f(self.up(self.embed(tokens))) @ self.embed.weight.T
            return logits

    rows = by_update(report(Tied(), torch.randint(7, (2, 5))))
    assert rows["x of f"].weights == ("embed.weight, transposed",)
    assert rows["up.weight"].activities == ("pre: output of embed", "x of f")
    assert set(rows["embed.weight"].activities) == {"pre: input", "pre: x̄ of f", "x of f", "∂L/∂output"}
    assert rows["embed.weight"].weights == ("up.weight, transposed",)


def test_weights_that_are_not_trained_still_carry_errors() -> None:
    network = mlp(3, 4, 4, 2)
    network[2].requires_grad_(False)
    rows = by_update(report(network, torch.randn(2, 3)))
    assert rows["x of 1"].weights == ("2.weight, transposed",)
    assert "2.weight" not in rows
    # Nothing that is trained lies above the first vertex now, so it is none.
    network[0].requires_grad_(False)
    network[2].requires_grad_(True)
    rows = by_update(report(network, torch.randn(2, 3)))
    assert "x of 1" not in rows
    assert rows["2.weight"] == layer("2", ("pre: output of 0", "x of 3"), ("f' of 3 at input",))


def test_parametrized_weights_keep_their_names() -> None:
    network = mlp(3, 4, 4, 2)
    nn.utils.parametrizations.weight_norm(network[2])
    rows = by_update(report(network, torch.randn(2, 3)))
    assert rows["x of 1"] == BASELINE[0]
    row = rows["2.bias"]
    assert row.update == "2.bias, 2.weight"
    assert (row.activities, row.weights, row.derivative) == (BASELINE[3].activities, (), BASELINE[3].derivative)


# --------------------------------------------------------------------------------------------- against the graph


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_states_reach_what_says_that_it_reads_them(problem: Problem) -> None:
    """A state alone, sent through the recorded Jacobians, arrives at its readers and nowhere else."""
    module, inputs = problem.build()
    rows = by_update(report(module, *inputs, vertices=problem.vertices))
    graph = problem.graph()  # of the loss: Nested's third output is not driven, but no vertex is above it alone
    names = problem_parameters(graph.read, problem)
    for vertex, x in random_states(graph).items():
        sent = graph.transport({vertex: x})
        for reader in graph.vertices:
            arrives = reader in sent and bool(sent[reader].count_nonzero())
            assert arrives == (f"x of {vertex.name}" in rows[f"x of {reader.name}"].activities)
        arrived = weight_gradients(graph, {vertex: x}, list(names.values()), driven=False)
        for name, gradient in zip(names, arrived, strict=True):
            (row,) = [row for row in rows.values() if name in row.update.split(", ")]
            assert (gradient is not None) == (f"x of {vertex.name}" in row.activities)


def problem_parameters(read: dict[int, Tensor], problem: Problem) -> dict[str, Tensor]:
    """The parameters in a graph by their names: a second copy of the module has the same values."""
    twin, _ = problem.build()
    parameters = {id(t): t for t in read.values() if isinstance(t, nn.Parameter)}
    found: dict[str, Tensor] = {}
    for name, p in twin.named_parameters():
        for t in parameters.values():
            if t.shape == p.shape and torch.equal(t, p):
                found[name] = t
    return found


# -------------------------------------------------------------------------------------------------- as a report


SEQUENTIAL = "sequential, towards the input: each layer waits for the one that reads it"


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (ClosedForm(), "closed form; simultaneous: all states step together, by a global clock"),
        (Euler(), "simultaneous: all states step together, by a global clock"),
        (Euler(order="sequential"), SEQUENTIAL),
        (ClosedForm(order="sequential"), f"closed form; {SEQUENTIAL}"),
        (Euler(order="asynchronous"), "asynchronous: no clock, each state is updated in a random half of the steps"),
        (Continuous(), "continuous time: no clock"),
        (
            Equilibrium(),
            "equilibrium: the limit of every schedule, found in one sweep towards the input",
        ),
    ],
    ids=name_of,
)
def test_the_schedule_is_the_solvers(solver: Solver, words: str) -> None:
    found = report(mlp(3, 4, 4, 2), torch.randn(2, 3), solver=solver)
    assert found.schedule == words
    assert found.rows == BASELINE
    assert words in str(found)


def test_the_table() -> None:
    lines = str(report(mlp(3, 4, 2), torch.randn(2, 3))).splitlines()
    assert lines[:8] == [
        "update    eq.  reads        weights               derivative        not local",
        "----------------------------------------------------------------------------------------------",
        "x of 1    (1)  own x        2.weight, transposed                    weight transport: 2.weight",
        "               ∂L/∂output",
        "0.weight  (2)  pre: input                         f' of 1 at input",
        "0.bias         x of 1",
        "2.weight  (2)  pre: x̄ of 1                                          memory of x̄: x̄ of 1",
        "2.bias         ∂L/∂output",
    ]


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_the_table_fits_100_columns(problem: Problem) -> None:
    module, inputs = problem.build()
    text = str(report(module, *inputs, vertices=problem.vertices))
    assert max(len(line.replace("x̄", "x")) for line in text.splitlines()) <= 100


def test_nothing_is_changed() -> None:
    model = ActivationRelaxation(regularised().double())
    x = torch.randn(6, 4).double()
    backward(squares(model(x)))
    record, random_state = model.last_relaxation, torch.random.get_rng_state()
    before, gradients = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()]
    with torch.no_grad():
        quiet = describe_locality(model, x)
    assert describe_locality(model, x) == quiet
    assert model.last_relaxation is record
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert not x.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_a_compiled_activation_is_described_as_it_was_written() -> None:
    network, x = mlp(3, 4, 2), torch.zeros(2, 3)
    plain = report(network, x)
    network[1].compile(backend="eager")
    torch.compile(lambda y: y, backend="eager")(x)  # the compiler is there, as after a pass
    assert report(network, x) == plain


def test_a_scripted_module_cannot_be_described() -> None:
    # That scripting is deprecated is a DeprecationWarning until PyTorch 2.13, and a FutureWarning from 2.14 on.
    with warnings.catch_warnings(action="ignore"):
        network = nn.Sequential(torch.jit.script(nn.Linear(3, 4)), nn.Tanh())
    with pytest.raises(ValueError, match="scripted module '0'"):
        report(network, torch.zeros(2, 3))


def test_errors() -> None:
    with pytest.raises(TypeError, match="wrap the module first"):
        describe_locality(mlp(3, 2, 2), torch.randn(2, 3))  # type: ignore[arg-type]
    model = ActivationRelaxation(mlp(3, 2, 2))
    with pytest.raises(TypeError, match="missing 1 required positional argument") as missing:
        describe_locality(model)
    assert "pass it what the model reads" in missing.value.__notes__[0]
    with pytest.raises(RuntimeError) as wrong:
        describe_locality(model, torch.randn(2, 4))
    assert not hasattr(wrong.value, "__notes__")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
