"""Tensors within nested arguments and results: tuples, lists, dicts, and what else PyTorch knows how to take apart.

May import: _pytorch.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import partial
from types import BuiltinMethodType, CellType, FunctionType, MethodType, MethodWrapperType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from relaxprop._pytorch import tree_leaves, tree_map, tree_parts


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


def replace_within(function: Callable[[Tensor], Tensor], nested: Any, seen: dict[int, Any]) -> Any:
    """As `map_tensors`, but lists, dicts and deques stay the same objects and are written to.

    Tuples and what else cannot be written to is built anew where a tensor in it was replaced.

    Args:
        function: makes what a tensor is replaced by.
        nested: in which.
        seen: by their ids, the lists, dicts and deques that were gone through; more are added.
    """
    if isinstance(nested, Tensor):
        return function(nested)
    if type(nested) in _WRITTEN_TO:
        if id(nested) not in seen:
            seen[id(nested)] = nested
            for key, value in _items(nested):
                replaced = replace_within(function, value, seen)
                if replaced is not value:
                    nested[key] = replaced
        return nested
    parts, rebuild = tree_parts(nested)
    if parts is None:
        return nested
    replaced = [replace_within(function, x, seen) for x in parts]
    return nested if all(a is b for a, b in zip(parts, replaced, strict=True)) else rebuild(replaced)


def rebuilt(nested: Any, copies: dict[int, Any]) -> Any:
    """``nested`` with tuples, lists and dicts of its own, which hold the same.

    Args:
        nested: of what.
        copies: by the ids of lists, dicts and deques, their copies; more are added. What is the same in two places, is
            so in the copy.
    """
    if type(nested) in _WRITTEN_TO:
        if id(nested) not in copies:
            copies[id(nested)] = own = copy(nested)
            for key, value in _items(own):
                own[key] = rebuilt(value, copies)
        return copies[id(nested)]
    if isinstance(nested, Tensor):
        return nested
    parts, rebuild = tree_parts(nested)
    return nested if parts is None else rebuild([rebuilt(x, copies) for x in parts])


_WRITTEN_TO = {list, dict, OrderedDict, defaultdict, deque}


def _items(container: Any) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, dict) else enumerate(container))


def tensors_in(nested: Any) -> list[Tensor]:
    """The tensors in ``nested``, in order."""
    if isinstance(nested, Tensor):
        return [nested]
    return [x for x in tree_leaves(nested) if isinstance(x, Tensor)]


def tensors_requiring_grad(nested: Any) -> list[Tensor]:
    """The tensors in ``nested`` that require grad, in order.

    Raises:
        TypeError: if there are such tensors in an object that PyTorch does not know how to take apart.
    """
    if isinstance(nested, Tensor):
        return [nested] if nested.requires_grad else []
    tensors = []
    for leaf in tree_leaves(nested):
        if isinstance(leaf, Tensor):
            if leaf.requires_grad:
                tensors.append(leaf)
        else:
            for place, _ in _hidden(leaf):
                raise TypeError(
                    f"PyTorch does not know where the tensors of a {type(leaf).__name__} are, as that at {place}: let "
                    "the model take and return tensors, tuples, lists, dicts or named tuples, register the class with "
                    "torch.export.register_dataclass, or pass solver=Equilibrium(), which needs not know"
                )
    return tensors


def tensors_reached(nested: Any) -> list[Tensor]:
    """As `tensors_requiring_grad`, with those in objects that PyTorch does not know how to take apart."""
    if isinstance(nested, Tensor):
        return [nested] if nested.requires_grad else []
    reached = []
    for leaf in tree_leaves(nested):
        reached += [leaf] if isinstance(leaf, Tensor) else [x for _, x in _hidden(leaf)]
    return [x for x in reached if x.requires_grad]


_PLAIN = (str, bytes, int, float, complex, type, nn.Module, nn.Parameter, np.ndarray, ModuleType)


def _hidden(outermost: Any) -> Iterator[tuple[str, Tensor]]:
    """Where tensors that require grad are in an object, by attributes, items and what a function encloses.

    Modules and their parameters are not looked for: no pass computes them.
    """
    stack = [(type(outermost).__name__, outermost)]
    seen = dict[int, Any]()
    while stack:
        place, x = stack.pop()
        if isinstance(x, _PLAIN) or id(x) in seen:
            continue
        seen[id(x)] = x
        if isinstance(x, Tensor):
            if x.requires_grad:
                yield place, x
        elif isinstance(x, Mapping):
            stack += [(f"{place}[{key!r}]", item) for key, item in x.items()]
        elif isinstance(x, list | tuple | set | frozenset | deque):
            stack += [(f"{place}[{i}]", item) for i, item in enumerate(x)]
        if not isinstance(x, Tensor):
            stack += [(f"{place}.{name}", value) for name, value in _attributes(x)]


def _attributes(x: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(x, "__dict__", {}).items()
    for kind in type(x).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(x, name):
                yield name, getattr(x, name)
    if isinstance(x, FunctionType):
        names = x.__code__.co_freevars
        yield from (
            (name, cell.cell_contents) for name, cell in zip(names, x.__closure__ or (), strict=True) if _full(cell)
        )
    elif isinstance(x, MethodType | BuiltinMethodType | MethodWrapperType):
        yield "__self__", x.__self__
    elif isinstance(x, partial):
        yield from (("func", x.func), ("args", x.args), ("keywords", x.keywords))


def _full(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
