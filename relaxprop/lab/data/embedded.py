"""The data sets that need no file and no download.

`digits` is scikit-learn's (real handwritten digits, 8×8, embedded in that library), `docstrings` the documentation of
this Python installation's own standard library.

May import: lab.data.dataset.
"""

from __future__ import annotations

import ast
import string
import sysconfig
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from relaxprop.lab.data.dataset import DataError, Dataset, Split


@lru_cache(maxsize=1)
def digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    known = load_digits()
    images = torch.tensor(known.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(known.target, dtype=torch.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=known.target)
    return Dataset(
        "digits",
        tuple(map(str, known.target_names)),
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
    )


TEXT_LENGTH = 32  # characters that a model sees at once
TEXT_SIZE = 400_000  # characters of the text, the last tenth of them for the test


@lru_cache(maxsize=1)
def docstrings() -> Dataset:
    """The documentation strings of the standard library's modules in alphabetical order, their printable ASCII."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = ""
    for path in sorted(library.glob("*.py")):
        tree = ast.parse(path.read_bytes())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
        text += "".join(f"{docstring}\n\n" for docstring in found if docstring)
        if len(text) >= TEXT_SIZE:
            break
    characters = sorted(set(string.printable))
    text = "".join(c for c in text[:TEXT_SIZE] if c in characters)
    if len(text) < TEXT_SIZE / 2:
        raise DataError(f"{library} holds no sources of the standard library whose documentation could be read")
    numbers = torch.tensor([characters.index(c) for c in text])
    rows = (len(numbers) - 1) // TEXT_LENGTH
    seen, following = (numbers[i : i + rows * TEXT_LENGTH].view(rows, TEXT_LENGTH) for i in (0, 1))
    test = rows // 10
    return Dataset(
        "docstrings",
        tuple(characters),
        Split(seen[:-test], following[:-test]),
        Split(seen[-test:], following[-test:]),
    )
