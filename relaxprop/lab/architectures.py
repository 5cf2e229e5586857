"""Models of many kinds, each with random inputs and a loss: what Appendix A of the paper calls arbitrary graphs.

Those that a library keeps come from there, with random weights; the others are written plainly, as a user would. All
of them use PyTorch's functions as they please: what relaxes are their operations.

May import: lab.data, lab.models, lab.training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from relaxprop.lab import models
from relaxprop.lab.data import Dataset, Split
from relaxprop.lab.training import squared_error

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Problem:
    """A model with inputs and a loss of its result."""

    model: nn.Module
    inputs: tuple[Any, ...]
    loss: Loss

    def to(self, dtype: torch.dtype) -> Problem:
        """The same with all floating-point numbers of one type."""
        inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in self.inputs)
        return Problem(self.model.to(dtype), inputs, self.loss)


@dataclass(frozen=True)
class Architecture:
    """A kind of model.

    Attributes:
        title: what it is.
        build: makes the problem; at the size of the table, or small.
    """

    title: str
    build: Callable[[bool], Problem]


def build(name: str, *, small: bool = False, seed: int = 0) -> Problem:
    """A problem by name, in float32.

    Args:
        name: one of ``ARCHITECTURES``.
        small: a size for tests: the same graph or a shorter one, narrower.
        seed: fixes weights and inputs.

    Raises:
        ValueError: an unknown name.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {name!r}")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return ARCHITECTURES[name].build(small)


def _squares(output: Tensor) -> Tensor:
    return squared_error(output, torch.full_like(output, 0.3))


def _papers(name: str, image: tuple[int, int, int]) -> Callable[[bool], Problem]:
    def problem(small: bool) -> Problem:
        batch = 4 if small else 64
        images, labels = torch.rand(batch, *image), torch.randint(10, (batch,))
        dataset = Dataset("random", tuple("0123456789"), Split(images, labels), Split(images, labels))
        target = functional.one_hot(labels, 10)
        return Problem(models.build(name, dataset, seed=0), (images,), lambda y: squared_error(y, target))

    return problem


def resnet18(*, small: bool = False) -> nn.Module:
    """ResNet-18 for 10 classes of images with three channels."""
    return models.resnet(3, 10, (8, 8, 16, 16) if small else (64, 128, 256, 512), (2, 2, 2, 2))


def _resnet18(small: bool) -> Problem:
    images = torch.rand(2 if small else 4, 3, 32, 32)
    return Problem(resnet18(small=small), (images,), lambda result: _squares(result.logits))


class Recurrent(nn.Module):
    """A recurrent cell unrolled over time, its last state read out."""

    def __init__(self, cell: nn.LSTMCell | nn.GRUCell, outputs: int) -> None:
        super().__init__()
        self.cell, self.read = cell, nn.Linear(cell.hidden_size, outputs)

    def forward(self, sequence: Tensor) -> Tensor:  # (batch, T, features)
        state: Any = None
        for x in sequence.unbind(1):
            state = self.cell(x, state)
        output: Tensor = self.read(state[0] if isinstance(state, tuple) else state)
        return output


def _recurrent(kind: type[nn.LSTMCell] | type[nn.GRUCell]) -> Callable[[bool], Problem]:
    def problem(small: bool) -> Problem:
        batch, moments, features, hidden = (2, 6, 3, 5) if small else (32, 28, 28, 128)
        return Problem(Recurrent(kind(features, hidden), 10), (torch.rand(batch, moments, features),), _squares)

    return problem


_VOCABULARY, _LENGTH = {True: 11, False: 256}, {True: 6, False: 64}  # small, and at the table's size


def transformer(*, small: bool = False) -> nn.Module:
    """GPT-2's decoder with few and narrow layers, for `text`."""
    layers, width, heads = (2, 16, 2) if small else (4, 128, 4)
    return models.gpt2(_VOCABULARY[small], _LENGTH[small], width=width, layers=layers, heads=heads)


def text(batch: int, *, small: bool = False) -> Tensor:
    """Random sequences that the transformer reads."""
    return torch.randint(_VOCABULARY[small], (batch, _LENGTH[small]))


def _transformer(small: bool) -> Problem:
    tokens = text(2 if small else 8, small=small)

    def loss(result: Any) -> Tensor:
        return functional.cross_entropy(result.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")

    return Problem(transformer(small=small), (tokens,), loss)


def chain(depth: int, width: int) -> nn.Module:
    """Linear layers with tanh and a linear readout; orthogonal, so that gradients neither vanish nor explode."""
    layers = [nn.Linear(width, width) for _ in range(depth)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh())), nn.Linear(width, 10))


class UNet(nn.Module):
    """Two levels down and up again, the way up reading what the way down has passed (Ronneberger et al., 2015)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down1, self.down2 = self._block(3, width), self._block(width, 2 * width)
        self.bottom = self._block(2 * width, 4 * width)
        self.enlarge2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.enlarge1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up2, self.up1 = self._block(4 * width, 2 * width), self._block(2 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    @staticmethod
    def _block(channels: int, filters: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, filters, 3, padding=1), nn.GroupNorm(2, filters), nn.SiLU(inplace=True)
        )

    def forward(self, image: Tensor) -> Tensor:
        first = self.down1(image)
        second = self.down2(functional.max_pool2d(first, 2))
        bottom = self.bottom(functional.max_pool2d(second, 2))
        second = self.up2(torch.cat([second, self.enlarge2(bottom)], dim=1))
        first = self.up1(torch.cat([first, self.enlarge1(second)], dim=1))
        output: Tensor = self.head(first)
        return output


def _unet(small: bool) -> Problem:
    width, batch, side = (4, 2, 8) if small else (16, 4, 32)
    return Problem(UNet(width), (torch.rand(batch, 3, side, side),), _squares)


class MessagePassing(nn.Module):
    """Nodes of a graph exchange gated messages along its edges; the sum over all nodes is read out."""

    def __init__(self, features: int, width: int, rounds: int) -> None:
        super().__init__()
        self.enter, self.read = nn.Linear(features, width), nn.Linear(width, 1)
        self.messages = nn.ModuleList(nn.Linear(2 * width, 2 * width) for _ in range(rounds))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(rounds))

    def forward(self, features: Tensor, edges: Tensor) -> Tensor:  # (nodes, features), (2, edges)
        h = self.enter(features)
        source, target = edges
        for message, norm in zip(self.messages, self.norms, strict=True):
            value, gate = message(torch.cat([h[source], h[target]], dim=1)).chunk(2, dim=1)
            arrived = torch.zeros_like(h).index_add(0, target, value * gate.sigmoid())
            h = norm(h + functional.gelu(arrived))
        output: Tensor = self.read(h.sum(0))
        return output


def _message_passing(small: bool) -> Problem:
    nodes, edges, features, width, rounds = (6, 12, 3, 4, 2) if small else (256, 1024, 16, 64, 4)
    model = MessagePassing(features, width, rounds)
    return Problem(model, (torch.rand(nodes, features), torch.randint(nodes, (2, edges))), _squares)


class Mixture(nn.Module):
    """Experts on top of one shared encoder that each of them calls twice, weighted by a gate."""

    def __init__(self, features: int, width: int, experts: int) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.enter, self.gate = nn.Linear(features, width), nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))
        self.read = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.enter(x))
        answers = [self.shared(expert(self.shared(h)) + h) for expert in self.experts]
        weights = self.gate(h).softmax(dim=1)
        output: Tensor = self.read(torch.einsum("be,ebw->bw", weights, torch.stack(answers)))
        return output


def _mixture(small: bool) -> Problem:
    features, width, experts, batch = (4, 5, 3, 3) if small else (64, 128, 4, 64)
    return Problem(Mixture(features, width, experts), (torch.rand(batch, features),), _squares)


ARCHITECTURES: Mapping[str, Architecture] = {
    "mlp": Architecture("the paper's MLP", _papers("mlp", (1, 28, 28))),
    "cnn": Architecture("the paper's CNN", _papers("cnn", (3, 32, 32))),
    "resnet-18": Architecture("ResNet-18: residual blocks, batch norm", _resnet18),
    "lstm": Architecture("LSTM unrolled over time", _recurrent(nn.LSTMCell)),
    "gru": Architecture("GRU unrolled over time", _recurrent(nn.GRUCell)),
    "transformer": Architecture("decoder-only transformer (GPT-2), tied embeddings", _transformer),
    "u-net": Architecture("U-Net: skips, transposed convolutions", _unet),
    "message-passing": Architecture("message passing on a graph, gated", _message_passing),
    "mixture": Architecture("mixture of experts on a shared module", _mixture),
}
