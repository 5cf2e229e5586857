"""PEFT's LoRA, with the wrapper around it and within it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from relaxprop import ActivationRelaxation
from relaxprop.solvers import Solver
from tests.compare import backward
from tests.integrations.problem import EQUAL, OTHER, ROUNDING, distance, mlp, samples, weights, wrapped
from tests.integrations.test_trainer import gpt2

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning"),  # PEFT asks for it
]

Adapted = Callable[[nn.Module, Solver | None], Any]


def lora(targets: list[str], **options: Any) -> Any:
    return peft.LoraConfig(
        r=2, lora_alpha=8, lora_dropout=0.0, init_lora_weights=False, target_modules=targets, **options
    )


def adapted(module: nn.Module, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return peft.get_peft_model(module, config)


def inside(module: nn.Module, solver: Solver | None, config: Any) -> Any:
    model = adapted(module, config)
    return model if solver is None else wrapped(model, solver)


def outside(module: nn.Module, solver: Solver | None, config: Any) -> Any:
    return adapted(module if solver is None else wrapped(module, solver), config)


PLACES = {"inside": inside, "outside": outside}
MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "top-level layers": (mlp, lora(["0", "2"])),
    "GPT-2": (gpt2, lora(["c_attn", "c_proj"], task_type="CAUSAL_LM")),
}


def loss_of(model: Any, module: nn.Module) -> Tensor:
    if isinstance(module, nn.Sequential):
        x, labels = samples(8)
        return functional.cross_entropy(model(x), labels)
    tokens = torch.randint(20, (2, 8), generator=torch.Generator().manual_seed(0))
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def trained(place: Any, name: str, solver: Solver | None) -> Any:
    make, config = MODELS[name]
    module = make()
    model = place(module, solver, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        backward(loss_of(model, module))
        optimizer.step()
    return model


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
def test_adapters_are_trained_as_in_the_plain_model(place: Any, name: str) -> None:
    expected = weights(trained(place, name, None))
    for solver in EQUAL.values():
        model = trained(place, name, solver)
        assert distance(weights(model), expected) < ROUNDING
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trainable == [n for n in expected if "lora" in n]
    assert distance(weights(trained(place, name, OTHER)), expected) > 0.01


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
def test_the_saved_adapter_is_the_plain_ones_and_is_read_back(place: Any, name: str, tmp_path: Path) -> None:
    make, _ = MODELS[name]
    model, plain = trained(place, name, EQUAL["default"]), trained(place, name, None)
    model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    ours = safetensors.load_file(tmp_path / "ours/adapter_model.safetensors")
    assert ours
    assert distance(ours, safetensors.load_file(tmp_path / "plain/adapter_model.safetensors")) < ROUNDING
    for module in (make(), wrapped(make(), EQUAL["default"])):
        read = peft.PeftModel.from_pretrained(module, tmp_path / "ours")
        assert torch.allclose(loss_of(read, make()), loss_of(model, make()), atol=1e-5)


@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
def test_merged_adapters_are_the_plain_models_weights(place: Any) -> None:
    model, plain = trained(place, "top-level layers", EQUAL["default"]), trained(place, "top-level layers", None)
    before = loss_of(model, mlp())
    merged, expected = model.merge_and_unload(), plain.merge_and_unload()
    assert torch.allclose(loss_of(merged, mlp()), before, atol=1e-5)
    assert distance(weights(merged), weights(expected)) < ROUNDING
    assert list(merged.state_dict()) == list(mlp().state_dict())


@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
def test_with_gradient_checkpoints_the_embedding_is_made_to_require_grad(place: Any) -> None:
    def gradients(solver: Solver | None) -> dict[str, Tensor]:
        module = gpt2()
        module.gradient_checkpointing_enable({"use_reentrant": False})
        module.train()
        model = place(module, solver, MODELS["GPT-2"][1])
        model.enable_input_require_grads()
        backward(loss_of(model, module))
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(None)
    assert expected
    for solver in EQUAL.values():
        assert distance(gradients(solver), expected) < ROUNDING
    assert distance(gradients(OTHER), expected) > 0.01


def test_a_wrapper_around_it_is_a_peft_model() -> None:
    model = inside(gpt2(), EQUAL["default"], MODELS["GPT-2"][1])
    assert isinstance(model, peft.PeftModel)
    assert isinstance(model, ActivationRelaxation)
    plain = cast(Any, model.module)
    assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    with cast(Any, model).disable_adapter():
        tokens = torch.tensor([[1, 2, 3]])
        logits: Tensor = model(input_ids=tokens).logits
        assert torch.equal(logits, gpt2()(input_ids=tokens).logits)
