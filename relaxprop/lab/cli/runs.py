"""Look at kept runs.

May import: lab.cli.options, lab.store.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from relaxprop.lab import store
from relaxprop.lab.cli.options import RunsOption, console


def take_over(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of records (runs.jsonl).")],
    runs: RunsOption = Path("runs"),
) -> None:
    """Make run directories of kept records, without weights, so that finished runs are not computed again."""
    for file in files:
        taken = store.take_over(file, runs)
        console.print(f"{file}: {len(taken)} runs taken over into {runs}", soft_wrap=True, highlight=False)


def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's name in --runs, or the path of its folder.")],
    runs: RunsOption = Path("runs"),
) -> None:
    """Show what a run was, what it reached, and what each of its updates reads."""
    path = runs / run if (runs / run).exists() or not Path(run).is_dir() else Path(run)
    kept = store.read_run(path)
    console.print(kept.config.model_dump_json(indent=2), highlight=False)
    where = [f"{name} {value}" for name, value in kept.environment.items() if value is not None]
    console.print(", ".join(where), soft_wrap=True, highlight=False)
    for metrics in kept.metrics[-1:]:
        console.print(
            f"epoch {metrics.epoch}: test accuracy {100 * metrics.test_accuracy:.2f} %, training loss "
            f"{metrics.train_loss:.4f}",
            highlight=False,
        )
    if kept.certificate is not None:
        shown = Table(title="weight of the initial state after the relaxation phase", title_justify="left")
        shown.add_column("vertex")
        shown.add_column("left", justify="right")
        for vertex, left in reversed(kept.certificate.items()):
            shown.add_row(vertex, f"{100 * left:.3g} %")
        console.print()
        console.print(shown)
    if kept.locality is not None:
        console.print()
        console.print(str(kept.locality), soft_wrap=True, highlight=False, markup=False)
