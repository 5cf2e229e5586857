"""TensorBoard: the relaxation and its alignment, beside the loss."""

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from relaxprop import PAPER, ActivationRelaxation, alignment


def main(folder="events", steps=10):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4))
    x, labels = torch.rand(32, 20), torch.randint(4, (32,))
    model = ActivationRelaxation(network, solver=PAPER)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def loss_fn(y):
        return nn.functional.cross_entropy(y, labels, reduction="sum")

    with SummaryWriter(folder) as writer:
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_fn(model(x))
            loss.backward()
            writer.add_scalar("loss", loss.item(), step)
            writer.add_scalar(
                "relaxation/remaining", model.last_relaxation.remaining, step
            )
            for name, found in alignment(model, loss_fn, x).items():
                writer.add_scalar(f"cosine/{name}", found.cosine, step)
            optimizer.step()
    return model


if __name__ == "__main__":
    main()
