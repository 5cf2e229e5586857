"""Learning rules by name: a run's description, its training, and the experiment that sets the rules side by side."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner

from relaxprop import DirectFeedback, EquilibriumPropagation, PredictiveCoding
from relaxprop.finite import DivergedError
from relaxprop.lab import data, models
from relaxprop.lab.cli.main import app
from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import DataError, Dataset, Split
from relaxprop.lab.engines.grid import run_all
from relaxprop.lab.experiments import rules
from relaxprop.lab.experiments.gathered import gather
from relaxprop.lab.experiments.rules import GRID, RIVALS
from relaxprop.lab.models import ModelError, ModelName
from relaxprop.lab.results import EpochMetrics, FinishedRun
from relaxprop.lab.rules import OTHERS, called
from relaxprop.lab.store import read_run
from relaxprop.lab.training import minibatches, squared_error, train, wrapped_by
from tests.compare import refuses
from tests.lab.problem import few_digits, learning

FEW = {"step_size": 0.2, "num_steps": 3}
OPTIONS: dict[str, dict[str, Any]] = {"pc": FEW, "ep": FEW | {"beta": 0.1}, "dfa": {}, "drtp": {}}


def described(rule: str, **more: Any) -> RunConfig:
    return RunConfig.model_validate({"rule": rule, "rule_options": OPTIONS[rule], "epochs": 1, **more})


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return few_digits()


# ----------------------------------------------------------------------------------------------------- descriptions


KEPT = [Path(__file__).parents[2] / "results" / name / "runs.jsonl" for name in ("figure1-b-d", "figure3-b-d")]


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.parent.name)
def test_the_names_of_runs_that_were_kept_earlier_stay(path: Path) -> None:
    """They are in the records themselves, from before there were other rules."""
    _, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert lines
    for line in lines:
        assert "rule_options" not in line["config"]
        assert RunConfig.model_validate(line["config"]).id == line["id"]


def test_what_is_new_in_a_description_is_in_its_name_where_it_is_used() -> None:
    for plain in (RunConfig(), RunConfig(rule="backprop")):
        for field, value in (("validation", 10), ("enlarged", 2)):
            assert RunConfig(rule=plain.rule, **{field: value}).id != plain.id  # type: ignore[arg-type]
            default = RunConfig.model_fields[field].default
            assert RunConfig(rule=plain.rule, **{field: default}).id == plain.id
    assert RunConfig().id == "digits-mlp-ar-seed0-03953a0452"
    assert RunConfig(rule="backprop").id == "digits-mlp-backprop-seed0-e2a2c8ecc6"
    assert RunConfig(model="cnn", feedback={"all": "sign"}).id == "digits-cnn-ar-seed0-1333d9505b"


def test_a_rule_has_one_description() -> None:
    spelt = RunConfig(rule="ep", rule_options={"step_size": 0.1, "num_steps": 100, "beta": 0.01, "centred": True})
    assert RunConfig(rule="ep").id == spelt.id
    assert RunConfig(rule="ep", solver="euler", initial="zero").id == spelt.id
    assert RunConfig(rule="ep", rule_options={"beta": 0.1}).id != spelt.id
    assert RunConfig.model_validate_json(spelt.model_dump_json()) == spelt
    assert RunConfig(rule="dfa").id != RunConfig(rule="drtp").id
    assert RunConfig(rule="dfa").rule_options == {"std": 0.05}


def test_impossible_descriptions_are_refused() -> None:
    for values, *parts in (
        ({"rule": "pc", "rule_options": {"beta": 1}}, "beta has no effect on strict predictive coding"),
        ({"rule": "ep", "rule_options": {"beta": -1}}, "beta must be positive"),
        ({"rule": "dfa", "rule_options": {"error": "target"}}, "error has no effect on direct feedback alignment"),
        ({"rule": "dfa", "feedback": {"all": "random"}}, "feedback has no effect on direct feedback alignment"),
        ({"rule": "ar", "rule_options": {"beta": 1}}, "rule_options are of the rules pc, ep, dfa, drtp"),
        ({"rule": "hebb"}, "'ar', 'backprop', 'pc', 'ep', 'dfa' or 'drtp'"),
    ):
        with pytest.raises(ValidationError) as caught:
            RunConfig.model_validate(values)
        for part in parts:
            assert part in str(caught.value)


def test_every_rule_wraps_the_network(digits: Dataset) -> None:
    kinds = {"pc": PredictiveCoding, "ep": EquilibriumPropagation, "dfa": DirectFeedback, "drtp": DirectFeedback}
    assert kinds.keys() == OTHERS.keys()
    for rule, kind in kinds.items():
        model = wrapped_by(described(rule, seed=7), models.build("mlp", digits, seed=7))
        assert isinstance(model, kind)
    assert model.settings.error == "target"
    assert (model.settings.seed, model.settings.std) == (7, 0.05)


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("rule", OTHERS)
def test_the_loop_by_hand(rule: str, digits: Dataset) -> None:
    """W ← W − η times the rule's gradient, minibatch by minibatch."""
    config = described(rule, seed=5)
    network = models.build("mlp", digits, seed=5)
    model = wrapped_by(config, network)
    total = 0.0
    for rows in minibatches(len(digits.train), config, 1):
        x, labels = digits.train.images[rows], digits.train.labels[rows]
        more, loss_of = called(config.rule, squared_error, torch.eye(10)[labels], labels)
        loss = loss_of(model(x, **more))
        found = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for p, g in zip(network.parameters(), found, strict=True):
                p.sub_(config.learning_rate * g)
        total += float(loss.detach())
    (metrics,) = train(config, digits)
    assert metrics.train_loss == pytest.approx(total / 320, rel=1e-5)
    correct = network(digits.test.images).argmax(1) == digits.test.labels
    assert metrics.test_accuracy == pytest.approx(float(correct.double().mean()), abs=1 / 360)


@pytest.mark.parametrize("rule", OTHERS)
def test_a_run_is_kept_with_what_its_rule_reads(rule: str, digits: Dataset, tmp_path: Path) -> None:
    config = described(rule, alignment_every=100)
    metrics = train(config, digits, root=tmp_path)
    kept = read_run(tmp_path / config.id)
    assert kept.config == config
    assert kept.locality is not None
    assert learning(kept.metrics) == learning(metrics)
    (sample,) = metrics[0].alignment
    assert sample.gradients["linear4.weight"] > 0.9
    assert -1 <= sample.gradients["linear1.weight"] <= 1
    (figure,) = gather([tmp_path]).figures
    assert figure.conditions[0].label.startswith(OTHERS[rule].title.capitalize())


def test_an_interrupted_run_of_direct_feedback_goes_on_as_if_it_had_not_been(digits: Dataset, tmp_path: Path) -> None:
    """Its feedback is in no checkpoint: it comes from the seed again."""
    whole = train(described("dfa", epochs=3), digits)
    train(described("dfa", epochs=1), digits, root=tmp_path)
    assert learning(train(described("dfa", epochs=3), digits, root=tmp_path)) == learning(whole)


def test_the_mirror_is_trained_by_noise_along_with_the_network(digits: Dataset) -> None:
    config = RunConfig(feedback={"all": "mirror"}, epochs=4, alignment_every=1000)
    first, *_, last = train(config, digits)
    assert first.alignment[0].feedback["linear4"] < 0.3
    assert last.alignment[0].feedback["linear4"] > 0.5


# ----------------------------------------------------------------------------------------- held-out images, larger ones


def test_images_are_held_out_of_the_training_images_alone(digits: Dataset) -> None:
    apart = digits.held_out(64)
    assert (len(apart.train), len(apart.test)) == (256, 64)
    together = torch.cat([apart.train.images, apart.test.images]).flatten(1)
    order = torch.cat([apart.train.labels, apart.test.labels])
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, digits.train.images.flatten(1).tolist()))
    assert torch.equal(order.bincount(), digits.train.labels.bincount())
    assert torch.equal(digits.held_out(64).test.images, apart.test.images)
    for count in (0, 320):
        with refuses(DataError, f"{count} of 320 training images of digits cannot be held out"):
            digits.held_out(count)


def test_a_run_with_held_out_images_never_sees_the_test_images(digits: Dataset) -> None:
    config = RunConfig(rule="backprop", validation=64, epochs=1)
    others = Split(torch.rand_like(digits.test.images), digits.test.labels.flip(0))
    changed = Dataset(digits.name, digits.classes, digits.train, others)
    assert learning(train(config, digits)) == learning(train(config, changed))
    assert train(config, digits)[0].test_accuracy * 64 == pytest.approx(
        round(train(config, digits)[0].test_accuracy * 64)
    )


def test_pixels_are_repeated() -> None:
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    small = Dataset("small", ("a",), Split(image, torch.tensor([0])), Split(image, torch.tensor([0])))
    expected = torch.tensor([[1.0, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]])
    assert torch.equal(small.enlarged(2).test.images[0, 0], expected)
    assert rules.enlargement("mlp", small) == 1
    assert rules.enlargement("cnn", small) == 7
    with refuses(DataError, "is a text, which has no pixels"):
        data.load("docstrings").enlarged(2)


# ------------------------------------------------------------------------------------------------------- the experiment


def test_learning_rates_are_chosen_by_the_held_out_images() -> None:
    """A run that has diverged guesses, at times better than one that learns nothing; a smaller rate may learn."""
    names, runs = [], []
    accuracies = {
        "dfa": ((0.1, 1), (0.7, 1), (0.9, 1), (0.9, 1), (0.2, math.nan)),
        "ar": ((0.8, 1), (0.3, 1), (0.2, 1), (0.1, 1), (0.1, 1)),
        "drtp": ((0.095, 903), (0.096, 904), (0.1005, math.nan), (0.1005, math.inf), (0.1005, math.nan)),
        "ep": ((0.1, math.nan), (0.1, math.nan), (0.2, math.nan), (0.1, math.nan), (0.1, math.nan)),
    }
    for name, found in accuracies.items():
        for rate, (accuracy, loss) in zip(GRID[2:7], found, strict=True):
            config = RunConfig(learning_rate=rate, validation=10)
            metrics = EpochMetrics(epoch=1, train_loss=loss, test_accuracy=accuracy, seconds=1)
            names.append(name)
            runs.append(FinishedRun(config, [metrics], {}))
    assert rules.chosen_rates(names, runs) == {"dfa": GRID[4], "ar": GRID[2], "drtp": GRID[3], "ep": GRID[2]}


def test_a_rate_at_which_one_of_the_seeds_diverges_is_not_chosen() -> None:
    """The mean decides, and no seed by itself."""
    accuracies = {GRID[3]: (0.7, 0.8, 0.9), GRID[4]: (0.95, 0.95, 0.45), GRID[5]: (0.99, 0.99, 0.99)}
    runs = [
        FinishedRun(
            RunConfig(learning_rate=rate, validation=10, seed=seed),
            [EpochMetrics(epoch=1, train_loss=math.nan if diverges else 1, test_accuracy=accuracy, seconds=1)],
            {},
        )
        for rate, found in accuracies.items()
        for seed, accuracy in enumerate(found)
        for diverges in [(rate, seed) == (GRID[5], 1)]
    ]
    assert rules.chosen_rates(["ar"] * len(runs), runs) == {"ar": GRID[3]}


def test_the_search_goes_on_until_the_best_rate_lies_between_two_others() -> None:
    first = rules.first_rates(["dfa", "ep"])
    assert first == dict.fromkeys(("backprop", "ep", "dfa"), GRID[4:7])
    assert list(first) == ["backprop", "ep", "dfa"]
    best = {"backprop": GRID[5], "ep": GRID[4], "dfa": GRID[6]}
    second = rules.further_rates(first, best)
    assert second == {"backprop": GRID[4:7], "ep": GRID[3:7], "dfa": GRID[4:8]}
    assert rules.further_rates(second, best) == second
    assert rules.further_rates(second, best | {"ep": GRID[3]})["ep"] == GRID[2:7]
    ends = {"backprop": GRID[:2], "ep": GRID[-2:]}
    assert rules.further_rates(ends, {"backprop": GRID[0], "ep": GRID[-1]}) == ends


def test_every_run_of_the_search_is_computed_before_its_rate_is_chosen(digits: Dataset, tmp_path: Path) -> None:
    """A landscape that is made up: the best rate of the one is the grid's least, of the other in the first three."""
    best, told = {"backprop": GRID[5], "drtp": GRID[0]}, list[float]()

    def compute(names: Sequence[str], configs: Sequence[RunConfig]) -> list[FinishedRun]:
        found = []
        for name, config in zip(names, configs, strict=True):
            assert config.validation == 64 or config.learning_rate == best[name]
            if name == "drtp" and config.validation:
                told.append(config.learning_rate)
            accuracy = 0.9 - abs(GRID.index(config.learning_rate) - GRID.index(best[name])) / 100
            metrics = EpochMetrics(epoch=1, train_loss=1, test_accuracy=accuracy, seconds=1)
            found.append(FinishedRun(config, [metrics], {}))
        return found

    found, _ = rules.compare_rivals(
        "mlp",
        digits,
        compute,
        seeds=2,
        search_seeds=2,
        epochs=1,
        only=["drtp"],
        threads=1,
        folder=tmp_path,
        command="made up",
    )
    assert {row.name: row.rate for row in found.rows} == best
    assert set(told) == set(GRID[:7])
    assert "at the grid's edge: drtp" in found.notes[0]
    assert "the highest mean accuracy" in found.notes[0]
    assert "(seeds 1000, 1001)" in found.notes[0]


def test_search_and_comparison_are_planned_apart(digits: Dataset) -> None:
    searched = rules.search_runs("mlp", digits, rules.first_rates(), seeds=2, epochs=2)
    assert len(searched) == len({config.id for _, config in searched}) == len(RIVALS) * 3 * 2
    assert {config.validation for _, config in searched} == {64}
    planned = rules.compared_runs("cnn", digits, dict.fromkeys(RIVALS, 0.001), seeds=3, epochs=2)
    assert len(planned) == len({config.id for _, config in planned}) == len(RIVALS) * 3
    assert {config.validation for _, config in planned} == {0}
    assert {config.enlarged for _, config in planned} == {2}
    assert not {config.seed for _, config in planned} & {config.seed for _, config in searched}
    with refuses(ValueError, "condition must be one of backprop, ar", "got 'x'"):
        rules.first_rates(["x"])


def test_what_is_not_local(digits: Dataset) -> None:
    planned = dict(rules.compared_runs("mlp", digits, dict.fromkeys(RIVALS, 0.001), seeds=1, epochs=1))
    found = {name: rules.not_local(config, digits) for name, config in planned.items()}
    assert found["backprop"] == found["ar"] == found["fixed"] == ["memory of x̄", "weight transport"]
    assert found["pc"] == ["weight transport"]
    assert found["ep"] == ["two phases", "weight transport"]
    assert found["FA"] == found["ψ"] == found["mirror"] == ["memory of x̄"]
    assert found["uSF"] == found["frSF"] == found["brSF"] == ["memory of x̄", "weight signs"]
    assert (found["dfa"], found["drtp"]) == (["error broadcast"], ["target broadcast"])


def test_costs_are_measured_in_turn_and_change_no_weights(digits: Dataset) -> None:
    names = ("backprop", "pc", "mirror", "drtp")
    planned = rules.compared_runs("mlp", digits, dict.fromkeys(names, 0.001), seeds=1, epochs=1)
    threads = torch.get_num_threads()
    found = rules.costs(dict(planned), digits)
    assert found.keys() == set(names)
    assert found["backprop"] == 1
    assert found["pc"] > 3  # twenty runs of the model
    assert torch.get_num_threads() == threads


def test_what_runs_away_at_the_start_is_not_compared(digits: Dataset) -> None:
    config = RunConfig(rule="pc", rule_options={"step_size": 1.9, "num_steps": 20})
    with refuses(ModelError, "rule pc (step_size=1.9, num_steps=20) cannot be compared on digits", "of the MLP"):
        rules.check_stable(config, digits)
    rules.check_stable(config.model_copy(update={"rule_options": {"step_size": 0.1, "num_steps": 20}}), digits)


@pytest.mark.parametrize("size", [(1, 8, 8), (1, 28, 28), (3, 32, 32)], ids=str)
@pytest.mark.parametrize("model", rules.MODELS)
def test_activities_rest_nowhere_near_the_edge_of_stability(model: ModelName, size: tuple[int, int, int]) -> None:
    """Of every rule whose activities move, on images of each size, at steps a quarter longer too."""
    images = torch.rand(64, *size, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(64) % 10)
    dataset = Dataset("pictures", tuple("0123456789"), split, split)
    for name in rules.MOVING:
        ((_, config),) = rules.search_runs(model, dataset, {name: GRID[:1]}, seeds=1, epochs=1)
        rules.check_stable(config, dataset)
        longer = rules.STEPS[model] | {"step_size": 1.25 * rules.STEPS[model]["step_size"]}
        rules.check_stable(config.model_copy(update={"rule_options": config.rule_options | longer}), dataset)


def test_what_runs_away_has_a_cost_too(digits: Dataset) -> None:
    """Its runs are recorded as diverged, so the table must not fail on them in the end."""
    config = RunConfig(rule="pc", rule_options={"step_size": 1.9, "num_steps": 20})
    with pytest.raises(DivergedError):
        train(config, digits, check_finite=True)
    assert rules.costs({"backprop": RunConfig(rule="backprop"), "pc": config}, digits)["pc"] > 3


def test_the_table_and_the_figure_come_from_the_records(digits: Dataset, tmp_path: Path) -> None:
    def compute(_names: Any, configs: Any) -> list[FinishedRun]:
        return run_all(configs, digits, root=tmp_path / "runs")

    only = ["FA", "dfa"]
    found, paths = rules.compare_rivals(
        "mlp",
        digits,
        compute,
        seeds=2,
        search_seeds=1,
        epochs=1,
        only=only,
        threads=1,
        folder=made(tmp_path / "out"),
        command="here",
    )
    assert [path.name for path in paths] == ["table.md", "runs.jsonl", "search.jsonl", "accuracy-by-cost.png"]
    assert [row.name for row in found.rows] == ["backprop", *only]
    reference, *others = found.rows
    assert (reference.difference, reference.cost) == (None, 1)
    for row in others:
        assert row.difference is not None
        assert row.difference.mean == pytest.approx(row.accuracy.mean - reference.accuracy.mean)
        assert row.alignment is not None
        assert row.rate in GRID
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| direct feedback alignment |" in text
    assert "error broadcast" in text
    (tmp_path / "out" / "table.md").unlink()
    outcome = CliRunner().invoke(app, ["table", str(tmp_path / "out")], env={"COLUMNS": "200"})
    assert outcome.exit_code == 0, outcome.output
    assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8") == text
    assert gather([tmp_path / "out"]).figures
    (tmp_path / "out").rename(tmp_path / "mlp")
    outcome = CliRunner().invoke(app, ["table", str(tmp_path)], env={"COLUMNS": "200"})
    assert outcome.exit_code == 0, outcome.output
    head, _, first, *lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert head == "| rule | MLP | not local | cost |"
    assert first.startswith(f"| Backpropagation | {reference.accuracy} % | memory of x̄, weight transport | 1.0× |")
    for line, row in zip(lines, found.rows[1:], strict=True):
        assert row.difference is not None
        low, high = row.difference.interval
        shown = f"{100 * row.difference.mean:.2f} ({100 * low:.2f} to {100 * high:.2f})"
        assert line == f"| {row.title} | {shown} | {', '.join(row.not_local)} | {row.cost:.1f}× |"
    # A rule that was trained on the first network alone has its row, without the last network's cost.
    shutil.copytree(tmp_path / "mlp", tmp_path / "cnn")
    head, *runs = (tmp_path / "cnn" / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    left = [run for run in runs if json.loads(run)["condition"] != "dfa"]
    head = json.dumps(json.loads(head) | {"runs": len(left)})
    (tmp_path / "cnn" / "runs.jsonl").write_text("\n".join([head, *left, ""]), encoding="utf-8")
    lines = rules.write_together(tmp_path).read_text(encoding="utf-8").splitlines()
    dfa = found.rows[-1]
    assert lines[-1].startswith(f"| {dfa.title} | ")
    assert lines[-1].endswith(") |  | error broadcast |  |")
    assert lines[-2].endswith(f" | memory of x̄ | {found.rows[1].cost:.1f}× |")


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


# --------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--rule", "dfa", "--beta", "1"], "--beta"),
        (["--rule", "dfa", "--step-size", "0.1"], "--step-size"),
        (["--rule", "dfa", "--feedback", "random"], "--feedback"),
        (["--rule", "pc", "--solver", "euler"], "--solver"),
        (["--rule", "pc", "--initial", "zero"], "--initial"),
        (["--rule", "pc", "--one-sided"], "--centred/--one-sided"),
        (["--rule", "ar", "--beta", "1"], "--beta"),
        (["--rule", "backprop", "--std", "1"], "--std"),
    ],
)
def test_options_without_effect_are_refused(arguments: list[str], flag: str) -> None:
    outcome = CliRunner().invoke(app, ["train", *arguments], env={"COLUMNS": "200"})
    assert outcome.exit_code == 2
    assert f"Invalid value for {flag}: it has no effect with --rule {arguments[1]}, leave it out" in outcome.output


def test_options_outside_their_range_are_refused() -> None:
    outcome = CliRunner().invoke(app, ["train", "--rule", "ep", "--beta", "-1"], env={"COLUMNS": "200"})
    assert outcome.exit_code == 2
    assert "Invalid value for --beta: beta must be positive and finite, got -1.0" in outcome.output


def test_training_from_the_command_line(tmp_path: Path) -> None:
    arguments = ["--rule", "ep", "--num-steps", "2", "--beta", "0.1", "--one-sided", "--epochs", "1"]
    outcome = CliRunner().invoke(app, ["train", *arguments, "--runs", str(tmp_path)], env={"COLUMNS": "200"})
    assert outcome.exit_code == 0, outcome.output
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("digits-mlp-ep-seed0-")
    options = read_run(folder).config.rule_options
    assert options == {"step_size": 0.1, "num_steps": 2, "beta": 0.1, "centred": False}


def test_reproduce_rules_refuses_what_has_no_effect() -> None:
    for arguments, flag in ((["--as-coded"], "--as-coded"), (["--alignment-every", "3"], "--alignment-every")):
        outcome = CliRunner().invoke(app, ["reproduce", "rules", *arguments], env={"COLUMNS": "200"})
        assert outcome.exit_code == 2
        assert f"Invalid value for {flag}: it has no effect on reproduce rules" in outcome.output
    outcome = CliRunner().invoke(app, ["reproduce", "demo", "--search-seeds", "2"], env={"COLUMNS": "200"})
    assert outcome.exit_code == 2
    assert "Invalid value for --search-seeds: it has an effect on reproduce rules alone" in outcome.output
    outcome = CliRunner().invoke(app, ["reproduce", "rules", "--condition", "x"], env={"COLUMNS": "200"})
    assert outcome.exit_code == 2
    assert "--condition must be one of backprop" in outcome.output
