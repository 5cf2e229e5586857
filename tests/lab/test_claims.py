"""The page of the paper's claims: which evidence a claim gets, what is said of it, and what the queue still takes."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from relaxprop.lab import stats
from relaxprop.lab.cli.main import app
from relaxprop.lab.config import RunConfig
from relaxprop.lab.experiments import claims, queue
from relaxprop.lab.experiments.evidence import CLAIMS, FIGURES, SUPPORTING, Claim, best, judged, sources
from relaxprop.lab.experiments.plan import plan_of
from relaxprop.lab.files import OutputError
from relaxprop.lab.results import Compared, EpochMetrics, FinishedRun, Head, RunLine, relative_cost
from relaxprop.lab.store import write_lines

ROOT = Path(__file__).parents[2]
MNIST, CHANCE = "a63d816db5", 0.1
B = Claim("figure1", "mnist", "b")
in_a_clone = pytest.mark.skipif(
    not (ROOT / "results").is_dir(), reason="the kept results are in the repository, and not in a source distribution"
)
Accuracies = Mapping[str, Sequence[float]]
EQUAL = {"backprop": [0.90, 0.92, 0.91], "baseline": [0.901, 0.919, 0.912], "b": [0.87, 0.89, 0.882]}


def kept(
    results: Path,
    folder: str,
    accuracies: Accuracies,
    options: str = "--epochs 5",
    *,
    planned: int | None = None,
    seconds: float = 2.0,
    data: str = MNIST,
) -> Path:
    """A folder of results with records, of runs with such final accuracies by seed."""
    command = f"relaxprop reproduce figure1 {options} --seeds {max(map(len, accuracies.values()))}"
    plan = plan_of(command)
    runs = [
        (name, FinishedRun(config, metrics(config.epochs, accuracies[name][config.seed], seconds), {}))
        for name, config in plan.runs("mnist", data)
        if name in accuracies and config.seed < len(accuracies[name])
    ]
    conditions = plan.experiment.of("mnist")
    compared = {
        name: Compared(conditions[name].title, conditions[name].claim, conditions[name].versus, conditions[name].beside)
        for name in accuracies
    }
    more: dict[str, Any] = {} if planned is None else {"planned": planned}
    head = Head(
        command=command,
        runs=len(runs),
        experiment=plan.experiment.title,
        dataset="mnist",
        chance=CHANCE,
        conditions=compared,
        **more,
    )
    path = results / folder / "runs.jsonl"
    path.parent.mkdir(parents=True)
    write_lines(path, head, [RunLine.of(run, name) for name, run in runs])
    return path


def metrics(epochs: int, final: float, seconds: float) -> list[EpochMetrics]:
    return [
        EpochMetrics(epoch=epoch, train_loss=1, test_accuracy=final if epoch == epochs else 0.2, seconds=seconds)
        for epoch in range(1, epochs + 1)
    ]


def chosen(results: Path, claim: Claim = B) -> str:
    found = best(claim, sources(results))
    return "" if found is None else found[0].place.partition("/")[2]


def invoke(*args: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "300"})
    if isinstance(result.exception, OutputError):
        return 1, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@in_a_clone
def test_the_committed_page_is_what_the_command_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    status, said = invoke("claims", "results")
    assert status == 0
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    assert "`relaxprop claims results --out docs/claims.md`" in page
    assert said.replace("`relaxprop claims results`", "`relaxprop claims results --out docs/claims.md`") == page


def test_the_claims_are_the_papers() -> None:
    assert len(CLAIMS) == 29
    assert len(set(CLAIMS)) == 29
    assert sum(claim.figure in ("figure1", "figure3") for claim in CLAIMS) == 8
    for dataset in ("cifar10", "svhn", "cifar100"):
        named = [claim.name for claim in CLAIMS if claim.dataset == dataset]
        assert named == ["ψ-conv", "ψ-fc", "ψ", "f'-conv", "f'-fc", "f'", "ψ-f'"]
    assert [claim.name for claim in SUPPORTING] == ["baseline"] * 2 + ["baseline", "random"] * 3


def test_the_evidence_is_of_most_seeds_then_epochs_then_complete(tmp_path: Path) -> None:
    two = {name: values[:2] for name, values in EQUAL.items()}
    assert chosen(tmp_path) == ""
    kept(tmp_path, "x/unfinished", two, "--epochs 5", planned=9)
    assert chosen(tmp_path) == "x/unfinished"
    kept(tmp_path, "complete", two)
    assert chosen(tmp_path) == "complete"
    kept(tmp_path, "z/longer", two, "--epochs 6", planned=9)
    assert chosen(tmp_path) == "z/longer"
    kept(tmp_path, "more", EQUAL, "--epochs 1")
    assert chosen(tmp_path) == "more"
    assert chosen(tmp_path, Claim("figure1", "mnist", "a")) == ""
    assert chosen(tmp_path, Claim("figure3", "fashion_mnist", "b")) == ""


def test_the_authors_code_is_no_evidence_for_the_papers_text(tmp_path: Path) -> None:
    kept(tmp_path, "coded", EQUAL, "--epochs 5 --as-coded")
    kept(tmp_path, "zero", EQUAL, "--epochs 5 --initial zero")
    assert chosen(tmp_path) == ""
    both = EQUAL | {f"{name}, as coded": [value - 0.02 for value in values] for name, values in EQUAL.items()}
    kept(tmp_path, "both", both, "--epochs 5 --as-coded --beside")
    found = sources(tmp_path)
    pair = best(B, found)
    assert pair is not None
    assert pair[1].difference == stats.mean_over_seeds(
        [x - y for x, y in zip(EQUAL["b"], EQUAL["baseline"], strict=True)]
    )
    page = claims.page(found, None, "make")
    assert "## Figure 1, MNIST: as coded and as written" in page
    row = (
        "| b, as coded: f'(W x) in the update | 86.07 ± 0.58 | 88.07 ± 0.58 | 3 | -2.00 ± 0.00 | -2.00 to -2.00 | no: "
    )
    assert row in page


@pytest.mark.parametrize(
    ("from_zero", "verdict"),
    [
        ([0.9, 0.92, 0.911], "holds"),
        ([0.851, 0.869, 0.8602], "does not hold"),
        ([0.89, 0.93, 0.902], "is open"),
    ],
)
def test_what_the_relaxation_from_zero_says_stands_beside_what_does_not_hold(
    from_zero: list[float], verdict: str, tmp_path: Path
) -> None:
    """Of Activation Relaxation and backpropagation: the list, and a sentence below the table of both versions."""
    behind = {"backprop": [0.90, 0.92, 0.91], "baseline": [0.80, 0.82, 0.811]}
    kept(tmp_path, "written", behind)
    claim = "* Figure 1, MNIST, Activation Relaxation reaches backpropagation's accuracy."
    bullet = f"{claim} The difference is -10.0 points"
    assert f"{bullet}.\n" in claims.page(sources(tmp_path), None, "make")
    kept(tmp_path, "zero", behind | {"baseline, from zero": from_zero}, "--epochs 5 --initial zero --beside")
    page = claims.page(sources(tmp_path), None, "make")
    difference = stats.mean_over_seeds([x - y for x, y in zip(from_zero, behind["backprop"], strict=True)])
    points = f"{100 * difference.mean:+.2f} points ({difference.limits})"
    assert f"{bullet}. Where the relaxation starts at zero, it is {points}, and the claim {verdict}.\n" in page
    assert "## Figure 1, MNIST: from zero and as written" in page
    said = f"the difference of *Activation Relaxation, from zero* is {difference} points ({difference.limits})."
    assert f"{said} The verdict on their equality: {verdict.removeprefix('is ')}" in page


def test_an_unfinished_claim_counts_the_seeds_that_both_have(tmp_path: Path) -> None:
    kept(tmp_path, "part", {**EQUAL, "b": EQUAL["b"][:2]}, planned=12)
    (line,) = judged([B], sources(tmp_path))
    assert line.found is not None
    differences = [x - y for x, y in zip(EQUAL["b"][:2], EQUAL["baseline"][:2], strict=True)]
    assert line.found.difference == stats.mean_over_seeds(differences)
    assert line.found.reference == pytest.approx(statistics.fmean(EQUAL["baseline"][:2]))
    assert "| 2 | 5 | " in page_line(tmp_path, "b: with")
    assert "unfinished, 8 of 12 runs: `" in page_line(tmp_path, "b: with")


def page_line(results: Path, start: str) -> str:
    """Of the page's first table."""
    page = claims.page(sources(results), None, "make")
    return next(line for line in page.splitlines() if line.startswith(f"| {start}"))


def test_what_is_said_without_evidence(tmp_path: Path) -> None:
    page = claims.page(sources(tmp_path), None, "make")
    assert page.startswith(
        "# The paper's claims\n\n**Of the paper's 29 claims 0 do not hold here, 0 hold, and 29 are open.**\n\nThis "
    )
    assert page.count("| 0 |  |  |  | open: no runs |  | none |") == 37
    for figure, dataset in FIGURES:
        assert f"\n* to be computed by `relaxprop reproduce {figure} --dataset {dataset}`\n" in page
    assert "There are no runs yet." in page


@pytest.mark.parametrize(
    ("b", "verdict"),
    [
        ([0.905, 0.917], "open: 2 seeds cannot tell"),
        ([0.9018, 0.9198], "holds"),
        ([0.84, 0.88], "open: 2 seeds cannot tell"),  # −6.1 and −3.9: the interval is ±14
        ([0.851, 0.8691], "**does not hold**: -5.0 points"),
    ],
)
def test_what_is_said_of_two_seeds(tmp_path: Path, b: list[float], verdict: str) -> None:
    baseline = EQUAL["baseline"][:2]
    kept(tmp_path, "two", {"backprop": EQUAL["backprop"][:2], "baseline": baseline, "b": b})
    difference = stats.mean_over_seeds([x - y for x, y in zip(b, baseline, strict=True)])
    half = 12.7062 * difference.standard_error  # t(0.975, 1) by any table
    cells = page_line(tmp_path, "b: with").split(" | ")
    assert cells[1:3] == ["2", "5"]
    low, high = (100 * (difference.mean + sign * half) for sign in (-1, 1))
    assert [float(x) for x in cells[4].split(" to ")] == pytest.approx([low, high], abs=0.006)
    assert cells[5].removesuffix(" (after Holm's correction open)") == verdict


def test_what_is_said_of_one_seed_and_at_chance(tmp_path: Path) -> None:
    kept(tmp_path, "one", {name: values[:1] for name, values in EQUAL.items()})
    assert page_line(tmp_path, "b: with").split(" | ")[3:7] == ["-3.10", "", "open: 1 seed cannot tell", ""]
    chance = {"backprop": [0.1, 0.1, 0.1], "baseline": [0.1, 0.101, 0.1], "b": [0.09, 0.1, 0.1]}
    kept(tmp_path, "chance", chance)
    assert page_line(tmp_path, "b: with").split(" | ")[5:7] == ["open: nothing has been learned", ""]
    (line,) = judged([B], sources(tmp_path))
    assert line.judgement.holm is None


def test_what_does_not_hold_is_said_first(tmp_path: Path) -> None:
    path = kept(tmp_path, "figure", EQUAL | {"d": [0.1, 0.1, 0.11]})
    paragraphs = claims.page(sources(tmp_path), None, "make").split("\n\n")
    assert paragraphs[1:4] == [
        "**Of the paper's 29 claims 1 does not hold here, 1 holds, and 27 are open.**",
        "These do not hold:",
        "* Figure 1, MNIST, b: with f'(W x) in the update, the accuracy stays the same. The difference is -3.0 points.",
    ]
    command = "`relaxprop reproduce figure1 --epochs 5 --seeds 3`"
    assert (
        sum(f"* `{tmp_path.name}/figure` is made by {command}" in part for part in paragraphs) == 2
    )  # the second: what it rests on
    path.unlink()
    path.parent.rmdir()
    worse = [value - 0.05 for value in EQUAL["backprop"]]
    kept(tmp_path, "figure", {"backprop": EQUAL["backprop"], "baseline": worse})
    assert claims.page(sources(tmp_path), None, "make").split("\n\n")[1:4] == [
        "**Of the paper's 29 claims 0 do not hold here, 0 hold, and 29 are open.**",
        "The claims rest on others, of which these do not hold:",
        "* Figure 1, MNIST, Activation Relaxation reaches backpropagation's accuracy. The difference is -5.0 points.",
    ]


def test_holms_correction_is_over_all_claims_of_the_page(tmp_path: Path) -> None:
    b = [value + difference for value, difference in zip(EQUAL["baseline"], (-0.02, -0.03, -0.028), strict=True)]
    spread = {name: [v + d for v, d in zip(EQUAL["baseline"], (-0.03, 0.0, 0.03), strict=True)] for name in "acd"}
    kept(tmp_path, "figure", EQUAL | spread | {"b": b})
    alone = {line.claim.name: line for line in judged([B], sources(tmp_path))}["b"]
    assert alone.judgement.holm is not None
    assert alone.judgement.holm < stats.LEVEL
    names = "abcd"
    lines = judged([Claim("figure1", "mnist", name) for name in names], sources(tmp_path))
    among = lines[1]
    p = stats.p_values(
        stats.mean_over_seeds([x - y for x, y in zip(b, EQUAL["baseline"], strict=True)]), stats.Region(-0.01, 0.01)
    )
    assert p.refuted < stats.LEVEL < 4 * p.refuted
    assert alone.judgement.holm == pytest.approx(p.refuted)
    assert among.judgement.holm is not None
    assert among.judgement.holm > stats.LEVEL
    assert among.judgement.verdict == "does not hold: -2.6 points"
    assert "**does not hold**: -2.6 points (after Holm's correction open)" in page_line(tmp_path, "b: with")
    page = claims.page(sources(tmp_path), None, "make")
    assert "The difference is -2.6 points, and after Holm's correction the claim is open." in page


def test_the_short_tables_have_the_same_verdicts(tmp_path: Path) -> None:
    kept(tmp_path, "figure", EQUAL | {"d": [0.1, 0.1, 0.11]})
    rows = claims.short_table(sources(tmp_path)).splitlines()
    assert len(rows) == 2 + 5 + 1 + 2 + 9
    (line,) = judged([B], sources(tmp_path))
    assert line.found is not None
    low, high = line.found.difference.interval
    said = f"-3.00 ({100 * low:.2f} to {100 * high:.2f}), n = 3: **does not hold**"
    assert f"| b: f'(W x) in the update | the same | {said} | no runs |" in rows
    assert any(row.startswith("| d: presynaptic x in the update | destroyed | -80.73 (") for row in rows)
    assert "| f': no f' anywhere | the same; SVHN: worse | no runs | no runs | no runs |" in rows
    status, said = invoke("claims", tmp_path, "--short")
    assert (status, said.splitlines()) == (0, rows)
    status, said = invoke("claims", tmp_path, "--out", tmp_path / "docs" / "page.md")
    assert (status, said.strip()) == (0, str(tmp_path / "docs" / "page.md"))
    command = f"`relaxprop claims {tmp_path.name} --out docs/page.md`"
    assert command in (tmp_path / "docs" / "page.md").read_text()


def test_costs_are_of_runs_in_the_same_place() -> None:
    """Seed 1 was computed on a GPU in one condition, and so were all seeds in another."""
    places: list[dict[str, object]] = [{"processor": "P", "threads": 1}, {"processor": "P", "threads": 1, "gpu": "G"}]

    def runs(seconds: Sequence[float], where: Sequence[int]) -> dict[int, FinishedRun]:
        configs = [RunConfig(seed=seed, epochs=2) for seed in range(len(seconds))]
        return {
            config.seed: FinishedRun(config, metrics(2, 0.5, time), places[place])
            for config, time, place in zip(configs, seconds, where, strict=True)
        }

    backprop = runs([2, 4, 3], [0, 0, 0])
    assert relative_cost(backprop, backprop) == 1
    assert relative_cost(runs([6, 8, 0.1], [0, 0, 1]), backprop) == pytest.approx(7 / 3)
    assert relative_cost(runs([0.1, 0.1, 0.1], [1, 1, 1]), backprop) is None
    assert relative_cost({}, backprop) is None


def test_damaged_results_are_refused_by_their_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"there is no folder .*/nothing: name the folder of kept results"):
        sources(tmp_path / "nothing")
    path = kept(tmp_path, "older", EQUAL)
    whole = path.read_text()
    head, _, lines = whole.partition("\n")
    for text, message in (
        ("{", r"older/runs.jsonl does not say by which command"),
        (head.replace("reproduce figure1", "reproduce figure9") + f"\n{lines}", "by a command that is not known"),
        (whole.replace("test_accuracy", "accuracy"), r"runs.jsonl"),
        (f"{head}\n{lines[:-9]}", r"runs.jsonl"),
    ):
        path.write_text(text)
        with pytest.raises(OutputError, match=message):
            sources(tmp_path)
    path.write_text(json.dumps({"command": "relaxprop bench"}))  # of something else
    assert sources(tmp_path) == []
    path.write_text(whole)
    kept(tmp_path, "other", EQUAL, data="0123456789")
    with pytest.raises(OutputError, match=r"older and .*other hold different data of the name mnist|other and .*older"):
        sources(tmp_path)


QUEUE = """
[[items]]
what = "b, and both versions of it"
runs = 24
commands = [
    "relaxprop reproduce figure1 --condition b --seeds 4 --epochs 5 --out somewhere",
    "relaxprop reproduce figure1 --condition b --seeds 4 --epochs 4 --runs elsewhere",
]

[[items]]
what = "a"
runs = 6
commands = ["relaxprop reproduce figure1 --condition a --seeds 2 --epochs 6"]

[[items]]
what = "as coded"
runs = 4
commands = ["relaxprop reproduce figure1 --as-coded --beside --condition baseline --seeds 1 --epochs 2"]
"""


def test_the_queue_counts_the_kept_runs_and_what_the_others_take(tmp_path: Path) -> None:
    (tmp_path / "queue.toml").write_text(QUEUE)
    kept(tmp_path, "figure", EQUAL | {"b": EQUAL["b"][:2]}, "--epochs 5", planned=12, seconds=720)
    states = queue.states(queue.read_queue(tmp_path / "queue.toml"), sources(tmp_path))
    assert [(s.item, s.runs, s.there) for s in states] == [(1, 12, 8), (1, 12, 8), (2, 6, 0), (3, 4, 2)]
    # An epoch takes 0.2 h. Missing are 4 runs of 5 epochs; the same ones of 4 epochs cost nothing again.
    assert [s.hours for s in states[:2]] == [pytest.approx(4.0), 0]
    # Two seeds of both baselines, 6 epochs each, and a, which no kept run is of.
    assert states[2].hours == pytest.approx(4 * 6 * 0.2)
    # As coded: both baselines, two epochs, as written ones take them.
    assert states[3].hours == pytest.approx(2 * 2 * 0.2)
    assert [s.unknown for s in states] == [0, 0, 2, 0]
    page = claims.page(sources(tmp_path), queue.read_queue(tmp_path / "queue.toml"), "make")
    assert "18 of 34 runs of the queue are there" in page
    assert "| 12 | 8 | 4 | 4.0 |" in page
    assert "| 6 | 0 | 6 | 4.8 and 2 runs of unknown cost |" in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("items = []", "is no queue of runs: items"),
        ("items = 3", "is no queue of runs: items"),
        ("[[items", "is no queue of runs"),
        (QUEUE.replace("runs = 24", "runs = 25"), "'b, and both versions of it' has 24 runs, and says 25"),
        (QUEUE.replace("figure1 --condition a", "figure9 --condition a"), "figure9"),
        (QUEUE.replace("--condition a", "--condition e"), "condition must be one of backprop, baseline, a, b, c, d, "),
        (QUEUE.replace("relaxprop reproduce figure1 --condition a", "make"), "must be `relaxprop reproduce FIGURE …`"),
        (QUEUE.replace("--seeds 2", "--seeds two"), "invalid int value: 'two'"),
        (QUEUE.replace("--as-coded --beside", "--beside"), "beside needs another version"),
    ],
)  # fmt: skip
def test_a_queue_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "queue.toml"
    path.write_text(text)
    with pytest.raises(OutputError, match=re.escape(message)):
        queue.read_queue(path)
    with pytest.raises(OutputError, match=r"cannot read .*missing\.toml"):
        queue.read_queue(tmp_path / "missing.toml")


@in_a_clone
def test_the_kept_queue_is_the_issues_and_counts_the_kept_runs() -> None:
    items = queue.read_queue(ROOT / "results" / "queue.toml").items
    assert len(items) == 8
    there = 0
    wanted = {(config.seed, name) for name, config in plan_of(items[0].commands[0]).runs("mnist")}
    for text in (ROOT / "results" / "figure1-b-d" / "runs.jsonl").read_text(encoding="utf-8").splitlines()[1:]:
        line = json.loads(text)
        there += (line["config"]["seed"], line["condition"]) in wanted and line["config"]["epochs"] >= 30
    first = queue.states(queue.Queue(items=items), sources(ROOT / "results"))[0]
    assert (first.there, first.runs) == (there, 40)


def test_commands_are_shown_as_one_types_them() -> None:
    command = """relaxprop reproduce figure2 --condition 'f'"'"'-conv' --condition ψ --out 'a b'"""
    assert claims.shown(command) == """relaxprop reproduce figure2 --condition "f'-conv" --condition ψ --out "a b\""""
    assert claims.shown("x 'a$b'") == "x 'a$b'"
