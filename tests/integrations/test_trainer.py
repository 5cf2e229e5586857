"""Hugging Face's Trainer, with nothing but the wrapper added."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relaxprop import ActivationRelaxation
from tests.integrations.problem import EQUAL, OTHER, ROUNDING, distance, weights, wrapped

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant:FutureWarning"),
]


class Sentences(torch.utils.data.Dataset[dict[str, Any]]):
    """Random tokens of differing numbers, so that the mean over tokens is not the mean of the minibatches' means."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Any]:
        tokens = torch.randint(1, 20, (8,), generator=torch.Generator().manual_seed(i))
        labels = tokens.clone()
        labels[: i % 5] = -100
        return {"input_ids": tokens, "labels": labels, "of no use": "to the model"}


def gpt2() -> Any:
    """Two layers; the embedding and the head are one weight."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=20, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "learning_rate": 0.1, "optim": "sgd", "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 0,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(output_dir=str(folder), **settings | options)
    return transformers.Trainer(model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences())


def trained(model: nn.Module, folder: Path, **options: Any) -> dict[str, Tensor]:
    trainer(model, folder, **options).train()
    return weights(model)


# Its name until version 5 of transformers, and after it.
_NAMES = ("gradient_checkpointing", "activation_checkpointing")
CHECKPOINTING = _NAMES["activation_checkpointing" in transformers.TrainingArguments.__dataclass_fields__]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 4, "max_grad_norm": 0.0},
    "clipped": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "checkpointed": {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
    "bfloat16": {"bf16": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_it_trains_as_it_trains_the_plain_model(options: dict[str, Any], tmp_path: Path) -> None:
    expected = trained(gpt2(), tmp_path, **options)
    # Half precision rounds states and products, which are other numbers on a cut graph.
    allowed = 0.02 if options.get("bf16") else ROUNDING
    for solver in EQUAL.values():
        assert distance(trained(wrapped(gpt2(), solver), tmp_path, **options), expected) < allowed
    assert distance(trained(wrapped(gpt2(), OTHER), tmp_path, **options), expected) > 5 * allowed


def test_reentrant_checkpoints_train_at_equilibrium_and_are_refused_on_a_cut_graph(tmp_path: Path) -> None:
    options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    expected = trained(gpt2(), tmp_path, **options)
    assert distance(trained(wrapped(gpt2(), EQUAL["default"]), tmp_path, **options), expected) < ROUNDING
    with pytest.raises(RuntimeError, match=r"set use_reentrant=False.*or.*pass solver=Equilibrium\(\)"):
        trained(wrapped(gpt2(), EQUAL["cut"]), tmp_path, **options)


def test_the_first_gradient_norm_is_that_of_the_plain_model(tmp_path: Path) -> None:
    norms = []
    for model in (gpt2(), wrapped(gpt2(), EQUAL["default"]), wrapped(gpt2(), OTHER)):
        run = trainer(model, tmp_path, max_steps=1, logging_steps=1, gradient_accumulation_steps=4, max_grad_norm=0.0)
        run.train()
        norms.append(run.state.log_history[0]["loss"])
        norms.append(run.state.log_history[0]["grad_norm"])
    assert float(norms[2]) == pytest.approx(float(norms[0]), rel=1e-5)
    assert float(norms[3]) == pytest.approx(float(norms[1]), rel=1e-4)
    assert float(norms[5]) != pytest.approx(float(norms[1]), rel=0.1)


def test_evaluation_and_prediction(tmp_path: Path) -> None:
    model, plain = wrapped(gpt2(), EQUAL["default"]), gpt2()
    ours, theirs = trainer(model, tmp_path), trainer(plain, tmp_path)
    assert ours.evaluate()["eval_loss"] == theirs.evaluate()["eval_loss"]
    assert (ours.predict(Sentences()).predictions == theirs.predict(Sentences()).predictions).all()


def test_a_saved_model_is_the_plain_one(tmp_path: Path) -> None:
    model = wrapped(gpt2(), EQUAL["default"])
    run = trainer(model, tmp_path)
    run.train()
    run.save_model(str(tmp_path / "ours"))
    assert json.loads((tmp_path / "ours/config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    read = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    assert read.lm_head.weight is read.transformer.wte.weight
    assert distance(weights(read), weights(model)) == 0
    model.save_pretrained(tmp_path / "again")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again")
    assert distance(weights(again), weights(model)) == 0


@pytest.mark.parametrize("solver", [EQUAL["default"], OTHER], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(solver: Any, tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    expected = trained(wrapped(gpt2(), solver), tmp_path / "whole", **options)
    model = wrapped(gpt2(), solver)
    trainer(model, tmp_path / "whole", **options).train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert distance(weights(model), expected) == 0


def test_methods_and_attributes_are_reached_through_the_wrapper() -> None:
    plain, model = gpt2(), wrapped(gpt2(), EQUAL["default"])
    start = torch.tensor([[1, 2, 3]])
    ours = model.generate(start, max_new_tokens=4, do_sample=False)
    assert torch.equal(ours, plain.generate(start, max_new_tokens=4, do_sample=False))
    assert model.config is model.module.config
    assert isinstance(model, transformers.PreTrainedModel | ActivationRelaxation)
    assert model.get_input_embeddings() is model.module.get_submodule("transformer.wte")
    model.resize_token_embeddings(24)
    assert model.module.get_submodule("transformer.wte").weight.shape == (24, 16)
    assert model.module.config.vocab_size == 24
