"""What each private name of PyTorch in ``_pytorch.py`` means, so that a version that changes it is noticed here."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge, save_on_cpu
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import relaxprop
from relaxprop import _pytorch


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


class Asks(torch.autograd.Function):
    """Twice its input; asks ``_pytorch.graph_is_kept`` in its backward pass."""

    answers: list[bool] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Asks.answers.append(_pytorch.graph_is_kept())
        return 2 * gradient


def asks(x: Tensor) -> Tensor:
    y: Tensor = Asks.apply(x)  # type: ignore[no-untyped-call]
    return y


def test_run_backward_is_grad() -> None:
    a, b, unread = leaf(3), leaf(3), leaf(3)
    h = a.sin()
    outputs, gradients = [h * b, h.sum()], [torch.randn(3).double(), torch.tensor(2.0).double()]
    onto: list[Any] = [a, get_gradient_edge(h), unread, b]
    expected = torch.autograd.grad(outputs, onto, gradients, retain_graph=True, allow_unused=True)
    found = _pytorch.run_backward(outputs, gradients, onto, retain_graph=True)
    assert found[2] is expected[2] is None
    for i in (0, 1, 3):
        assert torch.equal(cast(Tensor, found[i]), expected[i])
    assert a.grad is b.grad is None
    assert not cast(Tensor, found[0]).requires_grad
    _pytorch.run_backward(outputs, gradients, onto, retain_graph=False)
    with pytest.raises(RuntimeError, match="second time"):
        _pytorch.run_backward(outputs, gradients, onto, retain_graph=False)


def test_graph_is_kept_where_the_pass_was_asked_to() -> None:
    Asks.answers.clear()
    y = asks(leaf(2)).sum()
    y.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    y.backward()  # type: ignore[no-untyped-call]
    x = leaf(2)
    y = asks(x).sum()
    torch.autograd.grad(y, x, retain_graph=True)
    torch.autograd.grad(y, x)
    assert Asks.answers == [True, False, True, False]


def test_what_is_to_be_called_at_the_end_of_a_pass_is_called_there_and_may_refuse() -> None:
    x, told = leaf(2), list[object]()
    y = x.sin()

    def hook(gradient: Tensor) -> None:
        _pytorch.at_end_of_backward(lambda: told.append(None if x.grad is None else x.grad.clone()))
        told.append(x.grad)

    y.register_hook(hook)  # type: ignore[no-untyped-call]
    y.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    before, after = told
    assert before is None
    assert torch.equal(after, x.cos().detach())  # type: ignore[arg-type]

    def refuse() -> None:
        raise FloatingPointError("named")

    y.register_hook(lambda gradient: _pytorch.at_end_of_backward(refuse))  # type: ignore[no-untyped-call]
    with pytest.raises(FloatingPointError, match="named"):
        y.sum().backward()  # type: ignore[no-untyped-call]


def test_a_backward_pass_has_a_number_of_its_own() -> None:
    x, numbers = leaf(2), list[int]()
    y = x.sin()
    for z in (y, y.sin()):
        z.register_hook(lambda gradient: numbers.append(_pytorch.backward_pass()))  # type: ignore[no-untyped-call]
    (loss := y.sin().sum()).register_hook(lambda gradient: numbers.append(_pytorch.backward_pass()))  # type: ignore[no-untyped-call]
    for _ in range(2):
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    first, same, second, again = numbers
    assert first == same != second == again
    assert min(numbers) >= 0 > _pytorch.backward_pass()


class Looks(torch.autograd.Function):
    """Its input; asks ``_pytorch.engine_calls`` in its backward pass."""

    answers: list[Any] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Looks.answers += _pytorch.engine_calls()
        return gradient


def test_engine_calls_are_what_is_differentiated_and_what_is_asked_for() -> None:
    x, y = leaf(2), leaf(2)
    loss = (Looks.apply(x) * y).sum()  # type: ignore[no-untyped-call]
    other = loss.sin()
    Looks.answers.clear()
    loss.backward(retain_graph=True)
    torch.autograd.backward([loss, other], retain_graph=True)
    loss.backward(inputs=[x], retain_graph=True)
    torch.autograd.grad([other], [x, y], retain_graph=True)
    torch.autograd.grad(loss, x, is_grads_batched=True, grad_outputs=torch.ones(3).double(), retain_graph=True)
    expected: list[Any] = [([loss], []), ([loss, other], []), ([loss], [x]), ([other], [x, y]), ([loss], [x])]
    assert len(Looks.answers) == len(expected)
    for found, wanted in zip(Looks.answers, expected, strict=True):
        for tensors, known in zip(found, wanted, strict=True):
            assert [id(t) for t in tensors] == [id(t) for t in known]


def test_tree_parts_are_one_level_deep() -> None:
    Point = namedtuple("Point", ["x", "y"])
    nested = Point([1, (2, 3)], {"a": 4})
    parts, rebuild = _pytorch.tree_parts(nested)
    assert parts is not None
    assert parts[0] is nested.x
    assert parts[1] is nested.y
    assert rebuild([5, 6]) == Point(5, 6)
    assert _pytorch.tree_parts(7)[0] is None
    assert _pytorch.tree_parts({1, 2})[0] is None


def test_in_transform() -> None:
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(_pytorch.in_transform())
        return x.sin().sum()

    function(torch.ones(2))
    torch.func.vmap(function)(torch.ones(2, 2))
    torch.func.grad(function)(torch.ones(2))
    torch.func.vjp(function, torch.ones(2))
    function(torch.ones(2))
    assert seen == [False, True, True, True, False]


def test_in_forward_mode() -> None:
    assert not _pytorch.in_forward_mode()
    with forward_ad.dual_level():
        assert _pytorch.in_forward_mode()
    assert not _pytorch.in_forward_mode()


@pytest.mark.parametrize(
    "switch",
    [torch.no_grad, torch.enable_grad, lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True)],
)
def test_a_mode_sees_what_switches_gradients(switch: Callable[[], Any]) -> None:
    seen: list[bool] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if _pytorch.switches_gradients(func):
                seen.append(args[0])
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Mode():
        x.sin()
        torch.is_grad_enabled()
        assert seen == []
        with switch():
            enabled = torch.is_grad_enabled()
            assert seen[-1] is enabled
        assert seen[-1] is True


def test_a_mode_sees_the_gradients_that_a_function_switches() -> None:
    """An ``autograd.Function`` runs without gradients, which the mode is not told of; those in it are enabled anew."""
    seen: list[tuple[bool, bool]] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if _pytorch.switches_gradients(func):
                seen.append((args[0], torch.is_grad_enabled()))
            return func(*args, **(kwargs or {}))

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return x.detach().requires_grad_().sin().detach()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    with Mode():
        Function.apply(leaf(2))  # type: ignore[no-untyped-call]
    assert seen == [(True, False), (False, True)]


def test_compiling_imports_the_module_that_is_looked_for_and_watching_operations_does_not() -> None:
    code = (
        "import torch; from relaxprop import _pytorch\n"
        "class Seen(_pytorch.OperationMode):\n"
        "    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return func(*args, **(kwargs or {}))\n"
        "print(_pytorch.may_be_compiled())\n"
        "with Seen(): torch.ones(2) + 1\n"
        "print(_pytorch.may_be_compiled())\n"
        "f = torch.compile(lambda x: x + 1, backend='eager')\n"
        "print(_pytorch.may_be_compiled())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False", "True"]


def test_is_checkpointed() -> None:
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(_pytorch.is_checkpointed())
        return x.sin()

    x = leaf(2)
    function(x)
    with save_on_cpu():
        function(x)
    checkpoint(function, x, use_reentrant=False)
    checkpoint(lambda x: checkpoint(function, x, use_reentrant=False), x, use_reentrant=False)
    function(x)
    assert seen == [False, False, True, True, False]


def test_without_the_stack_of_hooks_the_running_functions_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pytorch, "_TOP_HOOKS", None)
    test_is_checkpointed()


def test_is_undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    known = _pytorch._TOP_HOOKS is not None
    assert _pytorch.is_undisturbed() is known
    contexts: list[Any] = [
        torch.autocast("cpu", torch.bfloat16),
        save_on_cpu(),
        forward_ad.dual_level(),
    ]
    for context in contexts:
        with context:
            assert not _pytorch.is_undisturbed()
    found = list[bool]()
    torch.func.vmap(lambda x: found.append(_pytorch.is_undisturbed()) or x)(torch.eye(2))  # type: ignore[func-returns-value]
    checkpoint(lambda x: found.append(_pytorch.is_undisturbed()) or x, leaf(2), use_reentrant=False)  # type: ignore[func-returns-value]
    assert found == [False, False]
    assert _pytorch.is_undisturbed() is known
    monkeypatch.setattr(_pytorch, "_TOP_HOOKS", None)
    assert not _pytorch.is_undisturbed()


def test_every_operation_is_watched_beneath_the_functions() -> None:
    class Seen(_pytorch.OperationMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((func.overloadpacket.__name__, set(func.tags)))
            return func(*args, **(kwargs or {}))

    seen = list[tuple[str, set[torch.Tag]]]()
    x = leaf(2, 2)
    with Seen():  # type: ignore[no-untyped-call]
        y = nn.functional.linear(x, x).sum()
        y.item()
        (x > 0).nonzero()
    assert y.grad_fn is not None
    assert [name for name, _ in seen] == ["t", "mm", "sum", "_local_scalar_dense", "gt", "nonzero"]
    assert torch.Tag.data_dependent_output in seen[3][1]
    assert torch.Tag.dynamic_output_shape in seen[5][1]


def test_what_an_operation_writes_into() -> None:
    class Seen(_pytorch.OperationMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            written.append([x.data_ptr() for x in _pytorch.written_by(func, args, kwargs or {})])
            return func(*args, **(kwargs or {}))

    x, y, written = torch.ones(2, 2), torch.ones(2, 2), list[list[int]]()
    with Seen():  # type: ignore[no-untyped-call]
        x.add_(y)
        torch.mm(x, y)
        torch.mm(x, x, out=y)
        torch._foreach_add_([x, y], 1.0)
    assert written == [[x.data_ptr()], [], [y.data_ptr()], [x.data_ptr(), y.data_ptr()]]


def test_version_counts_writes() -> None:
    x = torch.zeros(3)
    alias, view, before = x.detach(), x[1:], _pytorch.version(x)
    view.add_(1)
    assert _pytorch.version(x) == _pytorch.version(alias) == _pytorch.version(view) == before + 1
    x.sum()
    assert _pytorch.version(x) == before + 1
    x.data.add_(1)
    assert _pytorch.version(x) == before + 1  # such writes are not counted
    assert _pytorch.versions([x, view]) == [before + 1, before + 1]


def test_views_and_their_bases() -> None:
    a = leaf(2, 3)
    x = a.sin()
    for view in (x.T, x[:, 0], x.view(-1), x.T[0]):
        assert _pytorch.is_view(view)
        assert _pytorch.base(view) is x
    for new in (x, x.clone(), x + 1, x.contiguous()):
        assert not _pytorch.is_view(new)
        assert _pytorch.base(new) is new
    assert x.contiguous() is x


def test_accumulated_hooks_are_those_that_were_registered() -> None:
    x = leaf(2)
    assert not _pytorch.accumulated_hooks(x)
    hook = x.register_post_accumulate_grad_hook(print)  # type: ignore[no-untyped-call]
    assert list((_pytorch.accumulated_hooks(x) or {}).values()) == [print]
    hook.remove()
    assert not _pytorch.accumulated_hooks(x)


def test_every_hook_is_counted() -> None:
    x, module, before = leaf(2), nn.Linear(2, 2), _pytorch.hooks_registered()
    y = x.sin()
    handles = [
        x.register_hook(print),  # type: ignore[no-untyped-call]
        y.register_hook(print),  # type: ignore[no-untyped-call]
        get_gradient_edge(y).node.register_hook(print),
        get_gradient_edge(y).node.register_prehook(print),
        module.register_forward_hook(print),
        module.register_full_backward_hook(print),
    ]
    assert _pytorch.hooks_registered() == before + len(handles)
    for handle in handles:
        handle.remove()
    assert _pytorch.hooks_registered() == before + len(handles)


def test_a_hook_on_what_accumulates_is_the_public_one() -> None:
    arrived: list[Tensor] = []
    for place in (_pytorch.hook_accumulated, Tensor.register_post_accumulate_grad_hook):
        x = leaf(2)
        place(x, arrived.append)
        (3 * x).sum().backward()  # type: ignore[no-untyped-call]
        torch.autograd.grad((3 * x).sum(), x)  # accumulates nothing
        assert arrived.pop() is x
        assert not arrived


def test_reading_a_node_is_seen() -> None:
    class Looks(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(_pytorch.asks_for_node(func))
            return func(*args, **(kwargs or {}))

    seen = list[bool]()
    x = 3 * leaf(2)
    with Looks():
        assert x.grad_fn is not None
        assert not x.is_leaf
    assert seen == [True, False]


def test_a_hook_on_a_computed_tensor_sees_its_gradient_beside_the_users() -> None:
    for users_first in (False, True):
        x, arrived = leaf(2), list[tuple[str, Tensor]]()
        y = 3 * x

        def own(gradient: Tensor, arrived: list[tuple[str, Tensor]] = arrived) -> None:
            arrived.append(("own", gradient))

        def users(gradient: Tensor, arrived: list[tuple[str, Tensor]] = arrived) -> Tensor:
            arrived.append(("the user's", gradient))
            return 2 * gradient

        registered = _pytorch.hooks_registered()
        if not users_first:
            _pytorch.hook_arrived(y, own)
        assert _pytorch.hooks_registered() == registered  # it is not taken for one of the model's
        handle = y.register_hook(users)  # type: ignore[no-untyped-call]
        if users_first:
            _pytorch.hook_arrived(y, own)
        y.sum().backward()  # type: ignore[no-untyped-call]
        assert [who for who, _ in arrived] == (["the user's", "own"] if users_first else ["own", "the user's"])
        assert dict(arrived)["the user's"].tolist() == [1, 1]
        assert dict(arrived)["own"].tolist() == ([2, 2] if users_first else [1, 1])
        assert x.grad is not None
        assert x.grad.tolist() == [6, 6]
        handle.remove()
        assert list((_pytorch.arrived_hooks(y) or {}).values()) == [own]


@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 2), lambda: torch.jit.script(nn.Linear(2, 2))])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_hook_on_calls_follows_those_that_are_there_and_is_taken_away(make: Callable[[], nn.Module]) -> None:
    module, order, x = make(), list[str](), torch.zeros(1, 2)
    handle = nn.Module.register_forward_hook(module, lambda *_: order.append("the user's"))

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        order.append("this one")
        return output + 1

    def announce(module: nn.Module, args: Any) -> None:
        order.append("before")

    plain, registered = module(x), _pytorch.hooks_registered()
    _pytorch.hook_calls([module], hook)
    assert torch.equal(module(x), plain + 1)
    assert order == ["the user's", "the user's", "this one"]
    _pytorch.announce_calls([module], announce)
    assert torch.equal(module(x), plain + 1)
    assert order[3:] == ["before", "the user's", "this one"]
    _pytorch.unhook_calls([module], announce)
    assert torch.equal(module(x), plain + 1)
    assert order[6:] == ["the user's", "this one"]
    assert _pytorch.hooks_registered() == registered
    handle.remove()
    _pytorch.unhook_calls([module], hook)
    assert torch.equal(module(x), plain)
    assert len(order) == 8
    _pytorch.unhook_calls([module], hook)  # nothing is left to take away


def test_modules_with_backward_hooks() -> None:
    first, second, neither = nn.Tanh(), nn.Tanh(), nn.Tanh()
    first.register_full_backward_hook(lambda *_: None)
    second.register_full_backward_pre_hook(lambda *_: None)
    assert _pytorch.with_backward_hooks([first, neither, second]) == [first, second]


def test_scripted_and_compiled_modules_are_opaque() -> None:
    assert not _pytorch.is_opaque(nn.Linear)
    assert _pytorch.is_opaque(torch.jit.ScriptModule)
    assert _pytorch.is_opaque(type(cast(nn.Module, torch.compile(nn.Linear(2, 2), backend="eager"))))


def test_arrived_hooks_can_be_set_aside() -> None:
    x, seen = leaf(2), list[Tensor]()
    assert not _pytorch.arrived_hooks(x)
    handle = x.register_hook(seen.append)  # type: ignore[no-untyped-call]
    hooks = _pytorch.arrived_hooks(x)
    assert hooks is not None
    kept = dict(hooks)
    assert list(kept.values()) == [seen.append]
    hooks.clear()
    torch.autograd.grad(x.sin().sum(), x)
    assert seen == []
    hooks.update(kept)
    torch.autograd.grad(x.sin().sum(), x)
    assert len(seen) == 1
    handle.remove()
    assert not _pytorch.arrived_hooks(x)


def test_nodes_of_leaves() -> None:
    x, parameter = leaf(2), nn.Parameter(torch.ones(2))
    product = get_gradient_edge(x.sin() * parameter).node
    assert not _pytorch.is_leaf_node(product)
    assert not _pytorch.is_leaf_node(None)
    (sine, _), (node, _) = product.next_functions
    assert _pytorch.is_leaf_node(node)
    assert _pytorch.leaf_of(node) is parameter
    assert sine is not None
    ((node, _),) = sine.next_functions
    assert _pytorch.is_leaf_node(node)
    assert _pytorch.leaf_of(node) is x
    assert get_gradient_edge(x).node is node


def test_class_of_a_functions_nodes() -> None:
    x = leaf(2)
    assert isinstance(asks(x).grad_fn, _pytorch.backward_class(Asks))
    assert not isinstance(x.sin().grad_fn, _pytorch.backward_class(Asks))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_tracing_is_seen() -> None:
    seen, trace = list[bool](), cast(Any, torch.jit.trace)

    def look(x: Tensor) -> Tensor:
        seen.append(_pytorch.is_tracing())
        return x + 1

    look(torch.ones(1))
    trace(look, torch.ones(1), check_trace=False)
    assert seen == [False, True]


def test_exporting_is_seen() -> None:
    seen: list[bool] = []

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(_pytorch.is_exporting())
            return 2 * x

    assert not _pytorch.is_exporting()
    torch.export.export(Asks(), (torch.zeros(2),), strict=False)
    assert seen == [hasattr(torch.compiler, "is_exporting")] * len(seen)
    assert seen
    seen.clear()
    torch.compile(Asks(), backend="eager")(torch.zeros(2))
    assert not any(seen)


def test_batched_tensors() -> None:
    x, seen = torch.ones(2, requires_grad=True), list[bool]()
    y = x * 2
    y.register_hook(lambda g: seen.append(_pytorch.is_batched(g)))  # type: ignore[no-untyped-call]
    torch.autograd.grad(y, x, torch.ones(2), retain_graph=True)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert seen == [False, True]

    def look(row: Tensor) -> Tensor:
        seen.append(_pytorch.is_batched(row))
        return row

    torch.func.vmap(look)(torch.eye(2))
    assert seen == [False, True, True]


def test_a_module_has_backward_hooks() -> None:
    module, seen = nn.Linear(2, 2), list[str]()
    assert not any(_pytorch.backward_hooks(module))
    after = module.register_full_backward_hook(lambda *_: seen.append("after"))
    before = module.register_full_backward_pre_hook(lambda *_: seen.append("before"))
    hooks, pre_hooks = _pytorch.backward_hooks(module)
    assert (len(hooks), len(pre_hooks)) == (1, 1)
    for kept, name in ((hooks, "other after"), (pre_hooks, "other before")):
        kept.update((key, lambda *_, name=name: seen.append(name)) for key in list(kept))
    module(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert seen == ["other before", "other after"]
    after.remove()
    before.remove()
    assert not any(_pytorch.backward_hooks(module))


def test_a_module_has_hooks() -> None:
    module = nn.Linear(2, 2)
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        assert not _pytorch.has_hooks(module)
        handle = register(lambda *_: None)
        assert _pytorch.has_hooks(module)
        handle.remove()
    assert not _pytorch.has_hooks(module)


def test_hooks_on_all_modules() -> None:
    module = torch.nn.modules.module
    for register in (
        module.register_module_forward_hook,
        module.register_module_forward_pre_hook,
        module.register_module_full_backward_hook,
        module.register_module_full_backward_pre_hook,
    ):
        assert not _pytorch.hooks_on_all_modules()
        handle = register(lambda *_: None)
        assert _pytorch.hooks_on_all_modules()
        handle.remove()
    assert not _pytorch.hooks_on_all_modules()


def test_cached_weights_are_set_aside() -> None:
    layer = parametrizations.weight_norm(nn.Linear(2, 2))
    with parametrize.cached():
        before = layer.weight
        with _pytorch.nothing_cached():
            within = layer.weight
            assert within is layer.weight
        assert within is not before
        assert layer.weight is before
    assert layer.weight is not before


def test_copies_share_memory_as_their_originals_do() -> None:
    whole = torch.arange(6.0)
    for order in ([whole, whole[2:], whole.data, whole], [whole.view(2, 3), whole]):
        memo: dict[Any, Any] = {}
        copies = [_pytorch.deepcopy(x, memo) for x in order]
        assert all(map(torch.equal, copies, order))
        copies[0].fill_(7.0)
        assert all(bool((x == 7).all()) for x in copies)
    assert copies[-1] is _pytorch.deepcopy(whole, memo)
    assert torch.equal(whole, torch.arange(6.0))


def test_a_mode_sees_the_copying_of_tensors() -> None:
    class Seen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))

    x = leaf(2)
    assert copy.deepcopy([x])[0] is not x
    with Seen():
        assert copy.deepcopy([x, 2 * x])[0] is x


def test_message_of_a_write_to_a_leaf() -> None:
    with pytest.raises(RuntimeError, match=re.escape(_pytorch.LEAF_OVERWRITTEN)):
        leaf(2).add_(1)


def test_message_of_a_graph_that_was_freed() -> None:
    x = leaf(2)
    y = (x.sin() ** 2).sum()
    y.backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=_pytorch.GRAPH_FREED):
        y.backward()  # type: ignore[no-untyped-call]


def test_nested_structures() -> None:
    pair = namedtuple("pair", ("first", "second"))
    nested = {"a": [1, (2, None)], "b": pair(3, OrderedDict(x="x"))}
    assert _pytorch.tree_leaves(nested) == [1, 2, None, 3, "x"]
    assert _pytorch.arg_tree_leaves([1, 2], k=(3,)) == [1, 2, 3]
    doubled = _pytorch.tree_map(lambda leaf: None if leaf is None else 2 * leaf, nested)
    assert doubled == {"a": [2, (4, None)], "b": pair(6, OrderedDict(x="xx"))}
    assert type(doubled["b"]) is pair


_PRIVATE = (
    r"torch\._|utils import _|utils\._|_execution_engine|\._(version|base|is_view)\b|_conv_forward|_current_level"
    r"|\._\w*_hooks\b|\._backward_cls|_ConvNd|_InstanceNorm|\.variable\b|\._(cache|cdata)\b"
)


def test_private_names_stand_in_one_file() -> None:
    """But for ``_modules``, ``_parameters`` and ``_buffers`` of ``nn.Module``, which much of the world reads."""
    package = Path(relaxprop.__file__).parent
    files = sorted(f for f in package.rglob("*.py") if "lab" not in f.relative_to(package).parts)
    found = {(f.name, m[0]) for f in files for m in re.finditer(_PRIVATE, f.read_text(encoding="utf-8"))}
    assert {name for name, _ in found} == {"_pytorch.py"}, found


def test_is_capturing() -> None:
    """The capture itself is tried where there is a GPU."""
    assert not _pytorch.is_capturing()
    if not torch.cuda.is_available():
        return
    x, stream = torch.ones(2, device="cuda"), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        x.add_(1)
        assert _pytorch.is_capturing()
    assert not _pytorch.is_capturing()


def test_is_compiled() -> None:
    plain, by_method, by_function = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    assert not _pytorch.is_compiled(plain)
    by_method.compile(backend="eager")
    compiled: Any = torch.compile(by_function, backend="eager")
    assert _pytorch.is_compiled(by_method)
    assert _pytorch.is_compiled(compiled)
    assert not _pytorch.is_compiled(by_function)
    assert not _pytorch.is_compiled(plain)
