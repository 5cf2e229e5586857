"""What a training step costs by every rule beside backpropagation's: time, memory, operations, launches.

May import: vertices, lab.bench.against, lab.bench.counting, lab.bench.measuring, lab.bench.problems, lab.bench.records,
lab.bench.steps, lab.graphed, lab.training.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

import torch

from relaxprop.lab.bench import counting
from relaxprop.lab.bench.against import Rival
from relaxprop.lab.bench.measuring import BASELINE, Step, interleaved, peak_bytes, quartiles, ratio, warm
from relaxprop.lab.bench.problems import IMAGE_SIZES, PAPERS, Problem, build
from relaxprop.lab.bench.records import Benchmark, Ratio, StepCost
from relaxprop.lab.bench.steps import OWN, PAPERS_SOLVER, RULES, USUAL, Part, all_steps, parts
from relaxprop.lab.graphed import Graphed
from relaxprop.lab.training import expected_transients
from relaxprop.vertices import Granularity


@dataclass(frozen=True)
class Plan:
    """One network with all that trains it.

    Attributes:
        model: as `problems.build` has it.
        rules: None: all on the paper's networks, and Activation Relaxation on the others.
        solvers: of Activation Relaxation.
        vertices: what relaxes.
        batch_size: samples in the minibatch.
        device: where.
        image_size: of the ResNet's images.
        against: others' code that trains the same network.
        cuda_graphs: whether each training step is launched as one CUDA graph, which then looks at no value.
        compile_steps: whether unfrozen steps are measured by ``torch.compile`` too, where the parts of a step are.
    """

    model: str = "mlp"
    _: KW_ONLY
    rules: Sequence[str] | None = None
    solvers: Sequence[str] = USUAL
    vertices: Granularity = "activations"
    batch_size: int = 64
    device: torch.device | str = "cpu"
    image_size: int = IMAGE_SIZES[0]
    against: Sequence[Rival] = ()
    cuda_graphs: bool = False
    compile_steps: bool = False

    @property
    def chosen(self) -> Sequence[str]:
        """The rules that are measured."""
        if self.rules is not None:
            return self.rules
        return RULES if self.model in PAPERS else (OWN,)

    @property
    def has_parts(self) -> bool:
        """Whether the parts of a step are measured, as what they are compared with is."""
        of_the_paper = self.model in PAPERS and self.vertices == "activations" and OWN in self.chosen
        return of_the_paper and not self.cuda_graphs and {PAPERS_SOLVER, "euler"} <= {*self.solvers}

    def prepare(self) -> tuple[Problem, dict[str, Step]]:
        """The problem, and its training steps by their names.

        Raises:
            ValueError: if there is no such network, or a rule or others' code cannot train it.
        """
        problem = build(self.model, batch_size=self.batch_size, device=self.device, image_size=self.image_size)
        steps = all_steps(problem, self.chosen, self.solvers, self.vertices, check_finite=not self.cuda_graphs)
        for rival in self.against:
            steps |= rival.steps(problem)
        return problem, steps


@expected_transients()
def run(plan: Plan, *, rounds: int = 100, on_round: Callable[[], None] = lambda: None) -> Benchmark:
    """Measures the training step of backpropagation, of each rule and solver, and of others' code.

    Args:
        plan: what is measured.
        rounds: in each of which every step is taken once; at least 2.
        on_round: called after each.

    Raises:
        ValueError: as `Plan.prepare` does.
    """
    problem, steps = plan.prepare()
    beside, ratios = _parts(plan, problem)
    warm(steps | beside)
    counted = {name: _counts(step, plan.device) for name, step in steps.items()}
    if plan.cuda_graphs:
        steps = {name: Graphed(step, plan.device) for name, step in steps.items()}
        warm(steps)
        counted = {name: (*counted[name][:2], counting.launches(step, plan.device)) for name, step in steps.items()}
    times = interleaved(steps | beside, rounds=rounds, device=plan.device, on_round=on_round)
    return Benchmark(
        model=plan.model,
        image_size=plan.image_size,
        vertices=plan.vertices,
        batch_size=plan.batch_size,
        device=str(plan.device),
        cuda_graphs=plan.cuda_graphs,
        rounds=rounds,
        parameters=sum(p.numel() for p in problem.network.parameters()),
        costs=[_cost(name, times, counted) for name in steps],
        ratios=[Ratio(what=part.what, least=part.least, ratio=part.ratio(times)) for part in ratios],
    )


def _parts(plan: Plan, problem: Problem) -> tuple[dict[str, Step], list[Part]]:
    """Those of the paper's networks."""
    return parts(problem, plan.chosen, compile_steps=plan.compile_steps) if plan.has_parts else ({}, [])


def _counts(step: Step, device: torch.device | str) -> tuple[int, int, int | None]:
    return peak_bytes(step, device), counting.operations(step), counting.launches(step, device)


def _cost(name: str, times: dict[str, list[float]], counted: dict[str, tuple[int, int, int | None]]) -> StepCost:
    peak, operations, launches = counted[name]
    least_peak, least_operations, _ = counted[BASELINE]
    low, high = quartiles(times[name])
    return StepCost(
        rule=name,
        milliseconds=1e3 * statistics.median(times[name]),
        quartiles=(1e3 * low, 1e3 * high),
        time_ratio=ratio(times, name, BASELINE),
        peak_bytes=peak,
        memory_ratio=peak / least_peak,
        operations=operations,
        floor=operations / least_operations,
        launches=launches,
    )
