r"""Direct feedback alignment: the output's error reaches every vertex at once, through fixed random weights.

    x_i = B_i g,   g = ∂L/∂x^L, all numbers of a sample's output        A = 0, s_i = B_i g in the words of `graph`

and its label-driven variant, direct random target projection, where nothing of the output is waited for:

    x_i = −B_i t,  t the sample's target, one-hot where it is a class

Layers that the output reads directly have their exact gradient in both. Nothing propagates: one call of PyTorch's
engine gives all weight gradients, from the states alone.
B_i belongs to a vertex, that is to one call of one module: a recurrent network has one for each moment.
Source: Nøkland, arXiv 1609.01596; Frenkel, Lefebvre, Bol, arXiv 1909.01311, whose −t stands for g = y − t, as an
output between 0 and 1 has the sign of g wrong nowhere.

May import: graph, recording, rule, rules.base, vertices.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from relaxprop.graph import Graph, States, Vertex
from relaxprop.recording import Recording
from relaxprop.rule import shown
from relaxprop.rules.base import Described, Phase, Rule, RuleSettings, refuse_target_of_its_own
from relaxprop.vertices import Granularity, are_operations

ErrorSource = Literal["output", "target"]


@dataclass(frozen=True)
class DirectFeedbackSettings(RuleSettings):
    """The arguments of `DirectFeedback`, checked together.

    Raises:
        TypeError: if an option has the wrong type.
        ValueError: if an option is unknown or outside of its range.
    """

    error: ErrorSource = "output"
    seed: int = 0
    std: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.error not in get_args(ErrorSource):
            raise ValueError(f"error must be 'output' or 'target', got {self.error!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an integer, got {shown(self.seed)}")
        if self.std is not None:
            if isinstance(self.std, bool) or not isinstance(self.std, Real):
                raise TypeError(f"std must be a positive number or None, got {shown(self.std)}")
            if not 0 < float(self.std) < math.inf:
                raise ValueError(f"std must be positive and finite, got {self.std!r}")
        if are_operations(self.vertices):
            raise ValueError(
                "vertices='operations' has vertices that are no layer's activity (a transposed weight, a view), to "
                "which no error of a sample can be fed back: pass vertices='activations', 'modules' or submodules"
            )


class DirectFeedback(Rule):
    r"""Trains ``module`` by direct feedback alignment: each vertex's state is ``x_i = B_i g``, with fixed random B_i.

    (Nøkland, arXiv 1609.01596.) ``loss.backward()`` fills ``.grad``; loss, optimiser and loop stay as they are. The
    first dimension of the output and of every vertex counts the samples.

    With ``error="target"`` it is direct random target projection (Frenkel et al., arXiv 1909.01311):
    ``x_i = −B_i t``. Pass the target with the input, ``output = model(x, target=labels)``: classes of shape (batch,),
    or numbers of the output's shape. The states do not follow the loss's scale then, as no loss is read: the output
    layer's gradient has the loss's scale, and that of all others is a sum over the samples.

    B_i is drawn at the first pass that reaches vertex i, in float32 and from the seed and the vertex's name alone. So
    it is the same in every process and after every restart, is no part of ``state_dict()``, and needs no checkpoint.
    If a module has several outputs, the loss has to read the same ones in every pass.

    Args:
        module: any module; not one that returns its loss, which is one number for all samples.
        error: "output" feeds ∂L/∂x^L back, "target" the target.
        seed: fixes all B_i.
        std: standard deviation of the numbers in B_i; None (default): 1/√n for n numbers in a sample's error.
        vertices: what gets a state: "activations", "modules", or an iterable of submodules of ``module``.
        check_finite: raise `NonFiniteStateError` when a state overflows.
        keep_states: keep the final states (``last_phase.states``).

    Attributes:
        module: the plain module.
        settings: the arguments, a frozen record.
        feedback: B_i by the vertex's name, of shape ``(n, *activity.shape[1:])``; may be set, before the first
            pass or later.
        last_phase: the `Phase` record of the latest backward pass, None before the first.

    Raises:
        TypeError: if ``module`` is not a module or is already wrapped, or an option has the wrong type.
        ValueError: if an option is unknown or outside of its range, or no vertex is found; in the backward pass, if
            output or vertices are not by samples, a B_i does not fit, the loss reads other outputs than before, or the
            target is missing or does not fit.
        NonFiniteStateError: in the backward pass, if a state is not finite (``check_finite``).
    """

    settings: DirectFeedbackSettings
    feedback: dict[str, Tensor]
    _read_by_loss: dict[int, tuple[int, ...]]  # by the number of outputs, the places of those whose errors B_i reads

    def __init__(
        self,
        module: nn.Module,
        *,
        error: ErrorSource = "output",
        seed: int = 0,
        std: float | None = None,
        vertices: Granularity | Iterable[nn.Module] = "activations",
        check_finite: bool = True,
        keep_states: bool = False,
    ) -> None:
        super().__init__(module, DirectFeedbackSettings(vertices, check_finite, keep_states, error, seed, std))
        vars(self).update(feedback={}, _read_by_loss={})

    def _configure(self, settings: Any) -> None:
        super()._configure(settings)
        if self.settings.error == "target":
            refuse_target_of_its_own(self)

    @property
    def locality(self) -> Described:
        if self.settings.error == "target":
            return Described(
                "none: each layer's update is there as soon as its activity is", ("target", "target broadcast")
            )
        return Described("none: all states are there as soon as ∂L/∂output is", ("∂L/∂output", "error broadcast"))

    def solve(self, graph: Graph) -> tuple[States, Phase]:
        read = tuple([place for place, g in enumerate(graph.output_cotangents) if g is not None])
        if not self.feedback:
            self._read_by_loss.clear()
        if (known := self._read_by_loss.setdefault(len(graph.outputs), read)) != read:
            raise ValueError(
                f"the loss reads the outputs {read} of the module, counted from 0, and direct feedback has matrices "
                f"for the errors of {known}: let the loss read all of them in every pass, as by adding "
                "0 * other_output.sum()"
            )
        return self._fed_back(graph, _errors(graph))

    def _forward(self, args: Any, kwargs: Any) -> Any:
        if self.settings.error == "output":
            return super()._forward(args, kwargs)
        self._refuse_surroundings(args, kwargs)
        recording = self.record(args, kwargs)
        return self._handed_out(recording, partial(self._project, kwargs.get("target")), recording.update)

    def record(self, args: Any, kwargs: Any = None) -> Recording:
        return super().record(args, self._without_target(kwargs or {}))

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        return super()._plain(*args, **self._without_target(kwargs))

    def _without_target(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the module itself is called with."""
        if self.settings.error == "output":
            return kwargs
        return {name: value for name, value in kwargs.items() if name != "target"}

    def _project(self, target: Any, graph: Graph) -> tuple[States, Phase]:
        return self._fed_back(graph, -_targets(graph, target))

    def _fed_back(self, graph: Graph, errors: Tensor) -> tuple[States, Phase]:
        """x_i = B_i e for every vertex; errors has shape (batch, n)."""
        held = graph.held()  # an output that is a vertex has its error as it is
        source = graph.source() if held else {}
        states = {v: source[v] if v in held else self._state(v, errors) for v in graph.vertices}
        return states, Phase(len(states), graph.depth, products=1 + bool(held))

    def _state(self, vertex: Vertex, errors: Tensor) -> Tensor:
        activity = vertex.stand_in
        shape, (batch, n) = activity.shape, errors.shape
        if not shape or shape[0] != batch:
            raise ValueError(
                f"direct feedback reads samples along the first dimension, but vertex {vertex.name!r} has shape "
                f"{tuple(shape)} and the error {tuple(errors.shape)}: leave it out of vertices, or let the module "
                "keep the samples first"
            )
        # By how the activity lies in memory, so that no layer has to turn its error round.
        order = sorted(range(1, len(shape)), key=activity.stride, reverse=True)
        B = self.feedback.get(vertex.name)
        if B is None:
            std = 1 / math.sqrt(n) if self.settings.std is None else float(self.settings.std)
            generator = _generator(self.settings.seed, vertex.name)
            drawn = torch.randn(n, *shape[1:], generator=generator, dtype=torch.float32) * std
            B = drawn.permute(0, *order).contiguous().permute(0, *_inverse(order))
        elif B.shape != (n, *shape[1:]):
            raise ValueError(
                f"feedback[{vertex.name!r}] has shape {tuple(B.shape)}, and this pass needs {(n, *shape[1:])}, as a "
                f"sample's error has {n} numbers and the vertex shape {tuple(shape)}: direct feedback means nothing "
                "for outputs or activities of changing size"
            )
        # An error of lower precision, as within autocast, takes none from the numbers that are kept.
        kept = self.feedback[vertex.name] = B.to(errors.device, torch.promote_types(B.dtype, errors.dtype))
        B = kept.to(errors.dtype)
        laid = errors @ B.permute(0, *order).reshape(n, -1)
        state = laid.view(batch, *(shape[i] for i in order)).permute(0, *_inverse(order))
        return state.to(vertex.zeros().dtype) if state.dtype != activity.dtype else state


def _errors(graph: Graph) -> Tensor:
    """g: by sample all numbers of ∂L/∂(outputs), shape (batch, n).

    Raises:
        ValueError: if an output is not by samples.
    """
    driven = [g for g in graph.output_cotangents if g is not None]
    for g in driven:
        _check_samples(g, len(driven[0]) if driven[0].dim() else 0)
    parts = [_by_sample(g) for g in driven]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _by_sample(x: Tensor) -> Tensor:
    """Shape (batch, n)."""
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def _check_samples(output: Tensor, batch: int) -> None:
    if not output.dim():
        raise ValueError(
            "the module returns one number, as a loss is, and direct feedback needs every sample's error: let the "
            "module return its output, and compute the loss outside of it"
        )
    if len(output) != batch:
        raise ValueError(
            f"direct feedback reads samples along the first dimension, but the outputs have {batch} and {len(output)}"
        )


def _targets(graph: Graph, target: Any) -> Tensor:
    """t: by sample the target, one-hot where it is a class, shape (batch, n).

    Raises:
        ValueError: if it is missing, or does not fit the output.
    """
    if len(graph.outputs) != 1:
        raise ValueError(f"error='target' needs a module with one output, and this one has {len(graph.outputs)}")
    output = graph.outputs[0].detach()
    _check_samples(output, len(output) if output.dim() else 0)
    if not isinstance(target, Tensor):
        what = "no target was given" if target is None else f"got {type(target).__name__}"
        raise ValueError(f"error='target' reads the target as a tensor, and {what}: call model(x, target=labels)")
    if target.shape == output.shape and target.is_floating_point():
        return _by_sample(target.detach().to(output))
    if output.dim() != 2 or target.shape != output.shape[:1] or target.is_floating_point():
        raise ValueError(
            "target must be numbers of the output's shape, or the classes of its samples: the output has shape "
            f"{tuple(output.shape)}, and target {tuple(target.shape)} of {target.dtype}"
        )
    if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < output.shape[1]:
        raise ValueError(
            f"target must hold classes from 0 to {output.shape[1] - 1}, got {int(target.min())} to {int(target.max())}"
        )
    return nn.functional.one_hot(target.long(), output.shape[1]).to(output)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _inverse(order: list[int]) -> list[int]:
    """Where each of the dimensions from 1 on is after a permutation (0, *order)."""
    return [order.index(i) + 1 for i in range(1, len(order) + 1)]
