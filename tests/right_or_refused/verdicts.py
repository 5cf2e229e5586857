"""What every case is judged by: its value is right, or it is refused by name with a way out; it is never silent."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Found = Mapping[str, Tensor | None]

REFUSALS = (ValueError, RuntimeError, TypeError)
TOLERANCE = 1e-11
_WAY_OUT = re.compile(
    r"\b(pass|call|use|detach|wrap|register|return|let|leave|make|set|give|take|move|apply|remove|run|keep|skip|work)\b",
    re.IGNORECASE,
)


def squares(y: Tensor) -> Tensor:
    return (y - 0.3).square().sum()


def gradients(model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] = squares, **kwargs: Any) -> Found:
    """Of all parameters, by their names in the plain module, after one ``loss.backward()``."""
    model.zero_grad()
    loss(model(*inputs, **kwargs)).backward()  # type: ignore[no-untyped-call]
    return named_gradients(model)


def named_gradients(model: nn.Module) -> Found:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same(found: Found, expected: Found) -> None:
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        gradient = found[name]
        if exact is None or gradient is None:
            assert exact is None or not exact.count_nonzero(), f"{name} has no gradient"
            assert gradient is None or not gradient.count_nonzero(), f"{name} has a gradient, but should not"
            continue
        distance = float((gradient - exact).norm()) / (float(exact.norm()) or 1.0)
        assert distance <= TOLERANCE, f"{name} is {distance:.2e} off"


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the last bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def check_refused(error: BaseException, *names: str) -> None:
    """The message, notes included, has one of the names as a word of its own and offers a way out."""
    message = "\n".join([str(error), *getattr(error, "__notes__", ())])
    words = "|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in names)
    assert re.search(words, message), f"{type(error).__name__} names none of {names}: {message}"
    assert _WAY_OUT.search(message), f"{type(error).__name__} offers no way out: {message}"


def right_or_refused(attempt: Callable[[], Found], expected: Found, *names: str) -> bool:
    """Whether the attempt gave the right gradients; if not, it was refused by one of the names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning is no excuse for a wrong value
        try:
            found = attempt()
        except REFUSALS as error:
            check_refused(error, *names)
            return False
    assert_same(found, expected)
    return True
