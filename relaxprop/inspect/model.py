"""What every inspection shares: a wrapped model that it leaves as it was.

May import: _pytorch, nested, replay, rule, snapshot, vertices, wrapper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from relaxprop._pytorch import is_compiled
from relaxprop.nested import tensors_in
from relaxprop.replay import address, times_written
from relaxprop.rule import LearningRule, rule_of
from relaxprop.snapshot import Snapshot, alike, but_for
from relaxprop.vertices import named_parts
from relaxprop.wrapper import ActivationRelaxation

LossFunction = Callable[[Any], Tensor]


@contextmanager
def undisturbed(model: LearningRule) -> Iterator[None]:
    """Within it, forward passes leave no trace: they work on a copy of the module's state (`Snapshot`), and parameters
    that they write into (as ``nn.Embedding(max_norm=…)`` does) get their numbers back.
    """
    kept = vars(model)[model._record_name]
    parameters = [(p, p.detach(), p.detach().clone(), times_written(p)) for p in model.module.parameters()]
    try:
        with Snapshot(model.module).restored():
            yield
    finally:
        model._keep_record(kept)
        for p, memory, numbers, then in parameters:
            if address(p) != address(memory):
                p.data = memory
            if times_written(p) != then:
                with torch.no_grad():
                    p.copy_(numbers)


class SamePass:
    """Forward passes of a model that have to be the same one, as they are compared with each other.

    Used as a context around each pass: the first notes what the model's parts return, each later one is held against
    it.
    """

    def __init__(self, model: LearningRule) -> None:
        self._module = model.module
        names = named_parts(model.module)
        compiled = tuple(
            f"{name}." for part, name in names.items() if is_compiled(part)
        )  # no hook is compiled for this
        self._names = {part: name for part, name in names.items() if not name.startswith(compiled)}
        self._noted: dict[nn.Module, list[list[Tensor]]] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around a pass.

        Raises:
            RuntimeError: if a part of the model returns something else than in the first pass.
        """
        first, calls = not self._noted, dict.fromkeys(self._names, 0)

        def note(part: nn.Module, args: Any, output: Any) -> None:
            if torch.compiler.is_compiling():  # what is compiled is not to be compiled anew for this
                return
            tensors = tensors_in(output)
            if first:  # a clone, as the model may go on to write into what it computed
                self._noted.setdefault(part, []).append([x.detach().clone() for x in tensors])
                return
            noted = self._noted.get(part, [])[calls[part] :][:1]
            calls[part] += 1
            for before in noted:
                if len(before) != len(tensors) or not all(map(alike, before, tensors)):
                    raise RuntimeError(
                        f"two passes over the same input cannot be compared: {self._names[part]!r} returns something "
                        f"else in the second one, {but_for(Snapshot(self._module).shared)}"
                    )

        # Not `Hooked`, which leaves alone what belongs to another run, as each of these passes is.
        handles = [nn.Module.register_forward_hook(part, note) for part in self._names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def check_model(model: object, kind: type[LearningRule] = ActivationRelaxation) -> None:
    """Refuse what is not wrapped in this kind of rule, and a model or a moment of which no pass can be looked at.

    Raises:
        TypeError: if it is not one.
        ValueError: if it has lazy modules that have not seen an input yet.
        RuntimeError: within ``torch.inference_mode()``.
    """
    if isinstance(model, kind):
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "no gradient can be looked at within torch.inference_mode(): call this outside of it (torch.no_grad() "
                "is no hindrance)"
            )
        if any(is_lazy(x) for x in (*model.module.parameters(), *model.module.buffers())):
            raise ValueError(
                "the model has lazy modules, which take shape in their first forward pass: call the model once under "
                "torch.no_grad() before you look at it"
            )
        return
    must = (
        "an ActivationRelaxation"
        if kind is ActivationRelaxation
        else "an ActivationRelaxation or another learning rule"
    )
    if isinstance(model, LearningRule):
        got = rule_of(type(model)).__name__
        raise TypeError(
            f"model must be {must}, got {got}, which has no relaxation phase to follow: look at it by alignment"
        )
    parts = model.named_modules() if isinstance(model, nn.Module) else ()
    wrapped = [name for name, part in parts if isinstance(part, kind)]
    if not wrapped:
        got = rule_of(type(model)).__name__
        raise TypeError(f"model must be {must}, got {got}: wrap the module first")
    names = " and ".join(map(repr, wrapped))
    raise TypeError(
        f"model must be {must}, got a {type(model).__name__} that contains {names}: pass such a part, "
        f"model.get_submodule({wrapped[0]!r}), with the arguments that it is called with"
    )


def check_loss_function(loss_fn: object) -> None:
    """Refuse what cannot be called, as the loss itself, or an input that stands in its place.

    Raises:
        TypeError: if it cannot.
    """
    if not callable(loss_fn):
        raise TypeError(
            "loss_fn must be a function from the model's result to a scalar loss, and the model's inputs follow it, as "
            f"in alignment(model, loss_fn, x), got {type(loss_fn).__name__} in its place"
        )


def scalar(loss: object) -> Tensor:
    """The loss.

    Raises:
        TypeError: if it is not a tensor of one number.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss_fn must return a scalar tensor, got {what}")
    return loss
