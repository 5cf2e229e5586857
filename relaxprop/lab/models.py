"""The networks that experiments train: the paper's, and others from a library; simplifications of their parts.

May import: feedback, public names, lab.data.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from relaxprop import drop_derivatives, use_feedback
from relaxprop.feedback import FeedbackRule
from relaxprop.lab.data import Dataset

PapersModel = Literal["mlp", "cnn", "cnn-as-coded"]
ModelName = Literal[PapersModel, "resnet", "transformer"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)
Part = Literal["all", "convolutional", "fully_connected"]
Dropped = Literal["both", "relaxation", "update"]


class ModelError(ValueError):
    """The network does not fit the data, or has no such part."""


WEIGHT_STD = 0.05  # the paper's weights start at N(0, 0.05²), its biases at zero


def build(
    name: str,
    dataset: Dataset,
    *,
    seed: int,
    feedback: Mapping[Part, FeedbackRule] | None = None,
    dropped: Mapping[Part, Dropped] | None = None,
) -> nn.Module:
    """A network for a data set, with its initial weights: the paper's, or the library's own.

    Args:
        name: "mlp": input-300-300-100-classes; "cnn": convolutions of 5×5 with 32 and 64 filters, a 2×2 max-pooling
            after the first, fully connected 64-120-classes; "cnn-as-coded": as in the authors' code, with 6 and 16
            filters without biases and fully connected 120-120-classes. All with tanh and a linear output (the paper,
            section 3). The parts of the last two are ``convolutional`` and ``fully_connected``. "resnet": three
            residual blocks of 16, 32 and 64 filters with batch norm; "transformer": GPT-2's decoder with two blocks of
            width 64 and tied embeddings, for sequences; both by Hugging Face.
        seed: fixes the weights, whatever rule trains them, and the backwards weights, which are independent of them.
        feedback: the rule of the backwards weights, by part of the network.
        dropped: where derivatives are dropped, by part of the network.

    Raises:
        ValueError: an unknown name.
        ModelError: images that are too small, sequences where images are needed or the other way round; a part that
            the network does not have.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    if (name == "transformer") == dataset.is_images:
        raise ModelError(f"the {name} does not fit {dataset.name}: a transformer reads text, the others read images")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = _network(name, dataset)
        if name in get_args(PapersModel):
            torch.manual_seed(seed)  # whatever PyTorch's own initialisation has drawn
            _initialise(model)
        # The backwards weights go on in the same stream: seeded anew, they would be the weights once more.
        for part, rule in (feedback or {}).items():
            use_feedback(_part(model, part), rule)
    for part, places in (dropped or {}).items():
        drop_derivatives(_part(model, part), relaxation=places != "update", update=places != "relaxation")
    model.to(memory_format=memory_format(name))  # type: ignore[call-overload]  # PyTorch's stub lacks this form
    return model


def _network(name: str, dataset: Dataset) -> nn.Module:
    classes = len(dataset.classes)
    if name == "resnet":
        if min(dataset.image_shape[1:]) < 17:  # else the last block's normalisation sees one pixel
            height, width = dataset.image_shape[1:]
            raise ModelError(f"the resnet needs images of at least 17×17 pixels, got {height}×{width}")
        return Logits(resnet(dataset.image_shape[0], classes, (16, 32, 64), (1, 1, 1)))
    if name == "transformer":
        return Logits(gpt2(classes, dataset.train.images.shape[1], width=64, layers=2, heads=4))
    if name == "mlp":
        return _mlp([math.prod(dataset.image_shape), 300, 300, 100, classes])
    if name == "cnn":
        return _cnn(dataset.image_shape, (32, 64), (64, 120, classes), bias=True)
    return _cnn(dataset.image_shape, (6, 16), (120, 120, classes), bias=False)


@torch.no_grad()
def _initialise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            parameter.normal_(0, WEIGHT_STD)
        else:
            parameter.zero_()


class Logits(nn.Module):
    """A model of Hugging Face as PyTorch's losses expect it: (n, classes), or (n, classes, T) for a sequence."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x).logits
        return logits.movedim(-1, 1)


def resnet(channels: int, classes: int, sizes: Sequence[int], depths: Sequence[int]) -> nn.Module:
    """A residual network with batch norm (He et al., 2016): ``depths`` basic blocks of each of the ``sizes``."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=channels, embedding_size=sizes[0], hidden_sizes=[*sizes], depths=[*depths], layer_type="basic"
    )
    config.num_labels = classes
    model: nn.Module = ResNetForImageClassification(config)
    return model


def gpt2(vocabulary: int, length: int, *, width: int, layers: int, heads: int) -> nn.Module:
    """A decoder-only transformer with tied embeddings (Radford et al., 2019), its attention written out."""
    from transformers import GPT2Config, GPT2LMHeadModel

    options: dict[str, Any] = {
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False, "bos_token_id": 0,
        "eos_token_id": 0, "attn_implementation": "eager",  # scores, mask, softmax and sum are operations of their own
    }  # fmt: skip
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=layers, n_head=heads, **options
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def memory_format(name: str) -> torch.memory_format:
    """How a network's weights and images lie in memory: convolutions are fastest where channels are innermost."""
    return torch.contiguous_format if name in ("mlp", "transformer") else torch.channels_last


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
