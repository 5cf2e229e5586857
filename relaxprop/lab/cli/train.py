"""Train one network.

May import: feedback, public names, recording, solvers, transients, vertices, lab.cli.engines, lab.cli.options,
lab.cli.settings, lab.config, lab.distributed, lab.experiments.conditions, lab.report.logs, lab.results, lab.rules,
lab.training.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from relaxprop import (
    Frozen,
)
from relaxprop.feedback import RULES
from relaxprop.lab.cli.engines import ThreadsOption
from relaxprop.lab.cli.options import (
    RunsOption,
    console,
    says_what_is_kept,
    spoken,
    usage_errors,
)
from relaxprop.lab.cli.settings import (
    AlignmentOption,
    AsCodedOption,
    ColourOption,
    DataDirOption,
    DatasetOption,
    DeviceOption,
    EpochsOption,
    ImageColumnOption,
    LabelColumnOption,
    LogOption,
    ModelOption,
    SeedOption,
    find_device,
    find_logs,
    load_dataset,
)
from relaxprop.lab.config import Loss, OptimizerName, Precision, RunConfig, default_solver
from relaxprop.lab.distributed import joined
from relaxprop.lab.experiments.conditions import as_the_code_has_it
from relaxprop.lab.report.logs import logs
from relaxprop.lab.results import EpochMetrics
from relaxprop.lab.rules import OTHERS, Rule
from relaxprop.lab.training import train as train_network
from relaxprop.recording import InitialState
from relaxprop.solvers import SOLVERS
from relaxprop.transients import Order
from relaxprop.vertices import Granularity


class Quantity(StrEnum):  # Typer knows lists of an enumeration, not of literals
    """A field of `Frozen`, as options spell it."""

    relaxation_derivative = "relaxation-derivative"
    update_derivative = "update-derivative"
    update_activity = "update-activity"
    input = "input"


def _known_solver(name: str | None) -> str | None:
    if name is not None and name not in SOLVERS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, SOLVERS))}.")
    return name


def _solver_option(field: str, what: str, rules: str = "") -> Any:
    """An option of those solvers that have it, with their default, and of other rules."""
    takers = {
        name: kind.__dataclass_fields__[field] for name, kind in SOLVERS.items() if field in kind.__dataclass_fields__
    }
    default = next(iter(takers.values())).default
    shown = "" if default is None else f" (default: {default})"
    others = f"; --rule {rules}" if rules else ""
    return typer.Option(help=f"{what}; {', '.join(takers)}{others}.{shown}")


def train(
    dataset: DatasetOption = "digits",
    model: ModelOption = "mlp",
    rule: Annotated[
        Rule,
        typer.Option(
            help="ar: Activation Relaxation; backprop: the same loop without it; "
            + "; ".join(f"{name}: {other.title}" for name, other in OTHERS.items())
            + "."
        ),
    ] = "ar",
    solver: Annotated[
        str | None,
        typer.Option(
            metavar=f"[{'|'.join(SOLVERS)}]",
            callback=_known_solver,
            help="How the relaxation phase is integrated. (default: closed-form, or euler where the relaxation's "
            "derivative is unfrozen)",
        ),
    ] = None,
    step_size: Annotated[float | None, _solver_option("step_size", "η in (0, 2)", "pc, ep")] = None,
    num_steps: Annotated[int | None, _solver_option("num_steps", "Relaxation steps", "pc, ep")] = None,
    order: Annotated[Order | None, _solver_option("order", "Order of updates; asynchronous: euler only")] = None,
    tolerance: Annotated[float | None, _solver_option("tolerance", "Stop early at this residual")] = None,
    duration: Annotated[float | None, _solver_option("duration", "Time T")] = None,
    beta: Annotated[float | None, typer.Option(help="β > 0, the nudge of --rule ep. (default: 0.01)")] = None,
    centred: Annotated[
        bool | None, typer.Option("--centred/--one-sided", help="Phases of --rule ep. (default: centred)")
    ] = None,
    std: Annotated[
        float | None, typer.Option(help="Of the feedback of --rule dfa and drtp. (default: 0.05, as the weights)")
    ] = None,
    unfreeze: Annotated[
        list[Quantity] | None,
        typer.Option(help="Take it at the current states, not from the feedforward pass; repeat it for several."),
    ] = None,
    feedback: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[PART=]RULE",
            help=f"Backwards weights: {', '.join(RULES[:-1])}; of a part (convolutional, fully_connected) or of all.",
        ),
    ] = None,
    drop_derivatives: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[PART=]PLACE", help="f' → 1 in relaxation, update or both; in a part of the network or in all."
        ),
    ] = None,
    vertices: Annotated[
        Granularity, typer.Option(help="What relaxes: outputs of activation modules, of all modules, all operations.")
    ] = "activations",
    initial: Annotated[
        InitialState, typer.Option(help="Where the states start: at the feedforward activities, or at zero.")
    ] = "feedforward",
    seed: SeedOption = 0,
    epochs: EpochsOption = 30,
    batch_size: Annotated[int, typer.Option(help="Samples in a minibatch.")] = 64,
    loss: Annotated[Loss, typer.Option(help="Summed over minibatch and outputs; a text needs cross-entropy.")] = (
        "squared-error"
    ),
    optimizer: Annotated[OptimizerName, typer.Option(help="Of the weights.")] = "sgd",
    learning_rate: Annotated[float, typer.Option(help="Of the optimiser, on the summed loss.")] = 0.0005,
    alignment_every: AlignmentOption = 0,
    as_coded: AsCodedOption = False,
    threads: ThreadsOption = 1,
    precision: Annotated[
        Precision, typer.Option(help="bf16: matrix products and convolutions, and the relaxation of what they give.")
    ] = "fp32",
    data_dir: DataDirOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    colour: ColourOption = None,
    runs: RunsOption = Path("runs"),
    device: DeviceOption = "cpu",
    log: LogOption = None,
) -> None:
    """Train one network. The defaults are the paper's settings.

    Under torchrun, all its processes train it together: torchrun --nproc-per-node 2 -m relaxprop train …
    """
    options = {
        "step_size": step_size,
        "num_steps": num_steps,
        "order": order,
        "tolerance": tolerance,
        "duration": duration,
        "beta": beta,
        "centred": centred,
        "std": std,
    }
    config = _run_config(
        {name: value for name, value in options.items() if value is not None},
        dataset=dataset,
        model=model,
        rule=rule,
        solver=solver,
        unfreeze=unfreeze or (),
        feedback=_by_part(feedback, "--feedback"),
        dropped=_by_part(drop_derivatives, "--drop-derivatives"),
        seed=seed,
        epochs=epochs,
        batch_size=batch_size,
        vertices=vertices,
        initial=initial,
        loss=loss,
        optimizer=optimizer,
        learning_rate=learning_rate,
        alignment_every=alignment_every,
        threads=threads,
        precision=precision,
        as_coded=as_coded,
    )
    loaded = load_dataset(dataset, data_dir, runs, image_column=image_column, label_column=label_column, colour=colour)
    config = config.model_copy(update={"data": loaded.digest})

    tools = find_logs(log)

    def show(metrics: EpochMetrics) -> None:
        tell(config.id, metrics)
        console.print(
            f"epoch {metrics.epoch:>3}/{epochs}   test accuracy {100 * metrics.test_accuracy:6.2f} %   "
            f"training loss {metrics.train_loss:8.4f}   {metrics.seconds:6.1f} s",
            highlight=False,
        )

    path = runs / config.id
    on_device = find_device(device)
    with (
        says_what_is_kept(f"the finished epochs are in {path}"),
        joined(on_device) as group,
        logs(tools, {config.id: config}, runs) as tell,
    ):
        metrics = train_network(config, loaded, root=runs, device=on_device, on_epoch=show if group.is_first else None)
    if not group.is_first:
        return
    accuracy = 100 * metrics[-1].test_accuracy
    console.print(f"test accuracy {accuracy:.2f} % after {epochs} epochs; the run is in {path}", soft_wrap=True)


def _run_config(
    solver_options: dict[str, Any], *, solver: str | None, unfreeze: Sequence[Quantity], as_coded: bool, **values: Any
) -> RunConfig:
    given_flags = {
        "--solver": solver,
        "--unfreeze": unfreeze,
        "--feedback": values["feedback"],
        "--drop-derivatives": values["dropped"],
        "--alignment-every": values["alignment_every"],
        "--vertices": values["vertices"] != "activations",
        "--initial": values["initial"] != "feedforward",
    }
    other = OTHERS.get(values["rule"])
    used = {"--feedback", "--drop-derivatives", "--alignment-every", "--vertices"} if other else given_flags.keys()
    if other and not other.transports:
        used -= {"--feedback"}
    for flag, given in given_flags.items():
        if given and (values["rule"] == "backprop" or flag not in used):
            raise typer.BadParameter(f"it has no effect with --rule {values['rule']}, leave it out", param_hint=flag)
    with usage_errors("--unfreeze"):
        frozen = Frozen(**{quantity.name: False for quantity in unfreeze})
    values |= {"solver": solver or default_solver(frozen), "frozen": frozen}
    kind = SOLVERS[values["solver"]]
    known = other.options if other else list(kind.__dataclass_fields__)
    for name in solver_options:
        flag = "--centred/--one-sided" if name == "centred" else f"--{name.replace('_', '-')}"
        if values["rule"] == "backprop" or (name not in known and (other or name in _OF_RULES)):
            raise typer.BadParameter(f"it has no effect with --rule {values['rule']}, leave it out", param_hint=flag)
        if name not in known:
            raise typer.BadParameter(
                f"it has no effect with --solver {values['solver']}, leave it out", param_hint=flag
            )
    try:
        other.complete(solver_options) if other else kind(**solver_options)
    except (TypeError, ValueError) as error:  # its first word is the option's name
        flag = f"--{str(error).split()[0].replace('_', '-')}"
        raise typer.BadParameter(spoken(str(error)), param_hint=flag) from error
    values["rule_options" if other else "solver_options"] = solver_options
    if as_coded:
        coded = as_the_code_has_it(values)
        # Its order of updates is that of the steps, which not every solver takes.
        values = coded if "order" in known else coded | {"solver_options": {} if other else solver_options}
    with usage_errors("--solver or --vertices"):
        return RunConfig(**values)


_OF_RULES = {name for other in OTHERS.values() for name in other.options} - {
    name for kind in SOLVERS.values() for name in kind.__dataclass_fields__
}


def _by_part(options: Sequence[str] | None, flag: str) -> dict[str, str]:
    """``PART=VALUE``, or ``VALUE`` for the whole network."""
    found: dict[str, str] = {}
    for option in options or ():
        part, named, value = option.rpartition("=")
        if named and not part:
            raise typer.BadParameter(f"{option!r} names no part before the '='", param_hint=flag)
        if (part or "all") in found:
            raise typer.BadParameter(f"{option!r} names a part for the second time", param_hint=flag)
        found[part or "all"] = value
    return found
