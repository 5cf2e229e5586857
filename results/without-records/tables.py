"""Tables of the results whose runs were not kept, from what their summaries hold: accuracies by seed, seconds, cost.

    python results/without-records/tables.py

Those with a runs.jsonl are made by `relaxprop table`. A summary without its records tells the final accuracies alone.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import load
from relaxprop.lab.experiments.paper import EXPERIMENTS
from relaxprop.lab.report.claims import Row, summarise
from relaxprop.lab.report.figures import Figure, summary, table_document
from relaxprop.lab.results import EpochMetrics, FinishedRun

RESULTS = Path(__file__).parents[1]


def figure_of(kept: dict[str, Any]) -> Figure:
    """The figure, whose runs have their last epoch only."""
    (experiment,) = (e for name, e in EXPERIMENTS.items() if name == shlex.split(kept["command"])[2])
    configs = [RunConfig.model_validate(config) for config in kept["runs"].values()]
    names = list(kept["results"]) * (len(configs) // len(kept["results"]))
    dataset = load(configs[0].dataset)
    assert dataset.digest == configs[0].data, "these are other data"
    runs = []
    for name, config in zip(names, configs, strict=True):
        accuracy = kept["results"][name]["test_accuracy_by_seed"][config.seed]
        last = EpochMetrics(epoch=config.epochs, train_loss=0, test_accuracy=accuracy, seconds=1)
        runs.append(FinishedRun(config, [last], {}))

    def completed(row: Row) -> Row:
        result = kept["results"][row.name]
        seconds, cost = result["training_seconds_median"], result["cost_relative_to_backpropagation"]
        epochs = row.accuracies * configs[0].epochs
        return replace(row, seconds=seconds, relative_cost=cost, accuracies=epochs)

    rows = list(map(completed, summarise(experiment.of(dataset.name), names, runs, chance=dataset.chance)))
    return Figure(kept["command"], experiment.title, dataset.title, dataset.chance, names, runs, rows)


for path in sorted(RESULTS.glob("**/summary.json")):
    if (path.parent / "runs.jsonl").exists():
        continue
    kept = json.loads(path.read_text(encoding="utf-8"))
    figure = figure_of(kept)
    written = summary(figure)
    del written["environments"]  # those of the runs are not known, only that of the command
    written = {"command": written.pop("command"), "environment": kept["environment"]} | written
    for name, result in kept["results"].items():  # what was measured stays as it is
        for field in ("test_accuracy_mean", "test_accuracy_by_seed", "n", "training_seconds_median"):
            assert (
                written["results"][name][field] == result[field]
                or list(written["results"][name][field]) == result[field]
            )
    (path.parent / "table.md").write_text(table_document(figure), encoding="utf-8")
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    print(path.parent)
