"""A module's class with one thing changed, switched on and off in place: the module stays the same object, with its
parameters, its name and its hooks, and is copied and pickled as ever.

``torch.nn.utils.parametrize`` changes a module's class as well, and takes that class's first base for what the module
was before. So a variant always goes beneath that class: either of the two can be put on or taken off first.

May import: nothing of this project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations


class Variant(nn.Module):
    """Base of the classes that are mixed in ahead of a module's own class."""

    prefix: str  # of the name that ``print`` shows

    @classmethod
    def switch_on(cls, module: nn.Module) -> None:
        """Mixes this class in ahead of the module's own."""
        _set_class(module, _mixed(cls, plain_class(module)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, type(self).__bases__, self.__getstate__()  # type: ignore[no-untyped-call]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's own class, whether or not a variant is switched on or a parameter is parametrized."""
    kind: type[nn.Module] = type_before_parametrizations(module)
    return kind.__bases__[1] if issubclass(kind, Variant) else kind


def switch_off(module: nn.Module) -> None:
    """Gives the module its own class back."""
    _set_class(module, plain_class(module))


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Sequence[Any], Mapping[str, Any]]:
    """What a layer is called with, taken apart: its input, by place or by whatever name its forward pass has for it,
    and the other arguments.

    Raises:
        TypeError: if there is no tensor.
    """
    if args:
        return args[0], args[1:], kwargs
    name = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
    if name is None:
        raise TypeError("the layer was called without a tensor: pass its input as the first argument")
    return kwargs[name], args, {other: value for other, value in kwargs.items() if other != name}


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    if is_parametrized(module):
        # PyTorch makes such a class for each module, with a property for each parametrized tensor.
        kind = type(f"Parametrized{kind.__name__}", (kind,), dict(vars(type(module))))
    module.__class__ = kind


def _mixed(variant: type[Variant], base: type[nn.Module]) -> type[nn.Module]:
    if (variant, base) not in _MIXED:
        name, home = f"{variant.prefix}{base.__name__}", base.__module__
        _MIXED[variant, base] = type(name, (variant, base), {"__module__": home})
    return _MIXED[variant, base]


_MIXED: dict[tuple[type[Variant], type[nn.Module]], type[nn.Module]] = {}


def _new(variant: type[Variant], base: type[nn.Module]) -> nn.Module:
    kind = _mixed(variant, base)
    return kind.__new__(kind)
