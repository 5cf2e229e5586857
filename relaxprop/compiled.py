"""The operations of a step (`replay`) by ``torch.compile``: fused, and equal to rounding.

What a step does takes the same form in every pass of a training loop; only the tensors differ. So a form is compiled
once, as a graph of operations whose inputs are all tensors, and called with those of the pass.

May import: replay, snapshot, unconverged.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from relaxprop.replay import Place, Program, mapped
from relaxprop.snapshot import alike
from relaxprop.unconverged import warn_user

MOST_FORMS = 8  # that are compiled; a minibatch of another size makes another form
Compiled = Callable[[Iterable[Tensor]], list[Tensor | None]]


class StepCompiler:
    """Compiles the programs of one setting.

    Args:
        options: of ``torch.compile``, which refuses those that it does not know.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = {"fullgraph": True, "dynamic": False} | options
        torch.compile(nn.Identity(), **self.options)  # refuses here, and not in a backward pass
        self._compiled: dict[Hashable, Callable[..., Any] | None] = {}
        self._told = False

    def __call__(self, program: Program, states: Sequence[Tensor]) -> Compiled:
        """The compiled program; the program itself where it is one form too many, or compiled it makes something else.

        Args:
            program: what a step does.
            states: of which it makes the next.

        Raises:
            RuntimeError: if the compiler fails.
        """
        written = _Written(program, len(states))
        form = written.form, tuple(_layout(x) for x in (*states, *written.tensors))
        if form not in self._compiled:
            if len(self._compiled) == MOST_FORMS:
                warn_user(
                    f"compile_steps: the steps have taken {MOST_FORMS} forms, each compiled by itself, and others run "
                    "uncompiled: give the model minibatches of few different shapes"
                )
                self._compiled[form] = None
            elif len(self._compiled) < MOST_FORMS:
                self._compiled[form] = self._compile(program, written, states)
        compiled = self._compiled.get(form)
        if compiled is None:
            return program.__call__
        return lambda given: list(compiled(*given, *written.tensors))

    def tell_uncompiled(self) -> None:
        """Warns the user, once, that the steps run the model, as they are more than operations."""
        if not self._told:
            self._told = True
            warn_user(
                "compile_steps: nothing is compiled, as the model runs in every step: it is more than calls of "
                "PyTorch, it draws random numbers, hooks look at its modules, or its vertices are operations"
            )

    def _compile(self, program: Program, written: _Written, states: Sequence[Tensor]) -> Callable[..., Any] | None:
        compiled: Callable[..., Any] = torch.compile(written.graph(), **self.options)
        try:
            found = compiled(*states, *written.tensors)
        except Exception as error:  # each backend has errors of its own
            raise RuntimeError(
                f"compile_steps: torch.compile fails on the operations of a step ({type(error).__name__}): see the "
                "error above; without a C++ compiler, leave compile_steps() out, or pass it backend='aot_eager'"
            ) from error
        pairs = zip(found, program(states), strict=True)
        if all(x is y if x is None or y is None else alike(x, y) for x, y in pairs):
            return compiled
        warn_user(
            "compile_steps: compiled by torch.compile, the operations of a step make something else than without, so "
            "they run uncompiled: pass compile_steps() another backend, or leave it out"
        )
        return None


class _Written:
    """A program as a graph whose inputs are the states and the tensors that it reads.

    Attributes:
        tensors: that it reads beside the states, in the order in which it does.
        form: what two programs have in common that do the same with other tensors.
    """

    def __init__(self, program: Program, num_states: int) -> None:
        self.program = program
        self.num_states = num_states
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}  # by id, among the tensors
        self.form: Hashable = (
            *(
                (op.function, self._form(op.args), self._form(op.kwargs), tuple(op.gives), op.many)
                for op in program.operations
            ),
            self._form(program.results),
        )

    def _form(self, x: Any) -> Hashable:
        """An argument without its numbers."""
        if isinstance(x, Tensor):
            if id(x) not in self._places:
                self._places[id(x)] = len(self.tensors)
                self.tensors.append(x.detach())  # the compiler would look for its .grad
            return "tensor", self._places[id(x)]
        if isinstance(x, dict):
            return tuple((name, self._form(value)) for name, value in x.items())
        if isinstance(x, tuple | list):
            return tuple(map(self._form, x))
        return type(x), x

    def graph(self) -> fx.GraphModule:
        """What is compiled."""
        graph = fx.Graph()
        held = {i: graph.placeholder(f"state{i}") for i in range(self.num_states)}
        read = [graph.placeholder(f"tensor{i}") for i in range(len(self.tensors))]

        def filled(x: Any) -> Any:
            if isinstance(x, Tensor):
                return read[self._places[id(x)]]
            return held[x] if type(x) is Place else x

        for op in self.program.operations:
            node = graph.call_function(op.function, mapped(filled, tuple(op.args)), mapped(filled, op.kwargs))
            parts = [graph.call_function(operator.getitem, (node, i)) for i in range(len(op.gives))]
            held.update(zip(op.gives, parts if op.many else [node], strict=op.many))
        graph.output(tuple(filled(x) for x in self.program.results))
        return fx.GraphModule(nn.Module(), graph)


def _layout(x: Tensor) -> Hashable:
    return x.dtype, x.device, tuple(x.shape), x.stride()
