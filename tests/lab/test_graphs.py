"""Appendix A's claim on every architecture, in small: the gradients are backpropagation's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from relaxprop import ActivationRelaxation, ClosedForm, steps_to_converge
from relaxprop.lab.architectures import ARCHITECTURES, build
from relaxprop.lab.experiments import depth as cost_of_depth
from relaxprop.lab.experiments import gradients

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@every_architecture
def test_every_solver_reaches_backpropagations_gradient(name: str) -> None:
    problem = build(name, small=True).to(torch.float64)
    depth, vertices = gradients._depth(problem)
    assert vertices >= depth > 3
    for label, solver in gradients.planned(depth).items():
        assert gradients.error(problem, solver) < gradients.BOUND, label


@every_architecture
def test_a_relaxation_that_is_stopped_early_is_not_there_yet(name: str) -> None:
    """The error is no constant of the measurement."""
    problem = build(name, small=True).to(torch.float64)
    assert gradients.error(problem, ClosedForm(0.5, 2)) > 1e-3


@every_architecture
def test_the_errors_are_those_of_gradients_taken_by_hand(name: str) -> None:
    problem = build(name, small=True).to(torch.float64)
    model = ActivationRelaxation(problem.model, solver=ClosedForm(0.5, 10), vertices="operations")
    problem.loss(model(*problem.inputs)).backward()  # type: ignore[no-untyped-call]
    relaxed = {n: p.grad.clone() for n, p in problem.model.named_parameters() if p.grad is not None}
    problem.model.zero_grad()
    problem.loss(problem.model(*problem.inputs)).backward()  # type: ignore[no-untyped-call]
    exact = {n: p.grad for n, p in problem.model.named_parameters() if p.grad is not None}
    distances = [float((relaxed[n] - g).norm() / g.norm()) for n, g in exact.items()]
    assert gradients.error(problem, ClosedForm(0.5, 10)) == pytest.approx(max(distances), rel=1e-6)


def test_problems_are_seeded_and_leave_the_random_state() -> None:
    before = torch.get_rng_state()
    first, second, other = (build("mixture", small=True, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    pairs = list(zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.inputs[0], other.inputs[0])
    with pytest.raises(ValueError, match="architecture must be one of mlp, cnn, resnet-18"):
        build("perceptron")


def test_a_comparison_and_its_table() -> None:
    found = gradients.compare("lstm", rounds=2, small=True)
    # By hand: at each of six moments the cell's h and c, of which a path takes one; and the read-out.
    assert (found.vertices, found.depth) == (12, 7)
    assert found.steps == steps_to_converge(7, 0.5, gradients.TOLERANCE)
    assert found.errors.keys() == {"Equilibrium", "ClosedForm", "Euler", "asynchronous"}
    assert found.costs.keys() == {"Equilibrium", "ClosedForm", "Euler"}
    assert found.recording.keys() == {"operations"}  # it has no activation modules
    assert all(cost > 0 for cost in (*found.costs.values(), *found.recording.values()))
    errors, times = gradients.tables([found])
    for table in (errors, times):
        assert [len(row) for row in table.rows] == [len(table.columns)]
    assert errors.rows[0][2:5] == ("12", "7", str(found.steps))
    assert times.rows[0][-2] == ""


def test_an_asynchronous_relaxation_converges_whatever_is_drawn(tmp_path: Path) -> None:
    curve = gradients.asynchronous("message-passing", seeds=3)
    assert len(curve.errors) == 3
    for errors in curve.errors:
        assert len(errors) == len(curve.updates)
        assert errors[0] > 0.1
        assert errors[-1] < 1e-12
    assert curve.errors[0] != curve.errors[1]
    assert curve.updates[:3] == [0, 0.5, 1]
    assert gradients.asynchronous("message-passing", seeds=1).errors[0] == curve.errors[0]
    written = gradients.write_asynchronous([curve], 0.5, tmp_path, "command")
    assert {p.name for p in written} == {"asynchronous.json", "asynchronous.png"}
    assert json.loads((tmp_path / "asynchronous.json").read_text())["curves"][0]["depth"] == curve.depth


def test_the_cost_of_depth(tmp_path: Path) -> None:
    finished: list[bool] = []
    costs = cost_of_depth.cost_by_depth([2, 5], width=4, batch_size=2, rounds=2, on_depth=lambda: finished.append(True))
    assert len(finished) == 2
    assert [c.depth for c in costs] == [2] * 6 + [5] * 6
    by_name = {(c.depth, c.solver): c for c in costs}
    for depth in (2, 5):
        assert by_name[depth, "Equilibrium"].converged
        paper = by_name[depth, "ClosedForm, 100 steps of 0.1"]
        assert (paper.num_steps, paper.transports, paper.converged) == (100, depth - 1, False)
        euler = by_name[depth, "Euler, 100 steps of 0.1"]
        assert (euler.num_steps, euler.transports) == (100, 100)
        assert euler.remaining == pytest.approx(paper.remaining)
        planned = by_name[depth, f"Euler, {cost_of_depth.PLANNED}"]
        assert planned.num_steps == steps_to_converge(depth, gradients.STEP_SIZE, cost_of_depth.ENOUGH)
        assert planned.remaining <= cost_of_depth.ENOUGH
        converged = by_name[depth, f"ClosedForm, {cost_of_depth.TO_ROUNDING}"]
        assert converged.converged
        assert converged.transports == 1
    written = cost_of_depth.write_depths(costs, "about", tmp_path, "command")
    assert {p.name for p in written} == {"table.md", "depth.json", "depth.png"}
    assert (tmp_path / "table.md").read_text().count("none: as Equilibrium") == 4
