"""The scripts that lie beside kept results, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

RESULTS = Path(__file__).parents[1] / "results"


def load(path: str) -> ModuleType:
    """The script of that path below the folder of results."""
    name = path.removesuffix(".py").replace("/", "_").replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, RESULTS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where records look for their types
    spec.loader.exec_module(module)
    return module
