"""Tests of what only a GPU can show. `make gpu` runs them; elsewhere they are skipped.

MANYVIEWS_GPU_TESTS=cpu runs them on the CPU, to check the tests themselves: what is particular to CUDA is then left out.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ON_CPU = os.environ.get("MANYVIEWS_GPU_TESTS") == "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available() and not ON_CPU:
                item.add_marker(pytest.mark.skip(reason="no GPU that torch can use; `make gpu` runs these tests where there is one"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if ON_CPU else "cuda")


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device, for a test that means nothing on a CPU."""
    if device.type != "cuda":
        pytest.skip("is about CUDA itself")
    return device
