"""Triton's kernels: a file for each unit, in it a launcher for each of its operators, with the operator's arguments.

Nothing is compiled at import. The files need Triton alone, so that they can be compiled where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from resfuse._triton.add_relu import add_relu, add_relu_backward

# What serves the overload `.triton` of each operator; ops.py registers them.
LAUNCHERS: dict[str, Callable[..., Any]] = {
    launcher.__name__: launcher
    for launcher in (
        add_relu,
        add_relu_backward,
    )
}
