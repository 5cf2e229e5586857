"""What the README shows runs, and what it claims is what was measured."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from relaxprop.lab.architectures import ARCHITECTURES
from relaxprop.lab.bench import Benchmark, markdown
from relaxprop.lab.cli.main import app
from relaxprop.lab.experiments import depth as cost_of_depth

ROOT = Path(__file__).parents[1]
in_a_clone = pytest.mark.skipif(
    not (ROOT / "results").is_dir(), reason="the kept results are in the repository, and not in a source distribution"
)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_blocks_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    trained = []
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
        trained.append(names["network"][0].weight.grad is not None)
    assert trained[0]
    printed = capsys.readouterr().out
    for part in ("Relaxation(vertices=1", "Alignment(cosine=", "feedback=learned", "dropped derivative in relaxation"):
        assert part in printed


@pytest.mark.parametrize(
    "line", [line for b in blocks("sh") for line in b.splitlines() if line.startswith("relaxprop")]
)
def test_the_commands_exist_with_their_options(line: str) -> None:
    command, *arguments = shlex.split(line)[1:]
    help_text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    for argument in arguments:
        assert not argument.startswith("--") or argument in help_text


@in_a_clone
def test_the_tables_are_the_kept_results() -> None:
    figures = ("figure1", "figure3", "figure1-b-d", "figure3-b-d", "figure2")
    appendix = (f"appendix-c-{name}" for name in ("svhn", "cifar100", "cifar100-long"))
    for folder in (*figures, *appendix, *(f"graphs/{name}" for name in ("docstrings", "cifar10"))):
        written = (ROOT / "results" / folder / "table.md").read_text(encoding="utf-8")
        assert written.partition("\n\n")[0] in README, folder
    errors, times, _ = (ROOT / "results" / "gradients" / "table.md").read_text(encoding="utf-8").split("\n\n")
    assert errors in README
    assert times in README
    assert markdown(kept_benchmark("bench-mlp.json")) in README


def kept_benchmark(name: str) -> Benchmark:
    return Benchmark.model_validate_json((ROOT / "results" / name).read_text())


@in_a_clone
def test_the_costs_in_the_text_are_those_of_the_kept_benchmarks() -> None:
    text = " ".join(README.split())
    repeats = [kept_benchmark(f"bench-mlp-repeats/{i}.json") for i in range(1, 6)]
    ranges = []
    for rule in ("Equilibrium()", "ClosedForm(0.1, 100)"):
        ratios = [cost.time_ratio for benchmark in repeats for cost in benchmark.costs if cost.rule == rule]
        ranges.append(f"{min(ratios):.2f}× to {max(ratios):.2f}×")
    faster = [benchmark.ratios[0].ratio for benchmark in repeats]
    assert f"they came to {', '.join(ranges)} and {min(faster):.1f} to {max(faster):.1f} times" in text
    cnn = kept_benchmark("bench-cnn.json")
    _, equilibrium, closed_form, _ = cnn.costs
    assert f"`Equilibrium` takes {equilibrium.time_ratio:.2f}×, `ClosedForm` {closed_form.time_ratio:.2f}×" in text
    assert f"and {closed_form.memory_ratio:.2f}× the memory of backpropagation" in text
    assert f"`Euler` {cnn.ratios[0].ratio:.1f} times `ClosedForm`'s time" in text


@in_a_clone
def test_the_learning_curves_numbers_are_the_kept_results() -> None:
    lines = csv.DictReader((ROOT / "results" / "figure1" / "accuracy.csv").read_text().splitlines())
    accuracy = {(line["condition"], line["epoch"]): f"{100 * float(line['test_accuracy']):.2f}" for line in lines}
    ours, theirs = ([accuracy[name, epoch] for epoch in ("1", "3", "5")] for name in ("baseline", "backprop"))
    sentence = (
        f"After 1, 3 and 5 epochs of MNIST Activation Relaxation reaches {ours[0]}, {ours[1]} and {ours[2]} % and "
        f"backpropagation {theirs[0]}, {theirs[1]} and {theirs[2]} %."
    )
    assert sentence in " ".join(README.split())


def kept(path: str) -> Any:
    return json.loads((ROOT / "results" / path).read_text(encoding="utf-8"))


@in_a_clone
def test_every_architectures_gradients_are_within_the_bound() -> None:
    gradients = kept("gradients/gradients.json")
    assert len(gradients["comparisons"]) == len(ARCHITECTURES)
    for comparison in gradients["comparisons"]:
        assert len(comparison["errors"]) == 4
        assert all(error <= gradients["bound"] == 1e-10 for error in comparison["errors"].values())


@in_a_clone
def test_the_closed_form_is_faster_than_its_steps_at_every_depth() -> None:
    ratios = {(c["depth"], c["solver"]): c["ratio"] for c in kept("depth/depth.json")["costs"]}
    assert {depth for depth, _ in ratios} == set(cost_of_depth.DEPTHS)
    for depth in cost_of_depth.DEPTHS:
        for steps in (cost_of_depth.PAPERS, cost_of_depth.PLANNED):
            assert ratios[depth, f"ClosedForm, {steps}"] < ratios[depth, f"Euler, {steps}"]


@in_a_clone
def test_how_far_the_cnn_is_from_convergence_is_as_the_readme_says() -> None:
    lines = csv.DictReader((ROOT / "results" / "convergence-cnn" / "convergence.csv").read_text().splitlines())
    first = [line for line in lines if line["parameter"] == "convolutional.conv1.weight" and line["steps"] == "100"]
    left = {line["step_size"]: float(line["measured"]) for line in first}
    assert f"its gradient is {100 * left['0.1']:.0f} % off backpropagation's" in " ".join(README.split())
    assert left["0.2"] < 1e-5


@in_a_clone
def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_row_of_works_with_is_a_test() -> None:
    section = README.partition("## Works with\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith(("| tool", "| ---"))]
    named = {path for row in rows for path in re.findall(r"\]\((tests/[^)]+)\)", row)}
    there = {f"tests/integrations/{path.name}" for path in (ROOT / "tests/integrations").glob("test_*.py")}
    assert len(rows) == 8
    assert named == there | {"tests/test_transparent.py"}
