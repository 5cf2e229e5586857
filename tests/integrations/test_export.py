"""What follows a model through its forward pass sees the plain module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from relaxprop.solvers import Solver
from tests.integrations.problem import EQUAL, OTHER, mlp, samples, wrapped

SOLVERS = [*EQUAL.values(), OTHER]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("strict", [True, False])
def test_export_of_the_plain_module(solver: Solver, strict: bool) -> None:
    model, (x, _) = wrapped(mlp(), solver), samples(4)
    program = torch.export.export(model.module, (x,), strict=strict)
    assert torch.equal(program.module()(x), mlp()(x))
    assert list(program.state_dict) == list(model.state_dict())


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="before PyTorch 2.7 nothing tells of an export")
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_export_of_the_wrapper(solver: Solver) -> None:
    model, (x, _) = wrapped(mlp(), solver), samples(4)
    program = torch.export.export(model, (x,), strict=False)
    assert torch.equal(program.module()(x), mlp()(x))
    assert list(program.state_dict) == list(model.state_dict())


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_trace_of_the_wrapper(solver: Solver) -> None:
    model, (x, _) = wrapped(mlp(), solver), samples(4)
    traced = torch.jit.trace(model, (x,))  # type: ignore[no-untyped-call]
    assert torch.equal(traced(x), mlp()(x))
    assert list(traced.state_dict()) == list(model.state_dict())
    (weight, *_), (expected, *_) = (torch.autograd.grad(m(x).sum(), list(m.parameters())) for m in (traced, mlp()))
    assert torch.equal(weight, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("of", ["wrapper", "module"])
@pytest.mark.parametrize("dynamo", [True, False], ids=["by torch.export", "by tracing"])
def test_onnx(dynamo: bool, of: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    model, (x, _) = wrapped(mlp(), EQUAL["cut"]), samples(4)
    model.eval()
    torch.onnx.export(
        model if of == "wrapper" else model.module, (x,), tmp_path / "model.onnx", dynamo=dynamo, verbose=False
    )
    kept = onnx.load(str(tmp_path / "model.onnx"))
    operators = [node.op_type for node in kept.graph.node]
    assert operators.count("Tanh") == 2
    assert sorted(i.name for i in kept.graph.initializer if "weight" in i.name) == ["0.weight", "2.weight", "4.weight"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_graph_of_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    model, (x, _) = wrapped(mlp(), EQUAL["cut"]), samples(4)
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(model, x)
    (file,) = tmp_path.iterdir()
    assert b"Tanh" in file.read_bytes() or b"tanh" in file.read_bytes()


# Before PyTorch 2.7 the compiler says only what it does not compile.
REASON = "leave fullgraph=True out" if hasattr(torch.compiler, "is_exporting") else "disable"


class Larger(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.readout = part, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.readout(self.part(x))
        return y


@pytest.mark.parametrize("make", [lambda m: m, Larger], ids=["itself", "a part"])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler does
def test_one_whole_graph_is_refused_by_name(make: Callable[[nn.Module], nn.Module], solver: Solver) -> None:
    model, (x, _) = wrapped(mlp(), solver), samples(4)
    compiled = torch.compile(make(model), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=REASON):
        compiled(x)
    torch.compiler.reset()
    partly = torch.compile(make(model), backend="eager")
    partly(x).sum().backward()
    assert model.last_relaxation is not None
    torch.compiler.reset()
    plain = torch.compile(model.module, backend="eager", fullgraph=True)
    assert torch.equal(plain(x), mlp()(x))
