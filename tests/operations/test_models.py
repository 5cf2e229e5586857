"""vertices="operations" on models of all kinds: they have the gradients of plain autograd, or are refused by name."""

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from relaxprop import ActivationRelaxation, Equilibrium, Euler, Frozen
from relaxprop.solvers import Solver
from tests.compare import assert_same, assert_same_gradients, backward, gradients, squares
from tests.operations.models import CONVERGED, EARLY, WORKS, build, every_solver, loss_of, relaxing, x34, x234
from tests.problems import mlp


def assert_as_plain(make: Callable[[], nn.Module], inputs: Sequence[Any], tolerance: float = 1e-11) -> None:
    """Results and gradients are the plain module's, pass after pass: only the first hands on copies everywhere."""
    plain = make()
    torch.manual_seed(2)
    result = copy.deepcopy(plain)(*inputs)
    expected = [gradients(plain, inputs, loss_of) for _ in range(3)]
    for solver in CONVERGED:
        model = relaxing(make(), solver)
        torch.manual_seed(2)
        torch.testing.assert_close(copy.deepcopy(model)(*inputs), result, rtol=0, atol=0)
        for wanted in expected:
            found = gradients(model, inputs, loss_of)
            for name, g in wanted.items():  # a gradient may be zero but for rounding
                ours, scale = found[name], 1 + float(g.norm() if g is not None else 0)
                assert (ours is None) == (g is None), f"{name} under {solver}"
                if g is not None and ours is not None:
                    assert float((ours - g).to_dense().norm()) < tolerance * scale, f"{name} under {solver}"
    early = [relaxing(make(), solver) for solver in EARLY]
    for _ in range(2):
        euler, euler_sequential, closed, closed_sequential = (gradients(m, inputs, loss_of) for m in early)
        assert_same_gradients(closed, euler, max(tolerance, 1e-10))
        assert_same_gradients(closed_sequential, euler_sequential, max(tolerance, 1e-10))


# ------------------------------------------------------------------------------------------------------------- as plain


@pytest.mark.parametrize("name", WORKS)
def test_models_of_all_kinds_are_as_plain(name: str) -> None:
    assert_as_plain(lambda: build(WORKS[name]), (x34(),))


def scripted() -> nn.Module:
    # That scripting is deprecated is a DeprecationWarning until PyTorch 2.13, and a FutureWarning from 2.14 on.
    with warnings.catch_warnings(action="ignore"):
        return cast(nn.Module, torch.jit.script(mlp(4, 4, 4)))


normed = torch.nn.utils.parametrizations
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "attention": (lambda: nn.MultiheadAttention(4, 2), x234),
    "lstm": (lambda: nn.LSTM(4, 4, 2, dropout=0.3), x234),
    "gru": (lambda: nn.GRU(4, 4, bidirectional=True), x234),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2), x234),
    "batch-norm": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.3), nn.ReLU(True), nn.Linear(4, 4)), x34),
    "weight-norm": (lambda: normed.weight_norm(nn.Linear(4, 4)), x34),
    "spectral-norm": (lambda: normed.spectral_norm(nn.Linear(4, 4)).eval(), x34),
    "orthogonal": (lambda: normed.orthogonal(nn.Linear(4, 4)), x34),
}


def call(s: Any, x: Tensor) -> Any:
    h = torch.tanh(s.a(x))
    return s.m(h, h, h)[0].sin() if isinstance(s.m, nn.MultiheadAttention) else s.m(h)


@pytest.mark.parametrize("name", MODULES)
def test_pytorchs_modules_are_as_plain(name: str) -> None:
    make, x = MODULES[name]
    assert_as_plain(lambda: build(call, lambda: {"m": make()}), (x(),))


@every_solver
def test_a_scripted_module_is_part_of_what_reads_it(solver: Solver) -> None:
    module = build(call, lambda: {"m": scripted()})
    model = relaxing(module, solver)
    for _ in range(4):  # the interpreter changes what it runs after the first passes
        assert_same_gradients(gradients(model, (x34(),)), gradients(module, (x34(),)))


@every_solver
def test_a_scripted_module_is_one_vertex_of_modules(solver: Solver) -> None:
    module = nn.Sequential(nn.Linear(4, 4), scripted(), nn.Tanh(), nn.Linear(4, 2)).double()
    model = ActivationRelaxation(module, solver=solver, vertices="modules", measure_residual=True)
    for _ in range(4):
        assert_same_gradients(gradients(model, (x34(),)), gradients(module, (x34(),)))
    assert model.last_relaxation is not None
    assert model.last_relaxation.residuals is not None
    assert sorted(model.last_relaxation.residuals) == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match="not part of"):
        ActivationRelaxation(module, vertices=[module.get_submodule("1.1")])


@pytest.mark.parametrize("sparse", [False, True])
def test_embeddings_take_indices(sparse: bool) -> None:
    modules: Callable[[], dict[str, nn.Module]] = lambda: {"m": nn.Embedding(5, 4, sparse=sparse)}  # noqa: E731
    assert_as_plain(lambda: build(lambda s, i: s.b(s.m(i).sin()), modules), (torch.tensor([[0, 1], [1, 2]]),))


def test_a_model_may_take_another_dtype_in_the_middle() -> None:
    function = lambda s, x: s.b(torch.tanh(s.a(x)).float().exp().double())  # noqa: E731
    assert_as_plain(lambda: build(function), (x34(),), 1e-6)


@every_solver
def test_under_autocast(solver: Solver) -> None:
    def function(s: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            h = torch.tanh(s.a(x))
            with torch.no_grad():
                mean = s.b(h).float().mean()
            return s.b(h) + s.a(h * 1.0) * mean

    module = build(function).float()
    model = relaxing(module, solver)
    for _ in range(3):
        assert_same_gradients(gradients(model, (x34().float(),)), gradients(module, (x34().float(),)), 5e-2)


# ----------------------------------------------------------------------------------------------------- right or refused


def test_an_overwritten_saved_result_is_refused_as_in_the_plain_module() -> None:
    def function(s: Any, x: Tensor) -> Any:
        h = s.a(x)
        z = h * h
        h.add_(1)
        return z + s.b(h)

    for model in (build(function), *(relaxing(build(function), solver) for solver in CONVERGED)):
        for _ in range(3):
            with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
                gradients(model, (x34(),))


def test_a_loop_of_another_length_is_refused_once_at_most() -> None:
    def function(s: Any, x: Tensor, n: Tensor) -> Any:
        h = s.a(x) + s.b(x)
        for _ in range(int(n)):
            h = h + x
            h *= 2
        return s.b(h + x)

    module = build(function)
    model, refused = relaxing(module), 0
    for n in (2, 2, 3, 1, 4, 2):
        try:
            found = gradients(model, (x34(), torch.tensor(n)))
        except RuntimeError as error:
            assert any("repeat the pass" in note for note in error.__notes__)  # noqa: PT017
            refused += 1
            found = gradients(model, (x34(), torch.tensor(n)))
        assert_same_gradients(found, gradients(module, (x34(), torch.tensor(n))))
    assert refused <= 1


def test_a_model_that_only_reads_what_it_kept_is_refused() -> None:
    def function(s: Any, x: Tensor) -> Any:
        s.kept = s.a(x).sin()
        return s.b(x)

    model = relaxing(build(function))
    for _ in range(2):
        output = model(x34())
        with pytest.raises(RuntimeError, match="kept to itself"):
            backward(squares(output) + squares(cast(Any, model.module).kept))


def forward_mode(s: Any, x: Tensor) -> Any:
    ad: Any = forward_ad
    with ad.dual_level():
        return ad.unpack_dual(s.a(ad.make_dual(s.b(x), x)).sin()).tangent


jacobian: Any = torch.autograd.functional.jacobian
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "vmap": (lambda s, x: torch.vmap(lambda r: torch.tanh(s.a.weight @ r))(x), "transform of torch.func"),
    "grad": (lambda s, x: torch.func.grad(lambda z: s.a(z).sin().sum())(x), "transform of torch.func"),
    "autograd": (lambda s, x: torch.autograd.grad(s.a(x).sin().sum(), s.a.weight, create_graph=True), "calls grad"),
    "backward": (lambda s, x: (s.a(x).sin().sum().backward(), s.b(x))[1], "calls backward"),
    "jacobian": (lambda s, x: jacobian(s.a, x, create_graph=True), "calls grad"),
}


@every_solver
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_differentiate_a_cut_graph_is_refused(name: str, solver: Solver) -> None:
    function, reason = REFUSED[name]
    model = relaxing(build(function), solver)
    if isinstance(solver, Equilibrium):  # nothing is cut
        assert_same_gradients(gradients(model, (x34(),), loss_of), gradients(build(function), (x34(),), loss_of))
        return
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{reason}.*pass solver=Equilibrium\(\)"):
            gradients(model, (x34(),), loss_of)


@cache
def compiled() -> Any:
    return torch.compile(lambda x: torch.tanh(x).sin(), backend="eager", fullgraph=True)


class GraphOfItsOwn(torch.autograd.Function):
    """Differentiates in its backward what it recorded in its forward, as implicit layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = ctx.x.sin() * 2
        return cast(Tensor, ctx.y.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return torch.autograd.grad(ctx.y, ctx.x, gradients[0], allow_unused=True, retain_graph=True)[0]


UNSURE: dict[str, Callable[..., Any]] = {
    "forward-mode": forward_mode,
    "graph-of-its-own": lambda s, x: s.b(GraphOfItsOwn.apply(s.a(x))),  # type: ignore[no-untyped-call]
    "reentrant": lambda s, x: s.b(checkpoint(s.b, s.a(x), use_reentrant=True)),
    "compiled": lambda s, x: s.b(compiled()(s.a(x))),
}


@every_solver
@pytest.mark.parametrize("name", UNSURE)
def test_is_right_or_refused_by_name(name: str, solver: Solver) -> None:
    plain = build(UNSURE[name])
    model = relaxing(build(UNSURE[name]), solver)
    with warnings.catch_warnings(action="ignore"):
        for _ in range(3):
            try:
                found = gradients(model, (x34(),), loss_of)
            except (ValueError, RuntimeError) as error:
                assert "Equilibrium()" in str(error) or "use_reentrant=False" in str(error)  # noqa: PT017
            else:
                assert_same_gradients(found, gradients(plain, (x34(),), loss_of))


@every_solver
def test_a_retained_activity_gradient_is_right_or_refused(solver: Solver) -> None:
    def function(s: Any, x: Tensor) -> Any:
        s.kept = s.a(x)
        s.kept.retain_grad()
        return s.b(torch.tanh(s.kept))

    plain: Any = build(function)
    gradients(plain, (x34(),))
    model = relaxing(build(function), solver)
    for _ in range(2):
        try:
            gradients(model, (x34(),))
        except ValueError as error:
            assert "retain_grad" in str(error)  # noqa: PT017
        else:
            kept: Any = model.module.kept
            assert kept.grad is not None
            assert_same(kept.grad, plain.kept.grad)


@pytest.mark.parametrize("vertices", ["operations", "modules"])
def test_unfrozen_a_checkpoint_is_right_or_refused(vertices: Any) -> None:
    """Its second run, in the backward pass, computes activities again that should be states."""

    def build_with(run: Callable[..., Any]) -> ActivationRelaxation:
        module = build(lambda s, x: s.b(run(s.m, torch.tanh(s.a(x)))), lambda: {"m": mlp(4, 4, 4)})
        frozen = Frozen(relaxation_derivative=False)
        return ActivationRelaxation(module, solver=Euler(0.3, 4), vertices=vertices, frozen=frozen)

    expected = gradients(build_with(lambda m, h: m(h)), (x34(),))
    try:
        found = gradients(build_with(lambda m, h: checkpoint(m, h, use_reentrant=False)), (x34(),))
    except (ValueError, RuntimeError) as error:
        assert "frozen" in str(error)  # noqa: PT017
    else:
        assert_same_gradients(found, expected)
