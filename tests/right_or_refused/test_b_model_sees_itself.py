"""Kind B: a model that looks at itself while its graph is cut: its own derivatives, hooks, kept gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

from relaxprop import ActivationRelaxation, Equilibrium
from tests.right_or_refused.helper import (
    Run,
    Seen,
    all_solvers,
    all_vertices,
    cutting_solvers,
    right_or_refused,
    squares,
)

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)


class Body(nn.Module):
    """A scalar per sample, with a way around its vertices, so that a cut derivative is wrong and not missing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.f, self.second, self.g = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Softplus()
        self.head, self.skip = nn.Linear(5, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        deep: Tensor = self.head(self.g(self.second(self.f(self.first(x)))))
        output: Tensor = deep + torch.sin(self.skip(x))
        return output


class Without(Body):
    """The same without a way around."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.g(self.second(self.f(self.first(x)))))
        return output


def leaf(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.detach().requires_grad_()


# ------------------------------------------------------------------------------- models that differentiate themselves


class Differentiating(nn.Module):
    def __init__(self, body: Callable[[], nn.Module] = Body) -> None:
        super().__init__()
        self.body = body()


class Forces(Differentiating):
    """Energies and forces (SchNet, NequIP, MACE)."""

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        x = leaf(positions)
        energy = self.body(x)
        (forces,) = grad(energy.sum(), x, create_graph=True)
        return energy, -forces


class PhysicsInformed(Differentiating):
    """The residual u'' + u as the result."""

    def forward(self, x: Tensor) -> Tensor:
        x = leaf(x)
        u = self.body(x)
        (du,) = grad(u.sum(), x, create_graph=True)
        (ddu,) = grad(du.sum(), x, create_graph=True)
        result: Tensor = ddu + u
        return result


class GradientPenalty(Differentiating):
    """A critic with WGAN-GP's penalty in its own loss."""

    def forward(self, x: Tensor) -> Tensor:
        mixed = (0.5 * x + 0.1).detach().requires_grad_()
        score = self.body(x)
        (slope,) = grad(self.body(mixed).sum(), mixed, create_graph=True)
        loss: Tensor = score.mean() + ((slope.norm(dim=1) - 1) ** 2).mean()
        return loss


class Hamiltonian(Differentiating):
    """Time derivatives of position and momentum by the derivative of a learned energy."""

    def forward(self, x: Tensor) -> Tensor:
        x = leaf(x)
        (slope,) = grad(self.body(x).sum(), x, create_graph=True)
        q, p = slope.chunk(2, 1)
        return torch.cat([p, -q], 1)


class Langevin(Differentiating):
    """An energy-based model that samples by its own slope, which is not differentiated further."""

    def forward(self, x: Tensor) -> Tensor:
        sample = x.detach()
        for _ in range(3):
            sample = sample.requires_grad_()
            (slope,) = grad(self.body(sample).sum(), sample)
            sample = (sample - 0.1 * slope).detach()
        energy: Tensor = self.body(x) - self.body(sample)
        return energy


class InnerLoop(Differentiating):
    """MAML within the forward pass: one step of the head on an inner loss."""

    def forward(self, x: Tensor) -> Tensor:
        body: Any = self.body
        fast = body.skip.weight * 1.0
        inner = ((body(x).detach() + body.g(nn.functional.linear(x, fast)) - 0.2) ** 2).sum()
        (step,) = grad(inner, fast, create_graph=True)
        result: Tensor = body(x) + nn.functional.linear(x, fast - 0.1 * step)
        return result


class BackwardWithin(Differentiating):
    """Test-time training: ``backward()`` in the forward pass fills a tensor's ``.grad``."""

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.zeros(4, dtype=x.dtype, requires_grad=True)
        own = [p.grad for p in self.parameters()]
        ((self.body(x.detach() + shift) - 0.2) ** 2).sum().backward()
        for p, before in zip(self.parameters(), own, strict=True):
            p.grad = before
        assert shift.grad is not None
        result: Tensor = self.body(x - 0.1 * shift.grad)
        return result


class Functional(Differentiating):
    """torch.autograd.functional, which is autograd.grad behind another name."""

    def forward(self, x: Tensor) -> Tensor:
        vjp: Any = torch.autograd.functional.vjp
        _, product = vjp(self.body, x, torch.ones(len(x), 1, dtype=x.dtype), create_graph=True)
        result: Tensor = product
        return result


class FunctionTransform(Differentiating):
    """torch.func.grad of the network, per sample."""

    def forward(self, x: Tensor) -> Tensor:
        slopes: Tensor = torch.func.vmap(torch.func.grad(lambda one: self.body(one[None]).sum()))(x)
        return slopes


class ForwardMode(Differentiating):
    def forward(self, x: Tensor) -> Tensor:
        jvp: Any = torch.func.jvp
        value, tangent = jvp(self.body, (x,), (torch.ones_like(x),))
        result: Tensor = value + tangent
        return result


class LowerForwardMode(Differentiating):
    """Forward-mode derivatives without torch.func."""

    def forward(self, x: Tensor) -> Tensor:
        forward_ad: Any = torch.autograd.forward_ad
        with forward_ad.dual_level():
            parts = forward_ad.unpack_dual(self.body(forward_ad.make_dual(x * 1.0, torch.ones_like(x))))
            tangent = 0.0 if parts.tangent is None else parts.tangent
            result: Tensor = parts.primal + tangent
        return result


class ScoreInFunction(Differentiating):
    """A derivative by a tensor between the layers, as in attribution priors."""

    def forward(self, x: Tensor) -> Tensor:
        body: Any = self.body
        h = body.f(body.first(x))
        output = body.head(body.g(body.second(h))) + h.sum(1, keepdim=True)
        (slope,) = grad(output.sum(), h, create_graph=True)
        result: Tensor = output + (slope**2).sum(1, keepdim=True)
        return result


def energy_and_forces(result: tuple[Tensor, Tensor]) -> Tensor:
    return squares(result[0]) + squares(result[1])


DIFFERENTIATING: dict[str, tuple[type[Differentiating], Callable[[Any], Tensor]]] = {
    "forces": (Forces, energy_and_forces),
    "physics": (PhysicsInformed, squares),
    "penalty": (GradientPenalty, lambda loss: loss),
    "hamiltonian": (Hamiltonian, squares),
    "langevin": (Langevin, squares),
    "inner-loop": (InnerLoop, squares),
    "backward-within": (BackwardWithin, squares),
    "functional": (Functional, squares),
    "function-transform": (FunctionTransform, squares),
    "forward-mode": (ForwardMode, squares),
    "lower-forward-mode": (LowerForwardMode, squares),
    "between-layers": (ScoreInFunction, squares),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # PyTorch's own, in forward mode
@all_vertices
@all_solvers
@pytest.mark.parametrize("body", [Body, Without])
@pytest.mark.parametrize("case", DIFFERENTIATING)
def test_a_model_that_differentiates_itself(case: str, body: type[Body], solver: Any, vertices: Any) -> None:
    kind, loss = DIFFERENTIATING[case]
    outcome = right_or_refused(
        lambda: kind(body), [X], loss, solver=solver, vertices=vertices, names=[kind.__name__, "body"]
    )
    if solver == Equilibrium():
        assert outcome == "right"


class PolynomialForces(nn.Module):
    """What is differentiated within lies before the first vertex."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.net = nn.Parameter(torch.ones(4)), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = leaf(x)
        (slope,) = grad((self.a * x**3).sum(), x, create_graph=True)
        result: Tensor = self.net(slope)
        return result


@all_solvers
def test_a_derivative_that_meets_no_vertex(solver: Any) -> None:
    outcome = right_or_refused(
        PolynomialForces, [X], solver=solver, vertices="activations", names=["PolynomialForces", "net.1"]
    )
    if solver == Equilibrium():
        assert outcome == "right"


# ---------------------------------------------------------------------------------- models that look at what flows back


class Watched(nn.Module):
    """Two branches of different length from one activity, each of which something may watch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.f = nn.Linear(4, 4), nn.ReLU()
        self.second, self.g = nn.Linear(4, 4), nn.Tanh()
        self.third, self.k, self.head = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)
        self.seen: dict[str, Tensor] = {}
        self.watch: Callable[[Tensor, str], None] = lambda x, name: None

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(self.first(x))
        self.watch(h, "h")
        a = self.second(h)
        self.watch(a, "a")
        b = h + self.k(self.third(self.g(a)))
        self.watch(b, "b")
        output: Tensor = self.head(b)
        return output


class Retaining(Watched):
    """``retain_grad`` on an activity, on what a layer gives, and on a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        self.watch = self.retain

    def retain(self, x: Tensor, name: str) -> None:
        if x.requires_grad:
            x.retain_grad()
            self.kept[name] = x

    def shown(self) -> Seen:
        return {name: torch.zeros(()) if x.grad is None else x.grad for name, x in self.kept.items()}


class RetainingOnce(Retaining):
    def retain(self, x: Tensor, name: str) -> None:
        if name == "a":
            super().retain(x, name)


class Capturing(Watched):
    """Grad-CAM: a tensor hook keeps the last gradient that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.watch = self.register

    def register(self, x: Tensor, name: str) -> None:
        if x.requires_grad:
            x.register_hook(lambda g: self.note(name, g))  # type: ignore[no-untyped-call]

    def note(self, name: str, g: Tensor) -> None:
        self.seen[name] = g.detach().clone()

    def shown(self) -> Seen:
        return dict(self.seen)


class Summing(Capturing):
    """Empirical Fisher information: a hook adds the squares of what it sees."""

    def note(self, name: str, g: Tensor) -> None:
        self.seen[name] = self.seen.get(name, torch.zeros_like(g)) + g.detach() ** 2


class Counting(Capturing):
    """How often a gradient arrives."""

    def note(self, name: str, g: Tensor) -> None:
        self.seen[name] = self.seen.get(name, torch.zeros(())) + 1


class MultiHook(Capturing):
    """A hook that waits for all of its gradients."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(self.first(x))
        b = h + self.k(self.third(self.g(self.second(h))))
        if b.requires_grad:
            torch.autograd.graph.register_multi_grad_hook([h, b], self.both)
        output: Tensor = self.head(b)
        return output

    def both(self, gradients: Sequence[Tensor | None]) -> None:
        for name, g in zip("hb", gradients, strict=True):
            if g is not None:
                self.note(name, g)


def module_hook(on: str, hook: Callable[..., Any], *, before: bool = False) -> Callable[[], Watched]:
    def make() -> Watched:
        net = Watched()
        module = net.get_submodule(on)
        if before:
            module.register_full_backward_pre_hook(hook)
        else:
            module.register_full_backward_hook(hook)
        return net

    return make


def guided(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return (grad_input[0].clamp(min=0),)


def scaled(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return (0.5 * grad_input[0],)


def deconvolution(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return (nn.functional.relu(grad_output[0]),)


def scaled_before(module: nn.Module, grad_output: Any) -> Any:
    return (2 * grad_output[0],)


def clamped_before(module: nn.Module, grad_output: Any) -> Any:
    return (grad_output[0].clamp(-0.05, 0.05),)


def module_capture(on: str) -> Callable[[], Watched]:
    """Keeps what a full backward hook is shown, as Grad-CAM packages do."""

    def make() -> Watched:
        net = Watched()

        def capture(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
            net.seen["in"], net.seen["out"] = grad_input[0].detach().clone(), grad_output[0].detach().clone()

        net.get_submodule(on).register_full_backward_hook(capture)
        return net

    return make


def shown(net: Any) -> Seen:
    found: Seen = net.shown() if hasattr(net, "shown") else dict(net.seen)
    return found


WATCHED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "retain-grad": (Retaining, ("retain_grad", "Retaining", "second")),
    "retain-grad-of-a-layer": (RetainingOnce, ("retain_grad", "Retaining", "second")),
    "capture": (Capturing, ("hook", "Capturing", "second")),
    "sum-of-squares": (Summing, ("hook", "Summing", "second")),
    "count": (Counting, ("hook", "Counting", "second")),
    "multi-hook": (MultiHook, ("hook", "MultiHook", "second")),
    "guided-backprop": (module_hook("f", guided), ("guided", "'f'")),
    "deconvolution": (module_hook("f", deconvolution), ("deconvolution", "'f'")),
    "guided-backprop-deep": (module_hook("g", guided), ("guided", "'g'")),
    "scaled-activation": (module_hook("g", scaled), ("scaled", "'g'")),
    "scaled-layer": (module_hook("second", scaled), ("scaled", "'second'")),
    "scaled-before": (module_hook("g", scaled_before, before=True), ("scaled_before", "'g'")),
    "clamped-before": (module_hook("g", clamped_before, before=True), ("clamped_before", "'g'")),
    "captured-activation": (module_capture("g"), ("capture", "'g'")),
    "captured-layer": (module_capture("second"), ("capture", "'second'")),
    "captured-head": (module_capture("head"), ("capture", "'head'")),
}


@all_vertices
@all_solvers
@pytest.mark.parametrize("case", WATCHED)
def test_what_a_model_sees_flow_back(case: str, solver: Any, vertices: Any) -> None:
    make, names = WATCHED[case]
    outcome = right_or_refused(make, [X], solver=solver, vertices=vertices, names=names, also=shown)
    if solver == Equilibrium():
        assert outcome == "right"


class OnTheFirstLayer(Capturing):
    """What no vertex is computed before is watched too."""

    def forward(self, x: Tensor) -> Tensor:
        u = self.first(x)
        self.watch(u, "u")
        output: Tensor = self.head(self.g(self.second(self.f(u))))
        return output


class OnTheInput(Capturing):
    def forward(self, x: Tensor) -> Tensor:
        self.register(x, "x")
        output: Tensor = self.head(self.g(self.second(self.f(self.first(x)))))
        return output


class ScalingTheInput(Watched):
    """A hook that changes an input's gradient is on the caller's own tensor, and so on its gradient alone."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda g: 3 * g)  # type: ignore[no-untyped-call]
        return super().forward(x)


class OnAParameter(Capturing):
    """A parameter's hook sees its gradient, once."""

    def forward(self, x: Tensor) -> Tensor:
        handle: Any = self.second.weight.register_hook(lambda g: self.note("weight", g))  # type: ignore[no-untyped-call]
        self.watch = lambda x, name: None
        output = super().forward(x)
        self.handles = [*getattr(self, "handles", []), handle]
        for old in self.handles[:-1]:
            old.remove()
        return output


class InTrainingOnly(Capturing):
    def register(self, x: Tensor, name: str) -> None:
        if self.training:
            super().register(x, name)


class WhenAsked(Capturing):
    """A pass looks where it is told to."""

    def forward(self, x: Tensor, saliency: bool = False) -> Tensor:
        self.watch = self.register if saliency else lambda x, name: None
        return super().forward(x)


def _twice(model: nn.Module, arguments: Sequence[Any]) -> Tensor:
    """A pass whose result is only looked at, and one to train on."""
    model(*arguments)
    return squares(model(*arguments))


def _after_a_refusal(model: nn.Module, arguments: Sequence[Any]) -> Tensor:
    """A user who goes on after the error has the next pass refused too."""
    with suppress(ValueError):
        squares(model(*(x.detach() for x in arguments))).backward()  # type: ignore[no-untyped-call]
    for part in (model, *model.parameters()):
        if isinstance(part, nn.Parameter):
            part.grad = None
        elif isinstance(plain := getattr(part, "module", part), Watched):
            plain.seen.clear()
    return squares(model(*arguments))


def _evaluated(model: nn.Module, arguments: Sequence[Any]) -> Tensor:
    """A pass with gradients in evaluation, then one in training."""
    model.eval()
    model(*arguments)
    model.train()
    return squares(model(*arguments))


def _asked(model: nn.Module, arguments: Sequence[Any]) -> Tensor:
    model(*arguments)
    return squares(model(*arguments, saliency=True))


def _hooked_later(model: nn.Module, arguments: Sequence[Any]) -> Tensor:
    """Grad-CAM on a model that has trained before: a forward hook puts a hook on what a layer has computed."""
    squares(model(*(x.detach() for x in arguments))).backward()  # type: ignore[no-untyped-call]
    plain: Any = getattr(model, "module", model)

    def store(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda g: plain.seen.update(g=g.detach().clone()))  # type: ignore[no-untyped-call]

    plain.second.register_forward_hook(store)
    return squares(model(*arguments))


LATER: dict[str, tuple[Callable[[], nn.Module], Run]] = {
    "after-one-not-differentiated": (Capturing, _twice),
    "after-a-refusal": (Summing, _after_a_refusal),
    "in-training-only": (InTrainingOnly, _evaluated),
    "when-asked": (WhenAsked, _asked),
    "hooked-later": (Watched, _hooked_later),
    "first-layer": (OnTheFirstLayer, _twice),
    "first-layer-after-a-refusal": (OnTheFirstLayer, _after_a_refusal),
    "input": (OnTheInput, _twice),
    "input-scaled": (ScalingTheInput, _twice),
    "parameter": (OnAParameter, _twice),
}


@all_vertices
@all_solvers
@pytest.mark.parametrize("case", LATER)
def test_what_a_model_sees_flow_back_in_a_later_pass(case: str, solver: Any, vertices: Any) -> None:
    make, run = LATER[case]
    names = (make.__name__, "second")
    outcome = right_or_refused(make, [X], solver=solver, vertices=vertices, names=names, run=run, also=shown, passes=3)
    if solver == Equilibrium() or case in ("input", "input-scaled", "parameter"):
        assert outcome == "right"


@cutting_solvers
def test_a_hook_that_nobody_expects_is_told_of_and_refused_from_then_on(solver: Any) -> None:
    """No argument, mode or hook says that this pass will look."""
    net = Capturing().double()
    net.watch = lambda x, name: None
    model = ActivationRelaxation(net, solver=solver)
    squares(model(X)).backward()  # type: ignore[no-untyped-call]
    net.watch = lambda x, name: net.register(x, name) if name == "a" else None
    with pytest.warns(UserWarning, match=r"a hook was registered while Capturing ran.* pass solver=Equilibrium\(\)"):
        model(X)
    with pytest.raises(ValueError, match=r"that Capturing puts on an activity.*Equilibrium\(\)"):
        squares(model(X)).backward()  # type: ignore[no-untyped-call]


@cutting_solvers
def test_a_hook_on_a_vertex_is_refused_at_once(solver: Any) -> None:
    net = Capturing().double()
    net.watch = lambda x, name: None
    model = ActivationRelaxation(net, solver=solver)
    squares(model(X)).backward()  # type: ignore[no-untyped-call]
    net.watch = lambda x, name: net.register(x, name) if name == "h" else None
    with pytest.warns(UserWarning, match="a hook was registered while Capturing ran"):
        loss = squares(model(X))
    with pytest.raises(ValueError, match=r"that Capturing puts on an activity.*Equilibrium\(\)"):
        loss.backward()  # type: ignore[no-untyped-call]


class OnANode(Watched):
    """Looks at what flows back through a node of PyTorch's graph, which is no tensor that could be seen."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(self.first(x))
        a = self.second(h)
        if (node := a.grad_fn) is not None:
            place = node.register_prehook if self.before else node.register_hook
            place(lambda *seen: self.seen.update(g=seen[-1][0].detach().clone()))
        output: Tensor = self.head(h + self.k(self.third(self.g(a))))
        return output


@pytest.mark.parametrize("before", [True, False])
@all_solvers
def test_a_hook_on_a_node_is_told_of(before: bool, solver: Any) -> None:
    net = OnANode(before).double()
    squares(net(X)).backward()  # type: ignore[no-untyped-call]
    seen = net.seen.pop("g")
    model = ActivationRelaxation(net, solver=solver)
    for _ in range(2):
        uncut = solver.is_limit
        with nullcontext() if uncut else pytest.warns(UserWarning, match=r"not on a tensor was .*OnANode.*Equilibrium"):
            loss = squares(model(X))
    if uncut:
        loss.backward()  # type: ignore[no-untyped-call]
        assert torch.equal(net.seen["g"], seen)


@all_solvers
@pytest.mark.parametrize("hook", [guided, scaled])
def test_a_hook_on_the_model_itself(hook: Any, solver: Any) -> None:
    """The model's own full backward hook has the whole relaxation phase within."""

    def make() -> nn.Module:
        net = Watched()
        net.register_full_backward_hook(hook)
        return net

    right_or_refused(make, [X], solver=solver, vertices="activations", names=["Watched"])


# ---------------------------------------------------------------------------------------------------------- controls


class SavedElsewhere(Watched):
    """Saved tensors are packed away, as in offloading."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return super().forward(x)


class LooksAtGradients(Watched):
    """Asks whether activities require grad, and detaches for a statistic."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        self.mean = self.f(self.first(x)).detach().mean() if output.requires_grad else None
        return output


class NoGradWithin(Watched):
    """A momentum teacher under no_grad in the same pass."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = super().forward(x)
        return super().forward(x) - 0.5 * target


@all_vertices
@all_solvers
@pytest.mark.parametrize("kind", [SavedElsewhere, LooksAtGradients, NoGradWithin])
def test_a_model_that_only_looks_is_right(kind: type[Watched], solver: Any, vertices: Any) -> None:
    assert right_or_refused(kind, [X], solver=solver, vertices=vertices, names=["f"]) == "right"
