"""Tensors within nested arguments and results: tuples, lists, dicts, and what else PyTorch knows how to take apart.

May import: _pytorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from relaxprop._pytorch import tree_leaves, tree_map


def map_tensors(function: Callable[[Tensor], Tensor], nested: Any) -> Any:
    """``nested`` with every tensor in it replaced by what the function makes of it, in order; itself where none is."""
    if isinstance(nested, Tensor):  # the usual case, without the price of taking structures apart
        return function(nested)
    replaced = False

    def mapped(x: Any) -> Any:
        nonlocal replaced
        if not isinstance(x, Tensor):
            return x
        y = function(x)
        replaced = replaced or y is not x
        return y

    result = tree_map(mapped, nested)
    return result if replaced else nested


def rebuilt(nested: Any) -> Any:
    """``nested`` with tuples, lists and dicts of its own, which hold the same."""
    return tree_map(lambda x: x, nested)


def tensors_in(nested: Any) -> list[Tensor]:
    """The tensors in ``nested``, in order."""
    return [x for x in tree_leaves(nested) if isinstance(x, Tensor)]


def tensors_requiring_grad(nested: Any) -> list[Tensor]:
    """The tensors in ``nested`` that require grad, in order.

    Raises:
        TypeError: there are such tensors in an object that PyTorch does not know how to take apart.
    """
    if isinstance(nested, Tensor):
        return [nested] if nested.requires_grad else []
    tensors = []
    for leaf in tree_leaves(nested):
        if isinstance(leaf, Tensor):
            if leaf.requires_grad:
                tensors.append(leaf)
        elif any(isinstance(x, Tensor) and x.requires_grad for x in getattr(leaf, "__dict__", {}).values()):
            raise TypeError(
                f"PyTorch does not know where the tensors of a {type(leaf).__name__} are: let the model take and "
                "return tensors, tuples, lists, dicts or named tuples, or register the class with "
                "torch.export.register_dataclass"
            )
    return tensors
