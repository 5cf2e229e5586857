"""What the rules' updates read, and how far they are from backpropagation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from relaxprop import (
    ActivationRelaxation,
    DirectFeedback,
    EquilibriumPropagation,
    PredictiveCoding,
    alignment,
    certificate,
    convergence,
    describe_locality,
    use_feedback,
)
from relaxprop.inspect.walk import Reads
from tests.compare import refuses, squares
from tests.problems import mlp

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0, 1, 1, 0])


def rows(model: Any) -> dict[str, Reads]:
    return {row.update: row for row in describe_locality(model, X).rows}


@pytest.mark.parametrize(
    ("error", "what", "kind"), [("output", "∂L/∂output", "error broadcast"), ("target", "target", "target broadcast")]
)
def test_direct_feedback(error: Any, what: str, kind: str) -> None:
    model = DirectFeedback(mlp(3, 4, 4, 2), error=error)
    found = rows(model)
    for name in ("1", "3"):
        assert found[f"x of {name}"] == Reads(
            f"x of {name}", 1, (what,), (f"feedback of {name}, fixed",), (), (f"{kind}: {what}",)
        )
    assert found["2.weight, 2.bias"] == Reads(
        "2.weight, 2.bias", 2, ("pre: x̄ of 1", "x of 3"), (), ("f' of 3 at x̄",), ()
    )
    described = describe_locality(model, X)
    assert described.non_local == {kind}
    assert described.schedule.startswith("none: ")
    assert model.last_phase is None


def test_an_output_that_is_a_vertex_keeps_its_own_error() -> None:
    found = rows(DirectFeedback(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Sigmoid())))
    assert found["x of 3"].activities == ("∂L/∂output",)
    assert found["x of 3"].non_local == ()


def test_layers_without_a_vertex_between_transport_their_weights() -> None:
    model = DirectFeedback(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    assert rows(model)["0.weight, 0.bias"].non_local == ("weight transport: 1.weight",)


@pytest.mark.parametrize("kind", [PredictiveCoding, EquilibriumPropagation])
def test_rules_whose_activities_move(kind: Any) -> None:
    model = kind(mlp(3, 4, 4, 2), functional.cross_entropy)
    found = rows(model)
    assert found["v of 1"] == Reads(
        "v of 1", 1, ("own v", "own ε", "ε of 3"), ("2.weight, transposed",), ("f' of 3 at v",),
        ("weight transport: 2.weight",),
    )  # fmt: skip
    phases = ("two phases: +β and −β",) if kind is EquilibriumPropagation else ()
    assert found["2.weight, 2.bias"] == Reads(
        "2.weight, 2.bias", 2, ("pre: v of 1", "ε of 3"), (), ("f' of 3 at v",), phases
    )
    assert describe_locality(model, X).schedule.startswith("simultaneous")


def test_backwards_weights_take_the_transport_away() -> None:
    model = PredictiveCoding(use_feedback(mlp(3, 4, 4, 2), "random"), functional.cross_entropy)
    assert describe_locality(model, X).non_local == set()
    one_sided = EquilibriumPropagation(model.module, functional.cross_entropy, centred=False)
    assert describe_locality(one_sided, X).non_local == set()
    assert "after a free phase" in str(describe_locality(one_sided, X)).replace("\n  ", " ")


def test_alignment_of_every_rule() -> None:
    torch.manual_seed(0)
    network = mlp(3, 6, 6, 2).double()
    x = X.double()
    direct = alignment(DirectFeedback(network), squares, x)
    assert direct["4.weight"].cosine == pytest.approx(1)
    assert direct["0.weight"].cosine < 0.99
    projected = alignment(
        DirectFeedback(network, error="target"), lambda y: functional.cross_entropy(y, LABELS), x, target=LABELS
    )
    assert projected["4.weight"].distance < 1e-12
    assert projected["2.weight"].distance > 0.1
    nudged = EquilibriumPropagation(network, functional.cross_entropy, step_size=0.4, num_steps=200)
    for found in alignment(nudged, lambda loss: loss, x, target=LABELS).values():
        assert found.distance < 1e-3
    moving = PredictiveCoding(network, functional.cross_entropy, step_size=0.4, num_steps=200)
    distances = [found.distance for found in alignment(moving, lambda loss: loss, x, target=LABELS).values()]
    assert 1e-3 < max(distances) < 0.5
    assert moving.last_phase is None
    assert all(p.grad is None for p in network.parameters())


def test_what_is_about_relaxation_alone_is_refused_by_name() -> None:
    model = DirectFeedback(mlp(3, 4, 2))
    with refuses(TypeError, "model must be an ActivationRelaxation, got DirectFeedback", "no relaxation phase"):
        certificate(model, X)  # type: ignore[arg-type]
    with refuses(TypeError, "model must be an ActivationRelaxation, got DirectFeedback"):
        convergence(model, squares, X)  # type: ignore[arg-type]
    with refuses(TypeError, "model must be an ActivationRelaxation or another learning rule, got Sequential"):
        alignment(mlp(3, 4, 2), squares, X)  # type: ignore[arg-type]
    assert describe_locality(ActivationRelaxation(mlp(3, 4, 2)), X).rows
