"""Two conditions side by side, whichever they are, paired by seed.

May import: lab.records, lab.stats.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from relaxprop.lab.records import Run
from relaxprop.lab.stats import Mean, mean_over_seeds


class Paired(NamedTuple):
    """Two conditions side by side, seed by seed."""

    seeds: list[int]
    first: Mean
    second: Mean
    difference: Mean  # of the final test accuracy: the first's minus the second's
    fields: dict[str, tuple[Any, Any]]  # in which their descriptions differ
    chance: float | None  # accuracy of naming the most frequent class, where that was kept


def pair(first: Sequence[Run], second: Sequence[Run]) -> Paired:
    """Two conditions' final test accuracies, seed by seed.

    Raises:
        ValueError: one has no runs or other seeds than the other, a run is not finished or there twice, or data or
            numbers of epochs differ.
    """
    sides = []
    for name, runs in (("A", first), ("B", second)):
        by_seed: dict[int, Run] = {}
        for run in runs:
            seed = int(run.config["seed"])
            if seed in by_seed:
                raise ValueError(
                    f"seed {seed} is there twice in {name}, in {by_seed[seed].place} and in {run.place}: "
                    "name one folder, or choose by --where"
                )
            if not run.is_finished:
                raise ValueError(
                    f"{run.place} has {run.epochs} of {run.config['epochs']} epochs: choose by --where finished=true"
                )
            by_seed[seed] = run
        if not by_seed:
            raise ValueError(f"there are no runs of {name}")
        sides.append(by_seed)
    a, b = sides
    for name, missing in (("A", b.keys() - a.keys()), ("B", a.keys() - b.keys())):
        if missing:
            raise ValueError(f"seeds {', '.join(map(str, sorted(missing)))} are missing in {name}")
    for what in ("dataset", "data", "epochs"):
        kinds = {str(run.config.get(what)) for side in sides for run in side.values()}
        if len(kinds) > 1:
            raise ValueError(f"the runs differ in their {what}: {', '.join(sorted(kinds))}")
    fields: dict[str, tuple[Any, Any]] = {}
    for side in sides:
        if len(kinds := {json.dumps(_but_seed(run)) for run in side.values()}) > 1:
            name = "A" if side is a else "B"
            raise ValueError(f"{name} has runs of {len(kinds)} kinds: choose by --where")
    one, other = _but_seed(next(iter(a.values()))), _but_seed(next(iter(b.values())))
    for name in dict.fromkeys([*one, *other]):
        if one.get(name) != other.get(name):
            fields[name] = one.get(name), other.get(name)
    finals = [[run.accuracy or 0.0 for _, run in sorted(side.items())] for side in sides]
    return Paired(
        sorted(a),
        first=mean_over_seeds(finals[0]),
        second=mean_over_seeds(finals[1]),
        difference=mean_over_seeds([x - y for x, y in zip(*finals, strict=True)]),
        fields=fields,
        chance=next((run.chance for side in sides for run in side.values() if run.chance is not None), None),
    )


def _but_seed(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.described.items() if name != "seed"}
