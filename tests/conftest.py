"""What every test starts from."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests on real data run where RELAXPROP_DATA names a folder."""
    if os.environ.get("RELAXPROP_DATA"):
        return
    real = [item for item in items if item.get_closest_marker("real_data")]
    items[:] = [item for item in items if item not in real]
    config.hook.pytest_deselected(items=real)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
