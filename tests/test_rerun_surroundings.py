"""A run at the current states leaves no trace: chance, statistics, mode and precision are the feedforward pass's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relaxprop import ActivationRelaxation, Euler, Frozen
from tests.compare import assert_literal, assert_same, assert_same_gradients, backward, gradients, squares
from tests.problems import CONDITIONS, A, mlp, name_of

EULER = Euler(0.3, 4)
every_condition = pytest.mark.parametrize("frozen", CONDITIONS, ids=name_of)


# --------------------------------------------------------------------------------- chance, statistics, modes, precision


class Mask(nn.Module):
    """Dropout with masks that are given, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return x * self.masks[0]


def dropping() -> nn.Sequential:
    first, second = [nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5)], [nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.5)]
    return nn.Sequential(nn.Dropout(0.2), *first, *second, nn.Linear(6, 2))


@every_condition
@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_dropout_keeps_the_masks_of_the_feedforward_pass(frozen: Frozen, order: Any) -> None:
    module, z = dropping().double(), torch.randn(3, 4).double()
    masked = copy.deepcopy(module)
    for i in (0, 3, 6):
        masked[i] = Mask()

        def keep(dropout: Any, args: Any, output: Tensor, mask: Mask = masked[i]) -> None:  # type: ignore[assignment]
            scale = 1 / (1 - dropout.p)
            mask.masks.append(torch.where(output == 0, 0.0, scale).to(output))

        module[i].register_forward_hook(keep)
    solver = Euler(0.3, 4, order=order)
    found = gradients(ActivationRelaxation(module, solver=solver, frozen=frozen), (z,))
    assert_same_gradients(found, gradients(ActivationRelaxation(masked, solver=solver, frozen=frozen), (z,)))


@every_condition
@pytest.mark.parametrize("order", ["simultaneous", "asynchronous"])
def test_random_numbers_go_on_as_if_nothing_ran_again(frozen: Frozen, order: Any) -> None:
    def following(frozen: Frozen) -> Tensor:
        torch.manual_seed(1)
        module = dropping()
        model = ActivationRelaxation(module, solver=Euler(0.3, 3, order=order), frozen=frozen)
        backward(squares(model(torch.randn(3, 4))))
        return torch.rand(5)

    assert torch.equal(following(frozen), following(Frozen()))


def test_asynchronous_steps_draw_anew() -> None:
    # With η = 1 and one vertex, a step either leaves x̄ or sets ∂L/∂x: were every step the first one, one draw decided.
    module, z = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)), torch.randn(3, 4)
    model = ActivationRelaxation(module, solver=Euler(1.0, 40, order="asynchronous"), frozen=A)
    for seed in range(5):
        torch.manual_seed(seed)
        backward(squares(model(z)))
        found = [p.grad for p in module.parameters()]
        torch.manual_seed(seed)
        exact = torch.autograd.grad(squares(module(z)), list(module.parameters()))
        for gradient, expected in zip(found[2:], exact[2:], strict=True):
            assert gradient is not None
            assert_same(gradient, expected)
        model.zero_grad()


class FunctionalNorm(nn.Module):
    """Batch norm of a training batch, without buffers."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias = copy.deepcopy(norm.weight), copy.deepcopy(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        scaled = (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + 1e-5)
        output: Tensor = scaled * self.weight + self.bias
        return output


def normalised() -> nn.Sequential:
    first = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()]
    second = [nn.Linear(6, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Sigmoid()]
    return nn.Sequential(*first, *second, nn.Linear(5, 2)).double()


@every_condition
def test_batch_norm_is_that_of_the_batch(frozen: Frozen) -> None:
    module, z = normalised(), torch.randn(7, 4).double()
    plain = copy.deepcopy(module)
    plain[1], plain[5] = FunctionalNorm(module[1]), FunctionalNorm(module[5])
    found = gradients(ActivationRelaxation(module, solver=EULER, frozen=frozen), (z,))
    expected = gradients(ActivationRelaxation(plain, solver=EULER, frozen=frozen), (z,))
    # Zero but for rounding: batch norm takes the mean off again.
    assert_literal(found, {name: gradient for name, gradient in expected.items() if name != "0.bias"})


@every_condition
def test_batch_norm_counts_a_forward_pass_once(frozen: Frozen) -> None:
    module, once = normalised(), torch.randn(7, 4).double()
    plain, twice = copy.deepcopy(module), 3 * torch.randn(7, 4).double()
    own = [(name, id(b), b.data_ptr()) for name, b in module.named_buffers()]
    model = ActivationRelaxation(module, solver=EULER, frozen=frozen)
    loss = squares(model(once)) + 2 * squares(model(twice))
    plain(once)
    plain(twice)
    expected = {name: b.clone() for name, b in plain.named_buffers()}
    for _ in range(2):
        for name, buffer in module.named_buffers():
            assert torch.equal(buffer, expected[name]), name
        backward(loss, retain_graph=True)
    assert [(name, id(b), b.data_ptr()) for name, b in module.named_buffers()] == own
    found = [p.grad for p in module.parameters()]
    module.zero_grad()
    for z, factor in ((once, 1), (twice, 2)):
        for _ in range(2):
            backward(factor * squares(model(z)))
    for gradient, parameter in zip(found, module.parameters(), strict=True):
        assert gradient is not None
        assert parameter.grad is not None
        # A bias before batch norm gets nothing but rounding.
        assert_same(gradient, parameter.grad, tolerance=1e-11 if float(gradient.norm()) > 1e-9 else 1.0)


@every_condition
def test_batch_norm_in_evaluation(frozen: Frozen) -> None:
    module, z = normalised(), torch.randn(7, 4).double()
    module(3 * z + 1)
    plain = copy.deepcopy(module).eval()
    for i in (1, 5):
        norm: Any = plain[i]
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        affine = nn.Linear(len(scale), len(scale)).double()
        with torch.no_grad():
            affine.weight.copy_(torch.diag(scale))
            affine.bias.copy_(norm.bias - norm.running_mean * scale)
        plain[i] = affine
    found = gradients(ActivationRelaxation(module, solver=EULER, frozen=frozen).eval(), (z,))
    expected = gradients(ActivationRelaxation(plain, solver=EULER, frozen=frozen), (z,))
    compared = ("0.weight", "0.bias", "3.weight", "6.weight", "8.weight", "8.bias")
    assert_literal(found, {name: expected[name] for name in compared})


@every_condition
def test_mode_is_that_of_the_feedforward_pass(frozen: Frozen) -> None:
    module, z = dropping().double(), torch.randn(3, 4).double()
    module.append(nn.BatchNorm1d(2).double())
    expected = gradients(ActivationRelaxation(module, solver=EULER, frozen=frozen), (z,))
    model = ActivationRelaxation(module, solver=EULER, frozen=frozen)
    model.zero_grad()
    torch.manual_seed(2)
    loss = squares(model(z))
    model.eval()
    module[3].train()
    backward(loss)
    assert [m.training for m in module] == [i == 3 for i in range(len(module))]
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        gradient = expected[name]
        assert gradient is not None
        assert_same(parameter.grad, gradient, name)


@every_condition
@pytest.mark.parametrize("forward_is_half", [True, False])
def test_precision_is_that_of_the_feedforward_pass(frozen: Frozen, forward_is_half: bool) -> None:
    module, z, seen = mlp(4, 5, 5, 2), torch.randn(3, 4), list[torch.dtype]()
    module[2].register_forward_hook(lambda _m, _a, output: seen.append(output.dtype))
    model = ActivationRelaxation(module, solver=EULER, frozen=frozen)
    with torch.autocast("cpu", torch.bfloat16, enabled=forward_is_half):
        loss = squares(model(z).float())
    with torch.autocast("cpu", torch.bfloat16, enabled=not forward_is_half):
        backward(loss)
        assert torch.is_autocast_enabled("cpu") is not forward_is_half
    assert len(seen) > 1
    assert set(seen) == {torch.bfloat16 if forward_is_half else torch.float32}


@every_condition
def test_backward_within_autocast(frozen: Frozen) -> None:
    module, z = mlp(4, 5, 5, 2), torch.randn(3, 4)
    model = ActivationRelaxation(module, solver=EULER, frozen=frozen)
    found = []
    for within in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = squares(model(z).float())
            if within:
                backward(loss)
        if not within:
            backward(loss)
        found.append([p.grad for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None)


# ----------------------------------------------------------------------------------------------------- what has changed


@every_condition
def test_what_was_changed_in_place_is_refused(frozen: Frozen) -> None:
    module, z = mlp(4, 5, 5, 2), torch.randn(3, 4)
    model = ActivationRelaxation(module, solver=EULER, frozen=frozen)
    for changed, what in ((module[2].weight, r"the parameter '2.weight'"), (z, r"an input of shape \(3, 4\)")):
        loss = squares(model(z))
        with torch.no_grad():
            changed.mul_(2)  # type: ignore[operator]
        with pytest.raises(RuntimeError, match=rf"(?s){what} was changed in place|modified by an inplace"):
            backward(loss)
    backward(squares(model(z)))


@every_condition
def test_a_model_that_writes_into_its_own_input_is_refused(frozen: Frozen) -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(4, 5, 2)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.net(x.mul_(2))
            return output

    model = ActivationRelaxation(Doubles(), solver=EULER, frozen=frozen)
    with pytest.raises(ValueError, match=r"writes in place into an input of shape \(3, 4\).*x = x.clone\(\)"):
        model(torch.randn(3, 4))


@every_condition
def test_an_output_that_the_user_writes_into(frozen: Frozen) -> None:
    class Shows(nn.Module):
        """Returns what a layer above all vertices computed, too."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.f, self.last = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            u = self.first(x)
            return u, self.last(self.f(u))

    module, z, found = Shows(), torch.randn(3, 4), []
    for write in (False, True):
        module.zero_grad()
        u, y = ActivationRelaxation(module, solver=EULER, frozen=frozen)(z)
        if write:
            u.mul_(100)
        backward(squares(y))
        found.append([p.grad for p in module.parameters()])
    for gradient, expected in zip(found[1], found[0], strict=True):
        assert gradient is not None
        assert expected is not None
        assert_same(gradient, expected)


@every_condition
def test_two_passes_and_two_backward_passes(frozen: Frozen) -> None:
    module, y, z = mlp(4, 5, 5, 2).double(), torch.randn(3, 4).double(), torch.randn(3, 4).double()
    model = ActivationRelaxation(module, solver=EULER, frozen=frozen)
    separate = [gradients(model, (x,)) for x in (y, z)]
    model.zero_grad()
    loss = squares(model(y)) + squares(model(z))
    for repetition in (1, 2):
        backward(loss, retain_graph=True)
        for name, parameter in module.named_parameters():
            first, second = (g[name] for g in separate)
            assert parameter.grad is not None
            assert first is not None
            assert second is not None
            assert_same(parameter.grad, repetition * (first + second), name)
    backward(loss)
    with pytest.raises(RuntimeError, match="retain_graph"):
        backward(loss)
