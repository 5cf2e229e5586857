"""Lightning: a callback that logs the relaxation and its alignment to any logger."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from relaxprop import PAPER, ActivationRelaxation, alignment


class LogRelaxation(lightning.Callback):
    """Logs what the latest relaxation left of its initial state.

    Every few minibatches it also logs each gradient's cosine to backpropagation's.
    """

    def __init__(self, every=10):
        self.every = every

    def on_train_batch_end(self, trainer, learner, outputs, batch, index):
        record = learner.network.last_relaxation
        values = {
            "relaxation/transports": record.transports,
            "relaxation/remaining": record.remaining,
        }
        if index % self.every == 0:
            x, labels = batch
            found = alignment(learner.network, lambda y: learner.loss(y, labels), x)
            values |= {f"cosine/{name}": a.cosine for name, a in found.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


class Learner(lightning.LightningModule):
    """An ordinary LightningModule: the wrapper is its network."""

    def __init__(self):
        super().__init__()
        layers = nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4)
        self.network = ActivationRelaxation(nn.Sequential(*layers), solver=PAPER)

    def loss(self, y, labels):
        return nn.functional.cross_entropy(y, labels, reduction="sum")

    def training_step(self, batch, index):
        x, labels = batch
        return self.loss(self.network(x), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def main(logger, epochs=2):
    lightning.seed_everything(0, verbose=False)
    data = TensorDataset(torch.rand(64, 20), torch.randint(4, (64,)))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        callbacks=[LogRelaxation(every=2)],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    learner = Learner()
    trainer.fit(learner, DataLoader(data, batch_size=16))
    return learner


if __name__ == "__main__":
    main(lightning.pytorch.loggers.CSVLogger("logs"))
