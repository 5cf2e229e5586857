"""Hugging Face's Trainer: a callback that logs the relaxation beside the loss."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from relaxprop import ActivationRelaxation, ClosedForm, alignment


class LogRelaxation(TrainerCallback):
    """Adds to the logs what the latest relaxation did.

    It also adds the cosine of some gradients to backpropagation's.
    """

    def __init__(self, model, batch):
        self.model, self.batch = model, batch

    def on_log(self, args, state, control, logs, **kwargs):
        record = self.model.last_relaxation
        if record is None or "loss" not in logs:
            return
        logs["relaxation/transports"] = record.transports
        logs["relaxation/remaining"] = record.remaining
        found = alignment(self.model, lambda output: output.loss, **self.batch)
        for name, a in found.items():
            if name.endswith(("fc.weight", "fc1.weight")):
                logs[f"cosine/{name}"] = a.cosine


def gpt2():
    config = GPT2Config(
        vocab_size=20,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    tokens = torch.randint(1, 20, (32, 12))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    return GPT2LMHeadModel(config), data


def vit():
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        num_channels=1,
        num_labels=4,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    images, labels = torch.rand(32, 1, 16, 16), torch.randint(4, (32,))
    return ViTForImageClassification(config), [
        {"pixel_values": image, "labels": label}
        for image, label in zip(images, labels, strict=True)
    ]


def main(make, folder, steps=6):
    torch.manual_seed(0)
    plain, data = make()
    model = ActivationRelaxation(plain, solver=ClosedForm(0.5, 60))
    batch = torch.utils.data.default_collate(data[:4])
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=0.001,
        logging_steps=2, report_to=["tensorboard"], disable_tqdm=True,
        save_strategy="no", use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    # It comes first, so that the callbacks that report to TensorBoard report this too.
    trainer.callback_handler.callbacks.insert(0, LogRelaxation(model, batch))
    trainer.train()
    return model


if __name__ == "__main__":
    for make in (gpt2, vit):
        main(make, "trained")
