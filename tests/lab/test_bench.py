"""The benchmark measures every rule's time and memory against backpropagation."""

from __future__ import annotations

import torch

from relaxprop.lab.bench import measuring, suite


def test_every_rule_is_measured_against_backpropagation() -> None:
    measured = suite.run(rounds=2, batch_size=3)
    rules = [cost.rule for cost in measured.costs]
    assert rules == [
        "backpropagation", "Equilibrium()", "ClosedForm()", "ClosedForm(0.1, 100)", "Euler(0.1, 100)",
        "DirectFeedback()", "DirectFeedback(target)", "PredictiveCoding(0.1, 10)", "EquilibriumPropagation(0.1, 10)",
    ]  # fmt: skip
    first = measured.costs[0]
    assert (first.time_ratio, first.memory_ratio) == (1, 1)
    for cost in measured.costs:
        assert cost.milliseconds > 0
        assert cost.quartiles[0] <= cost.milliseconds <= cost.quartiles[1]
        # The gradients alone are as large as the network's 336,810 parameters.
        assert cost.peak_bytes >= 4 * 336_810
    assert suite.Benchmark.model_validate_json(measured.model_dump_json()) == measured


def test_peak_memory_is_the_most_at_one_time() -> None:
    def step() -> None:
        for _ in range(3):
            torch.zeros(1000, dtype=torch.float32)  # 4000 bytes, freed at once
        held = [torch.zeros(500, dtype=torch.float32) for _ in range(4)]  # 2000 bytes each
        del held

    # The allocator rounds each block up to a multiple of 64 bytes.
    assert 8000 <= measuring.peak_bytes(step, "cpu") <= 8000 + 4 * 64
