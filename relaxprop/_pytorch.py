"""Every private name of PyTorch that the library uses, each behind one function that says why and at what price.

Nothing here is promised by PyTorch: ``tests/test_pytorch.py`` checks what each name means, so that a new version that
changes it is noticed there first.

May import: nothing of this project.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import FrameType
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.utils import parametrize

# Nested structures: PyTorch has no public name, and Hugging Face registers its output classes with this one.
# What PyTorch does beneath the functions that it announces can be watched in a documented way that has no public name.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import arg_tree_leaves, tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

__all__ = [
    "GRAPH_FREED",
    "LEAF_OVERWRITTEN",
    "SAVED_OVERWRITTEN",
    "OperationMode",
    "accumulated_hooks",
    "announce_calls",
    "arg_tree_leaves",
    "arrived_hooks",
    "asks_for_node",
    "at_end_of_backward",
    "backward_class",
    "backward_hooks",
    "backward_pass",
    "base",
    "deepcopy",
    "engine_calls",
    "graph_is_kept",
    "has_hooks",
    "has_no_numbers",
    "higher_order",
    "hook_accumulated",
    "hook_arrived",
    "hook_calls",
    "hooks_on_all_backward",
    "hooks_on_all_modules",
    "hooks_registered",
    "in_forward_mode",
    "in_transform",
    "is_batched",
    "is_capturing",
    "is_checkpointed",
    "is_compiled",
    "is_exporting",
    "is_leaf_node",
    "is_opaque",
    "is_tracing",
    "is_undisturbed",
    "is_view",
    "leaf_of",
    "may_be_compiled",
    "not_in_a_whole_graph",
    "nothing_cached",
    "run_backward",
    "run_uncompiled",
    "switches_gradients",
    "tree_leaves",
    "tree_map",
    "tree_parts",
    "unhook_calls",
    "version",
    "versions",
    "with_backward_hooks",
    "written_by",
]


LEAF_OVERWRITTEN = "a leaf Variable that requires grad is being used in an in-place operation"
"""What PyTorch says in a `RuntimeError` that has no class of its own."""

SAVED_OVERWRITTEN = "has been modified by an inplace operation"
"""Likewise."""

GRAPH_FREED = "Trying to backward through the graph a second time"
"""Likewise."""


# ---------------------------------------------------------------------------------------------------------- the engine


def run_backward(
    outputs: Sequence[Tensor | GradientEdge],
    gradients: Sequence[Tensor],
    onto: Sequence[Tensor | GradientEdge],
    *,
    retain_graph: bool,
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad(outputs, onto, gradients, retain_graph=…, allow_unused=True)``.

    The public function looks at every argument before it calls the engine, which costs 0.07 of a training step of the
    MLP: the closed form calls it once for every hop.
    """
    return _ENGINE.run_backward(
        tuple(outputs),
        tuple(gradients),
        retain_graph,
        False,
        tuple(onto),
        allow_unreachable=True,
        accumulate_grad=False,
    )


_ENGINE = torch.autograd.Variable._execution_engine


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Within a backward pass: calls the function when the pass is over. What it raises, ``backward()`` raises.

    There is no public name. Without it whatever is looked at at every vertex makes a GPU wait there.
    """
    _ENGINE.queue_callback(function)


def backward_pass() -> int:
    """The number of the backward pass that is running now; −1 outside of one.

    There is no public name: PyTorch's own hooks on several tensors tell by it that a new pass has begun.
    """
    return torch._C._current_graph_task_id()


def graph_is_kept() -> bool:
    """Whether the backward pass that is running now was asked to retain its graph.

    There is no public name. Without it every pass would have to keep what only a second one needs.
    """
    return torch._C._autograd._get_current_graph_task_keep_graph()


def engine_calls() -> list[tuple[Sequence[Tensor | GradientEdge], Sequence[Tensor]]]:
    """Within a backward function: what ``torch.autograd.grad`` or ``backward`` called the engine with, the tensors that
    are differentiated and those that gradients are asked for (none, where all leaves get theirs).

    Nothing public tells a backward function either, and the engine's own answers leave out the nodes that it does not
    run. So the frames are looked at. A device has a thread of its own, while the caller's waits within its call; then
    the calls of all threads that wait so are given.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _ENGINE_CALL:
        frame = frame.f_back
    frames = [frame] if frame is not None else [f for f in sys._current_frames().values() if f.f_code is _ENGINE_CALL]
    given = [f.f_locals for f in frames]
    return [(call["t_outputs"], call["args"][3]) for call in given]


_ENGINE_CALL = torch.autograd.graph._engine_run_backward.__code__


# ----------------------------------------------------------------------------------------------- what is going on now


def in_transform() -> bool:
    """Whether this runs within ``torch.func.vmap``, ``grad`` or another transform. There is no public name."""
    return torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open.

    There is no public name: ``unpack_dual`` answers for one tensor only, and needs one.
    """
    return torch.autograd.forward_ad._current_level >= 0


def is_tracing() -> bool:
    """Whether this runs within ``torch.jit.trace``. The public name is one without types, and slower."""
    return torch._C._get_tracing_state() is not None


def is_exporting() -> bool:
    """Whether ``torch.export`` follows what runs. Before PyTorch 2.7 nothing tells.

    The public ``torch.compiler.is_exporting`` reads this flag. PyTorch 2.10 takes it for True in whatever it compiles.
    """
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def hooks_registered() -> int:
    """How many hooks were ever registered in this process, on tensors, nodes and modules: the number of the next one.

    Those on a tensor can be registered in public, but not seen: what keeps them once the tensor is gone is the node.
    """
    return RemovableHandle.next_id


def higher_order(function: Any) -> str | None:
    """The name of an operator that takes functions, as torch.cond does. There is no public name of their class."""
    return str(function.name()) if isinstance(function, torch._ops.HigherOrderOperator) else None  # type: ignore[no-untyped-call]


def switches_gradients(func: Any) -> bool:
    """Whether the function that a `TorchFunctionMode` sees is the one that ``torch.no_grad``, ``enable_grad`` and
    ``set_grad_enabled`` call. There is no public name for it."""
    return func is torch._C._set_grad_enabled


def asks_for_node(func: Any) -> bool:
    """Whether the function that a `TorchFunctionMode` sees is the one that reads ``x.grad_fn``.

    PyTorch's types say that ``Tensor.grad_fn`` is a node, so it is looked up in the class that defines it.
    """
    return bool(func == _NODE_OF)


_NODE_OF: Any = vars(torch._C.TensorBase)["grad_fn"].__get__


def not_in_a_whole_graph(reason: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: ``torch.compile(…, fullgraph=True)`` refuses the function, and says why.

    ``torch.compiler.disable`` does that in public, but imports the compiler, which takes a second. These are the marks
    that it leaves; the reason is shown from PyTorch 2.7 on.
    """

    def marked(function: Any) -> Callable[..., Any]:
        function._torchdynamo_disable, function._torchdynamo_disable_msg = True, reason
        return cast(Callable[..., Any], function)

    return marked


def run_uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    """``torch.compiler.disable(function)(*args)``. Where the compiler was not imported, nothing is compiled."""
    if not may_be_compiled():
        return function(*args)
    if function not in _UNCOMPILED:
        _UNCOMPILED[function] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return _UNCOMPILED[function](*args)


_UNCOMPILED: dict[Callable[..., Any], Callable[..., Any]] = {}  # a plain one, as the compiler follows to here


def may_be_compiled() -> bool:
    """Whether ``torch.compile`` was used at all. Its module is imported then; to import it here takes a second."""
    return "torch._dynamo" in sys.modules


def is_checkpointed() -> bool:
    """Whether what is saved for the backward pass now is left to ``torch.utils.checkpoint``.

    There is no public name for "what packs the tensors that are saved now?". Before PyTorch 2.8 there is no private one
    either: there the function that checkpoints is looked for among those that are running, which overlooks
    ``torch.distributed``'s checkpoints by hooks and counts one within which ``save_on_cpu`` packs.
    """
    if _TOP_HOOKS is None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__") != _CHECKPOINT:
            frame = frame.f_back
        return frame is not None
    hooks = _TOP_HOOKS(True)  # also while a compiler traces
    return hooks is not None and hooks[0].__module__ == _CHECKPOINT


_CHECKPOINT = "torch.utils.checkpoint"
_TOP_HOOKS: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def is_undisturbed() -> bool:
    """Whether PyTorch does now what it does by default: there is no autocast, no transform, and nothing that packs what
    is saved for the backward pass. Before PyTorch 2.8 nothing tells the last.
    """
    return not (
        _TOP_HOOKS is None
        or _TOP_HOOKS(True) is not None
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
        or in_transform()
        or in_forward_mode()
    )


def has_no_numbers(x: Tensor) -> bool:
    """Whether a tensor has a shape and nothing in it: on the device meta, or within ``FakeTensorMode``, whose class has
    no public name.
    """
    return x.is_meta or isinstance(x, FakeTensor)


def is_capturing() -> bool:
    """Whether what is launched now is written down as a CUDA graph, and computed by none. The public function raises an
    error where PyTorch was built without CUDA, and asks the driver where nothing was launched yet.
    """
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


class OperationMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """``TorchDispatchMode``, whose ``__torch_dispatch__`` sees every operation in its thread, those of derivatives too.

    PyTorch keeps its compiler out of each such mode by a wrapper, which imports the compiler; that takes a second.
    """

    def __init_subclass__(cls) -> None:
        pass


def written_by(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Those of its arguments that an operation which an `OperationMode` sees writes into. Only its schema tells."""
    found = []
    for i, name in _written(operation):
        found.append(args[i] if i < len(args) else kwargs.get(name))
    return [x for x in tree_leaves(found) if isinstance(x, Tensor)] if found else []


@cache
def _written(operation: Any) -> list[tuple[int, str]]:
    """The arguments that are written into, by place and name; the schema takes long to tell."""
    schema = operation._schema
    written = [(i, a) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    # What can be given by name only has no place.
    return [(sys.maxsize if a.kwarg_only else i, a.name) for i, a in written]


# ----------------------------------------------------------------------------------------------- nested structures


def tree_parts(nested: Any) -> tuple[list[Any] | None, Callable[[list[Any]], Any]]:
    """The parts of a nested structure, one level deep, and what builds it of such parts; None where it has none."""
    parts, form = tree_flatten(nested, is_leaf=lambda x: x is not nested)
    return (None if form.is_leaf() else parts), partial(tree_unflatten, treespec=form)


# ------------------------------------------------------------------------------------------------------------ a tensor


def version(x: Tensor) -> int:
    """How often the tensor's memory was written to. ``torch.autograd.graph`` can only increment it in public."""
    return x._version


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """The `version` of each; none of them may have been made for inference."""
    return [x._version for x in tensors]


def is_view(x: Tensor) -> bool:
    """Whether autograd takes the tensor for a view of another. In public, only shared memory can be seen, which an
    alias by ``detach`` has too."""
    return x._is_view()


def base(x: Tensor) -> Tensor | None:
    """What the tensor is a view of; itself if it is none."""
    return x._base if x._is_view() else x


def is_batched(x: Tensor) -> bool:
    """Whether the tensor stands for many, one for each run of a ``vmap``, be it torch.func's or that of
    ``is_grads_batched``. There is no public name."""
    return bool(_is_batched(x) or _is_batched_by_engine(x))


_is_batched: Any = torch._C._functorch.is_batchedtensor
_is_batched_by_engine: Any = torch._C._functorch.is_legacy_batchedtensor


def accumulated_hooks(x: Tensor) -> dict[int, Any] | None:
    """The hooks of ``Tensor.register_post_accumulate_grad_hook``, which can be registered in public, but not seen."""
    return x._post_accumulate_grad_hooks


def hook_accumulated(x: Tensor, hook: Callable[[Tensor], None]) -> None:
    """``x.register_post_accumulate_grad_hook(hook)``, for a tensor that has no such hook yet.

    The public method also makes a handle to remove the hook by. A pass places one at every vertex, and the handles cost
    0.01 of a training step of the MLP.
    """
    x._post_accumulate_grad_hooks = {0: hook}


def arrived_hooks(x: Tensor) -> dict[int, Any] | None:
    """The hooks of ``Tensor.register_hook``, which can be registered in public, but neither seen nor set aside."""
    return x._backward_hooks


def hook_arrived(x: Tensor, hook: Callable[[Any], Any]) -> None:
    """``x.register_hook(hook)``, for a tensor that was computed.

    The public method also makes a handle to remove the hook by. A step at equilibrium hooks every vertex, and the
    handles cost 0.05 of a training step of the MLP.
    """
    if x._backward_hooks is None:
        x._backward_hooks = OrderedDict()
        cast(Any, x.grad_fn)._register_hook_dict(x)
    x._backward_hooks[-id(hook)] = hook  # the public method counts from 0


def deepcopy(value: Any, memo: dict[Any, Any]) -> Any:
    """``copy.deepcopy``, at a tenth of its price where the value is a tensor that has its memory for itself.

    So that views of that memory, copied later, share the copy, it is noted where PyTorch's own storages look for it.
    """
    if type(value) is not Tensor or value.requires_grad or value.layout is not torch.strided or id(value) in memo:
        return copy.deepcopy(value, memo)
    storage, storages = value.untyped_storage(), memo.setdefault("torch", {})
    whole = value.is_contiguous() and storage.nbytes() == value.nbytes
    if (
        not whole
        or storage._cdata in storages
        or value.is_quantized
        or value.is_conj()
        or value.is_neg()
        or vars(value)
    ):
        return copy.deepcopy(value, memo)
    copied = memo[id(value)] = value.detach().clone()
    storages[storage._cdata] = copied.untyped_storage()
    return copied


# -------------------------------------------------------------------------------------------------- a node of the graph


def is_leaf_node(node: object) -> TypeGuard[Node]:
    """Whether the node stands for a leaf tensor. Its class has no public name; that of any leaf's node will do."""
    return type(node) is _ACCUMULATE_GRAD


def leaf_of(node: Node) -> Tensor:
    """The leaf tensor that a leaf's node stands for. PyTorch shows ``variable`` in its tutorials only."""
    return node.variable  # type: ignore[attr-defined, no-any-return]


_ACCUMULATE_GRAD: Any = type(get_gradient_edge(torch.empty(0, requires_grad=True)).node)


def backward_class(function: type[torch.autograd.Function]) -> Any:
    """The class of the nodes that an ``autograd.Function`` puts into the graph.

    In public it can be had from a call of the function only, so with arguments made up for it.
    """
    return cast(Any, function)._backward_cls


# ------------------------------------------------------------------------------------------------------------ a module


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run before or after the module's forward. They can be registered in public, but not seen."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def hooks_on_all_modules() -> bool:
    """Whether there are hooks that PyTorch runs at every module's call. They can be registered in public, but not
    seen."""
    return bool(torch.nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


def hooks_on_all_backward() -> list[Any]:
    """The backward hooks that PyTorch runs for every module. They can be registered in public, but not seen."""
    every = torch.nn.modules.module
    return [*every._global_backward_pre_hooks.values(), *every._global_backward_hooks.values()]


def hook_calls(modules: Collection[nn.Module], hook: Callable[[nn.Module, Any, Any], Any]) -> None:
    """``module.register_forward_hook(hook)`` for all the modules, to be undone by `unhook_calls`.

    The public method makes a handle for each module, and a scripted module refuses it. A pass hooks every vertex, and
    the handles cost 0.01 of a training step of the MLP. `hooks_registered` does not count these hooks.
    """
    for module in modules:
        module._forward_hooks[id(hook)] = hook


def announce_calls(modules: Collection[nn.Module], hook: Callable[[nn.Module, Any], Any]) -> None:
    """``module.register_forward_pre_hook(hook)`` likewise."""
    for module in modules:
        module._forward_pre_hooks[id(hook)] = hook


def unhook_calls(modules: Collection[nn.Module], hook: Callable[..., Any]) -> None:
    """Takes away what these two have placed; what a user has removed meanwhile stays removed."""
    for module in modules:
        module._forward_hooks.pop(id(hook), None)
        module._forward_pre_hooks.pop(id(hook), None)


@contextmanager
def nothing_cached() -> Iterator[None]:
    """Within it, ``parametrize.cached()`` holds no weight of what ran before, and afterwards none of what ran within.

    The cache can be opened in public, but neither emptied nor set aside, and its weights are parts of one run's graph.
    """
    cache: Any = parametrize
    aside, cache._cache = cache._cache, {}
    try:
        yield
    finally:
        cache._cache = aside


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of the module runs compiled code, by ``torch.compile(module)`` or ``module.compile()``.

    Neither can be asked for in public: the one's class has no public name, the other leaves a private attribute.
    """
    return may_be_compiled() and (
        isinstance(module, torch._dynamo.OptimizedModule) or vars(module).get("_compiled_call_impl") is not None
    )


def is_opaque(kind: type[nn.Module]) -> bool:
    """Whether the modules of this class are more than the class says, as scripted and compiled ones are.

    The class of the modules that ``torch.compile`` returns has no public name.
    """
    return issubclass(kind, torch.jit.ScriptModule) or (
        may_be_compiled() and issubclass(kind, torch._dynamo.OptimizedModule)
    )


def backward_hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """The module's full backward hooks and those before its backward. They can be registered in public, but not seen.

    Of the older kind, without "full", PyTorch keeps the hooks in the same place.
    """
    return module._backward_hooks, module._backward_pre_hooks


def with_backward_hooks(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the modules that have any of the `backward_hooks`."""
    return [m for m in modules if m._backward_hooks or m._backward_pre_hooks]
