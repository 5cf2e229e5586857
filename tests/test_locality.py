"""What `describe_locality` reads off networks whose wiring is known by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

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
from relaxprop.locality import Reads
from tests.helpers import PROBLEMS, Branches, Problem, Shared, Unrolled, mlp, name_of


def described(module: nn.Module, *inputs: Any, **options: Any) -> dict[str, Reads]:
    report = describe_locality(ActivationRelaxation(module, **options), *inputs)
    return {reads.update: reads for reads in report.reads}


def chain() -> tuple[nn.Module, torch.Tensor]:
    return mlp(4, 6, 5, 3), torch.randn(1, 4)  # 0: linear, 1: tanh, 2: linear, 3: tanh, 4: linear


def test_a_chain_with_everything_frozen() -> None:
    transport, memory = "weight transport", "memory"
    assert list(described(*chain()).values()) == [
        Reads("x of 1", 1, ("x of 1", "x of 3"), ("2.weight, transposed",), ("f' of 3 at x̄",), (transport, memory)),
        Reads("x of 3", 1, ("x of 3", "∂L/∂x of the output"), ("4.weight, transposed",), (), (transport,)),
        Reads("0.weight", 2, ("the input", "x of 1"), (), ("f' of 1 at x̄",), (memory,)),
        Reads("0.bias", 2, ("x of 1",), (), ("f' of 1 at x̄",), (memory,)),
        Reads("2.weight", 2, ("x̄ of 1", "x of 3"), (), ("f' of 3 at x̄",), (memory,)),
        Reads("2.bias", 2, ("x of 3",), (), ("f' of 3 at x̄",), (memory,)),
        Reads("4.weight", 2, ("x̄ of 3", "∂L/∂x of the output"), (), (), (memory,)),
        Reads("4.bias", 2, ("∂L/∂x of the output",), (), (), ()),
    ]


def test_what_is_unfrozen_is_current() -> None:
    a, b, d = (Frozen(**{name: False}) for name in ("relaxation_derivative", "update_derivative", "update_activity"))
    found = described(*chain(), frozen=a, solver=Euler())
    assert found["x of 1"].derivative == ("f' of 3 at x",)
    assert found["x of 1"].non_local == ("weight transport",)
    assert found["0.weight"].derivative == ("f' of 1 at x̄",)
    found = described(*chain(), frozen=b)
    assert found["x of 1"].derivative == ("f' of 3 at x̄",)
    assert found["0.weight"].derivative == ("f' of 1 at x",)
    assert found["0.weight"].non_local == ()
    assert found["2.weight"].activities == ("x̄ of 1", "x of 3")
    found = described(*chain(), frozen=d)
    assert found["2.weight"].activities == ("x of 1", "x of 3")
    assert found["2.weight"].non_local == ("memory",)  # of f'
    assert found["0.weight"].activities == ("the input", "x of 1")
    found = described(*chain(), frozen=Frozen(update_activity=False, input=False))
    assert found["0.weight"].activities == ("x of input", "x of 1")
    assert found["x of input"].activities == ("x of input", "x of 1")
    assert found["x of input"].weights == ("0.weight, transposed",)


def test_backwards_weights() -> None:
    expected = {
        "learned": ("2.feedback", ("memory",)),
        "random": ("2.feedback (fixed)", ("memory",)),
        "sign": ("signs of 2.weight", ("signs of weights", "memory")),
    }
    for rule, (weights, non_local) in expected.items():
        module, x = chain()
        found = described(use_feedback(module, rule), x)  # type: ignore[arg-type]
        assert found["x of 1"].weights == (weights,)
        assert found["x of 1"].non_local == non_local
        assert ("2.feedback" in found) == (rule == "learned")
        if rule == "learned":  # Δψ = ΔW
            assert found["2.feedback"].activities == found["2.weight"].activities


@pytest.mark.parametrize("relaxation", [True, False])
@pytest.mark.parametrize("update", [True, False])
def test_dropped_derivatives(relaxation: bool, update: bool) -> None:
    module, x = chain()
    found = described(drop_derivatives(module, relaxation=relaxation, update=update), x)
    assert (found["x of 1"].derivative == ()) == relaxation
    assert (found["2.weight"].derivative == ()) == update


def test_nothing_is_left_but_the_memory_of_activities() -> None:
    module, x = chain()
    drop_derivatives(use_feedback(module, "learned"))
    report = describe_locality(ActivationRelaxation(module, solver=Euler(order="asynchronous")), x)
    assert report.non_local == {"memory"}
    assert {reads.update for reads in report.reads if reads.non_local} == {
        f"{layer}.{parameter}" for layer in (2, 4) for parameter in ("weight", "feedback")
    }


def test_a_graph_with_branches() -> None:
    found = described(Branches(), torch.randn(1, 4))
    assert set(found["x of f_a"].activities) == {"x of f_a", "x of f_b", "x of f_c", "x of f_d"}
    assert set(found["x of f_a"].weights) == {"W.weight, transposed", "U.weight, transposed"}
    assert set(found["x of f_b"].activities) == {"x of f_b", "x of f_c", "∂L/∂x of the output"}
    assert set(found["x of f_b"].weights) == {"W.weight, transposed", "Q.weight, transposed"}
    assert set(found["W.weight"].activities) == {"x̄ of f_a", "x̄ of f_b", "x of f_b", "x of f_c"}
    assert set(found["P.weight"].activities) == {"x̄ of f_c", "x̄ of f_d", "∂L/∂x of the output"}


def test_modules_that_are_called_many_times() -> None:
    found = described(Shared(), torch.randn(1, 4))
    assert found["x of layer.1"].activities == ("x of layer.1", "∂L/∂x of the output")
    assert set(found["layer.0.weight"].activities) == {"the input", "x̄ of layer.1", "x of layer.1"}
    found = described(Unrolled(), torch.randn(1, 4, 2))
    assert set(found["x of f"].weights) == {"recur.weight, transposed", "read.weight, transposed"}
    assert found["enter.weight"].activities == ("the input", "x of f")
    assert found["recur.weight"].activities == ("x̄ of f", "x of f")


def test_layers_one_after_the_other() -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))
    found = described(module, torch.randn(1, 4))
    assert found["0.weight"].weights == ("1.weight, transposed",)
    assert found["0.weight"].activities == ("the input", "x of 2")
    assert found["0.weight"].non_local == ("weight transport", "memory")
    assert found["1.weight"].weights == ()


def test_batch_norm_reads_the_minibatch_while_it_trains() -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    found = described(module, torch.randn(6, 4))
    assert found["x of 1"].weights == ("2.weight, transposed", "3")
    assert "minibatch" in found["x of 1"].non_local
    assert "minibatch" in found["2.weight"].non_local
    assert "minibatch" not in found["x of 4"].non_local
    assert not any("minibatch" in reads.non_local for reads in described(module.eval(), torch.randn(6, 4)).values())


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (Euler(), "global clock"),
        (ClosedForm(), "global clock"),
        (Euler(order="sequential"), "waits for those that read it"),
        (Euler(order="asynchronous"), "no clock"),
        (Continuous(), "continuous time"),
        (Equilibrium(), "one sweep"),
    ],
    ids=str,
)
def test_the_schedule(solver: Any, words: str) -> None:
    module, x = chain()
    assert words in describe_locality(ActivationRelaxation(module, solver=solver), x).schedule


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_any_model(problem: Problem) -> None:
    module, inputs = problem.build()
    buffers = [buffer.clone() for buffer in module.buffers()]
    random_state = torch.get_rng_state()
    for output in ("clamped", "relaxed"):
        model = ActivationRelaxation(module, vertices=problem.vertices, output=output)
        report = describe_locality(model, *inputs)
        weights = {name for name, p in module.named_parameters() if p.dim() > 1}
        assert {reads.update for reads in report.reads if reads.equation == 2} >= weights - {"other.weight"}
        assert all(reads.activities for reads in report.reads)
    assert all(torch.equal(a, b) for a, b in zip(buffers, module.buffers(), strict=True))
    assert torch.equal(random_state, torch.get_rng_state())


def test_it_prints_as_a_table() -> None:
    module, x = chain()
    report = describe_locality(ActivationRelaxation(module), x)
    assert isinstance(report, Locality)
    lines = str(report).splitlines()
    assert lines[0].split() == ["update", "reads", "through", "derivative", "not", "local"]
    assert lines[1].startswith("x of 1    x of 1, x of 3")
    assert "memory: the activity of the feedforward pass has to be kept" in lines[-1]


def test_an_unwrapped_model_is_refused() -> None:
    with pytest.raises(TypeError, match="must be an ActivationRelaxation"):
        describe_locality(mlp(4, 5, 2), torch.randn(1, 4))  # type: ignore[arg-type]
