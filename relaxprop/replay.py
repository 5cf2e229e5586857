"""What is computed of the states in a step: written down once as operations, and done again without the model.

A run at other states finds the model as the first one did, so what differs is what depends on the states. Where it is
plain which operations of PyTorch these are, those of the model and those of its derivatives, they alone are done again:
no module is called, no graph is recorded, nothing is put back, no hook cuts. What depends on no state keeps its value,
such as the layers before the first vertex; what nothing depends on is left out.

It is plain where all of this holds of the run that is written down; else `rerun` goes on running the model:

* PyTorch announces every call that depends on a state, and does nothing beside the calls that it announces.
* Such a call gives tensors, or says what no value changes (a shape, a type): a number could change the model's path.
* It reads what an announced call has given, a vertex, a parameter, a buffer, an argument, and writes into none of them.
* No value decides on the size of what it gives, and no generator on its values: from those that all share the
  feedforward pass has not drawn, and one of its own is no argument that is the same in every run.
* Gradients are recorded as ever: no autograd.Function, no autocast, no transform, no packing of what is saved.

Tensors are told apart by their memory, all of which is kept while the run lasts: the derivatives read what the model
has computed by other objects. What PyTorch cannot see (a kernel of somebody's own that is given an address) is noticed
by `rerun`, which compares the two ways once for each `Program.kind` of a setting.

May import: _pytorch, sight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from relaxprop._pytorch import OperationMode, is_undisturbed, version, versions, written_by
from relaxprop.sight import uncompiled

Results = Sequence[Tensor | None]


class Place(int):
    """Where a tensor that depends on the states stands among those of a program; the states come first."""


class _Operation(NamedTuple):
    function: Callable[..., Any]
    args: Sequence[Any]  # places where tensors depend on the states
    kwargs: dict[str, Any]
    nested: bool  # whether there are places deeper than in args
    gives: Sequence[int]  # the places of its results
    many: bool  # whether they are several tensors
    reads: Sequence[int]  # the places in args and kwargs
    done: Sequence[int] = ()  # what is not read after it


class Program(NamedTuple):
    """Operations that make results of states.

    Attributes:
        operations: in their order.
        results: places, tensors that depend on no state, or None.
        read: the other tensors that were read.
        versions: theirs, then.
        kind: the same for programs that differ in tensors and floating-point numbers alone.
    """

    operations: Sequence[_Operation]
    results: Sequence[Any]
    read: Sequence[Tensor]
    versions: Sequence[int]
    kind: int

    @property
    def holds(self) -> bool:
        """Whether nothing that is read was written to since, and operations do what they did then."""
        return versions(self.read) == self.versions and is_undisturbed()

    def __call__(self, states: Iterable[Tensor]) -> list[Tensor | None]:
        """With gradients disabled."""
        held: dict[int, Any] = dict(enumerate(states))

        def filled(x: Any) -> Any:
            return held[x] if type(x) is Place else x

        for function, args, kwargs, nested, gives, many, _, done in self.operations:
            if nested:
                result = function(*mapped(filled, args), **mapped(filled, kwargs))
            else:
                result = function(*[held[x] if type(x) is Place else x for x in args], **kwargs)
            if many:
                held.update(zip(gives, result, strict=True))
            else:
                held[gives[0]] = result
            for place in done:
                del held[place]
        return [filled(x) for x in self.results]


class _NotPlainError(Exception):
    """What is computed is more than the operations that were seen."""


class Calls(TorchFunctionMode):
    """Within it, the model is run whose operations are to be written down.

    Args:
        states: that they depend on, in memory of their own.
        known: tensors that depend on no state.
    """

    def __init__(self, states: Sequence[Tensor], known: Sequence[Tensor]) -> None:
        super().__init__()
        self.operations = Operations(states)
        self._plain = True
        self._known: dict[int, tuple[Tensor, Node | None, bool]] = {}
        self._aside = False
        self.knows(known)

    def __enter__(self) -> Calls:
        uncompiled.__enter__()  # compiled code announces nothing
        super().__enter__()  # type: ignore[no-untyped-call]
        self.operations.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        self.operations.__exit__(*exception)  # type: ignore[no-untyped-call]
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        uncompiled.__exit__(*exception)

    def aside(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook that cuts the graph, whose own calls are none of the model's."""

        def cut(*args: Any) -> Any:
            self._aside = self.operations.announced = True
            result = hook(*args)
            self._aside = self.operations.announced = False
            return result

        return cut

    def hands_on(self, tensor: Tensor, *, vertex: bool) -> None:
        """The model goes on with this tensor, of a vertex or of an input."""
        self._known[id(tensor)] = tensor, tensor.grad_fn, vertex

    def knows(self, tensors: Sequence[Tensor]) -> None:
        """These tensors depend on no state."""
        self.operations.knows(tensors)
        for x in tensors:
            self._keep(x, depends=False)

    def then(self, function: Callable[[], Results]) -> Results:
        """What the library itself makes of the run."""
        with self.operations:
            self.operations.announced = True
            return function()

    def program(self, results: Results, ends: Iterable[Tensor], beside: Sequence[Tensor]) -> Program | None:
        """What was written down; None where it is not plain.

        Args:
            results: what the operations make.
            ends: what the model has computed.
            beside: what was read beside it.
        """
        for x in ends:
            self._depends(x)
        self.operations.note_read(beside)
        return self.operations.program(results) if self._plain else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._aside or not self._plain:
            return func(*args, **kwargs)
        given = _leaves((args, kwargs))
        depends = sum(self._depends(x) for x in given) > 0  # which looks at every one of them
        read = [x for x in given if isinstance(x, Tensor)]
        before = [times_written(x) for x in read]
        self.operations.announced, self.operations.depends = True, depends
        try:
            result = func(*args, **kwargs)
        finally:
            self.operations.announced, self.operations.depends = False, True
        if depends and func not in _ASKS:
            given = list(result) if isinstance(result, tuple | list) else [result]
            undisturbed = torch.is_grad_enabled() and is_undisturbed()
            self._plain &= undisturbed and all(x is None or _is_dense(x) for x in given)
        self._plain &= before == [times_written(x) for x in read]
        for x in _leaves(result):
            if isinstance(x, Tensor):
                self._keep(x, depends=depends)
        return result

    def _keep(self, x: Tensor, *, depends: bool) -> None:
        self._known.setdefault(id(x), (x, x.grad_fn, depends))  # a call may give what it was given

    def _depends(self, x: Any) -> bool:
        """Whether an argument depends on a state."""
        if not isinstance(x, Tensor):
            self._plain &= _is_plain(x)
            return False
        # An autograd.Function puts a tensor that is there into another place of the graph.
        _, node, depends = self._known.get(id(x), (x, None, False))
        self._plain &= id(x) in self._known and x.grad_fn is node
        return depends


class Operations(OperationMode):
    """Within it, what PyTorch does in this thread is written down, whoever has called it.

    Args:
        states: what it depends on.

    Attributes:
        announced: whether what PyTorch does now is part of what is to be written down.
        depends: whether it may depend on a state.
    """

    def __init__(self, states: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.announced, self.depends = False, True
        self._plain = True
        self._kept: list[Any] = [*states]  # so that no memory is used twice
        self._places = {_memory(x): Place(i) for i, x in enumerate(states)}
        self._count = len(states)
        self._inputs = len(states)
        # The storages of what depends on no state; 0 is that of what has no numbers.
        self._fixed = {0}
        self._lasting = {0, *(_storage(x) for x in states)}  # those of what is not to be written into
        self._writes = False
        self._read: dict[int, tuple[Tensor, int]] = {}
        self._operations: list[_Operation] = []

    def knows(self, tensors: Iterable[Tensor]) -> None:
        """These tensors depend on no state."""
        storages = {_storage(x) for x in tensors if _is_dense(x)}
        self._fixed |= storages
        self._lasting |= storages

    def note_read(self, tensors: Iterable[Tensor]) -> None:
        """These tensors are to be as they are now."""
        for x in tensors:
            if id(x) not in self._read and not x.is_inference():
                self._read[id(x)] = x, version(x)

    def program(self, results: Results) -> Program | None:
        """What was written down; None where it is not plain."""
        try:
            ends, places, beside = self._placed([None if x is None else x.detach() for x in results])
        except _NotPlainError:
            return None
        self.note_read(beside)
        if not self._plain:
            return None
        read, then = [x for x, _ in self._read.values()], [count for _, count in self._read.values()]
        operations = self._needed(places)
        return Program(operations, ends, read, then, hash(tuple(map(_described, operations))))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (self._plain and self.announced):
            self._plain = False
            return func(*args, **kwargs)
        if not self.depends:
            result = func(*args, **kwargs)
            self._fix(result)
            return result
        try:
            (own_args, own_kwargs), places, beside = self._placed((args, kwargs))
            written = written_by(func, args, kwargs) if places else []
            if written:
                for x in written:
                    self._begin_anew(x)
                (own_args, own_kwargs), places, beside = self._placed((args, kwargs))
        except _NotPlainError:
            self._plain = False
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if not places:
            self._fix(result)
            return result
        many = isinstance(result, tuple | list)
        given = list(result) if many else [result]
        if not all(x is None or _is_dense(x) for x in given):
            self._plain = False
            return result
        self._kept.append(given)
        memories = [None if x is None else _memory(x) for x in given]
        if not written and not many and memories[0] in self._places:
            return result  # the same memory under another name
        if not _BY_VALUE.isdisjoint(func.tags):
            self._plain = False
            return result
        self._writes = self._writes or bool(written)
        self.note_read(beside)
        nested = len(places) > sum(type(x) is Place for x in own_args)
        gives = range(self._count, self._count + len(given))
        self._operations.append(_Operation(func, own_args, own_kwargs, nested, gives, many, places))
        for i, memory in zip(gives, memories, strict=True):
            if memory is not None:
                self._places[memory] = Place(i)
        self._count += len(given)
        return result

    def _fix(self, result: Any) -> None:
        """What depends on no state was made."""
        self._kept.append(result)
        self._fixed |= {_storage(x) for x in _leaves(result) if _is_dense(x)}

    def _placed(self, nested: Any) -> tuple[Any, list[Place], list[Tensor]]:
        """What stands for arguments in what is written down, places where tensors depend on the states; these places;
        and the other tensors.
        """
        places, beside = list[Place](), list[Tensor]()

        def placed(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if not _is_dense(x):
                raise _NotPlainError
            place = self._places.get(_memory(x))
            if place is not None:
                places.append(place)
                return place
            if _storage(x) not in self._fixed:
                raise _NotPlainError
            beside.append(x)
            return x

        return mapped(placed, nested), places, beside

    def _begin_anew(self, x: Tensor) -> None:
        """Lets what depends on no state, and is about to be written into, begin as it is now in every replay."""
        if _storage(x) in self._lasting:
            raise _NotPlainError
        if _memory(x) not in self._places:
            self._fixed.discard(_storage(x))  # no view of it depends on no state any more
            gives = range(self._count, self._count + 1)
            own = _Operation(torch.clone, (x.clone(),), {}, nested=False, gives=gives, many=False, reads=())
            self._operations.append(own)
            self._places[_memory(x)] = Place(self._count)
            self._count += 1

    def _needed(self, ends: Sequence[Place]) -> list[_Operation]:
        """The operations that the ends depend on, each with what is not read after it."""
        needed, found = set[int](ends), list[_Operation]()
        for operation in reversed(self._operations):
            # What is written into may be read under another name.
            if self._writes or not needed.isdisjoint(operation.gives):
                done = [i for i in {*operation.reads, *operation.gives} if i not in needed and i >= self._inputs]
                found.append(operation._replace(done=done))
                needed.update(operation.reads)
        return found[::-1]


def _described(operation: _Operation) -> tuple[Any, ...]:
    """An operation, what it reads, and the values of its arguments that a step seldom changes."""
    values = [x if type(x) in _TOLD_APART else type(x) for x in _leaves((operation.args, operation.kwargs))]
    return (operation.function, *operation.reads, *values)


def times_written(x: Tensor) -> int:
    """How often the tensor was written to; those made for inference do not count that."""
    return 0 if x.is_inference() else version(x)


def address(x: Tensor) -> int:
    """Where a tensor's numbers are; 0 where they have no one place (sparse, sharded)."""
    return x.data_ptr() if _is_dense(x) else 0


def _memory(x: Tensor) -> tuple[Any, ...]:
    """The numbers of a tensor, whatever object holds them."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.is_conj(), x.is_neg()


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _is_dense(x: Any) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided


def _leaves(nested: Any) -> list[Any]:
    """What tuples, lists and dicts hold. (PyTorch's own function costs ten times as much.)"""
    if type(nested) is dict:
        nested = nested.values()
    elif not isinstance(nested, tuple | list) or type(nested) is torch.Size:
        return [nested]
    found: list[Any] = []
    for x in nested:
        if isinstance(x, tuple | list | dict):
            found += _leaves(x)
        else:
            found.append(x)
    return found


def mapped(function: Callable[[Any], Any], nested: Any) -> Any:
    """The same with what the function makes of each leaf."""
    if type(nested) is dict:
        return {name: mapped(function, x) for name, x in nested.items()}
    if type(nested) in (tuple, list):
        return type(nested)([mapped(function, x) for x in nested])
    return function(nested)


def _is_plain(x: Any) -> bool:
    """Whether an argument that is no tensor is the same in every run."""
    if type(x) is slice:
        return _is_plain(x.start) and _is_plain(x.stop) and _is_plain(x.step)
    return type(x) in _PLAIN


_TOLD_APART = {bool, int, str, torch.dtype, torch.device, torch.layout, torch.memory_format}
_BY_VALUE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_PLAIN = {
    *(bool, int, float, complex, str, type(None), type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
}
# What a tensor says of itself, whatever its values.
_ASKS: set[Any] = {
    *(getattr(Tensor, name) for name in (
        "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point",
        "ndimension", "nelement", "numel", "size", "stride",
    )),
    *(getattr(Tensor, name).__get__ for name in (
        "device", "dtype", "is_cpu", "is_cuda", "is_nested", "is_sparse", "layout", "ndim", "requires_grad", "shape",
    )),
    *(torch.is_complex, torch.is_floating_point, torch.numel),
}  # fmt: skip
