"""What the interpreter's tests share: the CPU tests' own functions on Triton's kernels, without bfloat16."""

from pathlib import Path

import pytest
import torch

from resfuse import ops
from resfuse._triton import LAUNCHERS

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    """Leave bfloat16 to the GPU's tests: the interpreter cuts it off where a GPU rounds, and multiplies it wrongly."""
    dropped = []
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if HERE in item.path.parents and any(value is torch.bfloat16 for value in values):
            dropped.append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


@pytest.fixture
def native_is_triton(monkeypatch):
    """The tests of the C++ kernels run on Triton's: what asks for "native" is given the overloads `.triton`."""
    triton = ops.of("triton")
    monkeypatch.setitem(ops._overloads, "native", triton)
    for name in LAUNCHERS:
        monkeypatch.setattr(ops, name, getattr(triton, name))
