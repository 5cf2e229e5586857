"""A module that stands in the place of another: with its names, attributes, methods, signature and class.

Tools know a model by these: optimisers and checkpoints by the names of parameters, Hugging Face's Trainer by the
signature of ``forward`` and by ``isinstance``, PEFT by submodules that it replaces, `torch.distributed` by all of them.

May import: _pytorch.
"""

from __future__ import annotations

import copy
import inspect
from contextlib import suppress
from functools import wraps
from typing import Any, cast

from torch import Tensor, nn

from relaxprop._pytorch import is_opaque


def _of_module(name: str) -> Any:
    """An attribute of every module that the wrapper has in common with its own."""

    def get(self: Transparent) -> Any:
        return getattr(self.module, name)

    def put(self: Transparent, value: Any) -> None:
        setattr(self.module, name, value)

    return property(get, put)


class Transparent(nn.Module):
    """Stands in the place of ``module``, which it leaves as it is.

    Parameters, buffers and submodules are the module's own, under its own names. Attributes are read from it and set on
    it, but for those that the class of the wrapper, or `torch.nn.Module`, defines. A method of the module that is
    called here sees the wrapper as ``self``, so that a call of ``self(…)`` within it is a call of the wrapper. The
    class of the wrapper is made for it, and derives from the module's.

    Attributes:
        module: the plain module.
    """

    module: nn.Module
    __call__ = nn.Module.__call__  # the module's class may have one of its own

    # PyTorch may give a module other dicts (``del sequential[1]`` does), so they are asked for each time.
    training = _of_module("training")
    _parameters = _of_module("_parameters")
    _buffers = _of_module("_buffers")
    _modules = _of_module("_modules")
    _non_persistent_buffers_set = _of_module("_non_persistent_buffers_set")
    _state_dict_hooks = _of_module("_state_dict_hooks")
    _state_dict_pre_hooks = _of_module("_state_dict_pre_hooks")
    _load_state_dict_pre_hooks = _of_module("_load_state_dict_pre_hooks")
    _load_state_dict_post_hooks = _of_module("_load_state_dict_post_hooks")

    def __init__(self, module: nn.Module) -> None:
        # Past nn.Module.__init__: the module's class may have another, which takes other arguments.
        own = {name: value for name, value in vars(nn.Module()).items() if not hasattr(Transparent, name)}
        vars(self).update(own, module=module)
        _stand_in_for(self, type(module))

    def __getattr__(self, name: str) -> Any:
        # Reached only for what neither the instance nor its classes have. A copy in the making has no module yet.
        if "module" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "module":
            raise AttributeError("module cannot be set: wrap the other module anew")
        if self._is_own(name, value):
            object.__setattr__(self, name, value)
        else:
            setattr(self.module, name, value)

    def _is_own(self, name: str, value: object) -> bool:
        """Whether an attribute that is set is the wrapper's, and not the module's.

        What replaces a method of every module (``forward``), and a method of the wrapper that is kept under another
        name, would make the module call the wrapper, which calls the module.
        """
        if isinstance(value, nn.Module | Tensor):
            return False
        return name in vars(self) or hasattr(nn.Module, name) or getattr(value, "__self__", None) is self

    def __delattr__(self, name: str) -> None:
        if name in vars(self) and name != "module":
            object.__delattr__(self, name)
        else:
            delattr(self.module, name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.module)})

    def __repr__(self) -> str:
        lines = [self.extra_repr(), *repr(self.module).splitlines()]
        return "\n  ".join([f"{_wrapper_of(type(self)).__name__}(", *filter(None, lines)]) + "\n)"

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As the module's own method."""
        self.module.register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As the module's own method."""
        self.module.register_buffer(name, tensor, persistent)

    def get_submodule(self, target: str) -> nn.Module:
        """The module's own submodule; the wrapper itself for the empty name."""
        return self.module.get_submodule(target) if target else self

    def _replicate_for_data_parallel(self) -> Any:
        raise NotImplementedError(
            "torch.nn.DataParallel copies the wrapper, but not the module that it calls: use "
            "torch.nn.parallel.DistributedDataParallel, which PyTorch recommends in its place"
        )

    # The class is made for this wrapper, so a copy, or a file, needs to know how.

    def __getstate__(self) -> dict[str, Any]:
        return nn.Module.__getstate__(self)  # type: ignore[no-untyped-call, no-any-return]

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = copied = _blank(_wrapper_of(type(self)), type(self.module))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (_wrapper_of(type(self)), type(self.module)), self.__getstate__()


def _stand_in_for(made: Transparent, kind: type[nn.Module]) -> None:
    """Gives a wrapper a class in the place of the module's: one that derives from it, where there can be one."""
    wrapper = type(made)
    plain = getattr(kind, "forward", nn.Module.__call__)  # a scripted module's is each instance's own

    @wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper.forward(self, *args, **kwargs)

    vars(forward).update(vars(wrapper.forward))
    # Accelerate takes its own forward off by following __wrapped__ to the end, which would be the plain module's.
    del forward.__wrapped__
    cast(Any, forward).__signature__ = inspect.signature(plain)

    def new(cls: type, *args: Any, **kwargs: Any) -> nn.Module:
        return kind(*args, **kwargs)  # what a class method of the module makes is a plain module

    known = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    content = {**known, "__new__": new, "forward": forward, "_wrapper": wrapper}
    # A class may ask its subclasses for arguments or have slots, and a module may be more than its class says.
    for bases in ((wrapper,),) if is_opaque(kind) else ((wrapper, kind), (wrapper,)):
        with suppress(TypeError):
            cast(Any, made).__class__ = cast(Any, type(bases[-1]))(kind.__name__, bases, content)
            return


def _wrapper_of(kind: type[Transparent]) -> type[Transparent]:
    """The class that a class of wrappers was made for."""
    return getattr(kind, "_wrapper", kind)


def _blank(wrapper: type[Transparent], kind: type[nn.Module]) -> Transparent:
    """A wrapper whose state is to come."""
    made = object.__new__(wrapper)
    _stand_in_for(made, kind)
    return made
