"""Figures and tables from files of runs, and the statistics in them."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt

from relaxprop.lab import data, stats
from relaxprop.lab.config import RunConfig
from relaxprop.lab.engines.grid import run_all
from relaxprop.lab.experiments import conditions, convergence, paper, records
from relaxprop.lab.report import claims, figures
from relaxprop.lab.results import AlignmentSample, EpochMetrics, FinishedRun


def test_mean_and_standard_error() -> None:
    mean = stats.mean_over_seeds([0.90, 0.92, 0.97])
    assert mean.mean == pytest.approx(0.93)
    # Sample variance ((0.03)² + (0.01)² + (0.04)²) / 2 = 0.0013, over n = 3.
    assert mean.standard_error == pytest.approx(math.sqrt(0.0013 / 3))
    assert str(mean) == "93.00 ± 2.08"
    single = stats.mean_over_seeds([0.5])
    assert math.isnan(single.standard_error)
    assert str(single) == "50.00"


def test_what_is_not_a_number_has_no_error() -> None:
    mean = stats.mean_over_seeds([math.nan, 0.5])
    assert math.isnan(mean.mean)
    assert math.isnan(mean.standard_error)


def test_confidence_interval() -> None:
    # t(0.975, 2) = 4.3027 by any table.
    low, high = stats.mean_over_seeds([0.90, 0.92, 0.97]).interval
    half = 4.3027 * math.sqrt(0.0013 / 3)
    assert low == pytest.approx(0.93 - half, abs=1e-5)
    assert high == pytest.approx(0.93 + half, abs=1e-5)
    assert stats.mean_over_seeds([0.5]).interval == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("claim", "differences", "expected"),
    [
        ("equivalent", [0.001, -0.001, 0.0], "holds"),
        ("equivalent", [-0.031, -0.030, -0.029], "does not hold: -3.0 points"),
        ("equivalent", [-0.011, -0.009, -0.010], "open: 3 seeds cannot tell"),
        ("equivalent", [0.0], "open: 1 seed cannot tell"),
        ("worse", [-0.031, -0.030, -0.029], "holds"),
        ("worse", [0.001, -0.001, 0.0], "does not hold: +0.0 points"),
        ("worse", [-0.011, -0.009, -0.010], "open: 3 seeds cannot tell"),
        ("destroyed", [-0.80, -0.79, -0.81], "holds"),  # of 0.9 with chance 0.1: half of what was learned is 0.4
        ("destroyed", [-0.02, -0.03, -0.01], "does not hold: -2.0 points"),
        ("destroyed", [-0.45, -0.30, -0.50], "open: 3 seeds cannot tell"),
    ],
)
def test_verdict_on_a_claim(claim: stats.Claim, differences: list[float], expected: str) -> None:
    assert stats.verdict(claim, stats.mean_over_seeds(differences), reference=0.9, chance=0.1) == expected


NAMES = ["backprop", "baseline", "d"] * 2
DEMO = paper.EXPERIMENTS["demo"]


def runs() -> list[FinishedRun]:
    accuracies = {
        "backprop": [(0.5, 0.85), (0.6, 0.89)],
        "baseline": [(0.5, 0.80), (0.6, 0.90)],
        "d": [(0.1, 0.12), (0.1, 0.10)],
    }
    seconds = {"backprop": 2.0, "baseline": 3.0, "d": 4.0}
    return [
        FinishedRun(
            RunConfig(rule=paper.UNFROZEN[name].rule, frozen=paper.UNFROZEN[name].frozen, seed=i // 3, epochs=2),
            [
                EpochMetrics(epoch=epoch, train_loss=1, test_accuracy=a, seconds=seconds[name])
                for epoch, a in enumerate(accuracies[name][i // 3], 1)
            ],
            {"torch": "2.13.0"},
        )
        for i, name in enumerate(NAMES)
    ]


def test_the_table_and_the_paired_differences() -> None:
    rows = claims.summarise(paper.UNFROZEN, NAMES, runs(), chance=0.1)
    assert [row[:5] for row in claims.table(rows)] == [
        ("Backpropagation", "87.00 ± 2.00", "2", "4.0", "1.0×"),
        ("Activation Relaxation", "85.00 ± 5.00", "2", "6.0", "1.5×"),
        ("d: presynaptic x in the update", "11.00 ± 1.00", "2", "8.0", "2.0×"),
    ]
    reference, baseline, d = rows
    assert reference.difference is None
    # Differences −0.05 and 0.01: mean −0.02, standard deviation 0.06/√2, over √2.
    for row, mean, error in ((baseline, -0.02, 0.03), (d, -0.74, 0.06)):  # d's is to the baseline
        assert row.difference is not None
        assert row.difference.mean == pytest.approx(mean)
        assert row.difference.standard_error == pytest.approx(error)
        assert row.difference.n == 2


def test_a_figures_files_hold_its_results(tmp_path: Path) -> None:
    digits = data.load("digits")
    demo = paper.EXPERIMENTS["demo"]
    _, written = records.write_conditions(demo, NAMES, runs(), digits, tmp_path, "relaxprop reproduce demo")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["command"] == "relaxprop reproduce demo"
    assert summary["results"]["baseline"]["test_accuracy_by_seed"] == [0.80, 0.90]
    assert summary["results"]["baseline"]["paired_difference"]["mean"] == pytest.approx(-0.02)
    assert summary["results"]["d"]["paired_difference"]["claim"] == "destroyed"
    assert len(summary["runs"]) == 6
    rows = list(csv.DictReader((tmp_path / "accuracy.csv").read_text().splitlines()))
    assert [(r["condition"], r["epoch"], r["test_accuracy"]) for r in rows][:2] == [
        ("backprop", "1", "0.550000"),
        ("backprop", "2", "0.870000"),
    ]
    pixels = np.asarray(plt.imread(tmp_path / "accuracy.png"))
    assert pixels.std() > 0.02  # something is drawn


def test_the_runs_of_a_figure() -> None:
    planned = conditions.condition_runs(DEMO, "digits", seeds=2, epochs=1)
    assert [(name, config.seed) for name, config in planned] == [(n, s) for s in (0, 1) for n in paper.UNFROZEN]
    assert len({config.id for _, config in planned}) == 12
    for name, config in planned:
        assert config.solver == ("euler" if name in ("a", "c") else "closed-form")
        if name != "backprop":
            assert (config.solver_options["step_size"], config.solver_options["num_steps"]) == (0.1, 100)


def test_some_of_the_runs_of_a_figure() -> None:
    planned = conditions.condition_runs(DEMO, "digits", seeds=1, epochs=1, only=["d"])
    assert [name for name, _ in planned] == ["backprop", "baseline", "d"]
    with pytest.raises(ValueError, match=r"condition must be one of backprop, baseline, a, b, c, d, got 'e'"):
        conditions.condition_runs(DEMO, "digits", seeds=1, epochs=1, only=["e"])


def test_the_runs_of_a_figure_as_coded() -> None:
    planned = dict(conditions.condition_runs(DEMO, "digits", seeds=1, epochs=1, as_coded=True))
    assert all(config.left_out == 2 for config in planned.values())
    assert all(planned[name].solver_options["order"] == "sequential" for name in ("baseline", "a", "b", "c", "d"))
    assert [name for name, config in planned.items() if not config.frozen.input] == ["d"]


@pytest.mark.parametrize("name", ["figure2", "appendix-c"])
def test_the_runs_of_the_cnns_figures(name: paper.FigureName) -> None:
    experiment = paper.EXPERIMENTS[name]
    for dataset in experiment.conditions:
        planned = dict(conditions.condition_runs(experiment, dataset, seeds=1, epochs=1))
        assert len({config.id for config in planned.values()}) == 10
        assert {config.model for config in planned.values()} == {"cnn"}
        assert planned["ψ-f'"].feedback == {"all": "learned"}
        assert planned["ψ-f'"].dropped == {"all": "both"}
        assert planned["f'-conv"].dropped == {"convolutional": "both"}
        assert not planned["baseline"].feedback
        assert not planned["baseline"].dropped
        coded = dict(conditions.condition_runs(experiment, dataset, seeds=1, epochs=1, as_coded=True))["ψ-fc"]
        assert (coded.model, coded.signed_inputs, coded.convolutional_factor) == ("cnn-as-coded", True, 2)
    assert paper.EXPERIMENTS["appendix-c"].of("svhn")["f'"].claim == "worse"
    assert paper.EXPERIMENTS["figure2"].of("leaves") is paper.SIMPLIFIED


def test_the_runs_on_other_graphs() -> None:
    experiment = paper.EXPERIMENTS["graphs"]
    for dataset, model in (("docstrings", "transformer"), ("cifar10", "resnet")):
        planned = dict(conditions.condition_runs(experiment, dataset, seeds=1, epochs=1))
        assert planned.keys() == {"backprop", "baseline"}
        assert {config.model for config in planned.values()} == {model}
        assert {config.optimizer for config in planned.values()} == {"adam"}
        assert planned["baseline"].vertices == "operations"


@pytest.mark.parametrize("claim", ["equivalent", "worse", "destroyed"])
def test_no_claim_is_tested_where_nothing_was_learned(claim: stats.Claim) -> None:
    difference = stats.mean_over_seeds([0.0, 0.001, -0.001])
    assert stats.verdict(claim, difference, reference=0.12, chance=0.12) == "open: nothing has been learned"
    ahead = stats.mean_over_seeds([0.30, 0.31, 0.32])  # of a reference that has learned nothing
    assert stats.verdict(claim, ahead, reference=0.12, chance=0.12) == "does not hold: +31.0 points"


def test_the_figure_and_table_of_alignment(tmp_path: Path) -> None:
    def measured(run: FinishedRun, offset: float) -> FinishedRun:
        if run.config.rule == "backprop":
            return run
        metrics = [
            m.model_copy(
                update={
                    "alignment": tuple(
                        AlignmentSample(
                            epochs=m.epoch - 1 + part,
                            gradients={"linear1.weight": 0.9 + offset, "linear1.bias": 1.0},
                            feedback={"linear1": 0.2 * part},
                            seconds=1.0,
                        )
                        for part in (0, 0.5)
                    )
                }
            )
            for m in run.metrics
        ]
        return FinishedRun(run.config, metrics, run.environment)

    with_alignment = [measured(run, 0.02 * (i // 3)) for i, run in enumerate(runs())]
    curves = figures.alignment_curves(NAMES, with_alignment)
    assert curves.keys() == {"baseline", "d"}
    weight = curves["d"].gradients["linear1.weight"]
    assert weight.epochs == (0, 0.5, 1, 1.5)
    assert weight.cosines[0].mean == pytest.approx(0.91)
    assert weight.cosines[0].standard_error == pytest.approx(0.01)  # of 0.90 and 0.92: 0.02 / √2 over √2
    assert [m.mean for m in curves["d"].feedback["linear1"].cosines] == pytest.approx([0, 0.1, 0, 0.1])
    _, written = records.write_conditions(DEMO, NAMES, with_alignment, data.load("digits"), tmp_path, "command")
    assert {"alignment.csv", "alignment.png"} <= {path.name for path in written}
    rows = list(csv.DictReader((tmp_path / "alignment.csv").read_text().splitlines()))
    assert len(rows) == 2 * 3 * 4  # conditions × quantities × measurements
    assert rows[0]["cosine"] == "0.910000"
    assert rows[0]["n"] == "2"
    assert np.asarray(plt.imread(tmp_path / "alignment.png")).std() > 0.02


def test_there_is_no_figure_of_alignment_where_none_was_measured(tmp_path: Path) -> None:
    assert figures.alignment_curves(NAMES, runs()) == {}
    _, written = records.write_conditions(DEMO, NAMES, runs(), data.load("digits"), tmp_path, "command")
    assert not any("alignment" in path.name for path in written)


def test_a_condition_that_diverges_is_a_result(tmp_path: Path) -> None:
    config = RunConfig(epochs=1, learning_rate=5.0)
    (run,) = run_all([config], data.load("digits"), root=tmp_path)
    assert math.isnan(run.metrics[0].train_loss)
    assert run.metrics[0].test_accuracy < 0.2


def test_convergence_is_as_predicted_for_every_step_size() -> None:
    for curve in convergence.convergence_by_step_size(data.load("digits"), step_sizes=(0.1, 1.5), num_steps=30):
        assert curve.depth == 3
        for name, measured in curve.measured.items():
            np.testing.assert_allclose(measured, curve.predicted[name], atol=1e-13, rtol=1e-9)
