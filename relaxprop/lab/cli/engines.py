"""Options that say by what a grid of runs is computed.

May import: lab.engines.processes, lab.engines.ray, lab.engines.serial, lab.engines.work.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import typer

from relaxprop.lab.engines.processes import default_workers, prepare, processes
from relaxprop.lab.engines.ray import ClusterError, connect, on_ray
from relaxprop.lab.engines.serial import serial
from relaxprop.lab.engines.work import Engine

EngineName = Literal["processes", "ray"]
WorkersOption = Annotated[
    int | None,
    typer.Option(min=1, help="Runs that are computed at a time, each in a process. (default: one for each core)"),
]
ThreadsOption = Annotated[
    int, typer.Option(min=1, help="Threads of each run. Results depend on them in the last digits.")
]
EngineOption = Annotated[
    EngineName, typer.Option(help="Processes of this machine, or a Ray cluster that is running (relaxprop[cluster]).")
]
AddressOption = Annotated[
    str | None, typer.Option(help="Of the Ray cluster, HOST:PORT. (default: the one that this machine belongs to)")
]
GpusOption = Annotated[
    float | None, typer.Option(min=0, help="GPUs of each run on a Ray cluster; a part of one will do.")
]


def find_engine(
    name: EngineName, *, workers: int | None, threads: int, address: str | None, gpus: float | None
) -> Engine:
    """The engine that the options name.

    Raises:
        typer.BadParameter: if options exclude one another, or the cluster does not answer.
    """
    if name == "processes":
        for flag, given in (("--address", address), ("--gpus", gpus)):
            if given is not None:
                raise typer.BadParameter("it has no effect without --engine ray, leave it out", param_hint=flag)
        number = default_workers(threads) if workers is None else workers
        if number == 1:
            return serial
        prepare()
        return partial(processes, workers=number)
    if workers is not None:
        raise typer.BadParameter("a Ray cluster has workers of its own, leave it out", param_hint="--workers")
    try:
        connect(address)
    except ClusterError as error:
        raise typer.BadParameter(str(error), param_hint="--engine" if address is None else "--address") from error
    return partial(on_ray, gpus=gpus or 0.0)
