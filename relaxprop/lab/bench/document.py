"""The benchmark's document, and the tables and figures that are made of it alone.

May import: lab.bench.measuring, lab.bench.problems, lab.bench.records, lab.bench.scaling, lab.files, lab.report.plots,
lab.report.tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from relaxprop.lab.bench.measuring import BASELINE
from relaxprop.lab.bench.problems import RESNET
from relaxprop.lab.bench.records import Benchmark, Scaling, Start, Suite
from relaxprop.lab.bench.scaling import QUANTITIES, REASONS, amount
from relaxprop.lab.files import OutputError, write_atomically
from relaxprop.lab.report import plots
from relaxprop.lab.report.tables import NamedTable, markdown_table

FILE = "bench.json"
NOTES = {
    "time": "median over the rounds of the ratio to backpropagation's step in the same round",
    "memory": "most that is allocated at one time in a step, its ratio to backpropagation's",
    "operations": "floating-point operations of matrix products, convolutions and attentions, counted",
    "floor": "their ratio to backpropagation's, which is the time ratio if arithmetic were all that takes time",
}
LAUNCHES = "kernels that a step launches on the GPU"


def title(benchmark: Benchmark) -> str:
    """What is measured."""
    image = f" on {benchmark.image_size}×{benchmark.image_size} images" if benchmark.model == RESNET else ""
    vertices = "" if benchmark.vertices == "activations" else f", all {benchmark.vertices} vertices"
    graphs = ", each step one CUDA graph" if benchmark.cuda_graphs else ""
    return f"{benchmark.model}{image}, batch {benchmark.batch_size}, {benchmark.device}{vertices}{graphs}"


def cost_tables(benchmark: Benchmark) -> list[NamedTable]:
    """Measured costs, counted ones, and those of parts; each where there are any."""
    about = title(benchmark)
    costs = benchmark.costs
    measured = NamedTable(
        f"{about}: {benchmark.rounds} interleaved training steps",
        ("training step", "median (ms)", "quartiles (ms)", "time", "peak KiB", "memory"),
        [
            (
                c.rule,
                _short(c.milliseconds),
                f"{_short(c.quartiles[0])}-{_short(c.quartiles[1])}",
                f"{c.time_ratio:.2f}×",
                f"{c.peak_bytes / 1024:.0f}",
                f"{c.memory_ratio:.2f}×",
            )
            for c in costs
        ],
    )
    found = [measured]
    if all(c.operations is not None for c in costs):
        on_gpu = any(c.launches is not None for c in costs)
        rows = [(c.rule, f"{c.operations:,}", f"{c.floor:.2f}×", *([f"{c.launches}"] if on_gpu else [])) for c in costs]
        columns = ("training step", "operations", "floor", *(("launches",) if on_gpu else ()))
        found.append(NamedTable(f"{about}: counted", columns, rows))
    if benchmark.ratios:
        rows = [(r.what, f"{r.ratio:.2f} × {r.least}") for r in benchmark.ratios]
        found.append(NamedTable(f"{about}: parts", ("part", "time"), rows))
    return found


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds < 100 else f"{milliseconds:.0f}"


def notes(benchmarks: Sequence[Benchmark]) -> list[str]:
    """What the columns are."""
    counted = any(c.operations is not None for b in benchmarks for c in b.costs)
    shown = [f"{name}: {note}" for name, note in NOTES.items() if counted or name in ("time", "memory")]
    on_gpu = any(c.launches is not None for b in benchmarks for c in b.costs)
    return shown + ([f"launches: {LAUNCHES}"] if on_gpu else [])


def scaling_tables(scaling: Scaling) -> list[tuple[NamedTable, list[str]]]:
    """The exponents of each quantity by rule and size, each table with the reasons for what is in it."""
    by_key = {(e.rule, e.quantity, e.size): e.exponent for e in scaling.exponents}
    rules, sizes = dict.fromkeys(e.rule for e in scaling.exponents), dict.fromkeys(e.size for e in scaling.exponents)
    found = []
    for quantity in QUANTITIES:
        rows = [(rule, *(f"{by_key[rule, quantity, size]:.2f}" for size in sizes)) for rule in rules]
        table = NamedTable(f"exponents of {quantity}", ("training step", *(f"in {size}" for size in sizes)), rows)
        found.append((table, [f"{quantity} in {size}: {REASONS[quantity, size]}" for size in sizes]))
    return found


def scaling_title(scaling: Scaling) -> str:
    """What was measured."""
    changed = [
        f"{size} {', '.join(str(value) for value in dict.fromkeys(p.value for p in scaling.points if p.size == size))}"
        for size in dict.fromkeys(p.size for p in scaling.points)
    ]
    return (
        f"Chains on {scaling.device}, {scaling.rounds} interleaved rounds: {'; '.join(changed)}; where it is not "
        f"changed, depth {scaling.depth}, width {scaling.width}, batch size {scaling.batch_size}."
    )


def start_table(starts: Sequence[Start]) -> NamedTable:
    """How long programs take to start, and whether as little as is aimed at."""
    return NamedTable(
        "start-up, each a process of its own, in turn",
        ("program", "median (s)", "quartiles (s)", "beyond import torch (s)", "aim", "reached"),
        [
            (
                s.program,
                f"{s.seconds:.3f}",
                f"{s.quartiles[0]:.3f}-{s.quartiles[1]:.3f}",
                "" if s.beyond is None else f"{s.beyond:.3f}",
                "" if s.aim is None else f"≤ {s.aim:g}",
                "" if s.aim is None or s.beyond is None else "yes" if s.beyond <= s.aim else "no",
            )
            for s in starts
        ],
    )


def markdown(suite: Suite) -> str:
    """All tables, what their columns are, and where they were measured."""
    return "\n".join(_sections(suite))


def _sections(suite: Suite) -> Iterator[str]:
    for benchmark in suite.benchmarks:
        for table in cost_tables(benchmark):
            yield from (f"**{table.title}**\n", markdown_table(table.columns, table.rows))
    if suite.benchmarks:
        yield "".join(f"* {note}\n" for note in notes(suite.benchmarks))
    for scaling in suite.scaling:
        yield f"{scaling_title(scaling)}\n"
        for table, reasons in scaling_tables(scaling):
            yield from (f"**{table.title}**\n", markdown_table(table.columns, table.rows))
            yield "".join(f"* {reason}\n" for reason in reasons)
    if suite.starts:
        table = start_table(suite.starts)
        yield from (f"**{table.title}**\n", markdown_table(table.columns, table.rows))
    known = {name: suite.environment.get(name) for name in ("date", "processor", "cores", "threads", "gpu", "torch")}
    where = [f"{name} {value}" for name, value in known.items() if value is not None]
    if commit := suite.environment.get("commit"):
        where.append(f"commit {commit}{'' if suite.environment.get('clean') else ', changed'}")
    yield f"`{suite.command}`: {', '.join(where)}\n"


def write(suite: Suite, folder: Path) -> list[Path]:
    """Writes the document, and its tables and figures.

    Raises:
        OutputError: if they cannot be written.
    """
    write_atomically(folder / FILE, suite.model_dump_json(indent=2) + "\n")
    return [folder / FILE, *_write_made(suite, folder)]


def make_again(folder: Path) -> tuple[Suite, list[Path]]:
    """Makes tables and figures from the document alone; gives what it holds, and the files.

    Raises:
        OutputError: if there is no document, or it cannot be read.
    """
    suite = read(folder / FILE)
    return suite, _write_made(suite, folder)


def read(path: Path) -> Suite:
    """A document.

    Raises:
        OutputError: if it cannot be read.
    """
    try:
        return Suite.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"cannot read {path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise OutputError(f"{path} is no document of `relaxprop bench`: {place}: {first['msg']}") from error


def _write_made(suite: Suite, folder: Path) -> list[Path]:
    write_atomically(folder / "table.md", markdown(suite))
    paths = [folder / "table.md"]
    if suite.benchmarks:
        panels = {
            title(b): {c.rule: (c.time_ratio, c.memory_ratio, c.floor) for c in b.costs if c.rule != BASELINE}
            for b in suite.benchmarks
        }
        paths.append(plots.step_costs(panels, folder / "costs.png"))
    for scaling in suite.scaling:
        where = "" if len(suite.scaling) == 1 else f"-{scaling.device.replace(':', '-')}"
        paths.append(plots.power_laws(_lines(scaling), folder / f"scaling{where}.png"))
    return paths


def _lines(scaling: Scaling) -> dict[tuple[str, str], dict[str, list[tuple[float, float]]]]:
    """The points by quantity and size, and by rule."""
    rules = list(dict.fromkeys(p.rule for p in scaling.points))
    return {
        (quantity, size): {
            rule: [(p.value, amount(p, quantity)) for p in scaling.points if (p.rule, p.size) == (rule, size)]
            for rule in rules
        }
        for quantity in QUANTITIES
        for size in dict.fromkeys(p.size for p in scaling.points)
    }
