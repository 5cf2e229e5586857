"""Which parts of a model are vertices: operations, or the modules whose outputs relax.

May import: _pytorch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from threading import local
from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from relaxprop._pytorch import has_hooks, hook_calls, unhook_calls

Granularity = Literal["activations", "modules", "operations"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)

ALLOWED = "vertices must be 'activations', 'modules', 'operations' or an iterable of the model's submodules"


def find_vertices(module: nn.Module, vertices: Granularity | Iterable[nn.Module]) -> dict[nn.Module, str]:
    """The modules whose outputs are vertices, with their names in ``module``.

    Args:
        vertices: "activations" (the paper's layers: modules of a class that is defined in a file of activations, as
            ``torch.nn.modules.activation`` and ``transformers.activations``), "modules" (every module without
            submodules, and every scripted one, whose inside cannot be seen), "operations" (every operation, whatever
            module makes it: no modules), or an iterable of submodules.

    Raises:
        ValueError: if the word is unknown, a module is not part of ``module``, or there is no vertex.
        TypeError: if it is anything else.
    """
    return choose_vertices(module, named_parts(module), vertices)


def choose_vertices(
    module: nn.Module, parts: Mapping[nn.Module, str], vertices: Granularity | Iterable[nn.Module]
) -> dict[nn.Module, str]:
    """As `find_vertices`, given the `named_parts` of ``module``."""
    if isinstance(vertices, str):
        if vertices not in GRANULARITIES:
            raise ValueError(f"{ALLOWED}, got {vertices!r}")
        if are_operations(vertices):
            return {}
        is_vertex = is_activation if vertices == "activations" else _is_one_piece
        found = {m: name for m, name in parts.items() if is_vertex(m)}
    else:
        if not isinstance(vertices, Iterable) or isinstance(vertices, nn.Module):
            raise TypeError(f"{ALLOWED}, got {type(vertices).__name__}")
        found = {}
        for submodule in vertices:
            if not isinstance(submodule, nn.Module):
                raise TypeError(f"{ALLOWED}, got {submodule!r} in it")
            if submodule not in parts:
                raise ValueError(
                    f"{ALLOWED}, got a {type(submodule).__name__} that is not part of the {type(module).__name__}"
                )
            found[submodule] = parts[submodule]
    if not found:
        raise ValueError(
            f"vertices={vertices!r} finds no vertex in {type(module).__name__}: pass vertices='modules' (the output of "
            "every module without submodules), 'operations', or an iterable of the submodules whose outputs should "
            "relax"
        )
    return found


def are_operations(vertices: object) -> bool:
    """Whether every operation is a vertex."""
    return isinstance(vertices, str) and vertices == "operations"


def is_activation(module: nn.Module) -> bool:
    """Whether the module's class, or one that it derives from, is defined in a file of activations."""
    kind = type(module)
    known = _ACTIVATIONS.get(kind)
    if known is None:
        homes = {c.__module__.rpartition(".")[2] for c in kind.__mro__}
        known = bool(homes & {"activation", "activations"}) and not issubclass(kind, nn.MultiheadAttention)
        _ACTIVATIONS[kind] = known
    return known


_ACTIVATIONS: dict[type[nn.Module], bool] = {}


def does_as_its_class_says(module: nn.Module) -> bool:
    """Whether a call of the module does nothing but compute its output: what else it did would happen once only.

    PyTorch's own layers do; another class says so of its own by ``only_computes = True``.
    """
    kind = type(module)
    known = kind.__module__.startswith("torch.nn.") or vars(kind).get("only_computes", False)
    return known and not has_hooks(module) and "forward" not in vars(module) and _has_no_submodules(module)


def find_layers(module: nn.Module) -> list[nn.Module]:
    """The modules with parameters of their own; what computes a parametrized weight is part of its layer."""
    modules = list(module.modules())
    parametrized = [m for m in modules if "parametrizations" in m._modules and is_parametrized(m)]
    within = {part for m in parametrized for part in cast(nn.Module, m.parametrizations).modules()}
    return [m for m in modules if (m._parameters or m in parametrized) and m not in within]


def _has_no_submodules(module: nn.Module) -> bool:
    return all(child is None for child in module._modules.values())


def _is_one_piece(module: nn.Module) -> bool:
    return _has_no_submodules(module) or isinstance(module, torch.jit.ScriptModule)


def named_parts(module: nn.Module) -> dict[nn.Module, str]:
    """The modules by name, ``module`` itself by its class's, but for those within scripted ones, where no hook runs.

    ``named_modules`` would cost as much as a small layer in every forward pass.
    """
    parts = {module: type(module).__name__}
    if not isinstance(module, torch.jit.ScriptModule):
        _add_children(module, "", parts)
    return parts


def _add_children(module: nn.Module, prefix: str, parts: dict[nn.Module, str]) -> None:
    for name, child in module._modules.items():
        if child is not None and child not in parts:
            parts[child] = prefix + name
            if child._modules and not isinstance(child, torch.jit.ScriptModule):
                _add_children(child, f"{prefix}{name}.", parts)


class Hooked:
    """A context within which ``hook(module, args, output)`` follows every call of the modules, in its own thread.

    The modules may be shared: another thread calls them as they are, and so does another run that is started within
    this one. A copy of a module that is made meanwhile, or a file, gets a hook that does nothing.

    Args:
        modules: whose calls are followed.
        hook: what follows them.
        run: what the calls belong to; those that are made while another run is on are not followed. By default this
            context is a run of its own.
    """

    def __init__(
        self, modules: Collection[nn.Module], hook: Callable[[nn.Module, Any, Any], Any], run: object = None
    ) -> None:
        self.modules = modules
        self.hook = hook
        self.run = self if run is None else run

    def __enter__(self) -> None:
        self._outer = getattr(_now, "run", None)
        _now.run = self.run
        hook_calls(self.modules, self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.hook(module, args, output) if getattr(_now, "run", None) is self.run else None

    def __exit__(self, *_: object) -> None:
        _now.run = self._outer
        unhook_calls(self.modules, self)

    def __reduce__(self) -> Any:
        return _NoHook, ()


class _NoHook:
    """What a copy has of a hook that was there for a run only."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        pass


_now = local()  # what runs in this thread
