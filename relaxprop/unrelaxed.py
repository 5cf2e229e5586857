"""What of a pass did not relax: vertices that the model never called, and nonlinear operations outside of any vertex.

The gradient is right all the same, but an error passes these parts within one step, as in backpropagation. The recorded
graph itself is asked, so that it does not matter whether a module, a function, a scripted part or an
``autograd.Function`` made an operation.

May import: nested.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from relaxprop.nested import tensors_reached

# Linear in each of the tensors that they read, by the names of their nodes in PyTorch's graph.
_NAMES = """
    Add Sub Rsub Neg Mul Sum Mean Cumsum Mm Mv Dot Bmm Addmm Addmv Addbmm Baddbmm Linear Convolution Embedding
    EmbeddingBag NativeDropout Clone Copy ToCopy Alias View UnsafeView ReshapeAlias AsStrided AsStridedScatter
    CopySlices T Transpose Permute Expand Repeat Squeeze Unsqueeze Select SelectScatter Slice SliceScatter Split
    SplitWithSizes Unbind Unfold Im2Col Col2Im Cat Stack Index IndexSelect IndexPut Gather Scatter ScatterAdd IndexAdd
    MaskedFill MaskedSelect MaskedScatter Where Tril Triu Diagonal Flip Roll ConstantPadNd ReflectionPad1D
    ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D PixelShuffle PixelUnshuffle
    AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D MkldnnAdaptiveAvgPool2D UpsampleNearest1D
    UpsampleNearest2D UpsampleNearest3D UpsampleLinear1D UpsampleBilinear2D UpsampleTrilinear3D UpsampleBicubic2D
    FftR2C FftC2R FftC2C ViewAsReal ViewAsComplex Complex Real Imag Conj ConjPhysical Lerp Trace Take Trilinear Rot90
    IndexFill DiagEmbed DiagonalScatter Addr Addcmul LinalgCross Cross SparseAddmm Kron Tensordot
    SendBack SharedGradient
"""
_LINEAR = frozenset(_NAMES.split())
_VIEWS = {
    *("Alias", "AsStrided", "Clone", "Conj", "Expand", "Permute", "ReshapeAlias", "Squeeze", "T", "Transpose"),
    *("UnsafeView", "Unsqueeze", "View"),
}
_PRODUCTS = {
    *("Addbmm", "Addcmul", "Addmm", "Addmv", "Baddbmm", "Bmm", "Dot", "Lerp", "Linear", "Mm", "Mul", "Mv", "Trilinear"),
}


def inside(args: Any, outputs: Any) -> set[Node]:
    """The operations by which a module computed its outputs from its arguments: they are within its vertex.

    What is given by keyword is not seen, so that then nothing is known to be within it.
    """
    begin = {x.grad_fn for x in tensors_reached(args)}
    if not args:
        return set()
    return _upstream((x.grad_fn for x in tensors_reached(outputs)), begin)


def operations(tensors: Iterable[Tensor], relaxing: Collection[Node | None]) -> list[str]:
    """The nonlinear operations that computed the tensors and are none of the ``relaxing``: each name once."""
    nodes = _upstream((x.grad_fn for x in tensors), ())
    return sorted({_name(node) for node in nodes if node not in relaxing and not _is_linear(node)})


def scripted(parts: Mapping[nn.Module, str], vertices: Collection[nn.Module]) -> list[str]:
    """The names of scripted parts that are no vertices: what happens in them is announced to nobody."""
    return [name for part, name in parts.items() if isinstance(part, torch.jit.ScriptModule) and part not in vertices]


def _upstream(nodes: Iterable[Node | None], until: Collection[Node | None]) -> set[Node]:
    """The nodes and all that they read, up to those of ``until`` and to leaf tensors."""
    found, stack = set[Node](), list(nodes)
    while stack:
        node = stack.pop()
        if node is not None and node.next_functions and node not in found and node not in until:
            found.add(node)
            stack += [read for read, _ in node.next_functions]
    return found


def _kind(node: Node) -> str:
    """``Relu`` for ``ReluBackward0``, and ``Own`` for the ``OwnBackward`` of an ``autograd.Function`` Own."""
    return re.sub(r"Backwards?\d*$", "", node.name().rpartition("::")[2])


def _is_linear(node: Node) -> bool:
    kind = _kind(node)
    if kind == "Div":  # linear in what it divides
        return all(read is None for read, _ in node.next_functions[1:])
    if kind not in _LINEAR:
        return False
    if kind not in _PRODUCTS:
        return True
    read = [_seen_through(source, number) for source, number in node.next_functions if source is not None]
    return len(set(read)) == len(read)  # a tensor times itself is a square


def _seen_through(node: Node, number: int) -> tuple[Node, int]:
    """What computed the numbers of a view: a node, and which of its results they are."""
    while _kind(node) in _VIEWS:
        source, place = node.next_functions[0]
        if source is None:
            break
        node, number = source, place
    return node, number


def _name(node: Node) -> str:
    """As PyTorch's function is called; an ``autograd.Function`` has its own name."""
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=\dD)(?=[A-Z])", "_", _kind(node)).lower()
    return snake if node.name()[-1:].isdigit() else _kind(node)
