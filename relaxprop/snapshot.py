"""A model as it was at a moment: what another run of it has to find, and what that run must leave alone.

That is, of every module, the mode, the buffers and the plain attributes (a membrane potential, a counter, a list, a
generator of its own), and the generators that all models share: PyTorch's, NumPy's and Python's.

Within such a run copies stand in the places of the model's own objects. Nothing is ever copied back into them: a tensor
that was written to could break a backward pass that has saved it, and whoever else holds a list or a buffer goes on
holding the model's own.

Out of reach is what a closure, a class or a hook keeps; an object that refuses to be copied is shared by all runs. Who
runs a model again compares the two runs, therefore.

May import: _pytorch.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from relaxprop._pytorch import deepcopy, is_capturing, nothing_cached

# Parameters are the optimiser's, and what a module is made of is no state. The mode is set by the module's own way.
_STRUCTURE = frozenset(vars(nn.Module()))
_NO_STATE = {bool, int, float, complex, str, type(None)}  # most attributes are such


class Snapshot:
    """What a model's modules and all generators hold now.

    Args:
        module: the model.
        inputs: tensors that it is called with: their devices have generators, too.

    Attributes:
        devices: the numbers of the CUDA devices that the model uses.
        shared: the names of the attributes that could not be copied.
        beside: parameters that are kept beside the module tree, in a list or an object, and want their gradients too.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor] = ()) -> None:
        self._modules = {m: f"{name}." if name else "" for name, m in module.named_modules()}
        parameters = [p for m in self._modules for p in m._parameters.values() if p is not None]
        self.devices = sorted({x.get_device() for x in (*parameters, *inputs) if x.is_cuda})
        self.shared: list[str] = []
        self.beside: Sequence[Tensor] = ()
        self._same: dict[int, Any] = {id(x): x for x in (*self._modules, *parameters)}  # in every copy
        self._parameters: list[_Held] = []
        self._modes = self._present_modes()
        self._held = self._copied(self._present())
        # During the capture of a CUDA graph nobody may ask a GPU's generator: `Rerun` refuses models that draw there.
        asked = () if is_capturing() else self.devices
        self._generators = [_Generator(get, put, get()) for get, put in _generators(asked)]

    def passed(self) -> bool:
        """After a pass: whether any generator has drawn. Those that have not, need not be put back.

        The parameters that are put back are those that are there now: `torch.func.functional_call` gives a module
        others for one pass.
        """
        self._parameters = self._present_parameters()
        self._generators = [generator for generator in self._generators if generator.has_drawn()]
        return bool(self._generators)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within it, a run of the model finds what was there at the moment; afterwards all is as it was before."""
        present, modes = self._present(), self._present_modes()
        parameters = self._present_parameters()
        # Before the first pass has ended there are none to compare with.
        others = [then for then, now in zip(self._parameters, parameters, strict=False) if not _is_same(then, now)]
        generators = [generator.now() for generator in self._generators]
        try:
            _set_modes(self._modes)
            for _, place, held in (*self._copied(self._held), *others):
                _put(place, held)
            for generator in self._generators:
                generator.put(generator.state)
            with nothing_cached():
                yield
        finally:
            for generator in generators:
                generator.put(generator.state)
            for _, place, held in (*present, *(parameters if others else ())):
                _put(place, held)
            _set_modes(modes)

    def _present_modes(self) -> list[tuple[nn.Module, bool]]:
        return [(m, m.training) for m in self._modules]

    def _present(self) -> list[_Held]:
        present = []
        for module, owner in self._modules.items():
            present.append(_Held(owner, module._buffers, dict(module._buffers.items())))
            if not isinstance(module, torch.jit.ScriptModule):  # its attributes are compiled
                own = vars(module)
                present.append(_Held(owner, own, {n: x for n, x in own.items() if n not in _STRUCTURE}))
        return present

    def _present_parameters(self) -> list[_Held]:
        return [
            _Held(owner, module._parameters, dict(module._parameters))
            for module, owner in self._modules.items()
            if not isinstance(module, torch.jit.ScriptModule)
        ]

    def _copied(self, present: Sequence[_Held]) -> list[_Held]:
        """One copy of all: what two modules share, their copies share as well."""
        memo: dict[int, Any] = dict(self._same)
        with _TensorsInGraphsShared():
            copied = [
                _Held(owner, place, {name: self._copy(value, memo, owner + name) for name, value in held.items()})
                for owner, place, held in present
            ]
        # A parameter copies itself without asking anybody; the memo keeps what was copied.
        beside = [x for x in memo.get(id(memo), ()) if isinstance(x, nn.Parameter) and x.requires_grad]
        if not beside or self.beside:
            return copied
        self.beside = beside
        self._same |= {id(x): x for x in beside}
        return self._copied(present)

    def _copy(self, value: Any, memo: dict[int, Any], name: str) -> Any:
        if type(value) in _NO_STATE:
            return value
        known = len(memo)
        try:
            return deepcopy(value, memo)
        except Exception:  # whatever the class of a user's object raises
            while len(memo) > known:  # halves of copies
                memo.popitem()
            if name not in self.shared:
                self.shared.append(name)
            return value


class _Held(NamedTuple):
    """What a module holds by name, as buffers or as plain attributes.

    Attributes:
        owner: the beginning of their full names.
        place: where the module itself looks for them.
        held: what is, or was, or is to be there.
    """

    owner: str
    place: MutableMapping[str, Any]
    held: Mapping[str, Any]


def _is_same(one: _Held, other: _Held) -> bool:
    return one.held.keys() == other.held.keys() and all(map(is_, one.held.values(), other.held.values()))


def _put(place: MutableMapping[str, Any], held: Mapping[str, Any]) -> None:
    for name in place.keys() - held.keys() - _STRUCTURE:
        del place[name]
    for name, value in held.items():
        place[name] = value


def _set_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        if module.training != training:
            module.training = training


class _TensorsInGraphsShared(TorchFunctionMode):
    """Within it, a copy of what holds tensors that require grad holds the same ones: they are parts of graphs, which
    cannot be copied, or leaves whose gradient is wanted."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and args[0].requires_grad:
            return args[0]
        return func(*args, **(kwargs or {}))


class _Generator(NamedTuple):
    """A generator of random numbers that all share, and its state at a moment."""

    get: Callable[[], Any]
    put: Callable[[Any], None]
    state: Any

    def now(self) -> _Generator:
        return self._replace(state=self.get())

    def has_drawn(self) -> bool:
        now = self.get()
        return not torch.equal(now, self.state) if isinstance(now, Tensor) else bool(now != self.state)


def _numpy_state() -> bytes:
    return pickle.dumps(np.random.get_state(legacy=False))  # noqa: NPY002 (the one that all share)


def _set_numpy_state(state: bytes) -> None:
    np.random.set_state(pickle.loads(state))  # noqa: NPY002


def _generators(devices: Sequence[int]) -> list[tuple[Callable[[], Any], Callable[[Any], None]]]:
    cuda: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
        (partial(torch.cuda.get_rng_state, device), partial(torch.cuda.set_rng_state, device=device))
        for device in devices
    ]
    return [
        (torch.get_rng_state, torch.set_rng_state),
        *cuda,
        (_numpy_state, _set_numpy_state),
        (random.getstate, random.setstate),
    ]


# ------------------------------------------------------------------------------------------------------- two runs alike


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two runs computed the same, but for the order in which a GPU may add up."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = one.detach(), other.detach()
    if torch.equal(one, other) or not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    finite = one[one.isfinite()].abs()
    # Between rounding and its square root: a state that moves by less than that is no state of a model.
    allowed = torch.finfo(one.dtype).eps ** 0.75 * float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=allowed, equal_nan=True)


def but_for(shared: Sequence[str]) -> str:
    """Why two runs may differ, and the way out, given the names of what could not be copied."""
    cause = "in a closure, a class or a hook"
    if shared:
        cause += f", or in what cannot be copied: {', '.join(map(repr, shared))}"
    return (
        f"so on the way it reads a state that is not put back between two runs ({cause}): keep such a state in buffers "
        "or in plain attributes of the model's modules, as tensors, numbers, lists or generators that can be copied"
    )
