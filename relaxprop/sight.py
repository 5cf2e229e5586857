"""What a model would see wrongly of itself while its graph is cut: refused by name, with the way out.

Its own derivatives would end at the next vertex, and what looks at a gradient on its way would see that of one product
with A, of which there are many. `Equilibrium` cuts nothing, so there all of it is right.

May import: _pytorch, unconverged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from relaxprop._pytorch import (
    arrived_hooks,
    asks_for_node,
    backward_hooks,
    hooks_on_all_backward,
    in_forward_mode,
    in_transform,
    is_leaf_node,
    leaf_of,
    may_be_compiled,
    tree_leaves,
    with_backward_hooks,
)
from relaxprop.unconverged import warn_user

_DIFFERENTIATING = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


class _Uncompiled:
    """Within it, compiled parts of a model run as they were written.

    The compiler's stance is the whole process's: the first thread that enters sets it, the last one that leaves puts it
    back.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._within = 0
        self._stance: AbstractContextManager[Any] = nullcontext()

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                # Where the compiler was not imported, nothing is compiled, and the import would take a second.
                self._stance = torch.compiler.set_stance("force_eager") if may_be_compiled() else nullcontext()
                self._stance.__enter__()
            self._within += 1

    def __exit__(self, *exception: Any) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                self._stance.__exit__(None, None, None)


uncompiled = _Uncompiled()


class Sight(TorchFunctionMode):
    """Within it, the model is watched for derivatives and hooks of its own on what was cut.

    Args:
        model: the name of its class.
        stand_ins: the ids of the vertices' stand-ins so far.
        given: for what was handed on in the place of an input, the user's tensor; else None.

    Raises:
        ValueError: within it, if the model differentiates what was cut, or retains a gradient there; later, in a
            backward, if a hook that it has put on what it computed only looks.
    """

    def __init__(
        self, model: str, stand_ins: Callable[[], Collection[int]], given: Callable[[Tensor], Tensor | None]
    ) -> None:
        super().__init__()
        self.model = model
        self.stand_ins = stand_ins
        self.given = given
        self.hooks = 0  # how many the model has put on tensors
        self.reads_nodes = False  # whether it has asked for a node of PyTorch's graph

    def __enter__(self) -> Sight:
        uncompiled.__enter__()  # compiled code announces nothing
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        uncompiled.__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DIFFERENTIATING and not in_transform():  # where nothing is cut
            if self._meets_a_vertex((args, kwargs)):
                raise cut_off(f"{self.model} calls {func.__name__} in its forward pass, which would end at a vertex")
        elif func is Tensor.retain_grad:
            if self._meets_a_vertex(args):
                raise cut_off(
                    f"{self.model} calls retain_grad on an activity, which would keep the sum over products with A"
                )
        elif asks_for_node(func):
            self.reads_nodes = True
        elif func is Tensor.register_hook:
            self.hooks += 1
            tensor, register, hook = args[0], cast(Any, func), kwargs["hook"] if kwargs else args[1]
            if (given := self.given(tensor)) is not None and given.requires_grad:
                return register(given, hook)
            if tensor.grad_fn is not None or id(tensor) in self.stand_ins():
                return register(tensor, _must_change(hook, _on_activity(self.model, tensor)))
        return func(*args, **kwargs)

    def _meets_a_vertex(self, nested: Any) -> bool:
        """Whether any of the tensors was computed from a vertex."""
        vertices = self.stand_ins()
        if not vertices:
            return False
        stack: list[Node | None] = [
            get_gradient_edge(x).node for x in tree_leaves(nested) if isinstance(x, Tensor) and x.requires_grad
        ]
        seen = set[Node]()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if is_leaf_node(node):
                if id(leaf_of(node)) in vertices:
                    return True
            else:
                stack += [source for source, _ in node.next_functions]
        return False


def refuse_nested_differentiation(model: str) -> None:
    """Refuse to cut within what differentiates by other means than the recorded graph.

    Raises:
        ValueError: if this runs within a transform of torch.func, or in forward mode.
    """
    if in_transform():
        raise cut_off(f"{model} uses a transform of torch.func in its forward pass, whose tensors cannot be cut")
    if in_forward_mode():
        raise cut_off(f"{model} differentiates in forward mode, whose tangents end at the next vertex")


class CutOffError(ValueError):
    """A model looks at itself across a cut."""


def cut_off(reason: str) -> CutOffError:
    """The error with the way out."""
    return CutOffError(
        f"{reason}: pass solver=Equilibrium(), which cuts nothing in training, or let the model do without it; "
        "certificate, convergence and describe_locality cut the graph with every solver, so take it away while they run"
    )


def hooked(parts: Mapping[nn.Module, str], vertices: Collection[nn.Module], *, each: bool) -> list[nn.Module]:
    """The parts with full backward hooks.

    Args:
        parts: by module, its name.
        vertices: the modules whose outputs are vertices.
        each: whether every operation is a vertex.

    Raises:
        ValueError: if a vertex is cut between such a module's output and its input, or all modules have such a hook.
    """
    if everywhere := hooks_on_all_backward():
        names = " and ".join(map(_name, everywhere))
        raise cut_off(
            f"all modules have a full backward hook, {names} (register_module_full_backward_hook), which would see "
            "products with A in the place of gradients"
        )
    found = with_backward_hooks(parts)
    for module in found:
        if each or module in vertices:
            names = " and ".join(_name(hook) for hooks in backward_hooks(module) for hook in hooks.values())
            raise cut_off(
                f"module {parts[module]!r} ({type(module).__name__}) has a full backward hook, {names}, which would "
                "not see its gradients, as the graph is cut at a vertex within"
            )
    return found


@contextmanager
def changing(modules: Collection[nn.Module], parts: Mapping[nn.Module, str]) -> Iterator[None]:
    """Within it, calls of the modules take only those full backward hooks that change the gradient."""
    places = [(m, hooks) for m in modules for hooks in backward_hooks(m)]
    own = [dict(hooks) for _, hooks in places]
    for module, hooks in places:
        where = f"of module {parts[module]!r} ({type(module).__name__})"
        for key, hook in hooks.items():
            hooks[key] = _must_change(hook, where)
    try:
        yield
    finally:
        for (_, hooks), kept in zip(places, own, strict=True):
            hooks.update((key, hook) for key, hook in kept.items() if key in hooks)


def hooked_unseen(model: str, activities: Iterable[Tensor], inputs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """To be called where hooks were registered while nobody watched: those that can be found are held to the same.

    Args:
        model: the name of its class.
        activities: what hooks may be on.
        inputs: likewise, the user's tensors and their stand-ins.
    """
    for tensor in activities:
        hooks = arrived_hooks(tensor) or {}
        for key, hook in hooks.items():
            hooks[key] = _must_change(hook, _on_activity(model, tensor))
    for given, stand_in in inputs:
        for hook in (arrived_hooks(stand_in) or {}).values():
            given.register_hook(hook)  # type: ignore[no-untyped-call]
    warn_user(
        f"a hook was registered while {model} ran, for the first time: if it is on what a layer has computed and only "
        "looks, it sees one product with A out of many in this pass, and is refused from the next one on; pass "
        "solver=Equilibrium(), with which every hook sees the gradient"
    )


def warn_of_other_hooks(model: str) -> None:
    """To be called where more hooks were registered than those on tensors, and nodes asked for: nothing tells which."""
    warn_user(
        f"a hook that is not on a tensor was registered while {model} ran: if it is on a node of PyTorch's graph "
        "(x.grad_fn.register_hook), it sees one product with A out of many, and if it changes what it sees, it does so "
        "in every one; put it on the tensor (x.register_hook), or pass solver=Equilibrium(), with which every hook "
        "sees the gradient"
    )


def _on_activity(model: str, tensor: Tensor) -> str:
    return f"that {model} puts on an activity of shape {tuple(tensor.shape)}"


def _must_change(hook: Callable[..., Any], where: str) -> Callable[..., Any]:
    """The hook, refused where it leaves the gradient as it is: it is there for what it sees, which is no gradient."""

    @wraps(hook)
    def changing(*args: Any) -> Any:
        result = hook(*args)
        if result is None:
            raise cut_off(
                f"the hook {_name(hook)} {where} only looks at what arrives, but that is one product with A out of many"
            )
        return result

    return changing


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__)).rpartition(".")[2]
