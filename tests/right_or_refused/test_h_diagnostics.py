"""Diagnostics in PyTorch's own ways: the model's keyword arguments, a wrapper that is a part of a larger model,
a solver of the user's own, memory, cached weights and hooks. Each works, or one sentence has a remedy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relaxprop import (
    ActivationRelaxation,
    ClosedForm,
    Equilibrium,
    Euler,
    alignment,
    certificate,
    convergence,
    describe_locality,
)
from tests.right_or_refused.verdicts import REFUSALS, TOLERANCE, Found, assert_same, check_refused, gradients, squares
from tests.right_or_refused.watching import norms, saliency


def batch(rows: int = 3) -> Tensor:
    return torch.linspace(-2, 2, 4 * rows).view(rows, 4).double().sin()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.retina, self.relay, self.readout = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.cortex, self.motor = nn.Tanh(), nn.Tanh()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.readout(self.motor(self.relay(self.cortex(self.retina(x)))))
        return y


_Solver: Any = Equilibrium.__mro__[1]  # what a user derives a solver from


class Halving(_Solver):  # type: ignore[misc]
    """A solver of the user's own, no descendant of one that the library knows."""

    def solve(self, graph: Any) -> Any:
        return Equilibrium().solve(graph)

    def hops(self, depth: int) -> Any:
        return Equilibrium().hops(depth)

    @property
    def schedule(self) -> str:
        return "halving: one half after the other"


class Stochastic(Euler):
    """A descendant of a known one that steps otherwise."""


class Jumping(Equilibrium):
    """A descendant of the limit."""


def test_describe_locality_of_an_unknown_solver_says_what_it_says_of_itself() -> None:
    found = describe_locality(ActivationRelaxation(Net(), solver=Halving()), batch())
    assert found.schedule == "halving: one half after the other"
    assert "equilibrium" not in str(found)


def test_a_solver_that_says_nothing_of_its_schedule_cannot_be_made() -> None:
    """So no one else's schedule is claimed for it, and what it has to add is named."""

    class Silent(_Solver):  # type: ignore[misc]
        solve, hops = Halving.solve, Halving.hops

    with pytest.raises(TypeError, match=r"Silent.*schedule"):
        Silent()


@pytest.mark.parametrize("kind", [Stochastic, Jumping])
def test_describe_locality_of_a_descendant_names_it(kind: type[Any]) -> None:
    """The issue leaves the choice between its base's schedule and none; the descendant is named in any case."""
    assert kind.__name__ in describe_locality(ActivationRelaxation(Net(), solver=kind()), batch()).schedule


@pytest.mark.parametrize("solver", [Halving(), Jumping(), Stochastic(0.5, 300)], ids=lambda s: type(s).__name__)
def test_a_solver_of_the_user_s_own_trains(solver: Any) -> None:
    assert_same(gradients(ActivationRelaxation(Net(), solver=solver), batch()), gradients(Net(), batch()))


class TakesKeywords(Net):
    """Keyword arguments as of Hugging Face's models; one is called like an argument of a diagnostic might be."""

    def forward(  # type: ignore[override]
        self, x: Tensor, *, mask: Tensor, scale: float = 1.0, inputs: Any = None
    ) -> Tensor:
        h = self.cortex(self.retina(x)) * mask * scale
        y: Tensor = self.readout(self.motor(self.relay(h)))
        return y


KEYWORDS: dict[str, Any] = {"mask": torch.tensor([1.0, 0.5, 1.0, 0.0, 2.0]).double(), "scale": 0.7}


def test_alignment_takes_keyword_arguments_of_the_model() -> None:
    wrapper = ActivationRelaxation(TakesKeywords(), solver=ClosedForm(0.5, 300))
    found = alignment(wrapper, squares, batch(), **KEYWORDS)
    assert max(entry.distance for entry in found.values()) <= TOLERANCE
    early = ActivationRelaxation(TakesKeywords(), solver=ClosedForm(0.3, 3))
    exact, relaxed = gradients(TakesKeywords(), batch(), **KEYWORDS), gradients(early, batch(), **KEYWORDS)
    for name, entry in alignment(early, squares, batch(), **KEYWORDS).items():
        a, b = relaxed[name], exact[name]
        assert a is not None
        assert b is not None
        assert entry.distance == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-9)


def test_certificate_takes_keyword_arguments_of_the_model() -> None:
    found = certificate(ActivationRelaxation(TakesKeywords()), batch(), **KEYWORDS)
    assert found.keys() == {"cortex", "motor"}


def test_convergence_takes_keyword_arguments_of_the_model() -> None:
    wrapper = ActivationRelaxation(TakesKeywords())
    found = convergence(wrapper, squares, batch(), solver=Euler(1.0, 4), **KEYWORDS)
    assert max(float(curve[-1]) for curve in found.measured.values()) <= TOLERANCE


def test_describe_locality_takes_keyword_arguments_of_the_model() -> None:
    found = describe_locality(ActivationRelaxation(TakesKeywords()), batch(), **KEYWORDS)
    assert any("cortex" in row.update for row in found.rows)


class OnlyKeywords(Net):
    def forward(self, *, pixels: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(pixels)


DIAGNOSTICS: dict[str, Callable[..., Any]] = {
    "alignment": lambda model, *args, **kwargs: alignment(model, squares, *args, **kwargs),
    "certificate": certificate,
    "convergence": lambda model, *args, **kwargs: convergence(model, squares, *args, solver=Euler(1.0, 4), **kwargs),
    "describe_locality": describe_locality,
}
every_diagnostic = pytest.mark.parametrize("diagnostic", DIAGNOSTICS.values(), ids=DIAGNOSTICS.keys())


@every_diagnostic
def test_diagnostics_of_a_model_that_only_takes_keywords(diagnostic: Callable[..., Any]) -> None:
    assert diagnostic(ActivationRelaxation(OnlyKeywords(), solver=ClosedForm(0.5, 300)), pixels=batch())


class TakesTheirNames(Net):
    """A model whose keywords are called as the diagnostics' own arguments."""

    def forward(self, x: Tensor, *, solver: Tensor | None = None, model: Tensor | None = None) -> Tensor:
        y: Tensor = super().forward(x)
        return y if solver is None and model is None else 2 * y


@pytest.mark.parametrize("name", ["solver", "model"])
def test_a_keyword_that_a_diagnostic_has_itself_is_right_or_refused(name: str) -> None:
    """``convergence`` has a ``solver`` of its own; a clash is an error, not another argument in silence."""
    wrapper = ActivationRelaxation(TakesTheirNames(), solver=Euler(1.0, 4))
    keyword: dict[str, Any] = {name: torch.ones(())}
    try:
        found = convergence(wrapper, squares, batch(), **keyword)
    except REFUSALS as error:
        if name not in str(error):
            raise
        return
    assert max(float(curve[-1]) for curve in found.measured.values()) <= TOLERANCE


@every_diagnostic
def test_a_wrong_keyword_is_python_s_own_error(diagnostic: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="colour"):
        diagnostic(ActivationRelaxation(Net()), batch(), colour=1)


@every_diagnostic
def test_inputs_that_require_grad_get_no_gradient(diagnostic: Callable[..., Any]) -> None:
    x = batch().requires_grad_()
    diagnostic(ActivationRelaxation(Net(), solver=ClosedForm(0.5, 300)), x)
    assert x.grad is None


def _contains(depth: int) -> nn.Module:
    """A larger model with the wrapper as a part of it."""
    torch.manual_seed(3)
    body: nn.Module = ActivationRelaxation(Net(), solver=ClosedForm(0.5, 300))
    for _ in range(depth):
        body = nn.ModuleDict({"body": body})
    parts = {"stem": nn.Linear(4, 4).double(), "body": body, "top": nn.Linear(3, 3).double()}

    class Larger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                self.add_module(name, part)

        def forward(self, x: Tensor) -> Tensor:
            inner: Any = parts["body"]
            while isinstance(inner, nn.ModuleDict):
                inner = inner["body"]
            y: Tensor = parts["top"](inner(parts["stem"](x)))
            return y

    return Larger()


@every_diagnostic
@pytest.mark.parametrize("depth", [0, 1])
def test_diagnostics_of_a_model_that_only_contains_a_wrapper(diagnostic: Callable[..., Any], depth: int) -> None:
    """They work, or one sentence names the part that is wrapped; "wrap the module first" is no way out of it."""
    model: Any = _contains(depth)
    try:
        assert diagnostic(model, batch())
    except REFUSALS as error:
        check_refused(error, "body" + ".body" * depth)


@every_diagnostic
def test_diagnostics_of_a_model_with_two_wrappers(diagnostic: Callable[..., Any]) -> None:
    """Likewise: both are named."""
    parts = {name: ActivationRelaxation(Net(), solver=ClosedForm(0.5, 300)) for name in ("cerebrum", "cerebellum")}

    class Both(nn.ModuleDict):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self["cerebrum"](x) + self["cerebellum"](x)
            return y

    model: Any = Both(parts)
    try:
        assert diagnostic(model, batch())
    except REFUSALS as error:
        check_refused(error, "cerebrum")
        check_refused(error, "cerebellum")


@every_diagnostic
def test_diagnostics_of_what_is_not_wrapped_anywhere(diagnostic: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="wrap"):
        diagnostic(Net(), batch())


@every_diagnostic
def test_diagnostics_of_a_wrapper_in_data_parallel(diagnostic: Callable[..., Any]) -> None:
    """A wrapper in another wrapper of PyTorch's: it works, or it says to pass the inner one, by name."""
    model: Any = nn.DataParallel(ActivationRelaxation(Net(), solver=ClosedForm(0.5, 300)))
    try:
        assert diagnostic(model, batch())
    except REFUSALS as error:
        check_refused(error, "'module'", "model.module")


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of float64 numbers that are alive, of what is made within it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.dtype == torch.float64:
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    self._known.add(key)
                    self._add(key, storage.nbytes())
                    weakref.finalize(storage, self._drop, key, storage.nbytes())
        return result

    def _add(self, key: int, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def test_convergence_holds_no_second_copy_of_depth_times_parameters_in_float64() -> None:
    """A float32 model: D contributions for each parameter are needed at most once, and not all of them in float64."""
    torch.manual_seed(1)
    depth, width = 8, 32
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(width, 1))
    parameters = sum(p.numel() for p in model.parameters())
    with _Peak() as memory:
        found = convergence(ActivationRelaxation(model), squares, torch.randn(2, width), solver=Euler(0.5, 4))
    assert found.depth == depth
    assert memory.peak <= 0.5 * depth * parameters * 8


@every_diagnostic
def test_diagnostics_with_parametrize_cached(diagnostic: Callable[..., Any]) -> None:
    """A cache that outlives the diagnostic must not hold what the diagnostic has computed."""
    model = Net()
    parametrizations.weight_norm(model.relay)
    wrapper = ActivationRelaxation(model, solver=ClosedForm(0.5, 300))
    exact = gradients(wrapper, batch())
    with parametrize.cached():
        diagnostic(wrapper, batch())
        assert_same(gradients(wrapper, batch()), exact)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@every_diagnostic
@pytest.mark.parametrize(("hooks", "names"), [(norms, ("cortex", "motor")), (saliency, ("note",))])
def test_a_diagnostic_beside_hooks(
    diagnostic: Callable[..., Any], hooks: Callable[[nn.Module], Callable[[], Found]], names: tuple[str, ...]
) -> None:
    """What takes products of a cut graph refuses the hooks that only look, and works while they are away; so does what
    looks at a cut graph where a hook is on a module."""
    model = Net()
    hooks(model)
    wrapper = ActivationRelaxation(model, solver=Equilibrium())
    refusing = {"convergence"} if hooks is saliency else {"certificate", "convergence", "describe_locality"}
    if diagnostic not in [DIAGNOSTICS[name] for name in refusing]:
        assert diagnostic(wrapper, batch())
    else:
        with pytest.raises(ValueError, match="take it away while they run") as refused:
            diagnostic(wrapper, batch())
        check_refused(refused.value, *names)
        kinds = ("_forward_hooks", "_backward_hooks")
        away = [(m, kind, dict(getattr(m, kind))) for m in model.modules() for kind in kinds]
        for module, kind, _ in away:
            getattr(module, kind).clear()
        assert diagnostic(wrapper, batch())
        for module, kind, own in away:
            getattr(module, kind).update(own)
    assert_same(gradients(wrapper, batch()), gradients(Net(), batch()))
