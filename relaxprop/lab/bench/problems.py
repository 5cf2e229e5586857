"""The networks that are measured, on random inputs of the size that they are for.

May import: lab.architectures, lab.data, lab.models, lab.rules, lab.training.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from relaxprop.lab import models
from relaxprop.lab.architectures import chain, resnet18, text, transformer
from relaxprop.lab.data import Dataset, Split
from relaxprop.lab.models import Logits, PapersModel
from relaxprop.lab.rules import LossFunction
from relaxprop.lab.training import cross_entropy, squared_error

PAPERS: tuple[str, ...] = get_args(PapersModel)
RESNET, TRANSFORMER = "resnet-18", "transformer"
NAMES = (*PAPERS, RESNET, TRANSFORMER, "chain-N")
CHAIN = re.compile(r"chain-(\d+)")
CHAIN_WIDTH = 128
IMAGE_SIZES = (32, 224)  # CIFAR's and ImageNet's
_IMAGES = {"mlp": (1, 28, 28), "cnn": (3, 32, 32), "cnn-as-coded": (3, 32, 32)}  # MNIST's and CIFAR's


@dataclass(frozen=True)
class Problem:
    """A network, random inputs, and the loss of what it makes of them."""

    network: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: LossFunction

    def to(self, device: torch.device | str, memory_format: torch.memory_format) -> Problem:
        """The same on a device."""
        images = self.inputs.dim() == 4
        inputs = self.inputs.to(device, memory_format=memory_format) if images else self.inputs.to(device)
        network = self.network.to(device).to(memory_format=memory_format)  # type: ignore[call-overload]  # as in models
        return Problem(network, inputs, self.targets.to(device), self.loss)


def check_name(name: str) -> None:
    """Refuse a network that is not known.

    Raises:
        ValueError: if it is none of ``NAMES``, or a chain without layers.
    """
    found = CHAIN.fullmatch(name)
    if found and not int(found[1]):
        raise ValueError(f"chain-N is a chain of N layers, and N must be at least 1, got {name!r}")
    if not found and (name not in NAMES or name == "chain-N"):
        raise ValueError(f"model must be one of {', '.join(NAMES)} (as chain-20), got {name!r}")


def build(
    name: str, *, batch_size: int = 64, device: torch.device | str = "cpu", image_size: int = IMAGE_SIZES[0]
) -> Problem:
    """A network by name.

    Args:
        name: "mlp", "cnn" or "cnn-as-coded", the paper's; "resnet-18"; "transformer", a small GPT-2; "chain-N" for a
            number N, so many linear layers of ``CHAIN_WIDTH`` units with tanh.
        batch_size: at least 1; of the ResNet's small images at least 2.
        image_size: height and width of the ResNet's images; the others' have the size of the paper's.

    Raises:
        ValueError: an unknown name, or a minibatch that is too small.
    """
    check_name(name)
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    if name == RESNET and batch_size == 1 and image_size <= 32:
        raise ValueError(
            f"batch size must be at least 2 for {RESNET} on images of {image_size}×{image_size}, whose last batch norm "
            "sees one pixel, got 1"
        )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        if found := CHAIN.fullmatch(name):
            return on_chain(int(found[1]), batch_size=batch_size, device=device)
        memory_format = models.memory_format(name)
        if name == TRANSFORMER:
            tokens = text(batch_size)
            problem = Problem(Logits(transformer()), tokens, tokens[:, 1:], _of_next_tokens)
        elif name == RESNET:
            images = torch.rand(batch_size, 3, image_size, image_size)
            problem = Problem(Logits(resnet18()), images, _classes(batch_size), squared_error)
        else:
            images, targets = torch.rand(batch_size, *_IMAGES[name]), _classes(batch_size)
            split = Split(images, targets.argmax(1))
            network = models.build(name, Dataset("random", tuple("0123456789"), split, split), seed=0)
            problem = Problem(network, images, targets, squared_error)
        return problem.to(device, memory_format)


def on_chain(
    depth: int, *, width: int = CHAIN_WIDTH, batch_size: int = 64, device: torch.device | str = "cpu"
) -> Problem:
    """A chain of linear layers with tanh, each of so many units."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        problem = Problem(chain(depth, width), torch.rand(batch_size, width), _classes(batch_size), squared_error)
        return problem.to(device, torch.contiguous_format)


def _classes(batch_size: int) -> Tensor:
    return functional.one_hot(torch.randint(10, (batch_size,)), 10).float()


def _of_next_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    return cross_entropy(logits[..., :-1], tokens)
