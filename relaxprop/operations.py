"""Every operation of a forward pass, seen as the model makes it, whether in modules or in functional code.

An operation is a call of a PyTorch function: ``F.linear``, ``a + b``, ``torch.cat``. What gives no new tensor is part
of the operation that reads it next: a view (``x.T``, ``x[:, 0]``, ``reshape``), a write in place (``x += y``), the same
tensor once more (``contiguous``). So are the results of an ``autograd.Function`` and of a scripted module, which
PyTorch announces to nobody. What a function is composed of inside, as in ``nn.MultiheadAttention`` and ``nn.LSTM``, is
one operation.
Source: Millidge et al., arXiv 2010.06219, Appendix A, where every vertex of the computation graph relaxes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_DIFFERENTIATING = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


class EachOperation(TorchFunctionMode):
    """Within it, the model goes on with what ``replace(result, name)`` makes of every operation's results.

    Args:
        replace: called with a tensor that requires grad and the operation's name.

    Raises:
        ValueError: within it, the model differentiates by itself, or is compiled.
    """

    def __init__(self, replace: Callable[[Tensor, str], Tensor]) -> None:
        super().__init__()
        self.replace = replace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DIFFERENTIATING:
            raise _refused(f"the model calls {func.__name__} in its forward pass, which would end at the next vertex")
        # PyTorch has no public name for "is this inside of vmap, grad or another transform?"
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise _refused("the model uses a transform of torch.func, whose tensors cannot be cut")
        if torch.compiler.is_compiling():
            raise _refused("the model is compiled, so that its operations are made out of sight")
        result = func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return result
        if isinstance(result, Tensor):  # the usual case, without the price of taking structures apart
            return self._replaced(result, func, args, kwargs) if result.requires_grad else result
        if not isinstance(result, tuple | list):
            return result
        return pytree.tree_map(
            lambda x: self._replaced(x, func, args, kwargs) if isinstance(x, Tensor) and x.requires_grad else x, result
        )

    def _replaced(self, result: Tensor, func: Any, args: Any, kwargs: Any) -> Tensor:
        if result.is_leaf or result._is_view() or any(x is result for x in pytree.arg_tree_leaves(*args, **kwargs)):
            return result
        return self.replace(result, _name(func))


def _name(func: Any) -> str:
    name: str = func.__name__
    if name == "__get__":  # of a property, as in x.real
        return str(func.__self__.__name__)
    return name.strip("_")


def _refused(reason: str) -> ValueError:
    return ValueError(
        f"vertices='operations': {reason}: pass vertices='modules', 'activations', or the submodules whose outputs "
        "should relax"
    )
