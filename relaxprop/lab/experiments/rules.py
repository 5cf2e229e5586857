"""Every learning rule and every rule of backwards weights on the same network, each at its own learning rate.

First each of them is trained at learning rates of a small grid, on four fifths of the training images and from several
starts, and the rate is taken at which it classifies the last fifth best. The search begins in the grid's middle, and
goes on until the rates next to the best have been tried. No test image is looked at for that. Then all are trained from
the same starts and on the same minibatches, seed by seed.

May import: public names, lab.bench.measuring, lab.config, lab.data, lab.experiments.conditions, lab.files, lab.models,
lab.records, lab.report.figures, lab.report.plots, lab.report.tables, lab.results, lab.rules, lab.stats, lab.store,
lab.training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from relaxprop import DivergedError, NonFiniteStateError, describe_locality, mirror_weights
from relaxprop.lab import models
from relaxprop.lab.bench.measuring import Step, interleaved, ratio, training_step, warm
from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import Dataset
from relaxprop.lab.experiments.conditions import Condition
from relaxprop.lab.files import OutputError, write_atomically
from relaxprop.lab.models import ModelName
from relaxprop.lab.records import RECORDS
from relaxprop.lab.report import plots
from relaxprop.lab.report.figures import alignment_curves
from relaxprop.lab.report.tables import markdown_table
from relaxprop.lab.results import REFERENCE, Compared, EpochMetrics, FinishedRun, Head, RunLine
from relaxprop.lab.rules import called
from relaxprop.lab.stats import Mean, mean_over_seeds
from relaxprop.lab.store import read_lines, refuse_to_discard, write_lines
from relaxprop.lab.training import expected_transients, limited_threads, measured_by, wrapped_by

TITLE = "the rivals on the same network"
MODELS: tuple[ModelName, ...] = ("mlp", "cnn")
GRID = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)  # learning rates on the summed squared error
FIRST = GRID[4:7]  # that are tried
FIRST_SEARCH_SEED = 1000  # none of the seeds that are compared
SEARCH_SEEDS = 3
HELD_OUT = 5  # one of so many training images
SEARCH = "search.jsonl"
# Of the rules whose activities move. The larger the weights are, the smaller are the steps that are stable: on the CNN,
# and images of 28×28 and more, steps of 0.2 run away in every phase.
STEPS: dict[ModelName, dict[str, Any]] = {
    "mlp": {"step_size": 0.2, "num_steps": 20},
    "cnn": {"step_size": 0.1, "num_steps": 20},
}
MOVING = ("pc", "ep")
EPOCHS, SEEDS = 8, 5
ROUNDS = 15  # of measured training steps


@dataclass(frozen=True)
class Rival(Condition):
    """A condition, and what its rule is told."""

    rule_options: Mapping[str, Any] = field(default_factory=dict)
    versus: str = REFERENCE


RIVALS: dict[str, Rival] = {
    REFERENCE: Rival("Backpropagation", rule="backprop"),
    "ar": Rival("Activation Relaxation"),
    "fixed": Rival("predictive coding, fixed predictions", initial="zero"),
    "pc": Rival("predictive coding, strict", rule="pc"),
    "ep": Rival("equilibrium propagation, centred", rule="ep", rule_options={"beta": 0.1}),
    "FA": Rival("feedback alignment", feedback={"all": "random"}, claim="worse"),
    "ψ": Rival("learned ψ", feedback={"all": "learned"}),
    "mirror": Rival("weight mirror", feedback={"all": "mirror"}),
    "uSF": Rival("signs of W, one magnitude", feedback={"all": "sign"}),
    "frSF": Rival("signs of W, fixed magnitudes", feedback={"all": "fixed-sign"}),
    "brSF": Rival("signs of W, magnitudes drawn anew", feedback={"all": "batch-sign"}),
    "dfa": Rival("direct feedback alignment", rule="dfa", claim="worse"),
    # A target does not shrink with the error: weights as large as those of "dfa" drown what the output layer tells.
    "drtp": Rival("direct random target projection", rule="drtp", rule_options={"std": 0.002}, claim="worse"),
}


def enlargement(model: str, dataset: Dataset) -> int:
    """How often each pixel is repeated, so that the CNN's two convolutions find a place."""
    return 1 if model == "mlp" else math.ceil(14 / min(dataset.image_shape[1:]))


def search_runs(
    model: ModelName,
    dataset: Dataset,
    rates: Mapping[str, Sequence[float]],
    *,
    seeds: int,
    epochs: int,
    threads: int = 1,
) -> list[tuple[str, RunConfig]]:
    """The runs by which learning rates are chosen, with the names of their conditions."""
    held_out = len(dataset.train) // HELD_OUT
    return [
        (name, _run(name, model, dataset, epochs, threads, seed, rate, validation=held_out))
        for name, tried in rates.items()
        for rate in tried
        for seed in range(FIRST_SEARCH_SEED, FIRST_SEARCH_SEED + seeds)
    ]


def first_rates(only: Sequence[str] = ()) -> dict[str, tuple[float, ...]]:
    """By condition, the learning rates that the search begins with.

    Raises:
        ValueError: if a condition is unknown.
    """
    check_names(only)
    return dict.fromkeys([name for name in RIVALS if not only or name in only or name == REFERENCE], FIRST)


def further_rates(tried: Mapping[str, Sequence[float]], best: Mapping[str, float]) -> dict[str, tuple[float, ...]]:
    """By condition, the rates to be tried so that the best has been compared with those next to it in the grid."""
    return {
        name: tuple(
            rate
            for i, rate in enumerate(GRID)
            if rate in rates or best[name] in (GRID[max(i - 1, 0)], GRID[min(i + 1, len(GRID) - 1)])
        )
        for name, rates in tried.items()
    }


def chosen_rates(names: Sequence[str], runs: Sequence[FinishedRun]) -> dict[str, float]:
    """By condition, the learning rate with the highest mean accuracy on the held-out images; of equals, the smallest.

    A run that has diverged may still guess well by chance: a rate at which one has diverged comes after all others,
    whatever the accuracies.
    """
    last: dict[str, dict[float, list[EpochMetrics]]] = {}
    for name, run in zip(names, runs, strict=True):
        last.setdefault(name, {}).setdefault(run.config.learning_rate, []).append(run.metrics[-1])

    def quality(rate: float, ends: Sequence[EpochMetrics]) -> tuple[bool, float, float]:
        converges = all(math.isfinite(end.train_loss) for end in ends)
        return converges, statistics.fmean(end.test_accuracy for end in ends) if converges else 0.0, -rate

    return {name: max(by_rate, key=lambda rate: quality(rate, by_rate[rate])) for name, by_rate in last.items()}


def compared_runs(
    model: ModelName, dataset: Dataset, rates: Mapping[str, float], *, seeds: int, epochs: int, threads: int = 1
) -> list[tuple[str, RunConfig]]:
    """The runs that are compared: per seed the same start and minibatches in all conditions."""
    # Once at the beginning of each epoch.
    once = {name: 0 if name == REFERENCE else len(dataset.train) for name in rates}
    return [
        (name, _run(name, model, dataset, epochs, threads, seed, rate, alignment_every=once[name]))
        for seed in range(seeds)
        for name, rate in rates.items()
    ]


def check_names(only: Sequence[str]) -> None:
    """Refuse conditions that are not known.

    Raises:
        ValueError: if there is one.
    """
    if unknown := [name for name in only if name not in RIVALS]:
        raise ValueError(f"condition must be one of {', '.join(RIVALS)}, got {unknown[0]!r}")


def _run(
    name: str, model: ModelName, dataset: Dataset, epochs: int, threads: int, seed: int, rate: float, **more: Any
) -> RunConfig:
    rival = RIVALS[name]
    return RunConfig(
        dataset=dataset.name,
        data=dataset.digest,
        model=model,
        rule=rival.rule,
        rule_options={**(STEPS[model] if rival.rule in MOVING else {}), **rival.rule_options},
        initial=rival.initial,
        feedback=dict(rival.feedback),
        seed=seed,
        epochs=epochs,
        enlarged=enlargement(model, dataset),
        learning_rate=rate,
        threads=threads,
        **more,
    )


def not_local(config: RunConfig, dataset: Dataset) -> list[str]:
    """The kinds of what is not local in the updates; backpropagation's are those of its states, found in one sweep."""
    if config.rule == "backprop":
        config = RunConfig(**config.model_dump() | {"rule": "ar", "solver": "equilibrium"})
    dataset = dataset.enlarged(config.enlarged)
    network = models.build(config.model, dataset, seed=0, feedback=config.feedback, dropped=config.dropped)
    return sorted(describe_locality(wrapped_by(config, network), dataset.train.images[:2]).non_local)


def costs(configs: Mapping[str, RunConfig], dataset: Dataset) -> dict[str, float]:
    """The time of a training step over backpropagation's, in turn on one minibatch; by the name of the condition."""
    steps = {name: _training_step(config, dataset) for name, config in configs.items()}
    with limited_threads(configs[REFERENCE].threads), expected_transients():
        warm(steps)
        times = interleaved(steps, rounds=ROUNDS)
    return {name: ratio(times, name, REFERENCE) for name in steps}


def check_stable(config: RunConfig, dataset: Dataset) -> None:
    """Refuse a rule whose states run away before anything is learned: it could be compared with nothing.

    Raises:
        ModelError: if they do, on the first minibatch, at the initial weights.
    """
    _, loss = _on_a_minibatch(config, dataset, check_finite=True)
    try:
        with expected_transients():
            loss().backward()  # type: ignore[no-untyped-call]
    except (DivergedError, NonFiniteStateError) as error:
        options = ", ".join(f"{name}={value}" for name, value in config.rule_options.items())
        raise models.ModelError(
            f"rule {config.rule} ({options}) cannot be compared on {dataset.name}: at the initial weights of the "
            f"{config.model.upper()}, {error}"
        ) from error


def _training_step(config: RunConfig, dataset: Dataset) -> Step:
    # As in a grid, where states that run away are a bad result, and no error.
    return training_step(*_on_a_minibatch(config, dataset, check_finite=False))


def _on_a_minibatch(
    config: RunConfig, dataset: Dataset, *, check_finite: bool
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A network, and what computes its loss on the first minibatch."""
    dataset = dataset.enlarged(config.enlarged)
    network = models.build(config.model, dataset, seed=0, feedback=config.feedback, dropped=config.dropped)
    trained: Any = network if config.rule == "backprop" else wrapped_by(config, network, check_finite=check_finite)
    images, labels = dataset.train.images[: config.batch_size], dataset.train.labels[: config.batch_size]
    targets = functional.one_hot(labels, len(dataset.classes)).to(images.dtype)
    more, loss_of = called(config.rule, measured_by(config), targets, labels)

    def loss() -> Tensor:
        if "mirror" in config.feedback.values():
            mirror_weights(trained)
        return loss_of(trained(images, **more))

    return network, loss


class Row(NamedTuple):
    """One rule's results."""

    name: str
    title: str
    accuracy: Mean
    difference: Mean | None
    alignment: Mean | None  # cosine to backpropagation's gradient at the last epoch's start, mean over weight matrices
    first: Mean | None  # of these, that of the layer next to the input
    not_local: Sequence[str]
    rate: float
    cost: float


class Rivals(NamedTuple):
    """What a file of records tells."""

    about: str
    rows: list[Row]
    notes: list[str]


def keep(
    found: tuple[Sequence[str], Sequence[FinishedRun]],
    searched: tuple[Sequence[str], Sequence[FinishedRun]],
    dataset: Dataset,
    folder: Path,
    command: str,
) -> None:
    """Keeps the runs that were compared, and those by which their learning rates were chosen."""
    measured = costs({name: run.config for name, run in zip(*found, strict=True)}, dataset)
    for (names, runs), path in ((found, folder / RECORDS), (searched, folder / SEARCH)):
        configs = {name: run.config for name, run in zip(names, runs, strict=True)}
        head = Head(
            command=command,
            runs=len(runs),
            experiment=TITLE,
            dataset=dataset.title,
            chance=dataset.chance,
            conditions={n: Compared(RIVALS[n].title, RIVALS[n].claim, REFERENCE) for n in configs},
            not_local={name: not_local(config, dataset) for name, config in configs.items()},
            costs=measured,
        )
        write_lines(path, head, [RunLine.of(run, name) for run, name in zip(runs, names, strict=True)])


def is_of_rivals(folder: Path) -> bool:
    """Whether a folder's records are of this experiment."""
    return (folder / SEARCH).exists()


def networks_in(folder: Path) -> list[Path]:
    """The folders within, by network, that hold this experiment's records."""
    return [folder / model for model in MODELS if is_of_rivals(folder / model)]


def read_rivals(folder: Path) -> Rivals:
    """The table's rows, from the kept records alone.

    Raises:
        OutputError: the records cannot be read, are of another experiment, or cannot be paired.
    """
    head, conditions, runs = read_lines(folder / RECORDS)
    searched = sorted({run.config.seed for run in read_lines(folder / SEARCH).runs})
    if head.experiment != TITLE or head.not_local is None or head.costs is None:
        raise OutputError(f"{folder / RECORDS} is of another experiment: {head.experiment}")
    by_name: dict[str, dict[int, FinishedRun]] = {}
    for name, run in zip(conditions, runs, strict=True):
        by_name.setdefault(str(name), {})[run.config.seed] = run
    reference = by_name.get(REFERENCE, {})
    for name, own in by_name.items():
        if own.keys() != reference.keys():
            raise OutputError(f"{folder / RECORDS}: {name} and {REFERENCE} have not the same seeds")
    rows = [
        _row(name, head.conditions[name].title, own, reference, head.not_local[name], head.costs[name])
        for name, own in by_name.items()
    ]
    config = runs[0].config
    n, epochs = len(reference), config.epochs
    about = f"{head.dataset}, {config.model.upper()}, {epochs} epoch{'s' * (epochs > 1)}, n = {n} seed{'s' * (n > 1)}"
    edges = [row.name for row in rows if row.rate in (min(GRID), max(GRID))]
    notes = [
        f"learning rate: of {', '.join(f'{rate:g}' for rate in GRID)}, the one with the highest "
        f"{'mean ' * (len(searched) > 1)}accuracy on a fifth of the training images that was held out in runs of "
        f"their own (seed{'s' * (len(searched) > 1)} {', '.join(map(str, searched))}), none of which has diverged; "
        "searched for from the middle on, until the rates next to it were tried"
        + (f"; at the grid's edge: {', '.join(edges)}" if edges else ""),
        "difference: of the final test accuracy to backpropagation's, seed by seed, with its 95 % interval",
        "alignment: cosine to backpropagation's gradient on the first minibatch of the last epoch, mean over the "
        "weight matrices, and that of the matrix next to the input",
        f"cost: time of a training step over backpropagation's, measured in turn on {config.threads} thread"
        f"{'s' * (config.threads > 1)}, median of {ROUNDS} rounds",
        f"chance: {100 * (head.chance or 0):.2f} %",
    ]
    if config.enlarged > 1:
        notes.append(f"every pixel is repeated {config.enlarged} times in height and in width, as the CNN needs 14×14")
    return Rivals(about, rows, notes)


def _row(
    name: str,
    title: str,
    own: Mapping[int, FinishedRun],
    reference: Mapping[int, FinishedRun],
    kinds: Sequence[str],
    cost: float,
) -> Row:
    final = {seed: run.metrics[-1].test_accuracy for seed, run in own.items()}
    exact = {seed: run.metrics[-1].test_accuracy for seed, run in reference.items()}
    measured = alignment_curves([name] * len(own), list(own.values())).get(name)
    weights = [] if measured is None else [c for n, c in measured.gradients.items() if n.endswith("weight")]
    by_seed = [
        [cosine for n, cosine in run.metrics[-1].alignment[-1].gradients.items() if n.endswith("weight")]
        for run in own.values()
        if run.metrics[-1].alignment
    ]
    return Row(
        name=name,
        title=title,
        accuracy=mean_over_seeds(list(final.values())),
        difference=None if name == REFERENCE else mean_over_seeds([final[s] - exact[s] for s in exact]),
        alignment=mean_over_seeds([statistics.fmean(cosines) for cosines in by_seed]) if by_seed else None,
        first=weights[0].cosines[-1] if weights else None,
        not_local=kinds,
        rate=next(iter(own.values())).config.learning_rate,
        cost=cost,
    )


COLUMNS = (
    "rule", "test accuracy (%)", "difference (points)", "95 % interval", "alignment", "first layer", "not local",
    "learning rate", "cost",
)  # fmt: skip


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table under ``COLUMNS``."""
    return [
        (
            row.title,
            str(row.accuracy),
            str(row.difference or ""),
            row.difference.limits if row.difference is not None else "",
            "" if row.alignment is None else f"{row.alignment.mean:.2f}",
            "" if row.first is None else f"{row.first.mean:.2f}",
            ", ".join(row.not_local),
            f"{row.rate:g}",
            f"{row.cost:.1f}×",
        )
        for row in rows
    ]


def write_together(folder: Path) -> Path:
    """Makes one table of the networks whose results are in the folder, from their records; gives the file.

    The cost is that on the last of them.
    """
    networks = [read_rivals(network) for network in networks_in(folder)]
    by_name = [{row.name: row for row in network.rows} for network in networks]
    every = {name: row for rows in by_name for name, row in rows.items()}
    columns = ("rule", *(network.about.split(", ")[1] for network in networks), "not local", "cost")
    cells = [
        (
            row.title,
            *(_with_interval(rows[row.name]) if row.name in rows else "" for rows in by_name),
            ", ".join(row.not_local),
            f"{row.cost:.1f}×" if name in by_name[-1] else "",
        )
        for name, row in every.items()
    ]
    write_atomically(folder / "table.md", markdown_table(columns, cells))
    return folder / "table.md"


def _with_interval(row: Row) -> str:
    """The difference in points, and its interval; for what others are compared with, its accuracy."""
    if row.difference is None:
        return f"{row.accuracy} %"
    limits = row.difference.limits
    return f"{100 * row.difference.mean:.2f}" + (f" ({limits})" if limits else "")


def write_rivals(folder: Path) -> tuple[Rivals, list[Path]]:
    """Makes the table and the figure from the records; gives what they show, and the files."""
    rivals = read_rivals(folder)
    listed = "".join(f"* {note}\n" for note in rivals.notes)
    write_atomically(folder / "table.md", f"{markdown_table(COLUMNS, cells(rivals.rows))}\n{rivals.about}\n\n{listed}")
    points = {row.title: (row.cost, row.accuracy) for row in rivals.rows}
    drawn = plots.accuracy_by_cost(points, f"{TITLE}\n{rivals.about}", folder / "accuracy-by-cost.png")
    return rivals, [folder / name for name in ("table.md", RECORDS, SEARCH)] + [drawn]


Compute = Callable[[Sequence[str], Sequence[RunConfig]], list[FinishedRun]]


def refuse_to_discard_rivals(folder: Path, only: Sequence[str], seeds: int, epochs: int) -> None:
    """As `store.refuse_to_discard`, of records in a network's folder, whose learning rates are not known yet."""
    names = first_rates(only)
    refuse_to_discard(folder / RECORDS, lambda name, run: epochs if name in names and run.seed < seeds else 0)


def compare_rivals(
    model: ModelName,
    dataset: Dataset,
    compute: Compute,
    *,
    seeds: int,
    search_seeds: int,
    epochs: int,
    only: Sequence[str],
    threads: int,
    folder: Path,
    command: str,
) -> tuple[Rivals, list[Path]]:
    """Both parts of the experiment on one network.

    Args:
        compute: gives the metrics of runs, whose conditions it is told.
    """
    tried, further = dict[str, tuple[float, ...]](), first_rates(only)
    for name in further:
        check_stable(_run(name, model, dataset, epochs, threads, 0, FIRST[0]), dataset)
    while further != tried:
        tried = further
        searched = search_runs(model, dataset, tried, seeds=search_seeds, epochs=epochs, threads=threads)
        search_names = [name for name, _ in searched]
        search = compute(search_names, [config for _, config in searched])
        rates = chosen_rates(search_names, search)
        further = further_rates(tried, rates)
    planned = compared_runs(model, dataset, rates, seeds=seeds, epochs=epochs, threads=threads)
    names = [name for name, _ in planned]
    found = compute(names, [config for _, config in planned])
    keep((names, found), (search_names, search), dataset, folder, command)
    return write_rivals(folder)
