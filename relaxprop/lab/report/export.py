"""Runs as one tidy table for other tools: a row for each run and epoch.

May import: lab.files, lab.records.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from relaxprop.lab.files import check_writable, write_atomically
from relaxprop.lab.records import Run, flattened

if TYPE_CHECKING:  # where it is not used, it would take a tenth of a second
    import pyarrow

Format = Literal["parquet", "csv"]
MEASURED = ("epoch", "train_loss", "test_accuracy", "seconds")


def epochs_table(runs: Sequence[Run]) -> pyarrow.Table:
    """A row for each run and epoch: what was measured, the description's fields by their dotted names, environment."""
    described = [
        {"id": run.id, "condition": run.condition, "place": run.place}
        | flattened(run.config)
        | flattened(run.environment(), "environment.")
        for run in runs
    ]
    measured = [run.metrics() for run in runs]
    rows = [i for i, epochs in enumerate(measured) for _ in epochs]
    columns = {name: [epoch[name] for epochs in measured for epoch in epochs] for name in MEASURED}
    return _joined(described, rows, columns)


def alignment_table(runs: Sequence[Run]) -> pyarrow.Table:
    """A row for each measured cosine: of a gradient to backpropagation's, or of backwards weights to weights."""
    described = [{"id": run.id, "condition": run.condition, "place": run.place} for run in runs]
    rows: list[int] = []
    columns: dict[str, list[Any]] = {name: [] for name in ("epochs", "quantity", "name", "cosine")}
    for i, run in enumerate(runs):
        for sample in (sample for epoch in run.metrics() for sample in epoch.get("alignment", ())):
            for quantity in ("gradients", "feedback"):
                for name, cosine in sample[quantity].items():
                    rows.append(i)
                    for column, value in zip(columns.values(), (sample["epochs"], quantity, name, cosine), strict=True):
                        column.append(value)
    return _joined(described, rows, columns)


def _joined(described: Sequence[dict[str, Any]], rows: list[int], columns: dict[str, list[Any]]) -> pyarrow.Table:
    """The columns beside the run that each of their rows belongs to."""
    names = list(dict.fromkeys(name for run in described for name in run))
    import pyarrow

    repeated = pyarrow.array(rows, pyarrow.int64())
    whole = {name: _array([run.get(name) for run in described]).take(repeated) for name in names}
    for name, values in columns.items():
        whole[name] = _array(values)
    return pyarrow.table(whole)


def _array(values: list[Any]) -> pyarrow.Array:
    import pyarrow

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):  # numbers in some runs, words in others
        return pyarrow.array([None if value is None else str(value) for value in values])


def write_table(table: pyarrow.Table, path: Path, kind: Format) -> None:
    """Writes a table, which is either whole or not there.

    Raises:
        OutputError: if it cannot be written.
    """
    import pyarrow.csv
    import pyarrow.parquet

    content = pyarrow.BufferOutputStream()
    (pyarrow.parquet.write_table if kind == "parquet" else pyarrow.csv.write_csv)(table, content)
    check_writable(path.parent)
    write_atomically(path, content.getvalue().to_pybytes())
