"""The benchmark measures what it says, beside backpropagation: what is counted is known by mathematics."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from relaxprop._pytorch import is_undisturbed
from relaxprop.lab.bench import counting, document, measuring, problems, scaling, startup, suite
from relaxprop.lab.bench.records import Point, Scaling, Suite
from relaxprop.lab.bench.scaling import Chain
from relaxprop.lab.bench.steps import SOLVERS, USUAL, all_steps, label
from relaxprop.lab.files import OutputError
from relaxprop.vertices import Granularity

# Multiplications of one sample in one product with each layer's weights, from the input.
MLP = (784 * 300, 300 * 300, 300 * 100, 100 * 10)
CNN = (28 * 28 * 32 * 3 * 25, 10 * 10 * 64 * 32 * 25, 6400 * 64, 64 * 120, 120 * 10)


def sweep(layers: tuple[int, ...], batch: int) -> int:
    """Operations of backpropagation: forward, towards the input, and for the weights; the input needs no gradient."""
    return 2 * batch * (3 * sum(layers) - layers[0])


def test_every_rule_is_measured_against_backpropagation() -> None:
    measured = suite.run(suite.Plan(batch_size=3), rounds=2)
    rules = [cost.rule for cost in measured.costs]
    assert rules == [
        "backpropagation", "Equilibrium()", "ClosedForm()", "ClosedForm(0.1, 100)", "Euler(0.1, 100)",
        "PredictiveCoding(0.1, 10)", "EquilibriumPropagation(0.1, 10)", "DirectFeedback()", "DirectFeedback(target)",
    ]  # fmt: skip
    assert measured.parameters == 356_910
    first = measured.costs[0]
    assert (first.time_ratio, first.memory_ratio, first.floor) == (1, 1, 1)
    for cost in measured.costs:
        assert cost.milliseconds > 0
        assert cost.quartiles[0] <= cost.milliseconds <= cost.quartiles[1]
        assert cost.peak_bytes >= 4 * 356_910  # the gradients alone
        assert cost.launches is None  # no GPU
    assert len(measured.ratios) == 5 + 2  # of Activation Relaxation, of the two rules whose activities move


@pytest.mark.parametrize(
    ("model", "layers", "vertices"),
    [("mlp", MLP, (300, 300, 100)), ("cnn", CNN, (32 * 28 * 28, 64 * 10 * 10, 64, 120))],
)
def test_operations_are_those_of_the_products(model: str, layers: tuple[int, ...], vertices: tuple[int, ...]) -> None:
    batch = 2
    problem = problems.build(model, batch_size=batch)
    steps = all_steps(problem, ("ar", "dfa"), USUAL)
    measuring.warm(steps)
    counted = {name: counting.operations(step) for name, step in steps.items()}
    exact = sweep(layers, batch)
    assert counted["backpropagation"] == exact
    assert counted["Equilibrium()"] == counted["ClosedForm()"] == exact
    # A product with A passes the layers between the vertices. As many as there are hops from the last vertex to the
    # first are enough, and one that has k more to come is needed only at the vertices beyond the first k.
    within = layers[1:-1]
    horner = sum(sum(within[k:]) for k in range(len(within)))
    assert exact <= counted["ClosedForm(0.1, 100)"] <= exact + 2 * batch * (horner - sum(within))
    assert counted["Euler(0.1, 100)"] == exact + 2 * batch * 99 * sum(within)
    # Nothing is sent through layers: each vertex has its own weights from the 10 outputs.
    assert counted["DirectFeedback()"] == 2 * batch * (2 * sum(layers) + 10 * sum(vertices))


def test_counting_leaves_a_pass_as_it_is() -> None:
    problem = problems.on_chain(3, width=4, batch_size=2)
    steps = all_steps(problem, ("ar",), ("paper",))
    measuring.warm(steps)
    output = problem.network(problem.inputs).detach()
    for step in steps.values():
        assert counting.operations(step) == counting.operations(step)
    assert torch.equal(problem.network(problem.inputs), output)  # an update of no length
    assert all(p.grad is None for p in problem.network.parameters())


def test_launches_are_counted_by_their_calls() -> None:
    names = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaGraphLaunch", "hipLaunchKernel"]
    others = ["cudaDeviceSynchronize", "cudaMemcpyAsync", "aten::mm", "LaunchKernel", "volta_sgemm_128x64_nn"]
    assert counting.launched(names + others + names[:1]) == len(names) + 1
    assert counting.launches(lambda: None, "cpu") is None


def test_peak_memory_is_the_most_at_one_time() -> None:
    def step() -> None:
        for _ in range(3):
            torch.zeros(1000, dtype=torch.float32)  # 4000 bytes, freed at once
        held = [torch.zeros(500, dtype=torch.float32) for _ in range(4)]  # 2000 bytes each
        del held

    # The allocator rounds each block up to a multiple of 64 bytes.
    assert 8000 <= measuring.peak_bytes(step, "cpu") <= 8000 + 4 * 64


# ------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize(
    ("model", "vertices", "parameters"),
    [
        ("chain-1", "activations", 128 * 129 + 129 * 10),
        ("chain-5", "modules", 5 * 128 * 129 + 129 * 10),
        # Convolutions of He et al., 2016, their batch norms, and a readout for 10 classes.
        ("resnet-18", "activations", 11_176_512 + 5_130),
        ("transformer", "operations", 256 * 128 + 64 * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128),
    ],
)
def test_other_networks_are_measured(model: str, vertices: Granularity, parameters: int) -> None:
    measured = suite.run(suite.Plan(model, solvers=("equilibrium",), vertices=vertices, batch_size=2), rounds=2)
    assert [(cost.rule, cost.floor) for cost in measured.costs] == [("backpropagation", 1), ("Equilibrium()", 1)]
    assert (measured.parameters, measured.vertices) == (parameters, vertices)


def test_the_resnet_takes_larger_images() -> None:
    problem = problems.build("resnet-18", batch_size=1, image_size=64)
    assert problem.inputs.shape == (1, 3, 64, 64)
    assert problem.network(problem.inputs).shape == (1, 10)


@pytest.mark.parametrize("name", ["chain-0", "chain-", "chain-N", "chain--3", "resnet", ""])
def test_an_unknown_network_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        problems.build(name)
    assert repr(name) in str(caught.value)


def test_a_minibatch_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        problems.build("mlp", batch_size=0)
    with pytest.raises(ValueError, match="batch size must be at least 2 for resnet-18 on images of 32×32"):
        problems.build("resnet-18", batch_size=1)


def test_a_solver_is_named_with_its_sizes() -> None:
    names = {"Equilibrium()", "ClosedForm()", "ClosedForm(0.1, 100)", "Euler(0.1, 100)", "Continuous(10.0)"}
    assert {label(solver) for solver in SOLVERS.values()} == names


# ------------------------------------------------------------------------------------------------------- scaling


@pytest.mark.parametrize("exponent", [0, 1, 2, -0.5, 1.7])
def test_the_exponent_of_a_power_law_is_found(exponent: float) -> None:
    sizes = [1, 2, 5, 30, 1000]
    found, factor = scaling.power_law(sizes, [3e-4 * size**exponent for size in sizes])
    assert found == pytest.approx(exponent, abs=1e-12)
    assert factor == pytest.approx(1)


def test_how_far_points_are_off_a_power_law() -> None:
    # log y is 0, 1, 0 at log x = −1, 0, 1: the slope is 0, the constant 1/3, and the second point is 2/3 above it.
    e = math.e
    exponent, factor = scaling.power_law([1 / e, 1, e], [1, e, 1])
    assert exponent == pytest.approx(0, abs=1e-12)
    assert factor == pytest.approx(math.exp(2 / 3))


@pytest.mark.parametrize(
    ("sizes", "amounts", "message"),
    [([3, 3], [1, 2], "at least two sizes"), ([1, 2], [0, 1], "positive"), ([0, 2], [1, 1], "positive")],
)
def test_what_has_no_power_law_is_refused(sizes: list[float], amounts: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaling.power_law(sizes, amounts)


def made_up(rule: str, factor: int) -> list[Point]:
    """Time grows as √size, memory as size, operations as size²."""
    return [
        Point(rule=rule, size=size, value=n, milliseconds=factor * n**0.5, peak_bytes=factor * n, operations=n**2)
        for size in scaling.SIZES
        for n in (1, 4, 16, 64)
    ]


def test_exponents_are_those_of_the_points() -> None:
    found = scaling.exponents(made_up("a", 3) + made_up("b", 5))
    assert {(e.rule, e.quantity, e.size) for e in found} == {
        (rule, quantity, size) for rule in "ab" for quantity in scaling.QUANTITIES for size in scaling.SIZES
    }
    for e in found:
        assert e.exponent == pytest.approx({"time": 0.5, "memory": 1, "operations": 2}[e.quantity])


def test_a_chain_is_measured_over_its_sizes() -> None:
    changed = {"depth": (2, 4), "width": (3, 6), "batch size": (1, 5)}
    measured = scaling.measure(base=Chain(2, 4, 3), changed=changed, rounds=2)  # type: ignore[arg-type]
    rules = ["backpropagation", "Equilibrium()", "ClosedForm()", "ClosedForm(0.1, 100)", "Euler(0.1, 100)"]
    assert list(dict.fromkeys(point.rule for point in measured.points)) == rules
    assert len(measured.points) == len(rules) * 6
    assert len(measured.exponents) == len(rules) * 9
    for point in measured.points:
        chain = Chain(2, 4, 3)._replace(**{point.size.replace(" ", "_"): point.value})
        layers = (chain.width**2,) * chain.depth + (10 * chain.width,)
        if point.rule in rules[:3]:
            assert point.operations == sweep(layers, chain.batch_size)
        if point.rule == "Euler(0.1, 100)":
            more = 2 * chain.batch_size * 99 * sum(layers[1:-1])
            assert point.operations == sweep(layers, chain.batch_size) + more
    by_sample = [e.exponent for e in measured.exponents if (e.quantity, e.size) == ("operations", "batch size")]
    assert by_sample == pytest.approx([1] * len(rules))


def test_every_exponent_is_explained() -> None:
    assert scaling.REASONS.keys() == {(q, s) for q in scaling.QUANTITIES for s in scaling.SIZES}


def test_a_deep_chain_takes_no_more_products_than_hops_have_weight() -> None:
    """As is said of PAPER's exponent in depth: near 2 below some 60 layers, then 1."""
    counted = []
    for depth in (70, 80):
        steps = all_steps(problems.on_chain(depth, width=2, batch_size=1), ("ar",), ("paper",))
        measuring.warm(steps)
        counted.append(counting.operations(steps["ClosedForm(0.1, 100)"]) / (2 * 2**2))
    # Ten layers more are ten products more forward and for the weights, and in each product with A.
    assert counted[1] - counted[0] <= 10 * (2 + 60)


# ------------------------------------------------------------------------------------------------------ start-up


def test_what_is_beyond_pytorch_is_found_in_the_same_round() -> None:
    seconds = {
        startup.EMPTY: [0.01, 0.02, 0.03],
        startup.TORCH: [1.0, 2.0, 3.0],
        startup.PACKAGE: [1.05, 2.5, 3.01],
        startup.HELP: [1.9, 2.3, 3.5],
    }
    found = {start.program: start for start in startup.starts(seconds)}
    assert found[startup.PACKAGE].seconds == 2.5
    assert found[startup.PACKAGE].beyond == pytest.approx(0.05)
    assert found[startup.HELP].beyond == pytest.approx(0.5)
    assert (found[startup.PACKAGE].aim, found[startup.HELP].aim) == (0.1, 0.4)
    assert found[startup.TORCH].beyond is found[startup.EMPTY].beyond is None
    rows = {row[0]: row[-1] for row in document.start_table(list(found.values())).rows}
    assert rows == {startup.EMPTY: "", startup.TORCH: "", startup.PACKAGE: "yes", startup.HELP: "no"}


@pytest.mark.skipif(not is_undisturbed(), reason="this PyTorch does not tell whether it is undisturbed")
def test_compiled_steps_are_measured_beside_those_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def compiles(graph: fx.GraphModule, inputs: object) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    own = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: own(model, backend=compiles, **options))
    plan = suite.Plan(rules=("ar",), solvers=("paper", "euler"), batch_size=2, compile_steps=True)
    ratios = {(ratio.what, ratio.least): ratio.ratio for ratio in suite.run(plan, rounds=2).ratios}
    both, compiles_nothing = "a forward and an activation-only backward pass", "one that is not compiled"
    assert len(compiled) == 1
    assert ratios["the same by torch.compile", both] > 0
    assert ratios["the same by torch.compile", compiles_nothing] > 0


def test_programs_are_started_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log"
    programs = {name: ("-c", f"open({str(log)!r}, 'a').write({name!r})") for name in "ab"}
    monkeypatch.setattr(startup, "PROGRAMS", programs)
    seconds = startup.times(2)
    assert log.read_text() == "ab" * 3  # once before it is measured
    assert [len(own) for own in seconds.values()] == [2, 2]


def test_a_program_that_fails_is_no_measurement() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        startup.run_python("-c", "raise SystemExit(3)")


def test_a_program_keeps_what_it_compiles_as_a_users_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    startup.run_python("-c", "import sys; raise SystemExit(sys.dont_write_bytecode)")


# ------------------------------------------------------------------------------------------------------ document


@pytest.fixture(scope="module")
def measured() -> Suite:
    """All parts: one is measured, the others are made up."""
    benchmark = suite.run(suite.Plan("chain-2", solvers=("equilibrium", "paper"), batch_size=2), rounds=2)
    points = made_up("backpropagation", 3) + made_up("Equilibrium()", 4)
    grown = Scaling(**Chain()._asdict(), device="cpu", rounds=2, points=points, exponents=scaling.exponents(points))
    starts = startup.starts({name: [1.0, 1.5] for name in startup.PROGRAMS})
    environment = {"date": "2026-11-26", "processor": "an abacus", "torch": torch.__version__, "gpu": None}
    return Suite(
        command="relaxprop bench", environment=environment, benchmarks=[benchmark], scaling=[grown], starts=starts
    )


def test_tables_and_figures_are_made_of_the_document_alone(measured: Suite, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    paths = document.write(measured, first)
    assert {path.name for path in paths} == {"bench.json", "table.md", "costs.png", "scaling.png"}
    assert document.read(first / "bench.json") == measured
    (second / "bench.json").write_bytes((first / "bench.json").read_bytes())
    again, made = document.make_again(second)
    assert again == measured
    for path in made:
        assert path.read_bytes() == (first / path.name).read_bytes()
    table = (first / "table.md").read_text()
    for part in ("chain-2, batch 2, cpu", "| Equilibrium() |", "| 1.00× |", "2.00", "an abacus", "`relaxprop bench`"):
        assert part in table
    assert "gpu" not in table
    for reason in scaling.REASONS.values():
        assert reason in table


def test_what_is_no_document_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    with pytest.raises(OutputError, match=r"cannot read .*bench\.json"):
        document.make_again(tmp_path)
    path.write_text("{")
    with pytest.raises(OutputError, match=r"bench\.json is no document of `relaxprop bench`"):
        document.make_again(tmp_path)
    path.write_text(json.dumps({"command": "relaxprop bench"}))
    with pytest.raises(OutputError, match="environment: Field required"):
        document.make_again(tmp_path)
