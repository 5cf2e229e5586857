"""What a training step costs: interleaved, medians, ratios within one process.

The steps of all rules alternate, so that a slow spell of the machine falls on all of them alike.

May import: frozen, public names, solvers, vertices, lab.data, lab.environment, lab.models, lab.training.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from relaxprop import (
    PAPER,
    ActivationRelaxation,
    ClosedForm,
    DirectFeedback,
    Equilibrium,
    EquilibriumPropagation,
    Euler,
    Frozen,
    PredictiveCoding,
)
from relaxprop.frozen import ALL_FROZEN
from relaxprop.lab import models
from relaxprop.lab.data import Dataset, Split
from relaxprop.lab.environment import environment
from relaxprop.lab.training import expected_transients, squared_error
from relaxprop.solvers import Solver
from relaxprop.vertices import find_vertices

BASELINE = "backpropagation"
IMAGE_SHAPES = {"mlp": (1, 28, 28), "cnn": (3, 32, 32), "cnn-as-coded": (3, 32, 32)}  # MNIST's and CIFAR's
EULER_STEPS = 10
RULE_STEPS = 10  # of predictive coding, and of each phase of equilibrium propagation
PREDICTIVE, NUDGED = f"PredictiveCoding(0.1, {RULE_STEPS})", f"EquilibriumPropagation(0.1, {RULE_STEPS})"
UPDATES = {"b": Frozen(update_derivative=False), "d": Frozen(update_activity=False)}  # the paper's conditions
Step = Callable[[], None]


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


def solvers() -> dict[str, Solver]:
    """What is compared with backpropagation."""
    found = (Equilibrium(), ClosedForm(), PAPER, Euler(0.1, 100))
    return {f"{type(s).__name__}({', '.join(map(str, _sizes(s)))})": s for s in found}


def _sizes(solver: Solver) -> list[float]:
    options = vars(solver)
    return [options["step_size"], options["num_steps"]] if options.get("num_steps") else []


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
    problem = _Problem(model, batch_size, device)
    rules = {name: problem.training_step(solver) for name, solver in ({BASELINE: None} | solvers()).items()}
    rules |= problem.other_rules()
    steps = rules | problem.parts()
    for step in steps.values():
        for _ in range(3):
            step()
    memory = {name: _peak_bytes(step, device) for name, step in rules.items()}
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


def interleaved(
    steps: Mapping[str, Step],
    *,
    rounds: int,
    device: torch.device | str = "cpu",
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds that each step takes, round by round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()  # a collection would fall on one rule's step
    try:
        for _ in range(rounds):
            for name, step in steps.items():
                times[name].append(_seconds(step, device))
            on_round()
    finally:
        gc.enable()
    return times


def ratio(times: Mapping[str, list[float]], what: str, *least: str, per: int = 1) -> float:
    """Median of the ratios, round by round, of a step's time to that of others together."""
    seconds = zip(times[what], *(times[name] for name in least), strict=True)
    ratios: list[float] = [row[0] / per / sum(row[1:]) for row in seconds]
    return statistics.median(ratios)


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


class _Problem:
    """A network on random images of the size that it is for, and what there is to do with it."""

    def __init__(self, model: str, batch_size: int, device: torch.device | str) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(batch_size, *IMAGE_SHAPES[model], generator=generator)
        labels = torch.randint(10, (batch_size,), generator=generator)
        dataset = Dataset("random", tuple(map(str, range(10))), Split(images, labels), Split(images, labels))
        self.dataset, self.model, self.device = dataset.to(device, models.memory_format(model)), model, device
        self.inputs = self.dataset.train.images
        self.targets = nn.functional.one_hot(self.dataset.train.labels, 10).to(self.inputs.dtype)

    def network(self) -> nn.Module:
        return models.build(self.model, self.dataset, seed=0).to(self.device)

    def training_step(self, solver: Solver | None, frozen: Frozen = ALL_FROZEN) -> Step:
        """Forward pass, backward pass or relaxation phase, update."""
        network = self.network()
        trained = network if solver is None else ActivationRelaxation(network, solver=solver, frozen=frozen)
        return self._step(network, lambda: squared_error(trained(self.inputs), self.targets))

    def other_rules(self) -> dict[str, Step]:
        """Training steps of the rules beside Activation Relaxation."""
        networks = [self.network() for _ in range(4)]
        direct, projected = DirectFeedback(networks[0]), DirectFeedback(networks[1], error="target")
        moving = PredictiveCoding(networks[2], squared_error, num_steps=RULE_STEPS)
        nudged = EquilibriumPropagation(networks[3], squared_error, num_steps=RULE_STEPS)
        x, t = self.inputs, self.targets
        losses: dict[str, Callable[[], Tensor]] = {
            "DirectFeedback()": lambda: squared_error(direct(x), t),
            "DirectFeedback(target)": lambda: squared_error(projected(x, target=t), t),
            PREDICTIVE: lambda: moving(x, target=t),
            NUDGED: lambda: nudged(x, target=t),
        }
        steps = zip(losses.items(), networks, strict=True)
        return {name: self._step(network, loss) for (name, loss), network in steps}

    def _step(self, network: nn.Module, loss_of: Callable[[], Tensor]) -> Step:
        # A step of no length costs the same, and in however many rounds no rule diverges on images without a pattern.
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)

        def step() -> None:
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return step

    def parts(self) -> dict[str, Step]:
        """Steps of Euler and conditions of the update, and the passes that are the least which they take."""
        network = self.network()
        vertices = find_vertices(network, "activations")
        closed_form = PAPER

        def forward() -> tuple[Tensor, list[Tensor]]:
            activities: list[Tensor] = []
            handles = [m.register_forward_hook(lambda m, args, y: activities.append(y)) for m in vertices]
            output = network(self.inputs)
            for handle in handles:
                handle.remove()
            return squared_error(output, self.targets), activities

        def forward_and_backward() -> None:
            loss, activities = forward()
            torch.autograd.grad(loss, activities)

        def plain_forward() -> None:
            network(self.inputs)

        kept_loss, kept_activities = forward()

        def backward() -> None:
            torch.autograd.grad(kept_loss, kept_activities, retain_graph=True)

        return {
            "forward": plain_forward,
            "backward": backward,
            "forward and backward": forward_and_backward,
            "Euler steps": self._euler_steps(network, ALL_FROZEN),
            "unfrozen Euler steps": self._euler_steps(network, Frozen(relaxation_derivative=False)),
            **{f"condition {name}": self.training_step(closed_form, frozen) for name, frozen in UPDATES.items()},
        }

    def _euler_steps(self, network: nn.Module, frozen: Frozen) -> Step:
        model = ActivationRelaxation(network, solver=PAPER.replay(), frozen=frozen)
        for _ in range(2):  # the first pass learns where copies are needed
            recording = model.record([self.inputs])
        (output,) = recording.graph.outputs
        recording.graph.drive_outputs([2 * (output.detach() - self.targets)])
        euler, initial = PAPER.replay(), recording.graph.initial_states()

        def step() -> None:
            for _ in islice(euler.trajectory(recording.graph, initial), EULER_STEPS):
                pass

        return step


def _seconds(step: Step, device: torch.device | str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(step: Step, device: torch.device | str) -> int:
    """Most memory allocated at one time during the step, beyond what was allocated before it."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return int(torch.cuda.max_memory_allocated(device)) - before
    with (
        _quiet_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        step()
    allocated = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Without what the profiler's C++ side prints when it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
