"""A module's class with one thing changed, switched on and off in place: the module stays the same object, with its
parameters, its name and its hooks, and is copied and pickled as ever.

May import: nothing of this project.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class Variant(nn.Module):
    """Base of the classes that are mixed in ahead of a module's own class."""

    prefix: str  # of the name that ``print`` shows

    @classmethod
    def switch_on(cls, module: nn.Module) -> None:
        """Mixes this class in ahead of the module's own."""
        module.__class__ = _mixed(cls, plain_class(module))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, type(self).__bases__, self.__getstate__()  # type: ignore[no-untyped-call]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's own class, whether or not a variant is switched on."""
    kind = type(module)
    return kind.__bases__[1] if issubclass(kind, Variant) else kind


def switch_off(module: nn.Module) -> None:
    """Gives the module its own class back."""
    module.__class__ = plain_class(module)


def _mixed(variant: type[Variant], base: type[nn.Module]) -> type[nn.Module]:
    if (variant, base) not in _MIXED:
        name, home = f"{variant.prefix}{base.__name__}", base.__module__
        _MIXED[variant, base] = type(name, (variant, base), {"__module__": home})
    return _MIXED[variant, base]


_MIXED: dict[tuple[type[Variant], type[nn.Module]], type[nn.Module]] = {}


def _new(variant: type[Variant], base: type[nn.Module]) -> nn.Module:
    kind = _mixed(variant, base)
    return kind.__new__(kind)
