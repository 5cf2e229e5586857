"""Runs as data: found, filtered, exported, compared, and a figure's folder made from its records alone."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet
import pytest

from relaxprop.lab import data, stats
from relaxprop.lab.config import RunConfig
from relaxprop.lab.experiments import conditions, paper, records
from relaxprop.lab.files import OutputError
from relaxprop.lab.records import Run, differing, find, sort, where
from relaxprop.lab.report import claims, compare, export, figures
from relaxprop.lab.results import AlignmentSample, EpochMetrics, FinishedRun, Head, RunLine
from relaxprop.lab.store import read_lines, take_over, write_lines
from tests.lab.problem import invoke

DEMO = paper.EXPERIMENTS["demo"]
COMMAND = "relaxprop reproduce demo --seeds 4 --epochs 2"
# Final accuracies of seeds 0 to 3.
ACCURACIES = {
    "backprop": (0.90, 0.91, 0.92, 0.93),
    "baseline": (0.901, 0.909, 0.922, 0.929),
    "a": (0.897, 0.906, 0.904, 0.925),
    "b": (0.88, 0.895, 0.905, 0.91),
    "c": (0.85, 0.86, 0.88, 0.88),
    "d": (0.10, 0.11, 0.10, 0.12),
}


def runs() -> tuple[list[str], list[FinishedRun]]:
    """Of all conditions, with alignment in the baseline, as if they had been computed."""
    digest = data.load("digits").digest
    planned = conditions.condition_runs(DEMO, "digits", seeds=4, epochs=2, data=digest, alignment_every=10)
    found = []
    for name, config in planned:
        final = ACCURACIES[name][config.seed]
        sample = AlignmentSample(epochs=0.5, gradients={"l.weight": 0.5, "l.bias": math.nan}, feedback={}, seconds=1)
        metrics = [
            EpochMetrics(
                epoch=epoch,
                train_loss=math.inf if name == "d" else 1 / epoch,
                test_accuracy=accuracy,
                seconds=2.0 + config.seed,
                alignment=(sample,) if name == "baseline" else (),
            )
            for epoch, accuracy in ((1, final / 2), (2, final))
        ]
        found.append(FinishedRun(config, metrics, {"torch": "2.13.0", "gpu": None}))
    return [name for name, _ in planned], found


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A figure's folder. It takes most of a second to draw."""
    kept = tmp_path_factory.mktemp("figure")
    records.write_conditions(DEMO, *runs(), data.load("digits"), kept, COMMAND)
    return kept


@pytest.fixture
def folder(drawn: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may change."""
    return Path(shutil.copytree(drawn, tmp_path / "figure"))


@pytest.fixture
def directories(folder: Path, tmp_path: Path) -> Path:
    """The same runs as run directories, one of which is not finished and one has only begun."""
    root = tmp_path / "runs"
    take_over(folder / "runs.jsonl", root)
    for name, config in (("unfinished", RunConfig(seed=77, epochs=3)), ("begun", RunConfig(seed=78, epochs=3))):
        (root / name).mkdir()
        (root / name / "config.json").write_text(config.model_dump_json())
    line = EpochMetrics(epoch=1, train_loss=1, test_accuracy=0.25, seconds=1).model_dump_json()
    (root / "unfinished" / "metrics.jsonl").write_text(line + "\n")
    return root


def test_a_file_and_directories_of_the_same_runs_tell_the_same(folder: Path, directories: Path) -> None:
    in_file = {run.id: run for run in find([folder / "runs.jsonl"]).runs}
    found = find([directories])
    assert not found.unreadable
    in_directories = {run.id: run for run in found.runs if run.is_finished}
    assert len(found.runs) == len(in_directories) + 2
    assert in_file.keys() == in_directories.keys() == {run.config.id for run in runs()[1]}
    for name, run in zip(*runs(), strict=True):
        for kept in (in_file[run.config.id], in_directories[run.config.id]):
            assert kept.config == run.config.model_dump(mode="json")
            assert kept.environment() == run.environment
            assert kept.accuracy == run.metrics[-1].test_accuracy
            assert repr([EpochMetrics.model_validate(m) for m in kept.metrics()]) == repr(run.metrics)  # NaN ≠ NaN
        assert in_file[run.config.id].condition == name


def test_epochs_done_are_counted(directories: Path) -> None:
    done = {run.id: (run.epochs, run.is_finished, run.accuracy) for run in find([directories]).runs}
    assert done["unfinished"] == (1, False, 0.25)
    assert done["begun"] == (0, False, None)
    (run,) = find([directories / "unfinished"]).runs
    assert run.environment() == {}  # which was not kept


def test_runs_are_chosen_by_any_field(folder: Path, directories: Path) -> None:
    kept = find([folder]).runs

    def chosen(*filters: str, among: list[Run] = kept) -> set[tuple[str | None, int]]:
        for condition in filters:
            among = where(among, condition)
        return {(run.condition, run.config["seed"]) for run in among}

    of = {name: {(name, seed) for seed in range(4)} for name in ACCURACIES}
    assert chosen("frozen.update_derivative=false") == of["b"] | of["c"]
    assert chosen("frozen.update_derivative=false", "seed=2") == {("b", 2), ("c", 2)}
    assert chosen("rule=backprop") == chosen('rule="backprop"') == of["backprop"]
    assert chosen("rule!=backprop", "solver=closed-form") == of["baseline"] | of["b"] | of["d"]
    assert chosen("seed>=2", "seed<3", "condition=d") == {("d", 2)}
    assert chosen("test_accuracy<=0.1") == {("d", 0), ("d", 2)}
    assert chosen("learning_rate=5e-4") == set().union(*of.values())
    assert chosen("seed=true") == chosen("frozen.input=1") == set()  # a number is no truth value
    assert chosen("solver_options.num_steps=null") == of["backprop"]  # which has no solver
    assert {run.id for run in where(find([directories]).runs, "finished=false")} == {"unfinished", "begun"}


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("rule", "must be FIELD=VALUE"),
        ("=ar", "must be FIELD=VALUE"),
        (
            "frozen.derivative=true",
            "field must be one of id, condition, .*frozen.update_derivative.*'frozen.derivative'",
        ),
        ("seed>many", "> needs a number, got 'many'"),
        ("seed<true", "< needs a number"),
    ],
)
def test_a_filter_that_is_none_is_refused(folder: Path, condition: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        where(find([folder]).runs, condition)


def test_sorting_leaves_what_has_no_value_to_the_end(directories: Path) -> None:
    found = find([directories]).runs
    accuracies = [run.accuracy for run in sort(found, "test_accuracy")]
    assert accuracies == [*sorted(a for a in accuracies if a is not None), None]
    assert sort(found, "test_accuracy", descending=True)[0].accuracy == 0.93
    with pytest.raises(ValueError, match=r"field must be one of .*got 'speed'"):
        sort(found, "speed")


def test_what_differs_from_most_is_told(folder: Path) -> None:
    kept = find([folder]).runs
    told = {run.condition: text for run, text in zip(kept, differing(kept), strict=True)}
    assert told["b"] == "frozen.update_derivative=false"
    assert told["d"] == "frozen.update_activity=false"
    assert "frozen.relaxation_derivative=false frozen.update_derivative=false" in told["c"]
    assert told["baseline"] == ""


LINE = RunLine.of(runs()[1][0]).model_dump(mode="json")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no run"),
        ("[]", r"line 2 is of another format: \[\] stands where an object has to"),
        (json.dumps(LINE | {"weights": 3}), "line 2 is of another format: it has weights"),
        (json.dumps({"id": "x"}), "line 2 is no run: config, environment, metrics is missing"),
        (json.dumps(LINE | {"config": LINE["config"] | {"seed": "one"}}), "seed must be of type int, got 'one'"),
        (json.dumps(LINE | {"metrics": [{"epoch": 1}]}), "an epoch's train_loss must be a number, got None"),
        (json.dumps(LINE | {"metrics": 7}), "its metrics are no list"),
    ],
)
def test_a_line_of_another_format_is_refused_by_name(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({"command": "x", "runs": 1}) + f"\n{line}\n")
    with pytest.raises(OutputError, match=message):
        find([path])
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "config.json").write_text(RunConfig().model_dump_json())
    found = find([tmp_path])  # in a folder it is told, and the others are read
    assert [run.id for run in found.runs] == ["good"]
    assert re.search(message, found.unreadable[0])


def test_an_unknown_place_is_refused_with_what_there_is(directories: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no run and no folder .*unfinishe: in .* are begun, digits"):
        find([directories / "unfinishe"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match="empty holds no runs"):
        find([tmp_path / "empty"])
    (tmp_path / "runs.jsonl").write_text(json.dumps({"command": "x", "runs": 2}) + "\n")
    with pytest.raises(OutputError, match="has 0 runs, and its first line says 2"):
        find([tmp_path / "runs.jsonl"])


def test_a_field_of_a_later_version_is_refused_and_an_earlier_description_is_read(tmp_path: Path) -> None:
    _, (run, *_) = runs()
    path, line = tmp_path / "runs.jsonl", RunLine.of(run).model_dump(mode="json")

    def written(config: dict[str, Any]) -> Path:
        path.write_text(json.dumps({"command": "x", "runs": 1}) + "\n" + json.dumps(line | {"config": config}) + "\n")
        return path

    with pytest.raises(OutputError, match=r"line 2 is no run, or one of another format .* momentum: .*got 0.9"):
        read_lines(written(line["config"] | {"momentum": 0.9}))
    with pytest.raises(OutputError, match=r"epochs: Input should be greater than or equal to 1, got 0"):
        read_lines(written(line["config"] | {"epochs": 0}))
    earlier = {name: value for name, value in line["config"].items() if name not in ("initial", "optimizer", "loss")}
    assert read_lines(written(earlier)).runs[0].config == run.config


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_the_exported_table_has_a_row_for_each_run_and_epoch(folder: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"all.{kind}"
    status, said = invoke("export", folder, "--format", kind, "--out", path, "--alignment")
    assert status == 0
    assert "48 epochs of 24 runs" in said
    empty_is_null = pyarrow.csv.ConvertOptions(null_values=[""])
    read = {
        "parquet": pyarrow.parquet.read_table,
        "csv": lambda path: pyarrow.csv.read_csv(path, convert_options=empty_is_null),
    }[kind]
    rows = read(path).to_pylist()
    expected = [
        (name, run.config.id, run.config.seed, run.config.frozen.update_derivative, m.epoch, m.test_accuracy, "2.13.0")
        for name, run in zip(*runs(), strict=True)
        for m in run.metrics
    ]
    columns = ("condition", "id", "seed", "frozen.update_derivative", "epoch", "test_accuracy", "environment.torch")
    assert [tuple(row[name] for name in columns) for row in rows] == expected
    assert {row["train_loss"] for row in rows if row["condition"] == "d"} == {math.inf}
    cosines = read(tmp_path / f"all-alignment.{kind}").to_pylist()
    assert len(cosines) == 4 * 2 * 2  # seeds × epochs × parameters
    assert {(row["condition"], row["quantity"], row["epochs"]) for row in cosines} == {("baseline", "gradients", 0.5)}
    assert [row["cosine"] for row in cosines if row["name"] == "l.weight"] == [0.5] * 8
    assert all(math.isnan(row["cosine"]) for row in cosines if row["name"] == "l.bias")


def test_a_field_of_numbers_and_words_is_exported_as_words(folder: Path) -> None:
    first, second, *_ = find([folder]).runs
    mixed = [Run(r.id, r.place, None, {**r.config, "data": d}, r.epochs, r.last, r.metrics, r.environment)
             for r, d in ((first, 1), (second, "abc"))]  # fmt: skip
    assert export.epochs_table(mixed)["data"].to_pylist() == ["1", "1", "abc", "abc"]


def test_two_conditions_side_by_side(folder: Path, directories: Path) -> None:
    kept = find([folder]).runs
    paired = compare.pair(where(kept, "condition=b"), where(kept, "condition=baseline"))
    differences = [b - a for a, b in zip(ACCURACIES["baseline"], ACCURACIES["b"], strict=True)]
    assert paired.difference == stats.mean_over_seeds(differences)
    assert paired.seeds == [0, 1, 2, 3]
    assert paired.fields == {"frozen.update_derivative": (False, True)}
    low, high = paired.difference.interval
    shown = f"{100 * low:.2f} to {100 * high:.2f}"
    for spelled in (("b", "baseline", folder), ("b", "baseline", directories, "--where", "finished=true")):
        status, said = invoke("compare", *spelled)
        assert status == 0, said
        assert shown in said
        assert "frozen.update_derivative: false in A, true in B" in said
    _, said = invoke("compare", "rule=ar,frozen.update_activity=false", "rule=backprop", folder)
    assert "does not hold: -80.8 points" in said  # the mean of −80, −80, −82, −81


def test_what_cannot_be_paired_is_refused(folder: Path, directories: Path, tmp_path: Path) -> None:
    lines = (folder / "runs.jsonl").read_text().splitlines()
    fewer = [
        line for line in lines[1:] if not ('"condition":"b"' in line and ('"seed":1,' in line or '"seed":3,' in line))
    ]
    (tmp_path / "fewer.jsonl").write_text("\n".join([json.dumps({"command": "x", "runs": 22}), *fewer]) + "\n")
    assert invoke("compare", "b", "baseline", tmp_path / "fewer.jsonl") == (1, "seeds 1, 3 are missing in A")
    status, said = invoke("compare", "b", "baseline", folder, directories, "--where", "finished=true")
    assert status == 1
    assert "seed 0 is there twice in A" in said
    status, said = invoke("compare", "baseline", "rule=backprop", directories)
    assert status == 1
    assert "has 0 of 3 epochs" in said or "has 1 of 3 epochs" in said
    status, said = invoke("compare", "e", "baseline", folder)
    assert status == 2
    assert "no run is 'e'; conditions here are a, b, backprop, baseline, c, d" in said
    name = next(directories.iterdir()).name
    status, said = invoke("compare", name, "baseline", directories)
    assert status == 2
    assert f"'{name}' is the name of a run, and A is a condition or FIELD=VALUE" in " ".join(said.split())
    for field, value in (("data", "0123456789"), ("epochs", 1)):
        changed = [json.loads(line) for line in lines[1:]]
        for line in changed:
            if line["condition"] == "b":
                line["config"][field] = value
        other = tmp_path / "other.jsonl"
        other.write_text("\n".join([lines[0], *map(json.dumps, changed)]) + "\n")
        status, said = invoke("compare", "b", "baseline", other)
        assert (status, f"the runs differ in their {field}" in said) == (1, True)


def test_a_figures_folder_is_made_from_its_records_alone(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "runs.jsonl", alone)
    status, said = invoke("table", alone)
    assert status == 0
    assert "Holm's p" in said
    assert "chance: " in said
    files = {path.name for path in folder.iterdir()}
    assert {"table.md", "accuracy.csv", "summary.json", "accuracy.png", "alignment.csv", "alignment.png"} < files
    assert {path.name for path in alone.iterdir()} == files
    for name in files:
        assert (alone / name).read_bytes() == (folder / name).read_bytes(), name


def test_older_records_are_completed_from_the_data(folder: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.mkdir()
    write_lines(older / "runs.jsonl", Head(command=COMMAND, runs=24), [RunLine.of(run) for run in runs()[1]])
    status, said = invoke("power", older)
    assert status == 1
    assert f"`relaxprop table {older}` completes it" in said
    assert invoke("table", older)[0] == 0
    for path in folder.iterdir():
        assert (older / path.name).read_bytes() == path.read_bytes(), path.name
    whole = data.load("digits")
    part = data.Dataset("digits", whole.classes, whole.train, data.Split(whole.test.images[1:], whole.test.labels[1:]))
    for command, message in ((COMMAND, "trained on other data of the name digits"), ("make", "made by 'make'")):
        write_lines(older / "runs.jsonl", Head(command=command, runs=24), [RunLine.of(run) for run in runs()[1]])
        with pytest.raises(OutputError, match=message):
            records.complete(older / "runs.jsonl", lambda name: part)


def test_a_figure_without_records_says_how_to_compute_them(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"command": COMMAND}))
    for command in ("table", "power"):
        status, said = invoke(command, tmp_path)
        assert status == 1
        assert f"runs.jsonl does not exist, as its records were not kept; computes them again: {COMMAND}" in said


def test_the_table_says_seeds_family_chance_margin_and_rule(folder: Path) -> None:
    rows = {row.name: row for row in figures.read_figure(folder).rows}
    tested = [name for name in ACCURACIES if name != "backprop"]
    differences = {
        name: stats.mean_over_seeds(
            [
                x - y
                for x, y in zip(
                    ACCURACIES[name], ACCURACIES["baseline" if name != "baseline" else "backprop"], strict=True
                )
            ]
        )
        for name in tested
    }
    chance = json.loads((folder / "summary.json").read_text())["chance"]
    regions = {name: stats.region("destroyed" if name == "d" else "equivalent", sum(ACCURACIES["baseline"]) / 4, chance)
               for name in tested}  # fmt: skip
    p = {name: stats.p_values(differences[name], regions[name]) for name in tested}
    for name in tested:
        side = "holds" if p[name].holds < p[name].refuted else "refuted"
        family = [getattr(p[other], side) for other in tested]  # of all claims the tests of the same side
        assert rows[name].judgement.p == pytest.approx(getattr(p[name], side))
        assert rows[name].judgement.holm == pytest.approx(stats.holm(family)[tested.index(name)])
    cells = dict(zip(rows, claims.table(list(rows.values())), strict=True))
    verdict = claims.COLUMNS.index("verdict")
    seeds = stats.seeds_to_decide(differences["a"], regions["a"])
    assert cells["a"][verdict] == f"open: 4 seeds cannot tell, {seeds} would"
    assert cells["d"][verdict] == "holds"
    document = (folder / "table.md").read_text()
    assert "corrected for this table's 5 claims (baseline, a, b, c, d)" in document
    assert f"chance: {100 * chance:.2f} %" in document
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["margin"], summary["confidence"], summary["power"]) == (0.01, 0.95, 0.8)
    assert summary["family"] == {"claims": tested, "correction": "Holm", "level": pytest.approx(0.025)}
    assert "interval of the difference lies within ±1 point" in summary["rule"]
    assert summary["environments"] == [{"torch": "2.13.0", "gpu": None, "runs": 24}]
    assert summary["results"]["a"]["paired_difference"]["seeds_to_decide"] == seeds


def test_a_verdict_that_does_not_survive_the_correction_says_so(tmp_path: Path) -> None:
    rows = figures.read_figure(tmp_path_with_b(tmp_path)).rows
    b = next(row for row in rows if row.name == "b")
    assert b.judgement.p is not None
    assert b.judgement.holm is not None
    assert b.judgement.p < stats.LEVEL < b.judgement.holm
    assert claims.table(rows)[3][-1].endswith(": open")


def tmp_path_with_b(folder: Path) -> Path:
    """A figure where b alone is refuted, by less than its family of five takes."""
    names, found = runs()
    final = {"b": (-0.016, -0.024, -0.015, -0.023)}
    changed = []
    for name, run in zip(names, found, strict=True):
        accuracy = 0.9 + (
            final[name][run.config.seed] if name in final else 0.02 * (run.config.seed - 1.5) * (name != "baseline")
        )
        changed.append(
            FinishedRun(run.config, [m.model_copy(update={"test_accuracy": accuracy}) for m in run.metrics], {})
        )
    records.write_conditions(DEMO, names, changed, data.load("digits"), folder, COMMAND)
    return folder


def test_a_condition_without_pairs_is_refused_by_its_seeds(folder: Path) -> None:
    names, found = runs()
    with pytest.raises(ValueError, match="conditions backprop and d have not both seed 3"):
        claims.summarise(paper.UNFROZEN, names[:-1], found[:-1], chance=0.1)
    with pytest.raises(ValueError, match="condition d has seed 3 twice"):
        claims.summarise(paper.UNFROZEN, [*names, "d"], [*found, found[-1]], chance=0.1)
    with pytest.raises(ValueError, match="there are no runs of backprop"):
        claims.summarise(paper.UNFROZEN, names[1:2], found[1:2], chance=0.1)
    shuffled = sorted(zip(names, found, strict=True), key=lambda pair: -pair[1].config.seed)
    backwards = claims.summarise(paper.UNFROZEN, [n for n, _ in shuffled], [r for _, r in shuffled], chance=0.1)
    forwards = claims.summarise(paper.UNFROZEN, names, found, chance=0.1)
    assert [row.difference for row in backwards] == [row.difference for row in forwards]


def test_power_says_how_many_seeds_a_margin_takes(folder: Path) -> None:
    for options, margin, probability in ((), 0.01, 0.8), (("--margin", "0.02", "--probability", "0.95"), 0.02, 0.95):
        status, said = invoke("power", folder, *options)
        assert status == 0
        differences = [x - y for x, y in zip(ACCURACIES["a"], ACCURACIES["baseline"], strict=True)]
        needed = stats.seeds_to_decide(
            stats.mean_over_seeds(differences), stats.Region(-margin, margin), probability=probability
        )
        (row,) = re.findall(r" a 4 .*? b 4 ", said)
        assert f" {needed} " in row
    for option in ("--margin", "--probability"):
        status, said = invoke("power", folder, option, "1")
        assert (status, "must be in (0, 1), got 1.0" in said) == (2, True)


def test_the_list_of_runs(folder: Path, directories: Path) -> None:
    status, said = invoke("runs", directories, "--unfinished")
    assert status == 0
    assert "unfinished 1/3 25.00 %" in said
    assert said.endswith("2 runs ")
    _, said = invoke("runs", folder, "--rule", "ar", "--where", "seed=0", "--sort", "test_accuracy", "--descending")
    order = [said.index(f" {name} 2/2 ") for name in ("baseline", "a", "b", "c", "d")]
    assert order == sorted(order)
    assert "backprop" not in said
    (directories / "broken").mkdir()
    (directories / "broken" / "config.json").write_text("{")
    _, said = invoke("runs", directories)
    assert "26 runs" in said
    assert "left out: the run in" in said
    status, said = invoke("export", directories, "--out", directories.parent / "x.parquet")
    assert status == 1
    assert "broken is damaged" in said
    status, said = invoke("runs", folder, "--where", "rul=ar")
    assert (status, "--where" in said, "field must be one of" in said) == (2, True, True)
    assert "frozen.update_derivative" in said  # as --where takes it
    status, said = invoke("runs", folder, "--where", "frozen.update_derivative=false")
    assert (status, " b 2/2 " in said, " a 2/2 " in said) == (0, True, False)


@pytest.mark.parametrize("figure", list(paper.EXPERIMENTS))
@pytest.mark.parametrize("as_coded", [False, True])
def test_the_condition_of_a_run_is_known_from_its_description(figure: paper.FigureName, as_coded: bool) -> None:
    experiment = paper.EXPERIMENTS[figure]
    for dataset in experiment.conditions:
        for name, config in conditions.condition_runs(experiment, dataset, seeds=1, epochs=1, as_coded=as_coded):
            assert conditions.condition_of(config, experiment.of(dataset)) == name
    assert conditions.condition_of(RunConfig(feedback={"all": "sign"}), experiment.of("digits")) is None


RESULTS = Path(__file__).parents[2] / "results"  # not there without a clone
KEPT = sorted([*RESULTS.glob("figure*/runs.jsonl"), *RESULTS.glob("unfinished/*/runs.jsonl")])


@pytest.mark.skipif(not RESULTS.is_dir(), reason="the kept results are in the repository")
def test_all_kept_results_can_be_read_at_once() -> None:
    """As the site shows it: `relaxprop export runs results`."""
    found = find([RESULTS])
    assert found.unreadable == []
    assert len(found.runs) > 800


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.parent.name)
def test_the_kept_tables_are_made_from_the_kept_records(kept: Path, tmp_path: Path) -> None:
    shutil.copy(kept, tmp_path)
    _, written = figures.write_figure(tmp_path)
    assert len(written) >= 5
    drawn = {path.name for path in kept.parent.iterdir()} - {"log.txt"}  # what the command printed
    assert {path.name for path in written} == drawn
    for name in sorted(name for name in drawn if not name.endswith(".png")):
        assert (tmp_path / name).read_bytes() == (kept.parent / name).read_bytes(), name
