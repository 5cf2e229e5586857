"""Experiments that are not complete, and conditions in another version than the paper's text beside it."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt

from relaxprop.lab import data, stats
from relaxprop.lab.config import RunConfig
from relaxprop.lab.engines.grid import run_all
from relaxprop.lab.experiments import conditions, paper, plan, records
from relaxprop.lab.files import OutputError
from relaxprop.lab.report import claims, figures
from relaxprop.lab.results import EpochMetrics, FinishedRun, Head, RunLine
from relaxprop.lab.store import read_lines, take_over, write_lines
from tests.lab.problem import invoke

DEMO = paper.EXPERIMENTS["demo"]
COMMAND = "relaxprop reproduce demo --condition b --seeds 3 --epochs 2"
FINAL = {"backprop": (0.90, 0.91, 0.92), "baseline": (0.901, 0.908, 0.924), "b": (0.88, 0.895, 0.905)}


def computed(command: str = COMMAND) -> list[tuple[str, FinishedRun]]:
    """The command's runs, as if they had been computed."""
    planned = plan.plan_of(command).runs("digits", data.load("digits").digest)
    return [
        (
            name,
            FinishedRun(
                config,
                [
                    EpochMetrics(epoch=i, train_loss=1, test_accuracy=FINAL[name][config.seed] / (3 - i), seconds=i)
                    for i in (1, 2)
                ],
                {"torch": "2.13.0"},
            ),
        )
        for name, config in planned
    ]


@pytest.fixture
def directories(tmp_path: Path) -> Path:
    """All runs of the command as run directories."""
    lines = [RunLine.of(run) for _, run in computed()]
    write_lines(tmp_path / "all.jsonl", Head(command=COMMAND, runs=len(lines)), lines)
    take_over(tmp_path / "all.jsonl", tmp_path / "all")
    return tmp_path / "all"


def some(directories: Path, *wanted: tuple[str, int]) -> Path:
    """A folder with these runs alone, by condition and seed, and a stranger."""
    folder = directories.parent / f"some-{len(wanted)}"
    for name, run in computed():
        if (name, run.config.seed) in wanted:
            shutil.copytree(directories / run.config.id, folder / run.config.id)
    (folder / "stranger").mkdir(parents=True)
    (folder / "stranger" / "config.json").write_text("{")
    return folder


EIGHT = [
    ("backprop", 0),
    ("baseline", 0),
    ("b", 0),
    ("backprop", 1),
    ("baseline", 1),
    ("b", 1),
    ("baseline", 2),
    ("b", 2),
]


def test_what_has_finished_is_collected_and_the_rest_later(directories: Path, tmp_path: Path) -> None:
    folder = tmp_path / "figure"
    status, said = invoke("collect", folder, "--runs", some(directories, ("baseline", 1), ("backprop", 1)))
    assert (status, "say by --command of which command the runs are" in said) == (1, True)
    status, said = invoke("collect", folder, "--runs", some(directories, *EIGHT), "--command", COMMAND)
    assert status == 0, said
    assert "8 runs added: 8 of 9 are there" in said
    kept = read_lines(folder / "runs.jsonl")
    assert (kept.head.runs, kept.head.planned) == (8, 9)
    expected = [(name, run) for name, run in computed() if (name, run.config.seed) in EIGHT]
    assert list(zip(kept.conditions, kept.runs, strict=True)) == expected
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    status, said = invoke("collect", folder, "--runs", some(directories, *EIGHT[:3]))
    assert "0 runs added: 8 of 9 are there" in said
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    status, said = invoke("collect", folder, "--runs", directories)
    assert "1 runs added: 9 of 9 are there" in said
    whole = tmp_path / "whole"
    whole.mkdir()
    names, runs = zip(*computed(), strict=True)
    records.write_conditions(DEMO, names, runs, data.load("digits"), whole, COMMAND)
    for path in whole.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_part_counts_over_the_seeds_that_both_have(directories: Path, tmp_path: Path) -> None:
    folder = tmp_path / "figure"
    records.collect(folder_of(folder), some(directories, *EIGHT), data.load, COMMAND)
    figure, _ = figures.write_figure(folder)
    rows = {row.name: row for row in figure.rows}
    assert {name: row.of_seeds for name, row in rows.items()} == {
        "backprop": (0, 1),
        "baseline": (0, 1),
        "b": (0, 1, 2),
    }
    pairs = {"baseline": ("backprop", 2), "b": ("baseline", 3)}
    for name, (other, n) in pairs.items():
        differences = [x - y for x, y in zip(FINAL[name][:n], FINAL[other][:n], strict=True)]
        assert rows[name].difference == stats.mean_over_seeds(differences)
        assert rows[name].versus[-1].mean == pytest.approx(statistics.fmean(FINAL[other][:n]))
    document = (folder / "table.md").read_text()
    assert "MLP, 2 epochs, n = 2 to 3 seeds, 8 of 9 runs" in document
    assert "* not finished: 8 of 9 runs are there; a row is over the seeds that are finished" in document
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["runs_there"], summary["runs_planned"]) == (8, 9)
    assert summary["results"]["baseline"]["seeds"] == [0, 1]
    lines = csv.DictReader((folder / "accuracy.csv").read_text().splitlines())
    assert {(line["condition"], line["n"]) for line in lines} == {("backprop", "2"), ("baseline", "2"), ("b", "3")}
    status, said = invoke("power", folder)
    assert status == 0
    assert "8 of 9 runs" in said


def folder_of(folder: Path) -> Path:
    folder.mkdir()
    return folder / "runs.jsonl"


def test_a_condition_without_a_pair_is_left_out(directories: Path, tmp_path: Path) -> None:
    wanted = [("backprop", 0), ("baseline", 0), ("backprop", 1), ("b", 2)]
    records.collect(folder_of(tmp_path / "figure"), some(directories, *wanted), data.load, COMMAND)
    figure, _ = figures.write_figure(tmp_path / "figure")
    assert [row.name for row in figure.rows] == ["backprop", "baseline"]
    assert "b: " not in (tmp_path / "figure" / "table.md").read_text().partition("\n\n")[0]
    records.collect(folder_of(tmp_path / "none"), some(directories, *wanted[1:]), data.load, COMMAND)
    with pytest.raises(OutputError, match="no condition has a seed with the one that it is compared with"):
        figures.write_figure(tmp_path / "none")


def test_a_complete_file_may_not_lack_seeds(directories: Path, tmp_path: Path) -> None:
    records.collect(folder_of(tmp_path / "figure"), some(directories, *EIGHT), data.load, COMMAND)
    path = tmp_path / "figure" / "runs.jsonl"
    path.write_text(path.read_text().replace('"planned": 9, ', ""))
    with pytest.raises(OutputError, match="conditions backprop and baseline have not both seed 2"):
        figures.write_figure(path.parent)


def test_what_cannot_be_collected_is_refused(directories: Path, tmp_path: Path) -> None:
    path = folder_of(tmp_path / "figure")

    def refused(message: str, command: str | None = None, runs: Path = directories, into: Path = path) -> None:
        with pytest.raises(OutputError, match=re.escape(message)):
            records.collect(into, runs, data.load, command)

    refused("of which the runs are not known: must be `relaxprop reproduce FIGURE …`, got 'make'", "make")
    refused("is of 2 data sets: name one in it by --dataset", "relaxprop reproduce graphs")
    refused("is no finished run of", COMMAND.replace("epochs 2", "epochs 3"))
    refused("is no finished run of", COMMAND, tmp_path)
    records.collect(path, some(directories, *EIGHT), data.load, COMMAND)
    refused("is of 'relaxprop reproduce demo --condition b --seeds 3 --epochs 2', not of 'relaxprop reproduce demo'",
            "relaxprop reproduce demo")  # fmt: skip
    strange = tmp_path / "strange.jsonl"
    (_, run), *_ = computed()
    for config, message in (
        (run.config.model_copy(update={"learning_rate": 0.1}), "is no run of its command"),
        (run.config.model_copy(update={"seed": 3}), "is no run of its command"),
        (run.config.model_copy(update={"data": "0123456789"}), "trained on other data of the name digits"),
        (computed()[1][1].config.model_copy(update={"alignment_every": 5}), "measured alignment at other times"),
    ):
        line = RunLine.of(FinishedRun(config, run.metrics, {}))
        write_lines(strange, Head(command=COMMAND, runs=1), [line])
        refused(message, into=strange)
    damaged = some(directories, *EIGHT[:3])
    for folder in damaged.iterdir():
        (folder / "metrics.jsonl").write_text("{")
    refused("is damaged", COMMAND, damaged, tmp_path / "new.jsonl")


def test_an_older_file_is_completed_with_what_is_missing(tmp_path: Path) -> None:
    lines = [RunLine.of(run) for _, run in computed()[:-1]]
    folder = folder_of(tmp_path / "older").parent
    write_lines(folder / "runs.jsonl", Head(command=COMMAND, runs=len(lines)), lines)
    assert records.complete(folder / "runs.jsonl", data.load)
    kept = read_lines(folder / "runs.jsonl")
    assert (kept.head.runs, kept.head.planned) == (8, 9)
    assert kept.conditions == [name for name, _ in computed()[:-1]]


@pytest.mark.parametrize("figure", list(paper.EXPERIMENTS))
def test_versions_stand_beside_what_is_written(figure: paper.FigureName) -> None:
    experiment = paper.EXPERIMENTS[figure]
    for dataset in experiment.conditions:
        for version in ({"as_coded": True}, {"initial": "zero"}, {"as_coded": True, "initial": "zero"}):
            alone = conditions.in_version(experiment, **version)
            both = conditions.in_version(experiment, **version, beside=True)
            runs = {
                kind: conditions.condition_runs(e, dataset, seeds=2, epochs=1)
                for kind, e in (("written", experiment), ("alone", alone), ("both", both))
            }
            by_name = {(name, config.seed): config for name, config in runs["both"]}
            assert len(by_name) == len(runs["both"]) == len({config.id for config in by_name.values()})
            assert {c.id for c in by_name.values()} == {c.id for kind in ("written", "alone") for _, c in runs[kind]}
            for name, condition in both.of(dataset).items():
                if condition.beside is None:
                    assert condition == experiment.of(dataset)[name]
                    continue
                written, own = by_name[condition.beside, 1], by_name[name, 1]
                assert (own.id, condition.beside) in {(config.id, known) for known, config in runs["alone"]}
                assert own.id != written.id
                assert condition.claim == experiment.of(dataset)[condition.beside].claim
                # It is compared with the same version of what it is compared with as written.
                versus = both.of(dataset)[condition.versus]
                assert (versus.beside or condition.versus) == experiment.of(dataset)[condition.beside].versus
                assert versus.rule == "backprop" or (versus.as_coded, versus.initial) == (own_version(condition))


def own_version(condition: conditions.Condition) -> tuple[bool, str]:
    return condition.as_coded, condition.initial


def test_a_start_changes_nothing_in_backpropagation() -> None:
    both = conditions.in_version(DEMO, initial="zero", beside=True)
    assert list(both.of("digits")) == [
        *paper.UNFROZEN,
        *(f"{name}, from zero" for name in paper.UNFROZEN if name != "backprop"),
    ]
    chosen = conditions.condition_runs(both, "digits", seeds=1, epochs=1, only=["baseline"])
    assert [name for name, _ in chosen] == ["backprop", "baseline", "baseline, from zero"]
    assert [config.initial for _, config in chosen] == ["feedforward", "feedforward", "zero"]
    with pytest.raises(ValueError, match="beside needs another version"):
        conditions.in_version(DEMO, beside=True)
    status, said = invoke("reproduce", "demo", "--beside")
    assert (status, "--beside" in said, "another version" in said) == (2, True, True)


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        (["--initial", "zero"], "from zero", {"initial": "zero"}),
        (["--as-coded"], "as coded", {"left_out": 2}),
    ],
)
def test_two_versions_are_computed_and_compared(
    tmp_path: Path, options: list[str], name: str, expected: dict[str, object]
) -> None:
    words = ["reproduce", "demo", "--seeds", "2", "--epochs", "1", "--condition", "d", *options, "--beside"]
    out = tmp_path / "out"
    status, said = invoke(*words, "--runs", tmp_path / "runs", "--out", out, "--workers", "1")
    assert status == 0, said
    kept = read_lines(out / "runs.jsonl")
    # The command tells its runs.
    planned = plan.plan_of(shlex.join(["relaxprop", *words])).runs("digits", data.load("digits").digest)
    assert [(n, run.config) for n, run in zip(kept.conditions, kept.runs, strict=True)] == planned
    finals = {
        (condition, run.config.seed): run.metrics[-1].test_accuracy
        for condition, run in zip(kept.conditions, kept.runs, strict=True)
    }
    for condition, run in zip(kept.conditions, kept.runs, strict=True):
        is_other = str(condition).endswith(name)
        assert all((getattr(run.config, field) == value) == is_other for field, value in expected.items())
    figure = figures.read_figure(out)
    rows = {row.name: row for row in figure.rows}
    twins = [f"{written}, {name}" for written in ("backprop", "baseline", "d") if f"{written}, {name}" in rows]
    assert len(twins) == (3 if "--as-coded" in options else 2)
    for twin in twins:
        written = twin.partition(",")[0]
        beside = rows[twin].beside
        assert beside is not None
        assert beside.difference == stats.mean_over_seeds([finals[twin, i] - finals[written, i] for i in (0, 1)])
    d = rows[f"d, {name}"].difference
    assert d == stats.mean_over_seeds([finals[f"d, {name}", i] - finals[f"baseline, {name}", i] for i in (0, 1)])
    assert [cells[0] for cells in claims.beside_table(figure.rows)] == [claims.label(rows[twin]) for twin in twins]
    first, second, *_ = (out / "table.md").read_text().split("\n\n")
    assert first.count("\n| ") == len(figure.rows) + 1
    assert second.startswith("| condition | test accuracy (%) | as written (%) | n |")
    assert "beside the paper's text" in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["results"][f"d, {name}"]["beside"]["to"] == "d"
    assert np.asarray(plt.imread(out / "accuracy.png")).std() > 0.02


def test_a_longer_run_stands_for_a_shorter_one(tmp_path: Path) -> None:
    digits = data.load("digits")
    command = "relaxprop reproduce demo --condition baseline --seeds 1 --epochs 1"
    planned = plan.plan_of(command).runs("digits", digits.digest)
    longer = [config.model_copy(update={"epochs": 2}) for _, config in planned]
    runs = run_all(longer, digits, root=tmp_path / "runs")
    collected = records.collect(tmp_path / "runs.jsonl", tmp_path / "runs", data.load, command)
    assert (collected.there, collected.planned) == (2, 2)
    kept = read_lines(tmp_path / "runs.jsonl").runs
    assert [run.metrics for run in kept] == [run.metrics[:1] for run in runs]
    assert [run.config for run in kept] == [config for _, config in planned]


def test_runs_with_the_same_results_have_one_name() -> None:
    run = RunConfig(dataset="digits", seed=1)
    assert plan.same_results(run) == plan.same_results(run.model_copy(update={"data": "x", "alignment_every": 7}))
    for change in ({"seed": 2}, {"learning_rate": 0.1}, {"threads": 2}, {"initial": "zero"}):
        assert plan.same_results(run) != plan.same_results(run.model_copy(update=change))
