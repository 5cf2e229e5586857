"""One way to ask whether a model's gradients are plain autograd's, or are refused in words that help."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from relaxprop import ActivationRelaxation, ClosedForm, Equilibrium, Euler

TOLERANCE = 1e-11  # relative, of norms
CONVERGED = (ClosedForm(0.5, 300), Euler(0.9, 60), Equilibrium())
CUTTING = CONVERGED[:2]  # the solvers that cut the graph
VERTICES = ("activations", "modules", "operations")

# What a message says to do about it: one of these is in it.
WAYS_OUT = ("Equilibrium()", "vertices=", "pass ", "return it", "return them", "wrapper.module", "leave ", "call ")

Outcome = Literal["right", "refused"]
Seen = dict[str, Tensor]
Run = Callable[[nn.Module, Sequence[Any]], Tensor]

all_solvers = pytest.mark.parametrize("solver", CONVERGED, ids=lambda s: type(s).__name__)
cutting_solvers = pytest.mark.parametrize("solver", CUTTING, ids=lambda s: type(s).__name__)
all_vertices = pytest.mark.parametrize("vertices", VERTICES)


def squares(output: Tensor) -> Tensor:
    return ((output - 0.3) ** 2).sum()


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def distance(found: Tensor, expected: Tensor) -> float:
    """``‖found − expected‖ / ‖expected‖``, absolute where nothing is expected."""
    if found.shape != expected.shape:
        return float("inf")
    size = float(expected.detach().norm())
    return float((found.detach() - expected.detach()).norm()) / (size or 1.0)


def assert_same(found: Seen, expected: Seen, tolerance: float = TOLERANCE) -> None:
    """Both hold the same tensors by the same names."""
    assert found.keys() == expected.keys(), (
        f"missing {expected.keys() - found.keys()}, more {found.keys() - expected.keys()}"
    )
    off = {name: d for name, e in expected.items() if not (d := distance(found[name], e)) <= tolerance}
    assert not off, "silently wrong: " + ", ".join(f"{name} by {d:.1e}" for name, d in off.items())


def gradients(
    model: nn.Module, inputs: Sequence[Any], run: Run, plain: nn.Module, also: Callable[[nn.Module], Seen] | None = None
) -> Seen:
    """The loss and, after one backward pass, the gradients of the parameters of ``plain`` and of the inputs."""
    arrived: list[Tensor] = []

    def fresh(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point():
            return x.clone()
        arrived.append(x.detach().clone().requires_grad_())
        return arrived[-1]

    arguments = pytree.tree_map(fresh, tuple(inputs))
    torch.manual_seed(2)
    loss = run(model, arguments)
    value = loss.detach().clone()
    backward(loss)
    found = {"loss": value} | {f"input {i}": x.grad for i, x in enumerate(arrived) if x.grad is not None}
    found |= {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    if also is not None:
        found |= also(plain)
    return {name: x.detach().clone() for name, x in found.items()}


def right_or_refused(
    make_model: Callable[[], nn.Module],
    inputs: Sequence[Any],
    loss: Callable[[Any], Tensor] = squares,
    *,
    solver: Any,
    vertices: Any,
    names: Iterable[str],
    run: Run | None = None,
    also: Callable[[nn.Module], Seen] | None = None,
    passes: int = 2,
) -> Outcome:
    """Compares a wrapped model with an identical fresh one under plain autograd.

    Args:
        make_model: builds the model, in any type; it is seeded and made float64.
        inputs: the model's; floating-point tensors in them get gradients, which are compared.
        loss: of the model's result.
        solver: of the wrapper.
        vertices: likewise; a callable picks submodules of the model.
        names: a refusal names one of these parts of the model.
        run: what is done instead of ``loss(model(*inputs))``.
        also: what else the plain module shows after a backward pass, to be compared too.
        passes: how many passes follow each other, as in training.

    Returns:
        "right" or "refused".

    Raises:
        AssertionError: silently wrong, or refused without a name or a way out.
    """

    def ordinary(model: nn.Module, arguments: Sequence[Any]) -> Tensor:
        return loss(model(*arguments))

    def build() -> nn.Module:
        torch.manual_seed(1)
        return make_model().double()

    step = ordinary if run is None else run
    plain = build()
    expected = [gradients(plain, inputs, step, plain, also) for _ in range(passes)]

    def wrapped(by: Any) -> None:
        module = build()
        chosen = vertices(module) if callable(vertices) else vertices
        model = ActivationRelaxation(module, solver=by, vertices=chosen)
        for wanted in expected:  # gradients accumulate in both
            assert_same(gradients(model, inputs, step, module, also), wanted)

    try:
        wrapped(solver)
    except (ValueError, RuntimeError, TypeError) as error:
        message = "\n".join([str(error), *getattr(error, "__notes__", [])])
        assert any(name in message for name in names), f"refused without a name of {tuple(names)}: {message}"
        assert any(way in message for way in WAYS_OUT), f"refused without a way out: {message}"
        if "Equilibrium()" in message:  # a remedy that is named has to work
            wrapped(Equilibrium())
        return "refused"
    return "right"
