"""The paper's networks, and which simplifications are put on which of their parts."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import nn

from relaxprop.derivatives import drop_derivatives
from relaxprop.feedback import FeedbackRule, use_feedback
from relaxprop.lab.data import Dataset

ModelName = Literal["mlp", "cnn", "cnn-as-coded"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)
Part = Literal["all", "convolutional", "fully_connected"]
Dropped = Literal["both", "relaxation", "update"]


class ModelError(ValueError):
    """The network does not fit the data, or has no such part."""


WEIGHT_STD = 0.05  # weights start at N(0, 0.05²), biases at zero


def build(
    name: str,
    dataset: Dataset,
    *,
    seed: int,
    feedback: Mapping[Part, FeedbackRule] | None = None,
    dropped: Mapping[Part, Dropped] | None = None,
) -> nn.Module:
    """A network for a data set, with the paper's initial weights.

    Args:
        name: "mlp": input-300-300-100-classes; "cnn": convolutions of 5×5 with 32 and 64 filters, a 2×2 max-pooling
            after the first, fully connected 64-120-classes; "cnn-as-coded": as in the authors' code, with 6 and 16
            filters without biases and fully connected 120-120-classes. All with tanh and a linear output (the paper,
            section 3). The parts of the last two are ``convolutional`` and ``fully_connected``.
        seed: fixes the weights, whatever rule trains them, and the backwards weights, which are independent of them.
        feedback: the rule of the backwards weights, by part of the network.
        dropped: where derivatives are dropped, by part of the network.

    Raises:
        ValueError: an unknown name.
        ModelError: images that are too small; a part that the network does not have.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    classes = len(dataset.classes)
    if name == "mlp":
        model = _mlp([math.prod(dataset.image_shape), 300, 300, 100, classes])
    elif name == "cnn":
        model = _cnn(dataset.image_shape, (32, 64), (64, 120, classes), bias=True)
    else:
        model = _cnn(dataset.image_shape, (6, 16), (120, 120, classes), bias=False)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("weight"):
                    parameter.normal_(0, WEIGHT_STD)
                else:
                    parameter.zero_()
        # The backwards weights go on in the same stream: seeded anew, they would be the weights once more.
        for part, rule in (feedback or {}).items():
            use_feedback(_part(model, part), rule)
    for part, places in (dropped or {}).items():
        drop_derivatives(_part(model, part), relaxation=places != "update", update=places != "relaxation")
    model.to(memory_format=memory_format(name))  # type: ignore[call-overload]  # PyTorch's stub lacks this form
    return model


def memory_format(name: str) -> torch.memory_format:
    """How a network's weights and images lie in memory: convolutions are fastest where channels are innermost."""
    return torch.contiguous_format if name == "mlp" else torch.channels_last


def _part(model: nn.Module, name: str) -> nn.Module:
    if name == "all":
        return model
    parts = dict(model.named_children())
    if name not in get_args(Part) or name not in parts:
        known = ["all", *(part for part in get_args(Part) if part in parts)]
        raise ModelError(f"the network has no part {name!r}: name one of {', '.join(known)}")
    return parts[name]


def _mlp(sizes: list[int]) -> nn.Module:
    return nn.Sequential(OrderedDict(flatten=nn.Flatten()) | _fully_connected(sizes))


def _cnn(
    image_shape: tuple[int, ...], filters: tuple[int, int], fully_connected: Sequence[int], *, bias: bool
) -> nn.Module:
    channels, height, width = image_shape
    side = [((n - 4) // 2) - 4 for n in (height, width)]
    if min(side) < 1:
        raise ModelError(f"the CNN needs images of at least 14×14 pixels, got {height}×{width}")
    convolutional = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(channels, filters[0], 5, bias=bias),
        tanh1=nn.Tanh(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(filters[0], filters[1], 5, bias=bias),
        tanh2=nn.Tanh(),
    )
    layers = _fully_connected([filters[1] * math.prod(side), *fully_connected])
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            convolutional=nn.Sequential(convolutional),
            flatten=nn.Flatten(),
            fully_connected=nn.Sequential(layers),
        )
    )


def _fully_connected(sizes: Sequence[int]) -> OrderedDict[str, nn.Module]:
    layers = OrderedDict[str, nn.Module]()
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes), 1):
        layers[f"linear{i}"] = nn.Linear(fan_in, fan_out)
        if i < len(sizes) - 1:
            layers[f"tanh{i}"] = nn.Tanh()
    return layers
