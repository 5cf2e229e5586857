"""The report: the page holds what the records hold, escapes it, and what cannot be read or written is refused."""

from __future__ import annotations

import csv
import html
import json
import math
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from relaxprop import Frozen
from relaxprop.lab import data
from relaxprop.lab.cli.main import main
from relaxprop.lab.cli.options import app
from relaxprop.lab.config import RunConfig
from relaxprop.lab.engines.grid import run_all
from relaxprop.lab.experiments import conditions, paper
from relaxprop.lab.experiments.gathered import KNOWN, gather
from relaxprop.lab.files import OutputError
from relaxprop.lab.report import claims
from relaxprop.lab.report.html import page, write_report
from relaxprop.lab.results import AlignmentSample, EpochMetrics, FinishedRun, Head, RunLine
from relaxprop.lab.store import write_lines

RESULTS = Path(__file__).parents[2] / "results"
HOSTILE = """</script><script>alert("&'1")</script><img src=x onerror=alert(2)>"""
DIGITS = "b7291dfff7"
LEVELS = {"backprop": 0.8, "baseline": 0.79, "a": 0.81, "b": 0.7, "c": 0.8, "d": 0.15}


def a_run(name: str, config: RunConfig) -> FinishedRun:
    """Made up, every number another one."""
    metrics = []
    for epoch in range(1, config.epochs + 1):
        samples = [
            AlignmentSample(
                epochs=epoch - 1 + part,
                gradients={"1.weight": 0.9 + config.seed / 50 - part / 9, "1.bias": 1.0, "2.weight": 0.5},
                feedback={"1": config.seed / 10 + part},
                seconds=0.5,
            )
            for part in (0, 0.5)
        ]
        metrics.append(
            EpochMetrics(
                epoch=epoch,
                train_loss=math.nan if name == "d" and epoch == 2 else 1.5 / (epoch + config.seed / 7),
                test_accuracy=LEVELS[name] + epoch / 100 + config.seed**2 / 300,
                seconds=(2.0 if name == "backprop" else 5.0) + config.seed + epoch / 10,
                alignment=tuple(samples) if config.alignment_every else (),
            )
        )
    return FinishedRun(config, metrics, {"date": "2026-01-01", "processor": "made up", "gpu": None, "torch": "2.13.0"})


def planned(seeds: int = 3, epochs: int = 4) -> list[tuple[str, FinishedRun]]:
    runs = conditions.condition_runs(
        paper.EXPERIMENTS["demo"], "digits", seeds=seeds, epochs=epochs, data=DIGITS, alignment_every=10
    )
    return [(name, a_run(name, config)) for name, config in runs]


def write_records(path: Path, runs: list[FinishedRun], command: str = "relaxprop reproduce demo") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, Head(command=command, runs=len(runs)), [RunLine.of(run) for run in runs])
    return path


def write_curves(folder: Path, title: str, parameter: str = "1.weight") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = {"command": "relaxprop convergence", "environment": {"torch": "2.13.0"}, "title": title}
    (folder / "convergence.json").write_text(json.dumps(about))
    with (folder / "convergence.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(("step_size", "order", "parameter", "steps", "measured", "predicted"))
        for step_size in (0.1, 0.5):
            for name in (parameter, "1.bias"):
                for step in range(31):
                    writer.writerow((step_size, "simultaneous", name, step, f"{(1 - step_size) ** step:.6e}", "0"))


def page_of(*paths: Path, folder: Path | None = None) -> str:
    return page(gather(paths), folder or paths[0].parent)


def embedded(text: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    charts: list[dict[str, Any]] = json.loads(found[1])["charts"]
    return charts


def view(chart: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [v for v in chart["views"] if v["name"] == name]
    return {series["name"]: series for series in found["series"]}


def cells(text: str, label: str) -> list[list[str]]:
    """Those of a table by the label of its box."""
    box = text[text.index(f'aria-label="{html.escape(label, quote=False)}') :]
    rows = re.findall(r"<tr>(.*?)</tr>", box[: box.index("</table>")], re.DOTALL)
    plain = [[re.sub(r"<[^>]*>", "", c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]
    return [[html.unescape(cell).strip() for cell in row] for row in plain]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Literally."""
    n = len(values)
    mean = sum(values) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) / math.sqrt(n)


def test_the_curves_are_the_records(tmp_path: Path) -> None:
    runs = planned()
    text = page_of(write_records(tmp_path / "runs.jsonl", [run for _, run in runs]))
    curves, alignment = embedded(text)
    labels = {name: c.title if name in conditions.BASELINES else f"{name}: {c.title}"
              for name, c in paper.UNFROZEN.items()}  # fmt: skip
    assert list(curves["styles"]) == list(labels.values())
    assert len({tuple(style) for style in curves["styles"].values()}) == 6
    for field, name in (("test_accuracy", "test accuracy"), ("train_loss", "training loss")):
        series = view(curves, name)
        for condition, label in labels.items():
            own = [run for of, run in runs if of == condition]
            assert series[label]["x"] == [1, 2, 3, 4]
            for run in own:
                values = [getattr(m, field) for m in run.metrics]
                kept = series[label]["seeds"][str(run.config.seed)]
                assert kept == [v if math.isfinite(v) else None for v in values]
            for i in range(4):
                values = [getattr(run.metrics[i], field) for run in own]
                if not all(map(math.isfinite, values)):
                    assert series[label]["y"][i] is None
                    assert series[label]["error"][i] is None
                else:
                    expected = pytest.approx(mean_and_error(values), rel=1e-12)
                    assert (series[label]["y"][i], series[label]["error"][i]) == expected
    cosines = view(alignment, "b: f'(W x) in the update – gradients to backpropagation's")
    assert cosines["1"]["x"] == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert (cosines["1"]["y"][1], cosines["1"]["error"][1]) == pytest.approx(
        mean_and_error([0.9 + seed / 50 - 0.5 / 9 for seed in range(3)]), rel=1e-12
    )
    feedback = view(alignment, "Activation Relaxation – backwards weights to weights")
    assert feedback["1"]["y"][:2] == pytest.approx([0.1, 0.6], rel=1e-12)
    rows = cells(text, "test accuracy (%)")
    mean, error = mean_and_error([0.79 + 0.02 + seed**2 / 300 for seed in range(3)])
    assert rows[2][:3] == ["2", rows[2][1], f"{100 * mean:.2f} ± {100 * error:.2f}"]


def test_the_claims_and_costs_are_those_of_the_figures_table(tmp_path: Path) -> None:
    runs = planned()
    text = page_of(write_records(tmp_path / "runs.jsonl", [run for _, run in runs]))
    names, finished = zip(*runs, strict=True)
    rows = claims.summarise(paper.UNFROZEN, names, finished, chance=37 / 360)
    ours = cells(text, "Claims and results")[1:]
    assert len(ours) == len(rows) == 6
    for (label, claim, verdict, accuracy, difference, interval, versus, n), row in zip(
        ours, claims.table(rows), strict=True
    ):
        assert (label, accuracy, n, difference, interval) == (row[0], row[1], row[2], row[5], row[6])
        assert verdict.lstrip("✓✗? ") == row[8]
        assert (claim != "") == (versus != "") == (row[7] != "")
    costs = cells(text, "Cost: ")[1:]
    assert [cost[1] for cost in costs] == [f"{row.relative_cost:.2f}×" for row in rows]


@pytest.mark.skipif(not RESULTS.is_dir(), reason="the kept results are in the repository alone")
def test_a_kept_figure_has_the_numbers_of_its_table() -> None:
    text = page_of(RESULTS / "figure1-b-d")
    table = [[c.strip() for c in line.split("|")[1:-1]] for line in
             (RESULTS / "figure1-b-d" / "table.md").read_text().split("\n\n")[0].splitlines()[2:]]  # fmt: skip
    ours = cells(text, "Claims and results")[1:]
    table = [row for row in table if len(row) == 10]
    assert [(o[0], o[3], o[7], o[4], o[5]) for o in ours] == [(t[0], t[1], t[2], t[5], t[6]) for t in table]
    assert [o[2].lstrip("✓✗? ") for o in ours] == [t[8] for t in table]
    assert "The paper's Figure 1: mnist, MLP, 30 epochs" in html.unescape(text)


def test_convergence(tmp_path: Path) -> None:
    write_curves(tmp_path / "c", "digits")
    (chart,) = embedded(page_of(tmp_path / "c"))
    assert [v["name"] for v in chart["views"]] == ["step size 0.1, simultaneous", "step size 0.5, simultaneous"]
    for step_size in (0.1, 0.5):
        series = view(chart, f"step size {step_size}, simultaneous")
        assert series.keys() == {"1", "1.bias"}
        assert series["1"]["y"] == pytest.approx([(1 - step_size) ** n for n in range(31)], rel=1e-5)
        assert series["1"]["points"] == [None] * 31  # 0 has no place on a logarithmic axis


def test_the_same_records_make_the_same_page(tmp_path: Path) -> None:
    write_records(tmp_path / "r" / "runs.jsonl", [run for _, run in planned(2, 2)])
    write_curves(tmp_path / "r", "digits")
    first = page_of(tmp_path / "r")
    assert page_of(tmp_path / "r") == first
    assert page_of(tmp_path / "r", tmp_path / "r" / "runs.jsonl") == first  # found twice, counted once


def test_what_comes_from_records_is_escaped(tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    write_records(clean / "runs.jsonl", [run for _, run in planned(1, 1)])
    write_curves(clean, "digits")
    runs = [run._replace(environment={"processor": HOSTILE, HOSTILE: 1}) for _, run in planned(1, 1)]
    odd = tmp_path / '<img src=x onerror=alert(3)> "'
    write_records(odd / "runs.jsonl", runs, command=HOSTILE)
    write_curves(odd, HOSTILE, parameter=HOSTILE)
    text = page_of(odd)
    assert text.count("<script") == page_of(clean).count("<script")
    assert "<img" not in text.replace(re.findall(r"<script>.*?</script>", text, re.DOTALL)[0], "")
    assert html.escape(HOSTILE, quote=False).partition("alert")[0] in text
    assert HOSTILE in embedded(text)[-1]["styles"]
    assert "javascript:" not in re.findall(r'href="([^"]*)"', text)


def test_only_its_own_scripts_run_and_nothing_is_fetched(tmp_path: Path) -> None:
    text = page_of(write_records(tmp_path / "runs.jsonl", [run for _, run in planned(1, 1)]))
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert "default-src 'none'" in policy
    assert not re.search(r"script-src[^;]*unsafe", policy)
    outside = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', outside)


def test_run_directories_with_their_locality_and_links(tmp_path: Path) -> None:
    configs = [RunConfig(epochs=1), RunConfig(epochs=1, rule="backprop")]
    run_all(configs, data.load("digits"), root=tmp_path / "runs")
    text = page_of(tmp_path / "runs", folder=tmp_path / "reports")
    assert cells(text, "What is not local")[1][0] == "Activation Relaxation"
    assert cells(text, "What is not local")[1][1] != "0"  # weights are transported
    links = [html.unescape(link) for link in re.findall(r'<a href="([^"#]+)"', text.partition("<script>")[0])]
    assert f"../runs/{configs[0].id}/metrics.jsonl" in links
    assert all((tmp_path / link.removeprefix("../")).exists() for link in links)
    assert "Weight of the initial state" in text


def test_what_is_not_finished_or_there_twice_is_not_counted(tmp_path: Path) -> None:
    runs = [run for _, run in planned(2, 2)]
    write_records(tmp_path / "runs.jsonl", runs)
    begun = runs[0].config.model_copy(update={"seed": 5})
    run_all([begun.model_copy(update={"epochs": 1})], data.load("digits"), root=tmp_path / "runs")
    folder = next((tmp_path / "runs").iterdir())
    (folder / "config.json").write_text(begun.model_dump_json())
    again = a_run("baseline", runs[1].config.model_copy(update={"alignment_every": 0}))
    text = page_of(write_records(tmp_path / "again.jsonl", [again]), tmp_path / "runs.jsonl", tmp_path / "runs")
    assert "unfinished: 1 of 2 epochs, not in the numbers" in text
    assert "the same seed again, not in the numbers" in text
    assert {row[7] for row in cells(text, "Claims and results")[1:]} == {"2"}
    other = runs[0]._replace(metrics=[m.model_copy(update={"test_accuracy": 0.1}) for m in runs[0].metrics])
    write_records(tmp_path / "other.jsonl", [other])
    with pytest.raises(OutputError, match="with different results: name only one of them"):
        gather([tmp_path / "runs.jsonl", tmp_path / "other.jsonl"])


def test_seeds_are_paired_where_one_is_missing(tmp_path: Path) -> None:
    runs = [(name, run) for name, run in planned(3, 1) if (name, run.config.seed) != ("d", 1)]
    text = page_of(write_records(tmp_path / "runs.jsonl", [run for _, run in runs]))
    d = cells(text, "Claims and results")[-1]
    final = {(name, run.config.seed): run.metrics[-1].test_accuracy for name, run in runs}
    mean, error = mean_and_error([final["d", seed] - final["baseline", seed] for seed in (0, 2)])
    assert d[4] == f"{100 * mean:.2f} ± {100 * error:.2f}"
    assert d[7] == "2"


def test_runs_of_no_figure(tmp_path: Path) -> None:
    config = RunConfig(
        dataset="leaves", epochs=2, learning_rate=0.25, frozen=Frozen(update_activity=False), solver="euler"
    )
    text = page_of(write_records(tmp_path / "runs.jsonl", [a_run("d", config)]))
    (row,) = cells(text, "Claims and results")[1:]
    assert row[0].startswith("Activation Relaxation, Euler(step_size=0.1")
    assert row[0].endswith("unfrozen update_activity")
    assert row[1:3] == ["", ""]
    assert "Runs: leaves, MLP, 2 epochs" in text
    assert "Backpropagation is not among these runs" in text


def test_a_verdict_needs_to_know_what_guessing_reaches(tmp_path: Path) -> None:
    runs = [
        run._replace(config=run.config.model_copy(update={"dataset": "leaves", "data": "0123456789"}))
        for name, run in planned(3, 1)
    ]
    file = write_records(tmp_path / "runs.jsonl", runs)
    assert "open: the accuracy of guessing is not known for these data" in page_of(file)
    head = Head(command="relaxprop reproduce demo", runs=len(runs), dataset="leaves", chance=0.1)
    write_lines(file, head, [RunLine.of(run) for run in runs])
    assert "not known" not in page_of(file)


def test_what_guessing_reaches_on_digits() -> None:
    digits = data.load("digits")
    assert KNOWN[digits.digest] == (digits.title, float(digits.test.labels.bincount().max()) / len(digits.test))


def test_what_the_page_is_made_of_is_in_the_package() -> None:
    folder = resources.files("relaxprop.lab.report") / "templates"
    assert {file.name for file in folder.iterdir()} >= {"report.html", "report.css", "report.js"}


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_records(tmp_path / "kept" / "runs.jsonl", [run for _, run in planned(1, 1)])


def test_the_command_prints_the_path_and_replaces_what_was_there(records: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    result = CliRunner().invoke(app, ["report", "kept"])
    assert (result.exit_code, result.output) == (0, "report.html\n")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    result = CliRunner().invoke(app, ["report", "kept", "--out", "a/new/folder/r.html"])
    assert result.exit_code == 0
    assert not list(tmp_path.rglob("*.partial"))
    assert 'href="../../../kept/runs.jsonl"' in (tmp_path / "a/new/folder/r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["missing"], "missing does not exist: name a run's folder"),
        (["empty"], "there are no records in empty: name a run's folder"),
        (["notes.txt"], "notes.txt is no file of records"),
        (["damaged"], "damaged/run/metrics.jsonl is damaged"),
        (["halved"], "no run in halved/run: config.json is missing"),
        (["damaged.jsonl"], "damaged.jsonl, line 2 is no run"),
        (["curves"], "curves/convergence.csv, line 3 is damaged"),
        (["headless"], "headless/convergence.json is damaged"),
        (["kept", "--out", "empty"], "empty is a folder: name a file for the report, as in empty/report.html"),
        (["kept", "--out", "notes.txt/report.html"], "cannot write notes.txt/report.html"),
    ],
)
def test_errors_are_one_line(
    records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    Path("empty").mkdir()
    Path("notes.txt").write_text("kept")
    for folder in ("damaged", "halved"):
        run_all([RunConfig(epochs=1)], data.load("digits"), root=Path(folder))
        next(Path(folder).iterdir()).rename(f"{folder}/run")
    for path in Path("damaged/run").glob("checkpoint*"):
        path.unlink()  # which would hold the metrics too
    Path("damaged/run/metrics.jsonl").write_text("{")
    Path("halved/run/config.json").unlink()
    Path("damaged.jsonl").write_text('{"command": "x", "runs": 1}\n{\n')
    write_curves(Path("curves"), "digits")
    Path("curves/convergence.csv").write_text(
        "step_size,order,parameter,steps,measured,predicted\n0.1,s,w,0,1,1\n0.1,s,w,2,1,1\n"
    )
    write_curves(Path("headless"), "digits")
    Path("headless/convergence.json").write_text("[]")
    monkeypatch.setattr("sys.argv", ["relaxprop", "report", *args])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {says}")
    assert error.count("\n") == 1
    assert not Path("report.html").exists()
    assert Path("notes.txt").read_text() == "kept"


def test_what_cannot_be_replaced_stays(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = gather([records])
    out = write_report(report, tmp_path / "report.html")
    before = out.read_text(encoding="utf-8")

    def full(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"cannot write .*No space left"):
        write_report(report, out)
    monkeypatch.undo()
    assert out.read_text(encoding="utf-8") == before
