"""Training by the default settings beside backpropagation, at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relaxprop.lab.experiments import defaults
from relaxprop.lab.experiments.defaults import RULES, Setting


@pytest.mark.parametrize("network", ["ReLU MLP, 2 hidden", "Tanh MLP, 6 hidden", "ResNet", "12-layer transformer"])
def test_the_default_follows_backpropagation(network: str) -> None:
    found = defaults.measure([Setting(network, "mean", "adam")], seeds=1, minibatches=2)
    losses = {x.rule: x.loss for x in found}
    assert losses.keys() == RULES.keys()
    for rule in ("default", "default, cut"):
        assert losses[rule] == pytest.approx(losses["backpropagation"], rel=1e-5)


def test_what_is_written(tmp_path: Path) -> None:
    told: list[None] = []
    setting = Setting("ReLU MLP, 1 hidden", "sum", "sgd")
    found = defaults.measure([setting], seeds=2, minibatches=3, on_run=lambda: told.append(None))
    assert len(found) == len(told) == 2 * len(RULES)
    paths = defaults.write(found, 3, tmp_path, "relaxprop defaults")
    assert [path.name for path in paths] == ["table.md", "losses.jsonl"]
    head, *lines = map(json.loads, (tmp_path / "losses.jsonl").read_text().splitlines())
    assert (head["command"], head["minibatches"], len(lines)) == ("relaxprop defaults", 3, len(found))
    header, (row,) = defaults.table(found)
    assert row[:3] == list(setting)
    assert len(row) == len(header)
    assert "| ReLU MLP, 1 hidden | sum | sgd |" in (tmp_path / "table.md").read_text()


def test_every_depth_is_trained_in_eight_ways() -> None:
    chosen = list(defaults.settings((1, 12)))
    assert len(chosen) == len(set(chosen)) == 2 * 2 * 2 * 2 + 2
