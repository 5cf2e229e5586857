"""Networks that differ in their weights alone, as one network that computes all of them at once: one for each seed.

    images                 (batch, S·C, H, W)     the seeds' minibatches side by side, as channels
    convolution, pooling   (batch, S·c, h, w)     in S groups
    fully connected        (S, batch, d)          one product of S matrices

No operation crosses from one seed to another. So the operator A of the relaxation phase has a block for each seed: all
equations hold in it as in the seed's own network, and what is not finite in one block stays there. A loss that is
summed over seeds gives each seed the gradient of its own. Sums are taken in another order than in the single networks,
so that results are theirs to rounding, and not to the last bit.

What depends on all seeds at once is refused (`check_batched`): a stopping rule, random draws, a step size that follows
the error.

May import: feedback, lab.config, lab.models.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any, get_args

import torch
from torch import Tensor, nn

from relaxprop.feedback import SendBack, SharedGradient, use_feedback
from relaxprop.lab.config import RunConfig
from relaxprop.lab.models import ModelError, PapersModel

_FEEDBACK = ("learned", "random")


def but_for_seed(config: RunConfig) -> str:
    """A text that is the same for descriptions which differ in their seeds alone."""
    return config.model_copy(update={"seed": 0}).model_dump_json()


def check_seeds(configs: Sequence[RunConfig]) -> None:
    """Refuse runs that are not those of several seeds, or that cannot be computed at once.

    Raises:
        ValueError: if two of them have the same seed, or differ in more than their seeds.
        ModelError: as `check_batched`.
    """
    if len({but_for_seed(config) for config in configs}) > 1:
        raise ValueError("runs that are computed at once must differ in their seeds alone, and these differ in more")
    if len({config.seed for config in configs}) < len(configs):
        raise ValueError(f"every run needs a seed of its own, got {', '.join(str(c.seed) for c in configs)}")
    check_batched(configs[0])


def check_batched(config: RunConfig) -> None:
    """Refuse what cannot be computed for several seeds at once as each seed's own run computes it.

    Raises:
        ModelError: if the description has it; the error names it.
    """
    options = config.solver_options
    if config.model not in get_args(PapersModel):
        reason = f"model {config.model}: its layers have no batched form"
    elif config.rule not in ("ar", "backprop"):
        reason = f"rule {config.rule}: only Activation Relaxation and backpropagation have a batched form"
    elif other := [rule for rule in config.feedback.values() if rule not in _FEEDBACK]:
        reason = f"feedback {other[0]}: only {' and '.join(_FEEDBACK)} backwards weights have a batched form"
    elif config.vertices == "operations":
        reason = "vertices operations: a batched layer is made of other operations"
    elif options.get("order") == "asynchronous":
        reason = "order asynchronous: each seed draws the vertices that it updates"
    elif options.get("tolerance") is not None:
        reason = f"tolerance {options['tolerance']}: each seed stops after a number of steps of its own"
    elif config.solver == "continuous" and not config.frozen.relaxation_derivative:
        reason = "solver continuous, unfrozen: the integration's step size follows the error of all seeds"
    elif config.precision != "fp32":
        reason = f"precision {config.precision}: its rounding is too coarse for results that are to be the same"
    else:
        return
    raise ModelError(f"{reason}, so its seeds cannot be computed at once; compute them one after the other")


class BatchedLinear(nn.Module):
    """S linear layers with biases: ``u_s = x_s W_s^T + b_s``, of x in (S, batch, inputs).

    The weights are in (S, inputs, outputs), so that their gradient comes as it is kept; biases in (S, 1, outputs);
    backwards weights, where the layers have any, as the weights.
    """

    only_computes = True
    feedback: Tensor | None

    def __init__(self, layer: Any, seeds: int) -> None:
        super().__init__()

        like: Tensor = layer.weight.detach()

        def empty(rows: int) -> Tensor:
            return like.new_empty(seeds, rows, layer.out_features)

        self.weight, self.bias = nn.Parameter(empty(layer.in_features)), nn.Parameter(empty(1))
        rule = getattr(layer, "feedback_rule", None)
        if rule == "learned":
            self.feedback = nn.Parameter(empty(layer.in_features))
        else:
            self.register_buffer("feedback", empty(layer.in_features) if rule else None)

    def forward(self, x: Tensor) -> Tensor:
        B = self.feedback
        if B is None:
            return torch.baddbmm(self.bias, x, self.weight)
        learned = isinstance(B, nn.Parameter)
        W = SharedGradient.apply(self.weight, B) if learned else self.weight  # type: ignore[no-untyped-call]
        u = torch.baddbmm(self.bias, x.detach(), W)
        if not x.requires_grad or not torch.is_grad_enabled():
            return u
        sent: Tensor = SendBack.apply(u, x, self, B.detach(), _adjoint)  # type: ignore[no-untyped-call]
        return sent


def _adjoint(layer: BatchedLinear, weight: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    return torch.bmm(gradient, weight.mT)


class Apart(nn.Module):
    """Pictures of S seeds side by side, (batch, S·c, h, w), as one vector for each: (S, batch, c·h·w)."""

    def __init__(self, seeds: int) -> None:
        super().__init__()
        self.seeds = seeds

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), self.seeds, -1).transpose(0, 1)


def side_by_side(images: Tensor) -> Tensor:
    """Images of (batch, S, C, H, W), those of a seed in each place of S, as the batched network takes them."""
    return images.flatten(1, 2)


def batched(models: Sequence[nn.Module]) -> nn.Module:
    """One network of several, which becomes theirs: what trains it trains each of them, as their weights are views of
    its own.

    Args:
        models: of `models.build`, that differ in their weights alone.

    Raises:
        ModelError: if there is no batched form of one of their layers.
    """
    with torch.random.fork_rng(devices=()):
        whole = _layer(models)
    own = [dict(_tensors(model)) for model in models]
    for name, tensor in _tensors(whole):
        for tensors, part in zip(own, of_seeds(whole, name, tensor.detach()), strict=True):
            part.copy_(tensors[name].detach())
            tensors[name].data = part
    return whole


def _layer(parts: Sequence[nn.Module]) -> nn.Module:
    """The batched form of layers that have the same place in their networks, with weights to be filled in."""
    first: Any = parts[0]
    seeds = len(parts)
    if isinstance(first, nn.Sequential):
        names = dict(first.named_children())
        return nn.Sequential(OrderedDict({name: _layer([p.get_submodule(name) for p in parts]) for name in names}))
    if isinstance(first, nn.Linear):
        return BatchedLinear(first, seeds)
    if isinstance(first, nn.Conv2d):
        return _convolution(first, seeds)
    if isinstance(first, nn.Flatten):
        return Apart(seeds)
    if isinstance(first, nn.Tanh | nn.MaxPool2d):
        return deepcopy(first)
    raise ModelError(f"{type(first).__name__} has no form for several seeds at once: compute them one after the other")


def _convolution(layer: Any, seeds: int) -> nn.Module:
    """S convolutions as the groups of one."""
    weight = layer.weight
    whole = nn.Conv2d(
        seeds * layer.in_channels, seeds * layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
        layer.dilation, seeds, layer.bias is not None, device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
    if (rule := getattr(layer, "feedback_rule", None)) is not None:
        use_feedback(whole, rule)
    whole.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's stub lacks this form
    return whole


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def of_seeds(network: nn.Module, name: str, tensor: Tensor) -> Sequence[Tensor]:
    """What belongs to each seed, as a view of the shape that it has in the seed's own network.

    Args:
        network: as `batched` gives it.
        name: of a parameter or a buffer.
        tensor: it, or any other of its shape.
    """
    place, _, kind = name.rpartition(".")
    layer = network.get_submodule(place)
    if isinstance(layer, BatchedLinear):
        return (tensor.squeeze(1) if kind == "bias" else tensor.mT).unbind()
    assert isinstance(layer, nn.Conv2d)
    return tensor.view(layer.groups, -1, *tensor.shape[1:]).unbind()


def gather_state(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    models: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Gives the optimiser of a batched network the state of the seeds' own, which have made equally many steps."""
    for name, parameter in network.named_parameters():
        own = [o.state.get(m.get_parameter(name), {}) for m, o in zip(models, optimizers, strict=True)]
        for key, first in own[0].items():
            if first.shape != models[0].get_parameter(name).shape:  # the number of steps
                optimizer.state[parameter][key] = first.clone()
                continue
            whole = torch.empty_like(parameter, requires_grad=False)
            for part, state in zip(of_seeds(network, name, whole), own, strict=True):
                part.copy_(state[key])
            optimizer.state[parameter][key] = whole


def hand_out_state(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    models: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """The other way round: each seed's optimiser gets its part, as a view."""
    for name, parameter in network.named_parameters():
        for key, whole in optimizer.state.get(parameter, {}).items():
            same = whole.shape == parameter.shape
            parts = of_seeds(network, name, whole) if same else [whole] * len(models)
            for model, own, part in zip(models, optimizers, parts, strict=True):
                own.state[model.get_parameter(name)][key] = part
