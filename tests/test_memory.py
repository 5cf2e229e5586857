"""How much memory a relaxation phase needs, counted in states; beside what the feedforward pass keeps."""

import pytest
import torch

from relaxprop import ClosedForm, Euler
from relaxprop.lab.bench.measuring import peak_bytes
from relaxprop.solvers import Solver
from relaxprop.transients import Order
from tests.compare import driven_graph
from tests.problems import mlp

DEPTH, WIDTH = 8, 512
STATE = 4 * WIDTH * WIDTH  # bytes: float32, as many samples as units; more than a few pieces have together


def peak(solver: Solver) -> float:
    """In states, of a chain whose states are all of one size but for the output."""
    graph = driven_graph(mlp(4, *[WIDTH] * DEPTH, 1), "activations", (torch.randn(WIDTH, 4),))
    graph.source()

    def step() -> None:
        with torch.no_grad():
            solver.solve(graph)

    return peak_bytes(step, "cpu") / STATE


@pytest.mark.parametrize("order", ["simultaneous", "sequential", "asynchronous"])
@pytest.mark.parametrize("tolerance", [None, 0.9])
def test_steps_need_one_state_for_each_vertex_and_what_one_product_makes(order: Order, tolerance: float | None) -> None:
    # A product makes what passes the activation, what arrives, and with a tolerance its distance to the state.
    assert DEPTH <= peak(Euler(0.5, 4, order=order, tolerance=tolerance)) < DEPTH + 3.1


def test_the_closed_form_lets_go_of_the_states_of_the_stage_before() -> None:
    # The last product makes all states of those that the others have made, all but the first.
    assert peak(ClosedForm(0.1, 50)) < 2 * DEPTH - 0.9
