"""Every operation of a forward pass, seen as the model makes it, whether in modules or in functional code.

An operation is a call of a PyTorch function: ``F.linear``, ``a + b``, ``torch.cat``. What gives no new tensor is part
of the operation that reads it next: a view of what it is given (``x.T``, ``x[:, 0]``, ``reshape``), a write in place
(``x += y``), the same tensor once more (``contiguous``). So are sparse tensors, and the results of an
``autograd.Function`` and of a scripted module, which PyTorch announces to nobody. What a function is composed of
inside, as in ``nn.MultiheadAttention`` and ``nn.LSTM``, is one operation. Compiled parts of the model run uncompiled.
Source: Millidge et al., arXiv 2010.06219, Appendix A, where every vertex of the computation graph relaxes.

May import: _pytorch, sight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from relaxprop._pytorch import (
    arg_tree_leaves,
    base,
    higher_order,
    in_transform,
    is_view,
    switches_gradients,
    tree_map,
)
from relaxprop.sight import refuse_nested_differentiation, uncompiled

_DENSE = (torch.strided, torch.jagged)


class EachOperation(TorchFunctionMode):
    """Within it, the model goes on with what ``replace(result, name)`` makes of every operation's results.

    Args:
        replace: called with a tensor that requires grad and the operation's name.
        model: the name of the model's class where the graph is cut there, None where it is not.

    Raises:
        ValueError: within it, if the graph is cut and the model uses a transform of torch.func, or if the model calls
            torch.cond or another operator of higher order.
    """

    def __init__(self, replace: Callable[[Tensor, str], Tensor], *, model: str | None = None) -> None:
        super().__init__()
        self.replace = replace
        self.model = model

    def __enter__(self) -> EachOperation:
        uncompiled.__enter__()  # compiled code announces nothing
        self._enabled = torch.is_grad_enabled()  # as the model has last set it, an autograd.Function aside
        self._in_function = False
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        uncompiled.__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if switches_gradients(func):
            self._note_gradients(args[0])
        if self._in_function:
            return func(*args, **kwargs)
        if (name := higher_order(func)) is not None:  # its backward fails where its branches are not compiled
            raise ValueError(
                f"the model calls torch.{name}, whose branches are compiled and announce no operations: pass "
                "vertices='activations', or let the model choose by torch.where"
            )
        transformed = in_transform()
        if transformed and self.model is not None:
            refuse_nested_differentiation(self.model)
        result = func(*args, **kwargs)
        if transformed or not torch.is_grad_enabled():
            return result
        if isinstance(result, Tensor):  # the usual case, without the price of taking structures apart
            return self._replaced(result, func, args, kwargs) if result.requires_grad else result
        if not isinstance(result, tuple | list):
            return result
        return tree_map(
            lambda x: self._replaced(x, func, args, kwargs) if isinstance(x, Tensor) and x.requires_grad else x, result
        )

    def _note_gradients(self, enabled: bool) -> None:
        """Gradients that are enabled, where the model has not disabled them itself, are those of an autograd.Function's
        forward: it differentiates what it records by itself, so nothing is cut there."""
        if enabled and self._enabled and not torch.is_grad_enabled():
            self._in_function = True
        elif self._in_function and not enabled:
            self._in_function = False
        else:
            self._enabled = enabled

    def _replaced(self, result: Tensor, func: Any, args: Any, kwargs: Any) -> Tensor:
        if result.is_leaf or result.layout not in _DENSE:
            return result
        read = [x for x in arg_tree_leaves(*args, **kwargs) if isinstance(x, Tensor)]
        # A function may return a view of what it has computed inside: that is new.
        if any(x is result for x in read) or (is_view(result) and any(base(x) is base(result) for x in read)):
            return result
        return self.replace(result, _name(func))


def _name(func: Any) -> str:
    name: str = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":  # of a property, as in x.real
        return str(func.__self__.__name__)
    return name.strip("_")
