"""The paper's networks."""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import nn

from relaxprop.lab.data import Dataset

ModelName = Literal["mlp"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)
WEIGHT_STD = 0.05  # weights start at N(0, 0.05²), biases at zero


def build(name: str, dataset: Dataset, *, seed: int) -> nn.Module:
    """A network for a data set, with the paper's initial weights.

    Args:
        name: "mlp": input-300-300-100-classes, tanh, linear output (the paper, section 3).
        seed: fixes the weights, whatever rule trains them.

    Raises:
        ValueError: an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    model = _mlp([math.prod(dataset.image_shape), 300, 300, 100, len(dataset.classes)])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("weight"):
                parameter.normal_(0, WEIGHT_STD, generator=generator)
            else:
                parameter.zero_()
    return model


def _mlp(sizes: list[int]) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes), 1):
        layers[f"linear{i}"] = nn.Linear(fan_in, fan_out)
        if i < len(sizes) - 1:
            layers[f"tanh{i}"] = nn.Tanh()
    return nn.Sequential(layers)
