"""The kept profile of a training step: its script, on a few steps."""

from __future__ import annotations

import time
from types import ModuleType

import pytest
from torch import nn

from relaxprop import relaxation, solvers, wrapper
from relaxprop.graph import Graph
from relaxprop.update import Update
from tests.scripts import RESULTS, load

pytestmark = pytest.mark.skipif(not RESULTS.is_dir(), reason="it is about the repository")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("step-profile/measure.py")


def test_a_part_has_its_own_time_only(script: ModuleType) -> None:
    watch = script.Stopwatch()
    start = time.perf_counter()
    with watch.part("outer"):
        with watch.part("inner"):
            time.sleep(0.05)
        watch.around(time.sleep, "inner")(0.05)
        time.sleep(0.02)
    whole = time.perf_counter() - start
    assert watch.own["inner"] >= 0.1
    assert watch.own["outer"] >= 0.02
    assert watch.own["inner"] + watch.own["outer"] <= whole


def test_every_part_is_found_in_a_step_and_left_as_it_was(script: ModuleType) -> None:
    def functions() -> list[object]:
        modules = [vars(wrapper)["record"], vars(wrapper)["check_finite"], vars(solvers)["_horner"]]
        return [*modules, Graph._arriving, Update.__call__, nn.Linear.forward, nn.Tanh.forward]

    before = functions()
    outcome = script.measure(2)
    assert functions() == before
    assert "apply" not in vars(relaxation.RelaxationPhase)
    assert all(outcome["PAPER"].values())
    alone = {name for name, took in outcome["backpropagation"].items() if took}
    assert alone == {"the model's own layers", script.REST}
    text = script.table(outcome)
    assert all(name in text for name in outcome["PAPER"])
    assert f"ratio of the steps {outcome['step']['ratio']:.2f}" in text
