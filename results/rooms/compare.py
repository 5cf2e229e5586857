"""A training step of two commits beside backpropagation, interleaved in one process.

    git worktree add ../before 471a196
    python results/rooms/compare.py ../before . --rounds 200 --out results/rooms/steps.json

Both packages are imported under the one name that they have, one after the other, and keep their own modules.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any


def imported(folder: Path) -> tuple[ModuleType, Callable[[str], Callable[[Any], Any]]]:
    """The package in a folder, and what gives a network's training step by a solver."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "relaxprop"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder.resolve()))
    try:
        package, bench = importlib.import_module("relaxprop"), importlib.import_module("relaxprop.lab.bench")
        if hasattr(bench, "_Problem"):  # in commits whose benchmark is one file
            return package, lambda model: bench._Problem(model, 64, "cpu").training_step
        problems, steps = (importlib.import_module(f"relaxprop.lab.bench.{room}") for room in ("problems", "steps"))
        return package, lambda model: partial(steps.relaxation_step, problems.build(model, batch_size=64))
    finally:
        sys.path.pop(0)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("before", type=Path)
    options.add_argument("after", type=Path)
    options.add_argument("--rounds", type=int, default=200)
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    warnings.simplefilter("ignore")  # of phases that do not converge
    outcome: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "rounds": given.rounds}
    for model in ("mlp", "cnn"):
        steps: dict[str, Any] = {}
        for label, folder in (("before", given.before), ("after", given.after)):
            package, training_step_of = imported(folder)
            training_step = training_step_of(model)
            solvers = {
                "backpropagation": None,
                "Equilibrium()": package.Equilibrium(),
                "ClosedForm(0.1, 100)": package.ClosedForm(0.1, 100),
                "Euler(0.1, 10)": package.Euler(0.1, 10),
            }
            for name, solver in solvers.items():
                steps[f"{name}, {label}"] = training_step(solver)
            if label == "after":
                steps["ClosedForm(), after"] = training_step(package.ClosedForm())
        room = sys.modules.get("relaxprop.lab.environment") or sys.modules["relaxprop.lab.records"]  # its room before
        environment = room.environment()
        times: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():
            for _ in range(5):
                step()
        gc.collect()
        gc.disable()
        for i in range(given.rounds if model == "mlp" else given.rounds // 4):
            # Forwards and backwards in turn, so that no step always follows the same other one.
            for name, step in list(steps.items())[:: 1 if i % 2 else -1]:
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
        gc.enable()

        def ratio(a: str, b: str, times: dict[str, list[float]] = times) -> float:
            return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

        rules = [name.rpartition(", ")[0] for name in steps if name.endswith("before")]
        outcome[model] = {
            "milliseconds": {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()},
            "after / before": {rule: ratio(f"{rule}, after", f"{rule}, before") for rule in rules},
            "to backpropagation": {
                name: ratio(name, f"backpropagation, {name.rpartition(', ')[2]}")
                for name in steps
                if "backpropagation" not in name
            },
        }
        outcome["environment"] = environment
    given.out.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({m: outcome[m] for m in ("mlp", "cnn")}, indent=2))


if __name__ == "__main__":
    main()
