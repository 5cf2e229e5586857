"""What a training step costs by every rule: time and peak memory, beside backpropagation's.

May import: lab.bench.measuring, lab.bench.problems, lab.environment, lab.training.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import BaseModel

from relaxprop.lab.bench.measuring import BASELINE, interleaved, peak_bytes, ratio
from relaxprop.lab.bench.problems import EULER_STEPS, NUDGED, PREDICTIVE, RULE_STEPS, UPDATES, Problem, solvers
from relaxprop.lab.environment import environment
from relaxprop.lab.training import expected_transients


class StepCost(BaseModel):
    """Cost of one rule's training step: forward pass, relaxation phase, weight update."""

    rule: str
    milliseconds: float  # median
    quartiles: tuple[float, float]  # of the milliseconds
    time_ratio: float  # median of the ratios to backpropagation's step in the same round
    peak_bytes: int  # most memory allocated at one time in the step, beyond what was there before it
    memory_ratio: float  # to backpropagation's


class Ratio(BaseModel):
    """What a part of Activation Relaxation costs beside its least work."""

    what: str
    least: str
    ratio: float  # median of the ratios in the same round


class Benchmark(BaseModel):
    """All rules on one model."""

    command: str
    model: str
    batch_size: int
    device: str
    rounds: int
    environment: dict[str, Any]
    costs: list[StepCost]
    ratios: list[Ratio]


@expected_transients()
def run(
    model: str = "mlp",
    *,
    rounds: int = 100,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    command: str = "",
    on_round: Callable[[], None] = lambda: None,
) -> Benchmark:
    """Measures the training step of backpropagation, of each solver and of the other rules on random images."""
    problem = Problem(model, batch_size, device)
    rules = {name: problem.training_step(solver) for name, solver in ({BASELINE: None} | solvers()).items()}
    rules |= problem.other_rules()
    steps = rules | problem.parts()
    for step in steps.values():
        for _ in range(3):
            step()
    memory = {name: peak_bytes(step, device) for name, step in rules.items()}
    times = interleaved(steps, rounds=rounds, device=device, on_round=on_round)
    return Benchmark(
        command=command,
        model=model,
        batch_size=batch_size,
        device=str(device),
        rounds=rounds,
        environment=environment(),
        costs=[_cost(name, times, memory) for name in rules],
        ratios=_ratios(times),
    )


def markdown(benchmark: Benchmark) -> str:
    """The measurements as a table for a document."""
    lines = ["| training step | median (ms) | time | peak memory |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {c.rule} | {c.milliseconds:.2f} | {c.time_ratio:.2f}× | {c.memory_ratio:.2f}× |" for c in benchmark.costs
    ]
    lines += ["", "| part | time |", "| --- | --- |"]
    lines += [f"| {r.what} | {r.ratio:.2f} × {r.least} |" for r in benchmark.ratios]
    return "".join(f"{line}\n" for line in lines)


def _cost(name: str, times: Mapping[str, list[float]], memory: Mapping[str, int]) -> StepCost:
    seconds = times[name]
    low, _, high = statistics.quantiles(seconds, n=4)
    return StepCost(
        rule=name,
        milliseconds=1e3 * statistics.median(seconds),
        quartiles=(1e3 * low, 1e3 * high),
        time_ratio=ratio(times, name, BASELINE),
        peak_bytes=memory[name],
        memory_ratio=memory[name] / memory[BASELINE],
    )


def _ratios(times: Mapping[str, list[float]]) -> list[Ratio]:
    baseline = next(name for name in times if name.startswith("ClosedForm(0"))
    simulated = next(name for name in times if name.startswith("Euler("))
    return [
        Ratio(
            what=f"a training step of {simulated}", least=f"one of {baseline}", ratio=ratio(times, simulated, baseline)
        ),
        Ratio(
            what="a step of Euler",
            least="an activation-only backward pass",
            ratio=ratio(times, "Euler steps", "backward", per=EULER_STEPS),
        ),
        Ratio(
            what="a step of Euler, the derivative unfrozen",
            least="a forward and an activation-only backward pass",
            ratio=ratio(times, "unfrozen Euler steps", "forward and backward", per=EULER_STEPS),
        ),
        *(
            Ratio(
                what=f"a training step under condition {name}",
                least=f"one of {baseline} and a forward pass",
                ratio=ratio(times, f"condition {name}", baseline, "forward"),
            )
            for name in UPDATES
        ),
        *(
            Ratio(
                what=f"a step of {name}, with its share of the training step",
                least="a forward and an activation-only backward pass",
                ratio=ratio(times, name, "forward and backward", per=steps),
            )
            for name, steps in ((PREDICTIVE, RULE_STEPS), (NUDGED, 2 * RULE_STEPS))
        ),
    ]
