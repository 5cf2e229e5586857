from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt

from relaxprop.lab import data, figures
from relaxprop.lab.engine import FinishedRun, run_all
from relaxprop.lab.records import EpochMetrics, RunConfig


def test_mean_and_standard_error() -> None:
    mean = figures.mean_over_seeds([0.90, 0.92, 0.97])
    assert mean.mean == pytest.approx(0.93)
    # Sample variance ((0.03)² + (0.01)² + (0.04)²) / 2 = 0.0013, over n = 3.
    assert mean.standard_error == pytest.approx(math.sqrt(0.0013 / 3))
    assert str(mean) == "93.00 ± 2.08"
    single = figures.mean_over_seeds([0.5])
    assert math.isnan(single.standard_error)
    assert str(single) == "50.00"


def runs() -> list[FinishedRun]:
    accuracies = {"ar": [(0.5, 0.80), (0.6, 0.90)], "backprop": [(0.5, 0.85), (0.6, 0.89)]}
    seconds = {"ar": 3.0, "backprop": 2.0}
    return [
        FinishedRun(
            RunConfig(rule=rule, seed=seed, epochs=2),
            [
                EpochMetrics(epoch=i, train_loss=1, test_accuracy=a, seconds=seconds[rule])
                for i, a in enumerate(accuracies[rule][seed], 1)
            ],
        )
        for seed in (0, 1)
        for rule in ("ar", "backprop")
    ]


def test_the_table_and_the_paired_difference() -> None:
    rows = figures.summarise(runs())
    assert figures.table(rows) == [
        ("Activation Relaxation", "85.00 ± 5.00", "2", "6.0", "1.50×"),
        ("Backpropagation", "87.00 ± 2.00", "2", "4.0", "1.00×"),
    ]
    # Differences −0.05 and 0.01: mean −0.02, standard deviation 0.06/√2, over √2.
    difference = figures.paired_difference(rows)
    assert difference.mean == pytest.approx(-0.02)
    assert difference.standard_error == pytest.approx(0.03)
    assert difference.n == 2


def test_the_demos_files_hold_its_results(tmp_path: Path) -> None:
    written = figures.write_demo(runs(), data.load("digits"), tmp_path, "relaxprop reproduce demo")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["command"] == "relaxprop reproduce demo"
    assert summary["results"]["ar"]["test_accuracy_by_seed"] == [0.80, 0.90]
    assert summary["paired_difference"]["mean"] == pytest.approx(-0.02)
    assert len(summary["runs"]) == 4
    rows = list(csv.DictReader((tmp_path / "accuracy.csv").read_text().splitlines()))
    assert [(r["rule"], r["epoch"], r["test_accuracy"]) for r in rows][:2] == [
        ("ar", "1", "0.550000"),
        ("ar", "2", "0.850000"),
    ]
    for name in ("accuracy.png", "convergence.png"):
        pixels = np.asarray(plt.imread(tmp_path / name))
        assert pixels.std() > 0.02  # something is drawn


def test_runs_share_start_and_minibatches_by_seed() -> None:
    configs = figures.demo_runs("digits", seeds=2, epochs=1)
    assert [(c.rule, c.seed) for c in configs] == [("ar", 0), ("backprop", 0), ("ar", 1), ("backprop", 1)]


def test_the_engine_counts_every_epoch_once(tmp_path: Path) -> None:
    configs, digits = figures.demo_runs("digits", seeds=1, epochs=2), data.load("digits")
    for _ in range(2):
        counted: list[int] = []
        finished = run_all(configs, digits, root=tmp_path, on_epoch=counted.append)
        assert sum(counted) == 4
        assert [run.config for run in finished] == configs


def test_convergence_is_as_predicted_for_every_step_size() -> None:
    for curve in figures.convergence_by_step_size(data.load("digits"), step_sizes=(0.1, 1.5), num_steps=30):
        assert curve.depth == 3
        for name, measured in curve.measured.items():
            np.testing.assert_allclose(measured, curve.predicted[name], atol=1e-13, rtol=1e-9)
