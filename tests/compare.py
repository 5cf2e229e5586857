"""How results are compared: tolerances, assertions, and the gradients that one backward pass leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from relaxprop import ActivationRelaxation
from relaxprop.graph import Graph, States
from relaxprop.recording import record
from relaxprop.vertices import Granularity

# Relative distance (of norms) at which two results are the same.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 5e-2}

Gradients = dict[str, Tensor | None]


def distance(actual: Tensor, expected: Tensor) -> float:
    """``‖actual − expected‖ / ‖expected‖``, absolute where nothing is expected."""
    assert actual.shape == expected.shape
    size = float(expected.norm())
    return float((actual - expected).norm()) / (size or 1.0)


def assert_same(actual: Tensor, expected: Tensor, what: str = "tensor", tolerance: float | None = None) -> None:
    allowed = TOLERANCES[expected.dtype] if tolerance is None else tolerance
    found = distance(actual, expected)
    assert found <= allowed, f"{what} is {found:.2e} off, {allowed:.0e} allowed"


def assert_same_gradients(actual: Gradients, expected: Gradients, tolerance: float | None = None) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        found = actual[name]
        assert (found is None) == (wanted is None), f"{name}: got {found}, expected {wanted}"
        if found is not None and wanted is not None:
            assert_same(found, wanted, name, tolerance)


def assert_literal(found: Gradients, expected: Gradients, tolerance: float | None = None) -> None:
    """As `assert_same_gradients`, where only the expected ones are looked at, none of which is missing."""
    for name, wanted in expected.items():
        assert wanted is not None
        actual = found[name]
        assert actual is not None
        assert_same(actual, wanted, name, tolerance)


def largest_distance(actual: Gradients, expected: Gradients) -> float:
    pairs = [(actual[name], wanted) for name, wanted in expected.items()]
    return max(distance(a, e) for a, e in pairs if a is not None and e is not None)


@contextmanager
def refuses(error: type[Exception], *parts: str) -> Iterator[None]:
    """Exactly this type of error is raised, and its message holds all the parts."""
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    for part in parts:
        assert part in str(caught.value), f"{part!r} is missing in: {caught.value}"


# ------------------------------------------------------------------------------------------------------------ gradients


def backward(loss: Tensor, **options: Any) -> None:
    """``loss.backward()``, which PyTorch has left without types."""
    loss.backward(**options)  # type: ignore[no-untyped-call]


def squares(output: Tensor) -> Tensor:
    """The paper's loss with a constant target; a sum, so samples do not mix."""
    return ((output - 0.3) ** 2).sum()


def gradients(model: nn.Module, inputs: Sequence[Any], loss: Callable[[Any], Tensor] = squares) -> Gradients:
    """The gradients of all parameters, by their names, and of all inputs, after one backward pass."""
    for parameter in model.parameters():
        parameter.grad = None
    arrived: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        arrived.append(x.detach().requires_grad_())
        return arrived[-1]

    arguments = pytree.tree_map(watched, tuple(inputs))
    torch.manual_seed(2)
    backward(loss(model(*arguments)))
    found: Gradients = {f"input {i}": x.grad for i, x in enumerate(arrived)}
    return found | {name: p.grad for name, p in model.named_parameters()}


def of_parameters(module: nn.Module) -> Gradients:
    return {name: p.grad for name, p in module.named_parameters()}


def both(plain: nn.Module, model: ActivationRelaxation, use: Callable[[nn.Module], Any]) -> None:
    """Does the same with a plain module and with its wrapped copy, and compares the gradients that are left."""
    use(plain)
    use(model)
    assert_same_gradients(of_parameters(model.module), of_parameters(plain))


def driven_graph(
    module: nn.Module,
    vertices: Granularity | Iterable[nn.Module],
    inputs: Sequence[Any],
    loss: Callable[[Any], Tensor] = squares,
) -> Graph:
    torch.manual_seed(2)
    recording = record(module, vertices, inputs)
    outputs: list[Tensor] = []

    def cut_off(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.requires_grad:
            return x
        outputs.append(x.detach().requires_grad_())
        return outputs[-1]

    final = loss(pytree.tree_map(cut_off, recording.result))
    recording.graph.drive_outputs(torch.autograd.grad(final, outputs, allow_unused=True))
    return recording.graph


def random_states(graph: Graph) -> States:
    return {v: torch.randn_like(v.stand_in) for v in graph.vertices}
