"""What the site shows runs, and what it claims is what was measured. The README is held by `test_readme`."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from typer.testing import CliRunner

import relaxprop
from relaxprop import plots, rules
from relaxprop.lab.architectures import ARCHITECTURES
from relaxprop.lab.bench import document
from relaxprop.lab.bench.records import Benchmark
from relaxprop.lab.cli.main import app
from relaxprop.lab.experiments import depth as cost_of_depth
from relaxprop.lab.store import read_lines

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "results"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the site is in the repository, not in a source distribution")

WRITTEN = [path for path in sorted(DOCS.rglob("*.md")) if not {"_build", "generated"} & set(path.parts)]
PAGES = {str(path.relative_to(DOCS).with_suffix("")): path.read_text(encoding="utf-8") for path in WRITTEN}
TEXT = {name: " ".join(page.split()) for name, page in PAGES.items()}
# Of two kinds: shown as they stand, and executed by the build as well.
PYTHON = re.compile(r"^```(?:python|\{code-cell\} ipython3)\n(?::\w[^\n]*\n)*(.*?)^```$", re.M | re.S)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.M | re.S)


# ------------------------------------------------------------------------------------------------------ it runs


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if PYTHON.search(text)])
def test_the_blocks_of_a_page_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in PYTHON.findall(PAGES[page]):
        exec(compile(block, f"docs/{page}.md", "exec"), names)
    plt.close("all")


def test_the_lines_of_code_fit_the_column() -> None:
    """The site shows 90 letters beside its contents; the examples have a limit of their own for ruff."""
    for name, page in PAGES.items():
        for block in (*PYTHON.findall(page), *SHELL.findall(page)):
            assert [line for line in block.splitlines() if len(line) > 88] == [], name


def commands() -> list[str]:
    lines = [line for page in PAGES.values() for block in SHELL.findall(page) for line in block.splitlines()]
    inline = [f"relaxprop {rest}" for page in TEXT.values() for rest in re.findall(r"`relaxprop ([^`]+)`", page)]
    return sorted({*lines, *inline})


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("relaxprop ")])
def test_the_commands_exist_with_their_options(line: str) -> None:
    command, *arguments = shlex.split(line)[1:]
    done = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    for argument in arguments:
        assert not argument.startswith("--") or argument in done.output


def test_what_is_installed_is_an_extra_of_the_project() -> None:
    described = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^(\w+) = \[", described.partition("[project.optional-dependencies]")[2], re.M))
    for page in PAGES.values():
        for named in re.findall(r"pip install '(?:relaxprop|\.)\[([^\]]+)\]'", page):
            assert set(named.split(",")) <= extras


# ---------------------------------------------------------------------------------------------------- it holds


def test_every_public_name_has_its_place_among_the_names() -> None:
    shown = re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)", PAGES["api"], re.M)
    plotting = [f"plots.{name}" for name in plots.__all__]
    bases = [f"rules.{name}" for name in rules.__all__ if name not in relaxprop.__all__]
    assert sorted(shown) == sorted(f"relaxprop.{name}" for name in (*relaxprop.__all__, *plotting, *bases))


def test_what_pages_include_and_show_is_there() -> None:
    for name, page in PAGES.items():
        folder = (DOCS / name).parent
        for target in re.findall(r"^```\{(?:include|literalinclude)\} (\S+)$", page, re.M):
            assert "generated/" in target or (folder / target).is_file(), f"{name}: {target}"
        for target in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", page):
            assert (folder / target).is_file(), f"{name}: {target}"
        for target in re.findall(r"`(results/[^`* ]+)`", page):
            assert (ROOT / target).exists(), f"{name}: {target}"


def test_files_and_goals_that_are_named_exist() -> None:
    """Also by what stands beside the site: how to contribute, and the READMEs of the kept results."""
    beside = [ROOT / "CONTRIBUTING.md", ROOT / "README.md", *RESULTS.rglob("README.md")]
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in beside} | PAGES
    goals = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for name, text in texts.items():
        paths = re.findall(r"`((?:relaxprop|tests|docs|results|\.github)/[\w./-]*)`", text)
        started = re.findall(r"(?:python|torchrun --nproc-per-node 2) ((?:docs|results)/\S+\.py)", text)
        for path in (*paths, *started):
            assert (ROOT / path).exists(), f"{name}: {path}"
        named = re.findall(r"`make\s([\w-]+)[^`]*`", text) + re.findall(r"^make ([\w-]+)", text, re.M)
        assert set(named) <= goals, name


def test_every_folder_of_results_has_a_line() -> None:
    lines = re.findall(r"^\| `([^`]+)` \| .+ \|$", (RESULTS / "README.md").read_text(encoding="utf-8"), re.M)
    assert lines == sorted(path.name for path in RESULTS.iterdir() if path.name not in ("README.md", "__pycache__"))


def test_every_kept_table_is_shown() -> None:
    shown = {
        ((DOCS / name).parent / target).resolve()
        for name, page in PAGES.items()
        for target in re.findall(r"^```\{include\} (\S+/table\.md)$", page, re.M)
    }
    generated = set(RESULTS.glob("bench/*/table.md"))  # the build puts all of them on two pages
    kept = set(RESULTS.rglob("table.md")) - {RESULTS / "depth" / "table.md"} - generated  # its plot is
    assert kept <= shown
    assert all(
        "```{include} ../generated/" + name in PAGES[f"results/{page}"]
        for name, page in (("bench.md", "costs"), ("scaling.md", "scaling"))
    )


def test_every_row_of_works_with_is_a_test() -> None:
    rows = [line for line in PAGES["works-with"].splitlines() if line.startswith("| ")][2:]
    named = [re.findall(r"`(tests/[^`]+)`", row) for row in rows]
    assert all(named)
    there = {f"tests/integrations/{path.name}" for path in (ROOT / "tests/integrations").glob("test_*.py")}
    assert {path for paths in named for path in paths} == there | {"tests/test_transparent.py"}


def bench_commands() -> dict[str, str]:
    """By folder, as the README of the kept benchmarks has them."""
    readme = (RESULTS / "bench" / "README.md").read_text(encoding="utf-8")
    return {command.rpartition("/")[2]: command for command in re.findall(r"`(relaxprop bench [^`]+)`", readme)}


def test_the_kept_benchmarks_are_of_the_commands_that_are_named() -> None:
    named = bench_commands()
    for command in named.values():
        done = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"})
        assert all(word in done.output for word in shlex.split(command) if word.startswith("--")), command
    for path in RESULTS.glob(f"bench/*/{document.FILE}"):
        assert document.read(path).command == named[path.parent.name]


def kept_benchmark(name: str) -> Benchmark:
    return document.read(RESULTS / "bench" / name / document.FILE).benchmarks[0]


def test_the_costs_in_the_text_are_those_of_the_kept_benchmarks() -> None:
    text = TEXT["results/costs"]
    names = ("Equilibrium()", "ClosedForm()", "ClosedForm(0.1, 100)")
    mlp = {cost.rule: f"{cost.time_ratio:.2f}×" for cost in kept_benchmark("mlp").costs}
    assert "They came to {}, {} and {}: the second is met, the".format(*(mlp[name] for name in names)) in text
    aims = 1.05, 1.10, 1.25
    said = "at most {:.2f}× for `Equilibrium`, {:.2f}× for `ClosedForm` until converged, and {:.2f}× for its"
    assert said.format(*aims) in text
    met = [float(mlp[name][:-1]) <= most for name, most in zip(names, aims, strict=True)]
    assert met == [False, True, False]
    measured = kept_benchmark("cnn")
    cnn = {cost.rule: cost for cost in measured.costs}
    paper = cnn["ClosedForm(0.1, 100)"]
    assert (
        f"`Equilibrium` takes {cnn['Equilibrium()'].time_ratio:.2f}×, `PAPER` {paper.time_ratio:.2f}× the time" in text
    )
    assert f"and {paper.memory_ratio:.2f}× the memory of backpropagation" in text
    assert f"`Euler` {measured.ratios[0].ratio:.1f} times `PAPER`'s time" in text
    assert f"`DirectFeedback` {cnn['DirectFeedback()'].time_ratio:.2f}×" in text


def test_what_is_said_of_compiled_steps_is_in_the_kept_benchmark() -> None:
    (mlp, cnn) = (
        {(ratio.what, ratio.least): f"{ratio.ratio:.2f} times" for ratio in benchmark.ratios}
        for benchmark in document.read(RESULTS / "bench" / "compiled-steps" / document.FILE).benchmarks
    )
    key = "the same by torch.compile", "one that is not compiled"
    assert f"the step takes {mlp[key]} as long on the MLP and {cnn[key]} on the CNN" in TEXT["results/costs"]
    assert f"{mlp[key]} on the MLP and {cnn[key]} on the CNN" in TEXT["guides/compile"]


def test_the_costs_of_others_code_are_those_of_the_kept_benchmark() -> None:
    (benchmark,) = document.read(RESULTS / "bench" / "against-mlp" / document.FILE).benchmarks
    ratios = {cost.rule: f"{cost.time_ratio:.1f}×" for cost in benchmark.costs}
    ours, theirs, authors = (
        ratios[name]
        for name in ("ClosedForm(0.1, 100)", "Torch2PC FixedPred(0.1, 100)", "the authors' code (0.1, 100)")
    )
    assert (
        f"takes {ours} backpropagation's time by `PAPER`, {theirs} by Torch2PC's fixed predictions, and {authors} by "
        "the authors' code" in TEXT["results/costs"]
    )


def test_what_is_said_of_condition_c_is_in_the_kept_runs() -> None:
    runs = read_lines(RESULTS / "figure1" / "runs.jsonl")
    curves = [
        [100 * epoch.test_accuracy for epoch in run.metrics]
        for condition, run in zip(runs.conditions, runs.runs, strict=True)
        if condition == "c"
    ]
    ends = sorted(curve[-1] for curve in curves)
    assert len(ends) == 10
    assert f"They end between {ends[0]:.0f} and {ends[4]:.0f} %" in TEXT["results/perceptrons"]
    assert f"the others between {math.floor(ends[5])} and {ends[9]:.0f} %" in TEXT["results/perceptrons"]
    begins = [next((i for i in range(8, 30) if max(curve[:i]) - curve[i] > 0.4), 30) for curve in curves]
    assert min(begins) == 8  # the ninth
    by_hand = kept("condition-c/outcome.json")
    first = curves[by_hand["seed"]]
    assert first[9] == min(curve[9] for curve in curves)
    accuracies = [100 * epoch["accuracy"] for epoch in by_hand["epochs"]]
    assert accuracies[:8] == pytest.approx(first[:8], abs=0.05)
    assert (
        f"in two epochs from {accuracies[7]:.1f} to {accuracies[9]:.1f} %, and the kept run to {first[9]:.1f} %"
        in TEXT["results/perceptrons"]
    )
    last = by_hand["epochs"][-1]
    assert last["saturation"][1] > 0.9 > 0.5 > last["cosine"][1]


BOTH_PLACES = [("figure1", "figure1-b-d", 40), ("figure3-a-c", "figure3-b-d", 20)]


@pytest.mark.parametrize(("here", "there", "runs"), BOTH_PLACES)
def test_a_gpu_and_a_processor_reach_the_same_accuracies(here: str, there: str, runs: int) -> None:
    """All seeds as one network whose steps are CUDA graphs, and each seed by itself on a processor."""
    on_gpu, on_cpu = (
        {run.config.id: run for run in read_lines(RESULTS / name / "runs.jsonl").runs} for name in (here, there)
    )
    both = on_gpu.keys() & on_cpu.keys()
    assert len(both) == runs
    for run in both:
        assert on_gpu[run].environment["gpu"] is not None
        assert on_cpu[run].environment["gpu"] is None
        for one, other in zip(on_gpu[run].metrics, on_cpu[run].metrics, strict=False):
            assert one.test_accuracy == other.test_accuracy
            is_early = one.epoch <= 10 and on_gpu[run].config.frozen.update_derivative
            assert one.train_loss == pytest.approx(other.train_loss, rel=7e-8 if is_early else 7e-6)


def test_how_long_figure_1_takes_on_a_gpu_is_what_the_command_printed() -> None:
    log = (RESULTS / "figure1" / "log.txt").read_text(encoding="utf-8")
    (minutes,) = re.findall(r"^60 of 60 runs done, after 0:0(\d:\d\d)$", log, flags=re.MULTILINE)
    (gpu,) = {run.environment["gpu"] for run in read_lines(RESULTS / "figure1" / "runs.jsonl").runs}
    assert gpu.startswith("NVIDIA H100")
    assert f"took {minutes} minutes on an NVIDIA H100" in TEXT["results/costs"]
    assert f"A GPU (NVIDIA H100) computed these 60 runs in {minutes} minutes" in TEXT["results/perceptrons"]


def test_what_is_said_of_a_gpus_steps_is_the_kept_measurement() -> None:
    def of(folder: str) -> dict[tuple[str, str], Any]:
        return {
            (b["model"], c["rule"]): c for b in kept(f"bench/{folder}/bench.json")["benchmarks"] for c in b["costs"]
        }

    single, graphs = of("cuda"), of("cuda-graphs")
    rules = "backpropagation", "ClosedForm(0.1, 100)"
    eager = [f"{single['mlp', rule]['milliseconds']:.1f} ms" for rule in rules]
    mlp, cnn = ([f"{graphs[model, rule]['milliseconds']:.2f}" for rule in rules] for model in ("mlp", "cnn"))
    ratios = [f"{graphs[model, rules[1]]['time_ratio']:.2f}×" for model in ("mlp", "cnn")]
    euler = [folder["mlp", "Euler(0.1, 100)"]["milliseconds"] for folder in (graphs, single)]
    text = TEXT["results/costs"]
    assert f"{eager[0]} by backpropagation on the MLP, {eager[1]} by `PAPER`" in text
    assert f"the same steps take {mlp[0]} and {mlp[1]} ms, a ratio of {ratios[0]}" in text
    assert f"on the CNN {cnn[0]} and {cnn[1]} ms, {ratios[1]}" in text
    assert f"by `Euler` take {euler[0]:.1f} ms on the MLP in place of {euler[1]:.0f}" in text
    assert f"it shows {graphs['mlp', 'Equilibrium()']['time_ratio']:.2f}×" in text


def kept(path: str) -> Any:
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


def test_every_architectures_gradients_are_within_the_bound() -> None:
    gradients = kept("gradients/gradients.json")
    assert len(gradients["comparisons"]) == len(ARCHITECTURES)
    for comparison in gradients["comparisons"]:
        assert len(comparison["errors"]) == 4
        assert all(error <= gradients["bound"] == 1e-10 for error in comparison["errors"].values())


def test_the_closed_form_is_faster_than_its_steps_at_every_depth() -> None:
    ratios = {(c["depth"], c["solver"]): c["ratio"] for c in kept("depth/depth.json")["costs"]}
    assert {depth for depth, _ in ratios} == set(cost_of_depth.DEPTHS)
    for depth in cost_of_depth.DEPTHS:
        for steps in (cost_of_depth.PAPERS, cost_of_depth.PLANNED):
            assert ratios[depth, f"ClosedForm, {steps}"] < ratios[depth, f"Euler, {steps}"]


def test_what_is_said_of_the_relaxation_from_zero_is_in_the_kept_results() -> None:
    text, readme = TEXT["results/cnns"], (ROOT / "README.md").read_text(encoding="utf-8")
    differences = {
        figure: {
            name: 100 * row["paired_difference"]["mean"]
            for name, row in kept(f"{figure}-from-zero/summary.json")["results"].items()
            if name != "backprop"
        }
        for figure in ("figure2", "appendix-c-svhn", "appendix-c-cifar100")
    }
    cifar10, svhn, cifar100 = differences.values()
    zero = "baseline, from zero"
    assert f"difference is {cifar10[zero]:.2f} points on CIFAR-10, {svhn[zero]:.2f} on SVHN" in " ".join(readme.split())
    assert f"differ by {cifar10[zero]:.2f} points from zero, and by {-cifar10['baseline']:.1f} from" in text
    assert f"where it is {-svhn['baseline']:.1f} points behind if it starts at the feedforward activities" in text
    assert (
        f"it is {-cifar100['baseline, from zero']:.1f} points behind backpropagation in place of "
        f"{cifar100['baseline']:.1f} points ahead" in text
    )


def test_what_two_gpus_say_of_svhn_differs_by_rounding_and_by_what_training_makes_of_it() -> None:
    h100, h200 = (
        {run.config.id: run for run in read_lines(RESULTS / f"appendix-c-svhn{more}" / "runs.jsonl").runs}
        for more in ("-from-zero", "")
    )
    both = h100.keys() & h200.keys()
    assert len(both) == 20
    farthest = {"backprop": 0.0, "ar": 0.0}
    for run in both:
        one, other = h100[run], h200[run]
        assert "H100" in one.environment["gpu"]
        assert "H200" in other.environment["gpu"]
        assert one.metrics[0].train_loss == pytest.approx(other.metrics[0].train_loss, rel=1e-5)
        difference = 100 * abs(one.metrics[-1].test_accuracy - other.metrics[-1].test_accuracy)
        farthest[one.config.rule] = max(farthest[one.config.rule], difference)
    assert (
        f"single accuracies differ by up to {farthest['ar']:.0f} points; backpropagation's differ by "
        f"{farthest['backprop']:.1f}" in TEXT["results/cnns"]
    )


def test_how_far_the_cnn_is_from_convergence_is_as_its_page_says() -> None:
    lines = csv.DictReader((RESULTS / "convergence-cnn" / "convergence.csv").read_text().splitlines())
    first = [line for line in lines if line["parameter"] == "convolutional.conv1.weight" and line["steps"] == "100"]
    left = {line["step_size"]: float(line["measured"]) for line in first}
    assert f"its gradient is {100 * left['0.1']:.0f} % off backpropagation's" in TEXT["results/cnns"]
    assert left["0.2"] < 1e-5


# ------------------------------------------------------------------------------------------- it leads somewhere


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    def outcome() -> tuple[int, list[str]]:
        command: list[str | Path] = [sys.executable, DOCS / "check_links.py", tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()

    page = tmp_path / "a.html"
    assert outcome() == (1, [f"{tmp_path}: no page in it"])
    (tmp_path / "b.html").write_text('<p id="there">')
    page.write_text('<a href="b.html#there">b</a> <a href="https://example.org/">elsewhere</a> <a href="#">up</a>')
    assert outcome() == (0, ["all links lead somewhere"])
    page.write_text('<a href="b.html#not">b</a> <img src="c.png"> <script src="https://example.org/d.js"></script>')
    assert outcome() == (
        1,
        [
            "a.html: b.html#not leads to no place on that page",
            "a.html: c.png leads nowhere",
            "a.html: loads https://example.org/d.js",
        ],
    )


def test_the_sizes_in_the_text_are_those_of_the_measured_phase() -> None:
    text, phases = TEXT["results/rules"], kept("moving-phase/outcome.json")["outcome"]

    def layers_of(when: str, steps: int) -> dict[tuple[bool, float], list[dict[str, float]]]:
        """By whether the rule is strict predictive coding and by the factor of the loss."""
        rows = [row for row in phases[when] if row["steps"] == steps]
        return {("strict" in row["rule"], row["factor"]): [*row["layers"].values()] for row in rows}

    start, later = layers_of("start", 20), layers_of("60 updates", 20)
    first = {f"{layers[0]['size']:.2f}" for layers in start.values()}
    assert first == {"0.02"}
    assert "the first convolution has 0.02 of its gradient in both" in text
    strict = later.pop((True, 1.0))[-1]["cosine"], layers_of("60 updates", 200)[True, 1.0][-1]["cosine"]
    assert (
        f"cosine is {strict[0]:.2f} in strict predictive coding, and {strict[1]:.2f} after 200 steps, but 1.00" in text
    )
    assert {f"{layers[-1]['cosine']:.2f}" for layers in later.values()} == {"1.00"}
