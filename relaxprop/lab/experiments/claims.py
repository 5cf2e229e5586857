"""The page of the paper's claims: each beside the best that is kept on it, and what is still to be computed.

May import: lab.experiments.evidence, lab.experiments.paper, lab.experiments.queue, lab.report.claims,
lab.report.tables, lab.results, lab.stats.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence

from relaxprop.lab.experiments.evidence import CLAIMS, FIGURES, SUPPORTING, Line, Source, judged
from relaxprop.lab.experiments.paper import EXPERIMENTS
from relaxprop.lab.experiments.queue import Queue, State, states
from relaxprop.lab.report.claims import BESIDE, RULES, beside_table
from relaxprop.lab.report.tables import markdown_table
from relaxprop.lab.results import BASELINE, REFERENCE
from relaxprop.lab.stats import LEVEL, Claim

SAID: dict[Claim, str] = {
    "equivalent": "the accuracy stays the same",
    "worse": "the accuracy falls",
    "destroyed": "learning is destroyed",
}
COLUMNS = (
    "the paper's claim", "seeds", "epochs", "difference (points)", "95 % interval", "verdict", "would decide",
    "evidence",
)  # fmt: skip
PAPER: dict[Claim, str] = {"equivalent": "the same", "worse": "worse", "destroyed": "destroyed"}
PAPERS = "the paper's "
QUEUE = ("item", "command", "runs", "there", "missing", "core-hours")


def page(found: Sequence[Source], queue: Queue | None, command: str) -> str:
    """The whole document.

    Args:
        found: what is kept, see `evidence.sources`.
        queue: what is to be computed.
        command: that makes the page.
    """
    lines, supporting = judged(CLAIMS, found), judged(SUPPORTING, found)
    to_come = [] if queue is None else states(queue, found)
    parts = [
        "# The paper's claims",
        first_sentence(lines),
        *_refuted("These do not hold:", lines),
        *_refuted("The claims rest on others, of which these do not hold:", supporting, found),
        f"This page is made by `{command}` from the kept results, and is not written by hand. Its words and symbols:",
        "* f' is the derivative of the activation function. Algorithm 1 takes f' and the presynaptic activity from the "
        "feedforward pass. *f'(W x)* and *presynaptic x* are taken at the states x instead.\n"
        "* *ψ* are backwards weights of their own, in the place of the weights' transpose. *No f'* means that the "
        "number 1 stands in the place of f'.\n"
        "* The *difference* is that of the test accuracy after the last epoch, seed by seed, to Activation Relaxation "
        "by Algorithm 1. In the rows of Activation Relaxation itself it is the difference to backpropagation.",
    ]
    parts += ["## At a glance", "The difference in points with its 95 % interval, and the verdict.",
              _short_table([*lines, *supporting])]  # fmt: skip
    for figure, dataset in FIGURES:
        own = [line for line in lines if line.claim[:2] == (figure, dataset)]
        parts += [
            f"## {_title(own[0])}",
            _data(own),
            markdown_table(COLUMNS, [_cells(x) for x in own]),
            _commands(own, to_come),
        ]
    parts += [
        "## What these claims rest on",
        "The other claims compare with Activation Relaxation by Algorithm 1, so it has to reach backpropagation's "
        "accuracy. Fixed random feedback has to be worse, so that the comparison can tell rules apart.",
        markdown_table(COLUMNS, [_cells(x, with_place=True) for x in supporting]),
        _commands(supporting, to_come),
    ]
    for source in found:
        if beside := beside_table(source.figure.rows):
            title, _, version = source.figure.experiment.removeprefix(PAPERS).partition(", ")
            about = f"`{source.place}`, {source.figure.about}, `{shown(source.command)}`"
            parts += [
                f"## {title}, {NAMES.get(source.dataset, source.dataset)}: {version}",
                about,
                markdown_table(BESIDE, beside),
            ]
            parts += [
                f"To backpropagation in the same version, the difference of *{row.condition.title}* is "
                f"{row.difference} points ({row.difference.limits}). The verdict on their equality: "
                f"{row.judgement.verdict}."
                for row in source.figure.rows
                if row.condition.beside == BASELINE and row.difference is not None
            ]
    if queue is not None:
        parts += _queue(queue, to_come)
    parts += ["## How the verdicts are made", "".join(f"* {note}\n" for note in _notes(lines, supporting))]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def short_table(found: Sequence[Source]) -> str:
    """The differences with their intervals and the verdicts alone: a row for a condition, a column for a data set."""
    return _short_table([*judged(CLAIMS, found), *judged(SUPPORTING, found)])


def _short_table(lines: Sequence[Line]) -> str:
    tables = []
    for together in (FIGURES[:2], FIGURES[2:]):
        own = [line for line in lines if line.claim[:2] in together]
        rows = []
        figure, dataset = together[0]
        for name in (name for name in EXPERIMENTS[figure].of(dataset) if name != REFERENCE):
            by_data = {line.claim.dataset: line for line in own if line.claim.name == name}
            (usual, _), *others = Counter(line.claim.condition.claim for line in by_data.values()).most_common()
            exceptions = [
                f"{NAMES[dataset]}: {PAPER[line.claim.condition.claim]}"
                for dataset, line in by_data.items()
                if others and line.claim.condition.claim != usual
            ]
            title = next(iter(by_data.values())).claim.condition.title
            label = title if name == BASELINE else f"{name}: {title}"
            said = "; ".join([PAPER[usual], *exceptions])
            rows.append((label, said, *(_short(by_data[dataset]) for _, dataset in together)))
        tables.append(markdown_table(("with", "the paper", *(NAMES[dataset] for _, dataset in together)), rows))
    return "\n".join(tables)


def _short(line: Line) -> str:
    if line.found is None:
        return "no runs"
    difference = line.found.difference
    interval = f" ({difference.limits})" if difference.limits else ""
    said = line.judgement.verdict.partition(":")[0].replace("does not hold", "**does not hold**")
    after = ", after Holm open" if line.judgement.is_open_after_holm else ""
    return f"{100 * difference.mean:.2f}{interval}, n = {difference.n}: {said}{after}"


def first_sentence(lines: Sequence[Line]) -> str:
    """How many do not hold, hold, and are open."""
    refuted = sum(line.judgement.verdict.startswith("does not hold") for line in lines)
    holds = sum(line.judgement.verdict == "holds" for line in lines)
    still = len(lines) - holds - refuted
    not_ = f"{refuted} {'does' if refuted == 1 else 'do'} not hold here"
    do = f"{holds} {'holds' if holds == 1 else 'hold'}"
    open_ = f"{still} {'is' if still == 1 else 'are'} open"
    said = f"**Of the paper's {len(lines)} claims {not_}, {do}, and {open_}.**"
    if after := sum(line.judgement.is_open_after_holm for line in lines):
        said += (
            f" Corrected for their number, {after} of those that are decided {'is' if after == 1 else 'are'} open too."
        )
    return said


def _refuted(title: str, lines: Sequence[Line], found: Sequence[Source] = ()) -> list[str]:
    """What does not hold, with the difference and whether Holm's correction leaves it open; nothing if all may hold.

    Args:
        found: where it is told what becomes of Activation Relaxation from zero.
    """
    texts = []
    for line in lines:
        if line.judgement.verdict.startswith("does not hold"):
            assert line.found is not None
            points = f"The difference is {100 * line.found.difference.mean:+.1f} points"
            after = ", and after Holm's correction the claim is open" if line.judgement.is_open_after_holm else ""
            texts.append(f"* {_title(line)}, {in_words(line)}. {points}{after}.{_from_zero(line, found)}")
    return [title, "\n".join(texts)] if texts else []


def _from_zero(line: Line, found: Sequence[Source]) -> str:
    """What the relaxation from zero says of the same; nothing where there is none."""
    for source in found:
        if (source.plan.figure, source.dataset, source.plan.initial) == (*line.claim[:2], "zero"):
            for row in source.figure.rows:
                if row.condition.beside == line.claim.name and row.difference is not None:
                    points = f"{100 * row.difference.mean:+.2f} points ({row.difference.limits})"
                    said = row.judgement.verdict.partition(":")[0].replace("open", "is open")
                    return f" Where the relaxation starts at zero, it is {points}, and the claim {said}."
    return ""


def in_words(line: Line) -> str:
    """The claim, in words."""
    condition, name = line.claim.condition, line.claim.name
    if name == BASELINE:
        return "Activation Relaxation reaches backpropagation's accuracy"
    return f"{name}: with {condition.title}, {SAID[condition.claim]}"


def shown(command: str) -> str:
    """A command as one types it: quoted only where it has to be, and in double quotes where a word has single ones."""

    def typed(word: str) -> str:
        if re.fullmatch(r"[\w@%+=:,./-]+", word):
            return word
        return f'"{word}"' if re.fullmatch(r"[\w' @%+=:,./-]+", word) else shlex.quote(word)

    return " ".join(map(typed, shlex.split(command)))


def _title(line: Line) -> str:
    figure, dataset, _ = line.claim
    return f"{EXPERIMENTS[figure].title.removeprefix(PAPERS)}, {NAMES[dataset]}"


NAMES = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "svhn": "SVHN",
    "cifar100": "CIFAR-100",
}


def _data(lines: Sequence[Line]) -> str:
    """How much of the data set its results are of."""
    titles = {line.source.title for line in lines if line.source is not None}
    if not titles:
        return "There are no runs yet."
    sizes = {title.partition(" (subset: ")[2].rstrip(")") for title in titles}
    return " ".join(
        f"On a part of the data set: {size} (training / test)." if size else "On the complete data set."
        for size in sorted(sizes)
    )


def _difference(line: Line) -> tuple[str, str]:
    if line.found is None:
        return "", ""
    return str(line.found.difference), line.found.difference.limits


def _verdict(line: Line) -> str:
    said = line.judgement.verdict.replace("does not hold", "**does not hold**")
    return f"{said} (after Holm's correction open)" if line.judgement.is_open_after_holm else said


def _commands(lines: Sequence[Line], to_come: Sequence[State]) -> str:
    """By which command each piece of evidence was made, or would be."""
    said = []
    for line in lines:
        if line.source is None or line.found is None:
            command = next((s.command for s in to_come if _computes(s, line)), None) or _command(line)
            said.append(f"* to be computed by `{shown(command)}`")
        else:
            said.append(f"* `{line.source.place}` is made by `{shown(line.source.command)}`{_on_gpus(line.source)}")
    return "\n".join(dict.fromkeys(said))


def _on_gpus(source: Source) -> str:
    """How many of the runs a GPU has computed, where its command does not say so."""
    runs = source.figure.runs
    on_gpu = sum(run.environment.get("gpu") is not None for run in runs)
    if not on_gpu or "--device" in source.command:
        return ""
    return f" ({on_gpu} of its {len(runs)} runs with `--batched-seeds --device cuda`)"


def _cells(line: Line, *, with_place: bool = False) -> tuple[str, ...]:
    source, on = line.source, line.found
    claim = f"{_title(line)}: {in_words(line)}" if with_place else in_words(line)
    if source is None or on is None:
        return (claim, "0", "", "", "", line.judgement.verdict, "", "none")
    would = ""
    if line.judgement.verdict.startswith("open") and line.judgement.holm is not None:
        would = f"{line.judgement.would} seeds"
    kind = "records" if source.planned is None else f"unfinished, {source.runs} of {source.planned} runs"
    return (
        claim,
        str(on.difference.n),
        str(source.epochs),
        *_difference(line),
        _verdict(line),
        would,
        f"{kind}: `{source.place}`",
    )


def _computes(state: State, line: Line) -> bool:
    plan = state.plan
    is_here = plan.figure == line.claim.figure and line.claim.dataset in plan.datasets
    return is_here and (not plan.only or line.claim.name in plan.only)


def _command(line: Line) -> str:
    return f"relaxprop reproduce {line.claim.figure} --dataset {line.claim.dataset}"


def _queue(queue: Queue, to_come: Sequence[State]) -> list[str]:
    rows, previous = [], 0
    for state in to_come:
        item = f"{state.item}. {queue.items[state.item - 1].what}" if state.item != previous else ""
        previous = state.item
        unknown = f" and {state.unknown} runs of unknown cost" if state.unknown else ""
        missing = state.runs - state.there
        hours = f"{state.hours:.1f}{unknown}" if missing else ""
        rows.append(
            (
                item,
                f"`{shown(state.command)}`",
                str(state.runs),
                str(state.there),
                str(missing) if missing else "complete",
                hours,
            )
        )
    runs, there = sum(s.runs for s in to_come), sum(s.there for s in to_come)
    rows.append(("all", "", str(runs), str(there), str(runs - there), f"{sum(s.hours for s in to_come):.1f}"))
    return [
        "## What is still to be computed",
        f"{there} of {runs} runs of the queue are there, counted from the kept records. The core-hours are an "
        "**estimate**, of one thread: the median time that an epoch took in kept runs of the same network, data set "
        "and condition, which went beside other work, times the epochs that are missing. For another version of a "
        "condition it is that of the condition as written. A run that an earlier command computes costs nothing again, "
        "and a run that goes on from the weights of a shorter one costs less.",
        markdown_table(QUEUE, rows),
    ]


def _notes(lines: Sequence[Line], supporting: Sequence[Line]) -> list[str]:
    tested, others = (sum(line.judgement.holm is not None for line in group) for group in (lines, supporting))
    return [
        "each claim stands beside the evidence of most seeds, then of most epochs; *records* are runs of which every "
        "epoch is kept, *unfinished* is a part of a command's runs, over the seeds that are finished in both "
        "conditions",
        RULES[0],
        RULES[1].replace("… would:", "would decide:"),
        f"Holm's correction is over all {tested} claims of this page that can be tested, and over the {others} that "
        f"they rest on: the verdict stays where the corrected p is below {LEVEL:.3g}. A figure's own table corrects "
        "for its own claims alone",
    ]
