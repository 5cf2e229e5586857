"""Others' code on the same network, where their folder is given: nothing of it is a part of this project.

Torch2PC (Rosenbaum, 2022; TorchSeq2PC.py) trains chains by predictive coding: `PCInfer(model, LossFun, X, Y, ErrType,
eta, n)` fills `.grad`. The authors' code of Activation Relaxation (main.py; cnn.py with cnn_layers.py) has layers of
its own, which are given the network's weights here: `learn_batch(inputs, targets, steps)` relaxes sequentially and
updates. Its learning rate is zero here, as everywhere in the benchmark.

May import: vertices, lab.bench.problems, lab.bench.measuring, lab.bench.steps.
"""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from relaxprop.lab.bench.measuring import Step, without_output
from relaxprop.lab.bench.problems import Problem
from relaxprop.lab.bench.steps import RULE_STEPS
from relaxprop.vertices import find_vertices

TORCH2PC, AUTHORS = "Torch2PC", "the authors' code"
STEP_SIZE, NUM_STEPS = 0.1, 100  # the paper's
_MODULE = "TorchSeq2PC"


class Rival(NamedTuple):
    """Others' code.

    Attributes:
        name: whose.
        steps: gives its training steps of a problem's network by their names in the tables; a ValueError says why it
            cannot train it.
    """

    name: str
    steps: Callable[[Problem], dict[str, Step]]


def find(name: str) -> Rival:
    """Others' code, by the name of the package Torch2PC where it can be imported, or by the folder of a repository.

    Raises:
        ValueError: if there is no such package or folder, or the folder holds neither.
    """
    folder = Path(name)
    if name in (TORCH2PC, _MODULE) and not folder.is_dir():
        spec = importlib.util.find_spec(_MODULE)
        if spec is None or spec.origin is None:
            raise ValueError(f"{name} cannot be imported here: name the folder that holds {_MODULE}.py")
        folder = Path(spec.origin).parent
    if not folder.is_dir():
        raise ValueError(f"{name} is neither the name {TORCH2PC} nor a folder")
    if (folder / f"{_MODULE}.py").is_file():
        return Rival(TORCH2PC, lambda problem: _by_torch2pc(_loaded(folder, _MODULE), problem))
    main = folder / "main.py"
    if main.is_file() and {"class FCLayer", "class Net"} <= _classes(main):
        return Rival(AUTHORS, lambda problem: _by_authors(folder, problem))
    raise ValueError(
        f"the folder {folder} holds neither {_MODULE}.py ({TORCH2PC}) nor main.py with the classes FCLayer and Net "
        f"({AUTHORS})"
    )


def _classes(file: Path) -> set[str]:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return {line.partition("(")[0].rstrip(": ") for line in lines if line.startswith("class ")}


# ----------------------------------------------------------------------------------------------------- Torch2PC


def _by_torch2pc(module: ModuleType, problem: Problem) -> dict[str, Step]:
    layers = _layers(problem.network)
    model = nn.Sequential(*layers)
    kinds = {
        f"FixedPred({STEP_SIZE}, {NUM_STEPS})": ("FixedPred", STEP_SIZE, NUM_STEPS),
        f"FixedPred(1, {len(layers)})": ("FixedPred", 1.0, len(layers)),  # exact
        f"Strict({STEP_SIZE}, {RULE_STEPS})": ("Strict", STEP_SIZE, RULE_STEPS),
        "Exact": ("Exact", 1.0, 1),
    }
    return {f"{TORCH2PC} {name}": _inference(module, model, problem, *kind) for name, kind in kinds.items()}


def _inference(module: ModuleType, model: nn.Module, problem: Problem, kind: str, eta: float, n: int) -> Step:
    optimizer = torch.optim.SGD(problem.network.parameters(), lr=0.0)

    def step() -> None:
        module.PCInfer(model, problem.loss, problem.inputs, problem.targets, kind, eta, n)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _layers(network: nn.Module) -> list[nn.Module]:
    """The network as a chain whose every layer ends with a vertex, as the relaxation has it."""
    layers: list[list[nn.Module]] = [[]]
    vertices = find_vertices(network, "activations")
    for module in _pieces(network, TORCH2PC):
        layers[-1].append(module)
        if module in vertices:
            layers.append([])
    return [nn.Sequential(*layer) for layer in layers if layer]


def _pieces(network: nn.Module, whose: str) -> list[nn.Module]:
    """The modules of a chain in their order."""
    if not isinstance(network, nn.Sequential):
        raise ValueError(f"{whose} trains chains (nn.Sequential) only, and this network is none")
    pieces = []
    for module in network:
        pieces += _pieces(module, whose) if isinstance(module, nn.Sequential) else [module]
    return pieces


# --------------------------------------------------------------------------------------------- the authors' code


def _by_authors(folder: Path, problem: Problem) -> dict[str, Step]:
    pieces = _pieces(problem.network, AUTHORS)
    convolutional = any(isinstance(piece, nn.Conv2d) for piece in pieces)
    if convolutional and not (folder / "cnn.py").is_file():
        raise ValueError(f"{AUTHORS} in {folder} has no cnn.py: it trains networks of linear layers only")
    made = _convolutional if convolutional else _fully_connected
    with _silent(), torch.no_grad():
        network = made(_loaded(folder, "cnn" if convolutional else "main"), pieces, problem)
    inputs = problem.inputs.contiguous() if convolutional else problem.inputs.flatten(1)

    def step() -> None:
        with torch.no_grad(), redirect_stdout(io.StringIO()):
            network.learn_batch(inputs, problem.targets, NUM_STEPS)

    return {f"{AUTHORS} ({STEP_SIZE}, {NUM_STEPS})": step}


def _fully_connected(module: Any, pieces: Sequence[nn.Module], problem: Problem) -> Any:
    batch, device = len(problem.inputs), problem.inputs.device
    module.DEVICE = device
    layers = []
    for piece, following in _followed(pieces):
        if isinstance(piece, nn.Linear):
            functions = _functions(module, following)
            sizes = (piece.in_features, piece.out_features, batch)
            layers.append(_given(module.FCLayer(*sizes, *functions, STEP_SIZE, 0.0, device=device), piece, batch))
        else:
            _refuse_unless(piece, nn.Flatten, nn.Tanh)
    return module.Net(
        layers,
        NUM_STEPS,
        use_backwards_weights=False,
        update_backwards_weights=False,
        use_backward_nonlinearity=True,
        device=device,
    )


def _convolutional(module: Any, pieces: Sequence[nn.Module], problem: Problem) -> Any:
    batch, device = len(problem.inputs), problem.inputs.device
    module.DEVICE = device
    layers: list[Any] = []
    x, flat, shape = problem.inputs, True, tuple(problem.inputs.shape)
    for piece, following in _followed(pieces):
        functions = _functions(module, following)
        if isinstance(piece, nn.Conv2d):
            sizes = (x.shape[2], x.shape[1], piece.out_channels, batch, piece.kernel_size[0])
            layers.append(module.ConvLayer(*sizes, 0.0, *functions, STEP_SIZE, device=device))
            layers[-1].weights = piece.weight.detach().clone(memory_format=torch.contiguous_format)
        elif isinstance(piece, nn.MaxPool2d):
            layers.append(module.MaxPool(piece.kernel_size, device=device))
        elif isinstance(piece, nn.Flatten):
            shape = (batch, *x.shape[1:])
            flat = False
        elif isinstance(piece, nn.Linear):
            rates = (0.0, STEP_SIZE)
            if flat:
                made = module.FCLayer(piece.in_features, piece.out_features, batch, *rates, *functions, device=device)
            else:  # the first after the convolutions flattens what it reads
                made = module.ProjectionLayer(shape, piece.out_features, *functions, *rates, device=device)
            layers.append(_given(made, piece, batch))
            flat = True
        else:
            _refuse_unless(piece, nn.Tanh)
        x = piece(x)
    return module.ARNet(
        layers,
        NUM_STEPS,
        STEP_SIZE,
        0.0,
        use_FC_backwards_nonlinearity=True,
        use_conv_backwards_nonlinearity=True,
        device=device,
    )


def _followed(pieces: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    return zip(pieces, [*pieces[1:], None], strict=True)


def _functions(module: Any, following: nn.Module | None) -> tuple[Any, Any]:
    """A layer's nonlinearity with its derivative."""
    return (module.tanh, module.tanh_deriv) if isinstance(following, nn.Tanh) else (module.linear, module.linear_deriv)


def _given(layer: Any, piece: nn.Linear, batch: int) -> Any:
    """Their layer with this one's weights; it has a bias for each sample."""
    layer.weights = piece.weight.detach().T.clone(memory_format=torch.contiguous_format)
    bias: Tensor = piece.bias.detach()
    layer.bias = bias.expand(batch, -1).clone()
    return layer


def _refuse_unless(piece: nn.Module, *kinds: type[nn.Module]) -> None:
    if not isinstance(piece, kinds):
        raise ValueError(f"{AUTHORS} has no layer for {type(piece).__name__}")


# ------------------------------------------------------------------------------------------------------- loading


def _loaded(folder: Path, name: str) -> Any:
    """A file of a folder as a module."""
    spec = importlib.util.spec_from_file_location(f"against_{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _silent(), _importing_from(folder):
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            raise ValueError(f"{folder / name}.py cannot be imported: {error}") from error
    return module


@contextmanager
def _silent() -> Iterator[None]:
    """Without what others' code prints, and what it says through programs of its own."""
    with without_output(1), redirect_stdout(io.StringIO()):
        yield


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """What the folder's files import of each other is found, and forgotten afterwards.

    The data sets of torchvision, which the authors' files import and the benchmark does not use, need not be there.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder.resolve()))
    if importlib.util.find_spec("torchvision") is None:
        absent = ModuleType("torchvision")
        absent.transforms = ModuleType("torchvision.transforms")  # type: ignore[attr-defined]
        sys.modules |= {"torchvision": absent, "torchvision.transforms": absent.transforms}
    try:
        yield
    finally:
        sys.path.pop(0)
        names = {path.stem for path in folder.glob("*.py")} | {"torchvision", "torchvision.transforms"}
        for name in names - before:
            sys.modules.pop(name, None)
