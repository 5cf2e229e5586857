"""Kind D: what a model is given is the caller's own: lists and dicts that it writes into, knows, or keeps."""

from __future__ import annotations

from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from relaxprop import ActivationRelaxation, Equilibrium, Euler, Frozen
from tests.right_or_refused.helper import (
    Outcome,
    all_solvers,
    all_vertices,
    backward,
    cutting_solvers,
    right_or_refused,
    squares,
)

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
NAMES = (
    "Experts",
    "aux",
    "cache",
    "gate",
    "list",
    "dict",
    "argument",
    "'input'",
    "'f",
    "'softmax",
    "'pow",
    "'mean",
    "'sum",
)


class Experts(nn.Module):
    """A gate with a balancing loss, which goes to whoever asked for it."""

    def __init__(self, put: Callable[[Any, str, Tensor], None], what: str = "gate") -> None:
        super().__init__()
        self.first, self.f, self.gate = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)
        self.second, self.g, self.head = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)
        self.put, self.what = put, what

    def forward(self, x: Tensor, into: Any = None) -> Tensor:
        h = self.f(self.first(x))
        if into is not None:
            available: dict[str, Callable[[], Tensor]] = {
                "gate": lambda: (torch.softmax(self.gate(x), 1).mean(0) ** 2).sum(),
                "activity": lambda: (h**2).mean(),
                "detached": lambda: h.detach().mean(),
                "weight": lambda: (self.second.weight**2).sum(),
            }
            self.put(into, "aux", available[self.what]())
        output: Tensor = self.head(self.g(self.second(h)) * torch.sigmoid(self.gate(x)))
        return output


def append(into: Any, name: str, x: Tensor) -> None:
    into.append(x)


def store(into: Any, name: str, x: Tensor) -> None:
    into[name] = x


def store_in_list(into: Any, name: str, x: Tensor) -> None:
    into[0] = x


def append_by_name(into: Any, name: str, x: Tensor) -> None:
    into[name].append(x)


def append_deeper(into: Any, name: str, x: Tensor) -> None:
    into["losses"]["aux"].append(x)


def append_to_field(into: Any, name: str, x: Tensor) -> None:
    into.aux.append(x)


def update(into: Any, name: str, x: Tensor) -> None:
    into.update({name: x})


def extend(into: Any, name: str, x: Tensor) -> None:
    into += [x]


def first_of_pair(into: Any, name: str, x: Tensor) -> None:
    into[0].append(x)


@dataclass
class Collected:
    aux: list[Tensor] = field(default_factory=list)


# By name: an empty container, how the model writes into it, and how its caller reads it.
CONTAINERS: dict[str, tuple[Callable[[], Any], Callable[[Any, str, Tensor], None], Callable[[Any], Tensor]]] = {
    "list": (list, append, lambda c: c[0]),
    "list-extended": (list, extend, lambda c: c[0]),
    "list-item": (lambda: [None], store_in_list, lambda c: c[0]),
    "dict": (dict, store, lambda c: c["aux"]),
    "dict-updated": (dict, update, lambda c: c["aux"]),
    "ordered-dict": (OrderedDict, store, lambda c: c["aux"]),
    "default-dict": (lambda: defaultdict(list), append_by_name, lambda c: c["aux"][0]),
    "nested": (lambda: {"losses": {"aux": []}, "step": 3}, append_deeper, lambda c: c["losses"]["aux"][0]),
    "deque": (deque, append, lambda c: c[0]),
    "tuple-of-lists": (lambda: ([], 1), first_of_pair, lambda c: c[0][0]),
    "user-list": (UserList, append, lambda c: c[0]),
    "user-dict": (UserDict, store, lambda c: c["aux"]),
    "dataclass": (Collected, append_to_field, lambda c: c.aux[0]),
}


def collect(
    container: str, what: str, solver: Any, vertices: Any, *, keyword: bool = False, beside: bool = False
) -> Outcome:
    """A loss of the result and of what the model has put into a container."""
    make, put, read = CONTAINERS[container]

    def run(model: nn.Module, inputs: Sequence[Any]) -> Tensor:
        into = make()
        if beside and isinstance(into, list):
            into.append(inputs[0])  # what needs a gradient is in the container
        output = model(inputs[0], into=into) if keyword else model(inputs[0], into)
        if beside and isinstance(into, list):
            assert into.pop(0) is inputs[0], "silently wrong: the caller's own tensor was replaced"
        return squares(output) + 3 * read(into)

    return right_or_refused(lambda: Experts(put, what), [X], solver=solver, vertices=vertices, names=NAMES, run=run)


@all_solvers
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("container", CONTAINERS)
def test_the_caller_gets_what_the_model_writes(container: str, keyword: bool, solver: Any) -> None:
    """A statistic without a gradient is always right."""
    assert collect(container, "detached", solver, "activations", keyword=keyword) == "right"


@all_vertices
@all_solvers
@pytest.mark.parametrize("what", ["gate", "activity", "weight"])
@pytest.mark.parametrize("container", ["list", "dict", "nested", "user-list"])
def test_an_auxiliary_loss_that_is_handed_out(container: str, what: str, solver: Any, vertices: Any) -> None:
    """It is read through the model's own list: right, or refused with the advice to return it."""
    outcome = collect(container, what, solver, vertices)
    if solver == Equilibrium():
        assert outcome == "right"


@all_solvers
@pytest.mark.parametrize("what", ["gate", "activity", "weight", "detached"])
def test_a_list_that_holds_an_input_too(what: str, solver: Any) -> None:
    outcome = collect("list", what, solver, "activations", beside=True)
    if what == "detached" or solver == Equilibrium():
        assert outcome == "right"


class Same(nn.Module):
    """Asks what only the caller's own objects answer."""

    def __init__(self, ask: Callable[..., bool]) -> None:
        super().__init__()
        self.first, self.f, self.head, self.ask = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3), ask
        self.answers: list[bool] = []

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        self.answers.append(self.ask(*others))
        output: Tensor = self.head(self.f(self.first(x)))
        return output


OWN: list[Any] = [X]


@all_solvers
@pytest.mark.parametrize(
    ("others", "ask"),
    [
        ((OWN,), lambda a: a is OWN),
        (({"cache": OWN},), lambda a: a["cache"] is OWN),
        ((OWN, OWN), lambda a, b: a is b),
        ((OWN, (OWN, 1)), lambda a, b: a is b[0]),
        ((OWN,), lambda a: a[0] is X),
    ],
    ids=["list", "in-dict", "twice", "in-tuple", "its-tensor"],
)
def test_the_model_gets_the_callers_own_objects(others: Any, ask: Any, solver: Any) -> None:
    torch.manual_seed(1)
    net = Same(ask).double()
    backward(squares(ActivationRelaxation(net, solver=solver)(X, *others)))
    assert net.answers == [True]


@cutting_solvers
def test_two_arguments_that_share_a_tensor_that_needs_a_gradient(solver: Any) -> None:
    """It is the same tensor to the model, which may ask."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.f, self.head = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)

        def forward(self, query: Tensor, key: Tensor) -> Tensor:  # as attention does with query and key
            factor = 1.0 if query is key else 0.5
            output: Tensor = self.head(self.f(self.first(query)) * factor + key)
            return output[:, :2]

    class Wide(Twice):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

    def run(model: nn.Module, inputs: Sequence[Any]) -> Tensor:
        return squares(model(inputs[0], inputs[0]))

    outcome = right_or_refused(Wide, [X], solver=solver, vertices="activations", names=["Wide"], run=run)
    assert outcome == "right"


class Stateful(nn.Module):
    """A cache in a dict that goes from call to call (keys and values, streaming state)."""

    def __init__(self, detaches: bool) -> None:
        super().__init__()
        self.first, self.f, self.head, self.detaches = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3), detaches

    def forward(self, x: Tensor, cache: dict[str, list[Tensor]]) -> Tensor:
        h = self.f(self.first(x))
        past = cache.setdefault("past", [])
        past.append(h.detach() if self.detaches else h)
        output: Tensor = self.head(torch.stack(past).sum(0))
        return output


@all_solvers
@pytest.mark.parametrize("detaches", [True, False])
def test_a_cache_that_goes_from_call_to_call(detaches: bool, solver: Any) -> None:
    def run(model: nn.Module, inputs: Sequence[Any]) -> Tensor:
        cache: dict[str, list[Tensor]] = {}
        total = squares(model(inputs[0], cache))
        total = total + squares(model(2 * inputs[0], cache))
        assert len(cache["past"]) == 2, "silently wrong: the cache is not the caller's"
        return total

    outcome = right_or_refused(
        lambda: Stateful(detaches),
        [X],
        solver=solver,
        vertices="activations",
        names=["Stateful", "cache", "'f'", "past"],
        run=run,
    )
    if detaches or solver == Equilibrium():
        assert outcome == "right"


class Consuming(nn.Module):
    """Pops what it has used off the caller's list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.f, self.head = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)

    def forward(self, xs: list[Tensor]) -> Tensor:
        total = torch.zeros(3, 4, dtype=torch.float64)
        while xs:
            total = total + self.f(self.first(xs.pop()))
        output: Tensor = self.head(total)
        return output


@all_solvers
def test_a_list_that_the_model_empties(solver: Any) -> None:
    def run(model: nn.Module, inputs: Sequence[Any]) -> Tensor:
        xs = [inputs[0], 2 * inputs[0]]
        loss = squares(model(xs))
        assert not xs, "silently wrong: the list is not the caller's"
        return loss

    assert right_or_refused(Consuming, [X], solver=solver, vertices="activations", names=[], run=run) == "right"


class Returning(nn.Module):
    """Gives the caller's list back, written to, as a part of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.f, self.head = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)

    def forward(self, x: Tensor, hidden: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        hidden.append(self.f(self.first(x)))
        return self.head(hidden[-1]), hidden


@all_solvers
def test_a_list_that_the_model_returns(solver: Any) -> None:
    """A loss of the returned list has to be right, whatever is made of the one that was given."""

    def run(model: nn.Module, inputs: Sequence[Any]) -> Tensor:
        output, hidden = model(inputs[0], [])
        return squares(output) + squares(hidden[0])

    assert right_or_refused(Returning, [X], solver=solver, vertices="activations", names=[], run=run) == "right"


@all_solvers
def test_the_given_list_is_read_though_it_is_returned(solver: Any) -> None:
    def run(model: nn.Module, inputs: Sequence[Any]) -> Tensor:
        given: list[Tensor] = []
        output, _ = model(inputs[0], given)
        return squares(output) + squares(given[0])

    outcome = right_or_refused(
        Returning, [X], solver=solver, vertices="activations", names=["Returning", "'f'", "hidden", "list"], run=run
    )
    if solver == Equilibrium():
        assert outcome == "right"


@cutting_solvers
def test_an_argument_is_not_written_to_again_by_what_runs_again(solver: Any) -> None:
    """What is unfrozen runs the model again: the caller's list has grown once."""
    if type(solver).__name__ == "ClosedForm":
        frozen = Frozen(update_derivative=False)
    else:
        frozen = Frozen(relaxation_derivative=False)
    torch.manual_seed(1)
    model = ActivationRelaxation(Experts(append, "detached").double(), solver=solver, frozen=frozen)
    given: list[Tensor] = []
    backward(squares(model(X, given)))
    assert len(given) == 1


# --------------------------------------------------------------------------- lists that hold what needs a gradient, too


class Pair(NamedTuple):
    xs: list[Tensor]
    factor: float


class Written(nn.Module):
    """Reads the first input that its arguments hold, and then does with the arguments what it was told."""

    def __init__(self, read: Callable[..., Tensor], write: Callable[..., None]) -> None:
        super().__init__()
        self.first, self.f, self.head = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)
        self.read, self.write = read, write

    def forward(self, *given: Any) -> Tensor:
        x = self.read(*given)
        h = self.f(self.first(x))
        self.write(*given, h.detach())
        output: Tensor = self.head(h)
        return output


# By name: what is given, made of x; how the model finds x in it; what it writes; how the caller looks at it afterwards.
WRITTEN: dict[str, tuple[Callable[[Tensor], Any], Callable[..., Tensor], Callable[..., None], Callable[..., Any]]] = {
    "appended": (lambda x: ([x],), lambda a: a[0], lambda a, h: a.append(h), lambda a: a),
    "the same twice": (lambda x: ([x],) * 2, lambda a, b: b[0], lambda a, b, h: a.append(b[0]), lambda a, b: b),
    "in a named tuple": (
        lambda x: (Pair([x], 2.0),),
        lambda p: p.factor * p.xs[0],
        lambda p, h: p.xs.insert(0, h),
        lambda p: p.xs,
    ),
    "in a dict of lists": (
        lambda x: ({"xs": [x], "seen": {}},),
        lambda d: d["xs"][0],
        lambda d, h: d["seen"].update(h=h, x=d["xs"][0]),
        lambda d: [*d["xs"], d["seen"]["h"], d["seen"]["x"]],
    ),
    "reversed": (lambda x: ([x, 2 * x],), lambda a: a[0], lambda a, h: a.reverse(), lambda a: a),
    "replaced": (lambda x: ([x, 2 * x],), lambda a: a[0], lambda a, h: a.__setitem__(0, h), lambda a: a),
    "moved into a new list": (lambda x: ([x, 3],), lambda a: a[0], lambda a, h: a.append([(h, a[0])]), lambda a: a),
    "default dict": (
        lambda x: (defaultdict(list, xs=[x]),),
        lambda d: d["xs"][0],
        lambda d, h: d["h"].append(h),
        lambda d: [d["xs"], d["h"]],
    ),
    "ordered dict moved": (
        lambda x: (OrderedDict(x=x, n=torch.ones(2)),),
        lambda d: d["x"],
        lambda d, h: d.move_to_end("x"),
        lambda d: [list(d), *d.values()],
    ),
    "bounded deque": (lambda x: (deque([x], 2),), lambda q: q[0], lambda q, h: q.extend([h, h]), lambda q: q),
}


def as_known(nested: Any, x: Tensor) -> Any:
    """What the caller sees: its own input by name, other tensors by their values."""
    if nested is x:
        return "x"
    if isinstance(nested, Tensor):
        return [round(value, 9) for value in nested.flatten().tolist()]
    return [as_known(item, x) for item in nested] if isinstance(nested, list | tuple | deque) else nested


FROZEN = (
    Frozen(),
    Frozen(update_derivative=False),
    Frozen(relaxation_derivative=False),
    Frozen(relaxation_derivative=False, input=False),
)


@pytest.mark.parametrize("frozen", FROZEN, ids=["frozen", "update", "relaxation", "input"])
@pytest.mark.parametrize("case", WRITTEN.values(), ids=WRITTEN.keys())
def test_the_caller_sees_its_own_inputs_and_all_writes(case: Any, frozen: Frozen) -> None:
    """As with the plain model, and once, whatever runs again; at rest, every condition gives some gradient."""
    make, read, write, look = case

    def attempt(wrapped: bool) -> tuple[Any, Tensor | None]:
        torch.manual_seed(1)
        model: nn.Module = Written(read, write).double()
        if wrapped:
            model = ActivationRelaxation(model, solver=Euler(0.5, 120), frozen=frozen)
        x = X.clone().requires_grad_()
        given = make(x)
        backward(squares(model(*given)))
        return as_known(look(*given), x), x.grad

    (seen, gradient), (exact_seen, exact) = attempt(True), attempt(False)
    assert seen == exact_seen
    assert gradient is not None
    assert exact is not None
    if frozen == Frozen():
        assert float((gradient - exact).norm()) <= 1e-11 * float(exact.norm())


@cutting_solvers
def test_an_error_of_the_model_leaves_the_callers_list_as_it_was(solver: Any) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("of the model's own")

    x = X.clone().requires_grad_()
    given: list[Any] = [x, [x]]
    model = ActivationRelaxation(Written(lambda a: a[0], fail).double(), solver=solver)
    with pytest.raises(KeyError, match="own"):
        model(given)
    assert given[0] is x
    assert given[1][0] is x


@cutting_solvers
def test_a_returned_list_that_holds_the_input_of_a_larger_model(solver: Any) -> None:
    """The input has a graph of its own, and comes back beside an activity."""

    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.f, self.head = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)

        def forward(self, xs: list[Tensor]) -> list[Tensor]:
            xs.append(self.head(self.f(self.first(xs[0]))))
            return xs

    def run(model: nn.Module, inputs: Sequence[Any]) -> Tensor:
        x, y = model([inputs[0].tanh()])
        return squares(x) + squares(y)

    outcome = right_or_refused(Gives, [X], solver=solver, vertices="activations", names=["Gives"], run=run)
    assert outcome == "right"


@cutting_solvers
def test_a_list_that_two_threads_give_at_once_is_right_or_refused(solver: Any) -> None:
    barrier = Barrier(2)

    def meet(*_: Any) -> None:
        barrier.wait(2)

    def build() -> Written:
        torch.manual_seed(1)
        return Written(lambda a: a[0], meet).double()

    x = X.clone().requires_grad_()
    given = [x]

    def attempt(model: nn.Module) -> list[Tensor] | str:
        try:
            return list(torch.autograd.grad(squares(model(given)), list(model.parameters())))
        except RuntimeError as error:
            barrier.abort()
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        exact = list(pool.map(attempt, (build(), build())))
    barrier.reset()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(attempt, [ActivationRelaxation(build(), solver=solver) for _ in range(2)]))
    assert given[0] is x
    assert any("give each thread a list of its own" in y for y in found if isinstance(y, str)) or all(
        torch.allclose(a, b, rtol=1e-10, atol=1e-12)
        for ours, theirs in zip(found, exact, strict=True)
        for a, b in zip(ours, theirs, strict=True)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
    )


@cutting_solvers
def test_threads_may_share_a_list_that_holds_no_input(solver: Any) -> None:
    shared: list[Tensor] = []
    torch.manual_seed(1)
    model = ActivationRelaxation(Written(lambda x, a: x, lambda x, a, h: a.append(h)).double(), solver=solver)

    def attempt(_: int) -> None:
        torch.autograd.grad(squares(model(X.clone().requires_grad_(), shared)), list(model.parameters()))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(attempt, range(20)))
    assert len(shared) == 20
