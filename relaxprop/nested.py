"""Tensors within nested arguments and results: tuples, lists, dicts, and what else PyTorch knows how to take apart.

May import: _pytorch.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from copy import copy
from functools import partial
from types import BuiltinMethodType, CellType, FunctionType, MethodType, MethodWrapperType, ModuleType
from typing import Any, NamedTuple

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


def rebuilt(nested: Any, copies: dict[int, Any], *, arrays: bool = False) -> Any:
    """``nested`` with tuples, lists and dicts of its own, which hold the same.

    Args:
        nested: of what.
        copies: by the ids of lists, dicts and deques, their copies; more are added. What is the same in two places, is
            so in the copy.
        arrays: whether arrays of NumPy are copied too, whose writes nobody counts.
    """
    if arrays and type(nested) is np.ndarray:
        return copies.setdefault(id(nested), nested.copy())
    if type(nested) in _WRITTEN_TO:
        if id(nested) not in copies:
            copies[id(nested)] = own = copy(nested)
            for key, value in _items(own):
                own[key] = rebuilt(value, copies, arrays=arrays)
        return copies[id(nested)]
    if isinstance(nested, Tensor):
        return nested
    parts, rebuild = tree_parts(nested)
    return nested if parts is None else rebuild([rebuilt(x, copies, arrays=arrays) for x in parts])


_WRITTEN_TO = {list, dict, OrderedDict, defaultdict, deque}


def _items(container: Any) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, dict) else enumerate(container))


def tensors_in(nested: Any) -> list[Tensor]:
    """The tensors in ``nested``, in order."""
    if isinstance(nested, Tensor):
        return [nested]
    return [x for x in tree_leaves(nested) if isinstance(x, Tensor)]


def tensors_requiring_grad(nested: Any) -> list[Tensor]:
    """The tensors in ``nested`` that require grad, in the order in which `map_requiring_grad` replaces them.

    Raises:
        TypeError: if there are such tensors where nothing can be put in their place.
    """
    if isinstance(nested, Tensor):
        return [nested] if nested.requires_grad else []
    tensors = []
    for leaf in tree_leaves(nested):
        if isinstance(leaf, Tensor):
            if leaf.requires_grad:
                tensors.append(leaf)
        else:
            for hidden in _hidden(leaf):
                if hidden.put is None:
                    raise TypeError(
                        f"nothing can be put in the place of the tensor at {hidden.place}, in a "
                        f"{type(leaf).__name__} that PyTorch does not know how to take apart: let the model return "
                        "tensors, tuples, lists, dicts, named tuples or objects with attributes, register the class "
                        "with torch.export.register_dataclass, or pass solver=Equilibrium(), which needs not know"
                    )
                tensors.append(hidden.tensor)
    return tensors


def map_requiring_grad(function: Callable[[Tensor], Tensor], nested: Any) -> Any:
    """``nested`` with every tensor in it that requires grad replaced by what the function makes of it, in order.

    An object that PyTorch does not know how to take apart, as a cache of keys and values, stays the same object.
    """

    def mapped(x: Tensor) -> Tensor:
        return function(x) if x.requires_grad else x

    if isinstance(nested, Tensor):
        return mapped(nested)

    def mapped_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return mapped(leaf)
        for hidden in list(_hidden(leaf)):
            if hidden.put is not None:
                hidden.put(function(hidden.tensor))
        return leaf

    return tree_map(mapped_leaf, nested)


def tensors_reached(nested: Any) -> list[Tensor]:
    """As `tensors_requiring_grad`, with those that cannot be replaced."""
    if isinstance(nested, Tensor):
        return [nested] if nested.requires_grad else []
    reached: list[Tensor] = []
    for leaf in tree_leaves(nested):
        reached += [leaf] if isinstance(leaf, Tensor) else [hidden.tensor for hidden in _hidden(leaf)]
    return [x for x in reached if x.requires_grad]


_PLAIN = (str, bytes, int, float, complex, type, nn.Module, nn.Parameter, np.ndarray, ModuleType)

Put = Callable[[Any], None] | None  # puts something else in a place; None where nothing can be put


class _Hidden(NamedTuple):
    """A tensor that requires grad, in an object."""

    place: str
    tensor: Tensor
    put: Put


def _hidden(outermost: Any) -> Iterator[_Hidden]:
    """The tensors that require grad in an object, by attributes, items and what a function encloses.

    Modules and their parameters are not looked for: no pass computes them.
    """
    stack: list[tuple[str, Any, Put]] = [(type(outermost).__name__, outermost, None)]
    seen = dict[int, Any]()
    while stack:
        place, x, put = stack.pop()
        if isinstance(x, _PLAIN):
            continue
        if isinstance(x, Tensor):
            if x.requires_grad:
                yield _Hidden(place, x, put)
        elif id(x) not in seen:
            seen[id(x)] = x
            stack += [(f"{place}{step}", value, put) for step, value, put in _within(x)]


def _within(x: Any) -> Iterator[tuple[str, Any, Put]]:
    """One step into an object: how to get there, what is there, and how to put something else there."""
    if isinstance(x, Mapping):
        for key, item in list(x.items()):
            yield f"[{key!r}]", item, partial(x.__setitem__, key) if isinstance(x, MutableMapping) else None
    elif isinstance(x, list | tuple | set | frozenset | deque):
        for i, item in enumerate(x):
            yield f"[{i}]", item, partial(x.__setitem__, i) if isinstance(x, list | deque) else None
    own = getattr(x, "__dict__", {})
    for name, value in list(own.items()):
        yield f".{name}", value, partial(own.__setitem__, name) if isinstance(own, dict) else None
    for kind in type(x).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(x, name):
                yield f".{name}", getattr(x, name), partial(object.__setattr__, x, name)
    if isinstance(x, FunctionType):
        names = x.__code__.co_freevars
        for name, cell in zip(names, x.__closure__ or (), strict=True):
            if _full(cell):
                yield f".{name}", cell.cell_contents, None
    elif isinstance(x, MethodType | BuiltinMethodType | MethodWrapperType):
        yield ".__self__", x.__self__, None
    elif isinstance(x, partial):
        yield from ((".func", x.func, None), (".args", x.args, None), (".keywords", x.keywords, None))


def _full(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
