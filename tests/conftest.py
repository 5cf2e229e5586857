"""What every test starts from."""

from __future__ import annotations

import gc
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Before anything is imported that looks there. No test asks the Hub. And the width of a terminal, which pytest's
# workers find in their environment, would be that of every table.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("COLUMNS", None)

TOOLS = ("transformers", "peft", "accelerate", "lightning", "onnx", "tensorboard")  # that the wrapper is tried in


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcome", type=Path, help="a file for the numbers of tests and the versions that they ran on")


def pytest_configure() -> None:
    torch.set_num_threads(1)
    devices: tuple[Any, ...] = (torch.cuda, torch.xpu, torch.mtia)
    for device in devices:
        if not device.is_available():  # `torch.manual_seed` keeps a formatted traceback for it, thousands of times here
            device.manual_seed_all = lambda seed: None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    path: Path | None = config.getoption("--outcome")
    if path is None:
        return
    results = {kind: terminalreporter.stats.get(kind, []) for kind in ("passed", "failed", "error", "skipped")}
    outcome = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        **{name: found for name in TOOLS if (found := _version(name)) is not None},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": " ".join(["pytest", *config.invocation_params.args]),
        **{kind: len(reports) for kind, reports in results.items()},
        "failures": [report.nodeid for kind in ("failed", "error") for report in results[kind]],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(outcome, indent=2) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests on real data run where RELAXPROP_DATA names a folder."""
    if os.environ.get("RELAXPROP_DATA"):
        return
    real = [item for item in items if item.get_closest_marker("real_data")]
    items[:] = [item for item in items if item not in real]
    config.hook.pytest_deselected(items=real)


def pytest_collection_finish() -> None:
    """What is imported by now stays. Whoever collects garbage, as Trainer does in every step, need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
