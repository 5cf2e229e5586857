"""The model run again as it was in the feedforward pass, every vertex set to its state.

The first step of a relaxation phase writes down what is computed of the states. Where it is plain which operations that
takes, the later ones do them alone (`replay`): no module is called, and no graph is recorded.

Dropout draws the feedforward pass's own masks in every later run, batch norm's statistics and all other states of the
model are updated once (`snapshot`), autocast and the training mode are what they were. What cannot be put back is
refused: parameters and inputs that were changed in place since, and states that no snapshot reaches.

May import: _pytorch, cutting, graph, nested, replay, snapshot, vertices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from operator import is_
from threading import get_ident
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from relaxprop._pytorch import (
    announce_calls,
    backward_hooks,
    has_hooks,
    hooks_on_all_modules,
    is_capturing,
    is_compiled,
    is_undisturbed,
    unhook_calls,
)
from relaxprop.cutting import Arguments, Cut, HandedOn, Run, Writes, other_path
from relaxprop.graph import Function, Linearisation, States, Vertex
from relaxprop.nested import tensors_in
from relaxprop.replay import Calls, Program, Results, address, times_written
from relaxprop.snapshot import Snapshot, alike, but_for
from relaxprop.vertices import Hooked, does_as_its_class_says, find_layers

_NOTHING = nullcontext()


class _Step(NamedTuple):
    """What was written down of a function of these vertices' states; None where it is not plain."""

    vertices: Sequence[Vertex]
    key: object
    beside: Sequence[Tensor | None]
    layouts: Sequence[tuple[torch.dtype, tuple[int, ...]]]  # of the vertices' activities
    program: Program | None

    def is_of(self, states: States, key: object, beside: Sequence[Tensor | None]) -> bool:
        return (
            self.key == key
            and self.vertices == [*states]
            and len(self.beside) == len(beside)
            and all(map(is_, self.beside, beside))
        )


class Rerun:
    """A function of the states: runs the model again with every vertex set to its state, and returns the linearisation
    there. Made right before the feedforward pass.

    Args:
        module: the model.
        arguments: as it is called with, stand-ins in place.
        cut: where its graph is cut; ``layers`` only where the weight update needs them.
        writes: as in the feedforward pass.
        given: the arguments as the user has them.

    Raises:
        ValueError: if the model has lazy modules that have not seen an input yet.
        RuntimeError: if a model that draws is captured as a CUDA graph.
    """

    def __init__(self, module: nn.Module, arguments: Arguments, cut: Cut, writes: Writes, given: Any) -> None:
        self.module = module
        self.arguments = arguments.copied()  # as they are before the feedforward pass
        self.cut = cut
        self.writes = writes
        if writes.draws and is_capturing():
            raise RuntimeError(
                "frozen: the model draws random numbers, and what is unfrozen runs it again with the same ones, for "
                "which a CUDA graph cannot put the generator back: leave everything frozen, or train without "
                "torch.cuda.graph"
            )
        self.surroundings = Surroundings(module, tensors_in(given))
        self.recorded: Sequence[Vertex] = ()
        self.stored = Linearisation({}, ())
        self.unchanged: dict[nn.Module, Sequence[HandedOn]] = {}
        self._step: _Step | None = None
        self._compiled: tuple[Program, Callable[..., Any]] | None = None

    @contextmanager
    def watching(self, run: Run) -> Iterator[None]:
        """Around the feedforward pass: learns what later runs need to know of it.

        Raises:
            ValueError: if the model wrote into its input, so that the input is gone.
        """
        first, later = dict[nn.Module, list[HandedOn]](), set[nn.Module]()

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if run.vertices or not isinstance(output, Tensor):
                later.add(module)
            else:
                first.setdefault(module, []).append(HandedOn.by_layer(output))

        with Hooked(find_layers(self.module), note, run):
            yield
        self.surroundings.passed()
        self.writes.draws |= self.surroundings.draws
        # Where operations are vertices, no layer stands before all of them.
        if not (self.surroundings.draws or self.cut.operations):
            # No state changes what the layers that are called before every vertex return, so no later run needs to
            # compute it again. These layers read the input, and are often the most expensive ones.
            for layer, returned in first.items():
                if layer.training and layer._buffers.get("running_mean") is not None:
                    break  # what a norm notes of its input, others may read; and these hang on the norm
                if layer not in later and does_as_its_class_says(layer):
                    self.unchanged[layer] = returned

    def passed(self, recorded: Sequence[Vertex], stored: Linearisation) -> None:
        """After the feedforward pass: what every later run has to match.

        Once per setting, the pass is run again at its own activities at once, to see whether it can be repeated.

        Raises:
            RuntimeError: if it cannot, since the model keeps a state where it is not put back.
        """
        self.recorded, self.stored = recorded, stored
        if not self.writes.repeated:
            self._check_repeated(self._run({}, layers=True))
            self.writes.repeated = True

    def __call__(self, states: States, *, layers: bool = False) -> Linearisation:
        """The model run again; a vertex without a state keeps its activity.

        Args:
            states: of the vertices.
            layers: whether the layers are noted.

        Raises:
            RuntimeError: if the model took another path than in the feedforward pass, or what it read has changed.
        """
        return self._run(states, layers=layers).linearisation()

    def compute(
        self, states: States, function: Function, key: object, beside: Sequence[Tensor | None], times: int = 1
    ) -> Results:
        """What a function makes of the model run again at given states, and of the states.

        Args:
            states: of the vertices.
            function: called with the linearisation and the states; it does nothing but call PyTorch.
            key: two functions of one key make the same.
            beside: what the function reads, the model and the states aside.
            times: how often: if more than once, the function makes the states of the next time.

        Raises:
            RuntimeError: as a call.
        """
        results: Results = ()
        for left in range(times, 0, -1):
            step = self._step
            if step is None or not step.is_of(states, key, beside):
                results = self._first(states, function, key, beside)
            elif step.program is None or not step.program.holds:
                results = function(self(states), states)
            elif step.program.kind in self.writes.compared:
                return self._replayed(step, step.program, states, left)
            else:
                results = function(self(states), states)
                if self._is_replayed_as(results, step, step.program, states):
                    self.writes.compared.add(step.program.kind)
                else:
                    self.writes.replays = False
                    self._step = step._replace(program=None)
            if left > 1:
                states = cast(States, dict(zip(states, results, strict=True)))
        if self.writes.compiler is not None and (self._step is None or self._step.program is None):
            self.writes.compiler.tell_uncompiled()
        return results

    def _is_replayed_as(self, expected: Results, step: _Step, program: Program, states: States) -> bool:
        try:
            return all(map(_alike, self._replayed(step, program, states, 1), expected))
        except Exception:  # what PyTorch does for a kernel of its own may be more than the kernel takes again
            return False

    def _replayed(self, step: _Step, program: Program, states: States, times: int) -> Results:
        self.surroundings.check()
        given: list[Any] = [*states.values()]
        run: Callable[..., Any] = program.__call__
        with torch.no_grad() if torch.is_grad_enabled() else _NOTHING:
            for _ in range(times):
                if [(x.dtype, x.stride()) for x in given] != step.layouts:
                    given = [_laid_out_as(v.stand_in, x) for v, x in zip(states, given, strict=True)]
                if self.writes.compiler is not None and program.kind in self.writes.compared:
                    run = self._compiled_of(program, given)
                given = run(given)
        self.surroundings.check()
        return given

    def _compiled_of(self, program: Program, states: Sequence[Tensor]) -> Callable[..., Any]:
        if self._compiled is None or self._compiled[0] is not program:
            self._compiled = program, self.writes.compiler(program, states)
        return self._compiled[1]

    def _first(self, states: States, function: Function, key: object, beside: Sequence[Tensor | None]) -> Results:
        """The same by the model, what it takes written down where it can be."""
        layouts = [(v.stand_in.dtype, v.stand_in.stride()) for v in states]
        self._step = _Step([*states], key, beside, layouts, None)
        if not self._calls_nothing_else() or any(x.dtype != v.stand_in.dtype for v, x in states.items()):
            return function(self(states), states)
        # In memory of their own, so that nothing else is taken for them.
        own = {v: _laid_out_as(v.stand_in, x).clone() for v, x in states.items()}
        try:
            still = [v.stand_in for v in self.recorded if v not in own]
            given = [x for x in beside if x is not None]
            calls = Calls([*own.values()], [*self.surroundings.fixed, *still, *given])
            at = self._run(own, written_down=calls).linearisation()
            results = calls.then(partial(function, at, own))
            stand_ins = {id(w.stand_in) for w in at.cuts.values()}
            ends = [*(w.output for w in at.cuts.values()), *(y for y in at.outputs if id(y) not in stand_ins)]
            program = calls.program(results, ends, given)
        except Exception:  # where it is watched, not all is possible that a model may do
            program, results = None, function(self(states), states)
        if program is None:
            self.writes.replays = False
        self._step = self._step._replace(program=program)
        return results

    def _calls_nothing_else(self) -> bool:
        """Whether the model may be no more than the calls that it makes: not where others run at a module's call."""
        return self.writes.replays and not (
            self.surroundings.draws
            or self.surroundings.has_autocast
            or self.cut.operations
            or not is_undisturbed()
            or torch.compiler.is_compiling()
            or hooks_on_all_modules()
            or any(has_hooks(m) or any(backward_hooks(m)) or is_compiled(m) for m in self.module.modules())
        )

    def _run(self, states: States, *, layers: bool = False, written_down: Calls | None = None) -> Run:
        values = [_laid_out_as(v.stand_in, states[v]) if v in states else v.stand_in for v in self.recorded]
        run = Run(
            self.cut if layers else self.cut._replace(layers=()), self.writes, self.recorded, values, written_down
        )
        # What was written to since has to be computed again.
        unchanged = {m: calls for m, calls in self.unchanged.items() if not any(x.overwritten for x in calls)}
        with self.surroundings.restored(), _returning(unchanged), torch.enable_grad():
            if written_down is not None:
                written_down.knows([*self.module.buffers(), *(x.tensor for given in unchanged.values() for x in given)])
            run.call(self.module, self.arguments.copied())
        if (
            len(run.vertices) != len(self.recorded)
            or (layers and len(run.layers) != len(self.stored.layers))
            or [x.shape for x in run.outputs] != [x.shape for x in self.stored.outputs]
        ):
            raise other_path()
        return run

    def _check_repeated(self, run: Run) -> None:
        computed = [
            (f"the vertex {v.name!r}", v.output, w.output) for v, w in zip(self.recorded, run.vertices, strict=True)
        ]
        outputs = [("the output", x, y) for x, y in zip(self.stored.outputs, run.outputs, strict=True)]
        for what, recorded, repeated in (*computed, *outputs):
            if not alike(recorded, repeated):
                raise RuntimeError(
                    f"frozen: run again at the activities of the feedforward pass, the model does not compute {what} "
                    f"as it did there, {but_for(self.surroundings.shared)}; or leave everything frozen"
                )


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else alike(one, other)


@contextmanager
def _returning(returned: Mapping[nn.Module, Sequence[HandedOn]]) -> Iterator[None]:
    """Within it, calls of these modules return, one after the other, what is given; those of other threads do not."""
    thread, called = get_ident(), {module: list[bool]() for module in returned}

    def announce(module: nn.Module, args: Any) -> None:
        if get_ident() == thread and module in called:  # a copy that is made meanwhile has this hook as well
            called[module].append(True)

    def returns(own: Callable[..., Any], called: list[bool], outputs: Iterator[HandedOn]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            # Who calls forward directly was not noticed when the outputs were recorded either.
            mine = get_ident() == thread and called and called.pop()
            stored = next(outputs, None) if mine else None
            return own(*args, **kwargs) if stored is None else stored.tensor

        return forward

    announce_calls(returned, announce)
    for module, given in returned.items():
        vars(module)["forward"] = returns(module.forward, called[module], iter(given))
    try:
        yield
    finally:
        unhook_calls(returned, announce)
        for module in returned:
            vars(module).pop("forward", None)


def _laid_out_as(stand_in: Tensor, state: Tensor) -> Tensor:
    """The state in an activity's type and memory layout, which the model may rely on (in ``view``)."""
    if state.dtype == stand_in.dtype and state.stride() == stand_in.stride():
        return state
    return torch.empty_like(stand_in, requires_grad=False).copy_(state)


class Surroundings:
    """The surroundings of one forward pass; made right before it.

    Args:
        module: the model.
        inputs: the tensors among its arguments.

    Attributes:
        draws: whether the pass has drawn random numbers.
        shared: the names of the model's attributes that could not be copied.

    Raises:
        ValueError: if the model has lazy modules that have not seen an input yet.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.module = module
        parameters = list(module.parameters())
        if any(is_lazy(x) for x in (*parameters, *module.buffers())):
            raise ValueError(
                "frozen: lazy modules take shape in their first forward pass, which could not be run again as it was: "
                "call the model once under torch.no_grad() before training"
            )
        self.before = Snapshot(module, inputs)
        self.inputs = inputs
        self.fixed = [*parameters, *self.before.beside, *inputs]
        self.signs = self._signs()
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in (("cpu", "cuda") if self.before.devices else ("cpu",))
        ]
        self.draws = False

    @property
    def has_autocast(self) -> bool:
        """Whether the pass ran in lower precision."""
        return any(enabled for _, _, enabled in self.autocast)

    @property
    def shared(self) -> Sequence[str]:
        return self.before.shared

    def passed(self) -> None:
        """To be called after the forward pass.

        Raises:
            ValueError: if the model wrote into its input, so that the input is gone.
        """
        for x, (then, _) in zip(self.inputs, self.signs[len(self.signs) - len(self.inputs) :], strict=True):
            if times_written(x) != then:
                raise ValueError(
                    f"frozen: the model writes in place into {self._name(x)}, so it cannot be run again on it, as "
                    "what is unfrozen needs: let the model work on a copy (x = x.clone())"
                )
        self.draws = self.before.passed()
        self.signs = self._signs()

    def _signs(self) -> list[tuple[int, int]]:
        """What changes where a tensor is written to, or other numbers take the place of its own (``x.data``)."""
        return [(times_written(x), address(x)) for x in self.fixed]

    def check(self) -> None:
        """Refuse another run where it would not find what the forward pass found.

        Raises:
            RuntimeError: if a parameter or an input was changed in place since the forward pass.
        """
        signs = self._signs()
        if signs == self.signs:
            return
        changed = next(x for x, then, now in zip(self.fixed, self.signs, signs, strict=True) if then != now)
        raise RuntimeError(
            f"frozen: {self._name(changed)} was changed in place since the forward pass, which has to be run again "
            "for what is unfrozen: call backward() before optimizer.step(), and change copies"
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within it, a run of the model finds what the forward pass found; afterwards all is as it was.

        Raises:
            RuntimeError: if a parameter or an input was changed in place since the forward pass, or no graph can be
                recorded.
        """
        self.check()
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "frozen: the backward pass runs within torch.inference_mode(), where the model that has to run again "
                "records no graph: call backward() outside of it"
            )
        with ExitStack() as stack:
            for kind, dtype, enabled in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled))
            stack.enter_context(self.before.restored())
            yield
        # A model may lay its weights out anew in each of its runs, as ``flatten_parameters`` does.
        self.signs = [(then, address(x)) for x, (then, _) in zip(self.fixed, self.signs, strict=True)]

    def _name(self, tensor: Tensor) -> str:
        names = {id(p): f"a parameter of shape {tuple(p.shape)} beside the modules" for p in self.before.beside}
        names |= {id(p): f"the parameter {name!r}" for name, p in self.module.named_parameters()}
        return names.get(id(tensor), f"an input of shape {tuple(tensor.shape)}")
