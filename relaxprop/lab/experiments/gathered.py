"""Kept records, found on disk and put together as the figures that they belong to.

Runs that differ only in what a condition changes stand side by side: they make one figure. Where they are those of an
experiment of the paper, its conditions lend them their titles and claims.

May import: lab.config, lab.data, lab.experiments.conditions, lab.experiments.paper, lab.files, lab.report.claims,
lab.report.figures, lab.report.findings, lab.results, lab.rules, lab.stats, lab.store.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import title_of
from relaxprop.lab.experiments.conditions import BASELINES, Condition, condition_runs
from relaxprop.lab.experiments.paper import EXPERIMENTS
from relaxprop.lab.files import OutputError
from relaxprop.lab.report.claims import difference_of, final, paired
from relaxprop.lab.report.figures import alignment_curves
from relaxprop.lab.report.findings import (
    ConditionResults,
    ConvergenceResults,
    FigureResults,
    LayerConvergence,
    Report,
    RunRecord,
)
from relaxprop.lab.results import BASELINE, REFERENCE, AlignmentCurves, FinishedRun, Head
from relaxprop.lab.rules import OTHERS
from relaxprop.lab.stats import Comparison, Mean, judge
from relaxprop.lab.store import read_lines, read_run

RECORDS, CONVERGENCE = "runs.jsonl", "convergence.json"
RUN = ("config.json", "metrics.jsonl")  # either of them makes a folder a run's
TAKES = f"name a run's folder, a folder of runs, or a results folder with {RECORDS} or {CONVERGENCE}"


class KnownData(NamedTuple):
    """What a report has to know of the data.

    Attributes:
        title: the name, with the sizes where this is a part of the published data.
        chance: the accuracy of guessing the most frequent class of the test data.
    """

    title: str
    chance: float


def _known(name: str, train: int, test: int, most_frequent: int) -> KnownData:
    return KnownData(title_of(name, (train, test)), most_frequent / test)


# By digest, those of the kept results: for run directories, and for files of records that do not say it.
KNOWN = {
    "b7291dfff7": _known("digits", 1437, 360, 37),
    "a63d816db5": _known("mnist", 60_000, 10_000, 1135),
    "6c0eefea18": _known("fashion_mnist", 60_000, 10_000, 1000),
    "e6b01d8bd6": _known("cifar10", 20_000, 5000, 500),
    "97e2d90d93": _known("cifar100", 20_000, 5000, 50),
    "6447a57ab3": _known("svhn", 5000, 2136, 406),
}
# What a condition changes; the other fields of a description are the same in all runs of a figure.
CHANGED = ("rule", "solver", "solver_options", "rule_options", "vertices", "initial", "frozen", "feedback", "dropped")
NOT_COMPARED = ("seed", "alignment_every")


def gather(paths: Sequence[Path]) -> Report:
    """Everything that is kept in some places.

    Args:
        paths: run directories, folders of them, files of records, and results folders; what is found twice counts once.

    Raises:
        OutputError: a path does not exist or holds nothing of this kind, or a record is damaged.
    """
    files = list(dict.fromkeys(file for path in paths for file in _files(path)))
    records: dict[tuple[str, int], RunRecord] = {}
    known, commands, curves = dict(KNOWN), [], []
    for file in files:
        if file.name == CONVERGENCE:
            curve = _read_convergence(file)
            curves.append(curve)
            commands.append((curve.command, file))
            continue
        head, found = _read_records(file)
        if head is not None:
            commands.append((head.command, file))
        for record in found:
            if head is not None and head.dataset is not None and head.chance is not None:
                known[record.config.data or ""] = KnownData(head.dataset, head.chance)
            key = record.config.id, record.config.epochs
            records[key] = _both(records[key], record) if key in records else record
    return Report(tuple(_figures(records.values(), known)), tuple(curves), tuple(commands))


def _files(path: Path) -> Iterator[Path]:
    """The files below a path that stand for records: of a run directory, its configuration."""
    if not path.exists():
        raise OutputError(f"{path} does not exist: {TAKES}")
    if path.is_file():
        if path.name in RUN:
            yield path.parent / RUN[0]
        elif path.name == CONVERGENCE or path.suffix == ".jsonl":
            yield path
        else:
            raise OutputError(f"{path} is no file of records: {TAKES}")
        return
    names = {*RUN, RECORDS, CONVERGENCE}
    found = sorted(file for file in path.rglob("*.json*") if file.name in names)
    if not found:
        raise OutputError(f"there are no records in {path}: {TAKES}")
    yield from dict.fromkeys(file.parent / RUN[0] if file.name in RUN else file for file in found)


def _read_records(file: Path) -> tuple[Head | None, list[RunRecord]]:
    """The runs that a file stands for, and what its first line says of them, where it has one."""
    if file.name != RUN[0]:
        head, _, runs = read_lines(file)
        return head, [
            RunRecord(config, dict(environment), tuple(metrics), ((file, number),))
            for number, (config, metrics, environment) in enumerate(runs, 2)
        ]
    folder = file.parent
    try:
        kept = read_run(folder)
    except OSError as error:
        raise OutputError(f"cannot read the run in {folder}: {error.strerror or error}") from error
    if not isinstance(kept.environment, dict):
        raise OutputError(f"the run in {folder} is damaged (environment.json does not say where it was computed)")
    if [m.epoch for m in kept.metrics] != list(range(1, len(kept.metrics) + 1)):
        raise OutputError(f"the run in {folder} is damaged (metrics.jsonl does not have its epochs in order)")
    names = ("metrics.jsonl", "config.json", "environment.json", "locality.json", "certificate.json")
    files = tuple((folder / name, None) for name in names if (folder / name).exists())
    return None, [RunRecord(kept.config, kept.environment, tuple(kept.metrics), files, kept.locality, kept.certificate)]


def _both(first: RunRecord, second: RunRecord) -> RunRecord:
    """A run that is kept in two places."""
    if not (first.is_finished and second.is_finished):
        return max(first, second, key=lambda record: len(record.metrics))
    if [m.test_accuracy for m in first.metrics] != [m.test_accuracy for m in second.metrics]:
        raise OutputError(
            f"{first.config.id} is in {first.files[0][0]} and in {second.files[0][0]} with different results: name "
            "only one of them"
        )
    return replace(
        first,
        files=first.files + second.files,
        locality=first.locality or second.locality,
        certificate=first.certificate or second.certificate,
    )


def _figures(records: Iterable[RunRecord], known: Mapping[str, KnownData]) -> list[FigureResults]:
    """The runs by what they share."""
    together: dict[str, list[RunRecord]] = {}
    for record in records:
        together.setdefault(_shared(record.config), []).append(record)
    figures = [_figure(own, known) for own in together.values()]
    titles = [experiment.title for experiment in EXPERIMENTS.values()]

    def place(figure: FigureResults) -> int:
        return next((i for i, title in enumerate(titles) if title in (figure.experiment or "")), len(titles))

    return sorted(figures, key=lambda figure: (place(figure), figure.title))


def _shared(config: RunConfig) -> str:
    return config.model_dump_json(exclude={*CHANGED, *NOT_COMPARED})


def _changed(config: RunConfig) -> str:
    return config.model_dump_json(include=set(CHANGED))


def _figure(records: Sequence[RunRecord], known: Mapping[str, KnownData]) -> FigureResults:
    """The runs of one figure, none twice."""
    config = records[0].config
    experiment, conditions = _conditions(config, {_changed(record.config) for record in records})
    titles = {changed: _described(next(r.config for r in records if _changed(r.config) == changed))
              for changed in sorted({_changed(r.config) for r in records})}  # fmt: skip
    titles = {changed: _label(*found) for changed, found in conditions.items() if changed in titles} | {
        changed: title for changed, title in titles.items() if changed not in conditions
    }
    by_condition = {changed: [r for r in records if _changed(r.config) == changed] for changed in titles}
    counted = {changed: _by_seed(own) for changed, own in by_condition.items()}
    names = {name: changed for changed, (name, _) in conditions.items()}
    data = known.get(config.data or "")
    results = []
    for changed, own in counted.items():
        if not own:
            continue
        name, condition = conditions.get(changed, ("", None))
        versus = names.get(condition.versus if condition else BASELINE, "")
        others = counted.get(versus, []) if name != REFERENCE else []
        difference, verdict_ = _compared(condition, own, others, data.chance if data else None)
        results.append(
            ConditionResults(
                label=titles[changed],
                runs=tuple(own),
                is_reference=own[0].config.rule == "backprop",
                versus=titles[versus] if difference else None,
                claim=condition.claim if condition and difference else None,
                difference=difference,
                verdict=verdict_,
                alignment=_alignment(own),
            )
        )
    epochs = f"{config.epochs} epoch{'s' if config.epochs > 1 else ''}"
    return FigureResults(
        experiment=experiment,
        title=f"{experiment or 'Runs'}: {data.title if data else config.dataset}, {config.model.upper()}, {epochs}",
        settings=json.loads(_shared(config)),
        conditions=tuple(results),
        records=tuple(
            (titles[changed], record, record in counted[changed])
            for changed, own in by_condition.items()
            for record in sorted(own, key=lambda r: r.config.seed)
        ),
    )


def _conditions(config: RunConfig, found: set[str]) -> tuple[str | None, dict[str, tuple[str, Condition]]]:
    """The experiment that runs like this belong to, and its conditions by what they change; none: all unknown.

    Of several experiments with the same protocol it is the one on these data, then the one with most of the conditions.
    """
    best: tuple[tuple[bool, int], str | None, dict[str, tuple[str, Condition]]] = ((False, 0), None, {})
    for experiment in sorted(EXPERIMENTS.values(), key=lambda e: "digits" in e.conditions):  # the demo has Figure 1's
        if experiment.settings and config.dataset not in experiment.settings:
            continue
        for as_coded in (False, True):
            planned = condition_runs(
                experiment, config.dataset, seeds=1, epochs=config.epochs, data=config.data, as_coded=as_coded
            )
            if _shared(planned[0][1]) != _shared(config):
                continue
            here = config.dataset in experiment.conditions
            conditions = {_changed(run): (name, experiment.of(config.dataset)[name]) for name, run in planned}
            title = experiment.title if here else f"as in {experiment.title}"
            score = here, len(found & conditions.keys())
            if score > best[0]:
                best = score, f"{title}, as coded" if as_coded else title, conditions
    return best[1:]


def _label(name: str, condition: Condition) -> str:
    return condition.title if name in BASELINES else f"{name}: {condition.title}"


def _described(config: RunConfig) -> str:
    """A condition that is none of the paper's, by what it changes."""
    if config.rule == "backprop":
        return BASELINES[REFERENCE].title
    default = RunConfig()
    if config.rule in OTHERS:
        told = [f"{name} {value:g}" for name, value in config.rule_options.items() if isinstance(value, float)]
        return ", ".join([OTHERS[config.rule].title.capitalize(), *told])
    parts = [BASELINES[BASELINE].title]
    if (config.solver, config.solver_options) != (default.solver, default.solver_options):
        parts.append(str(config.build_solver()))
    unfrozen = [name for name, is_frozen in vars(config.frozen).items() if not is_frozen]
    if unfrozen:
        parts.append(f"unfrozen {', '.join(unfrozen)}")
    parts += [f"{rule} feedback in {part}" for part, rule in config.feedback.items()]
    parts += [f"no f' in {part} ({places})" for part, places in config.dropped.items()]
    parts += [f"{name} {getattr(config, name)}" for name in ("vertices", "initial")
              if getattr(config, name) != getattr(default, name)]  # fmt: skip
    return ", ".join(parts)


def _by_seed(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Those that count: finished, and one for every seed; of several the one with most measurements of alignment."""
    best: dict[int, RunRecord] = {}
    for record in records:
        seed = record.config.seed
        if record.is_finished and (seed not in best or record.num_samples > best[seed].num_samples):
            best[seed] = record
    return [best[seed] for seed in sorted(best)]


def _compared(
    condition: Condition | None, own: Sequence[RunRecord], others: Sequence[RunRecord], chance: float | None
) -> tuple[Mean | None, str]:
    """The difference of final accuracies over the seeds that both have, and the verdict on the paper's claim."""
    pairs = paired(*({record.config.seed: record for record in side} for side in (own, others)))
    if not pairs:
        return None, ""
    difference = difference_of(pairs)
    if condition is None:
        return difference, ""
    if chance is None:
        return difference, "open: the accuracy of guessing is not known for these data"
    level = statistics.fmean(final(other) for _, other in pairs)
    return difference, str(judge(Comparison(condition.claim, difference, level, chance)))


def _alignment(records: Sequence[RunRecord]) -> AlignmentCurves | None:
    """Over those seeds in which it was measured equally often."""
    most = max(record.num_samples for record in records)
    measured = [
        FinishedRun(record.config, list(record.metrics), record.environment)
        for record in records
        if most and record.num_samples == most
    ]
    return alignment_curves([""] * len(measured), measured).get("")


def _read_convergence(file: Path) -> ConvergenceResults:
    """Curves of the relaxation phase: what is measured and predicted, by step size and parameter."""
    table = file.with_name("convergence.csv")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        command, environment = str(about["command"]), dict(about["environment"])
        title = str(about.get("title", file.parent.resolve().name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{file} is damaged ({type(error).__name__}: {error})") from error
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    try:
        rows = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot read {table}: {error}") from error
    try:
        for row in rows:
            solver = f"step size {float(row['step_size']):g}, {row['order']}"
            measured, predicted = curves.setdefault(solver, {}).setdefault(str(row["parameter"]), ([], []))
            if int(row["steps"]) != len(measured):
                raise ValueError(f"step {len(measured)} is missing")
            measured.append(float(row["measured"]))
            predicted.append(float(row["predicted"]))
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{table}, line {rows.line_num} is damaged ({type(error).__name__}: {error})") from error
    if not curves:
        raise OutputError(f"{table} holds no curves")
    layers = {
        solver: tuple(LayerConvergence(name, tuple(m), tuple(p)) for name, (m, p) in by_name.items())
        for solver, by_name in curves.items()
    }
    return ConvergenceResults(title, command, environment, layers, (file, table))
