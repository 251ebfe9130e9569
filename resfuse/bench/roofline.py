"""Counts of the units' bytes and operations, and the time that bytes predict on a device of known bandwidth.

A count is what the mathematics must move: each activation that a unit reads or writes, once; vectors are left out. A
prediction is that count over a measured copy's bandwidth: a bound that leaves out launches and caches, no measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from resfuse.bench.shapes import batch_norm_shapes

# How often an activation of x's size is read or written, by unit and form of the residual.
PASSES = {
    ("moments", ""): 1,
    ("add_relu", ""): 3,
    ("scale_shift_act", "none"): 2,
    ("scale_shift_act", "identity"): 3,
    ("scale_shift_act", "raw"): 3,
    ("backward_reduce", "none"): 2,
    ("backward_reduce", "identity"): 4,  # it also writes the masked gradient
    ("backward_reduce", "raw"): 3,
    ("backward_apply", "none"): 3,
    ("backward_apply", "identity"): 3,
    ("backward_apply", "raw"): 5,
    ("bn_act forward", "none"): 3,
    ("bn_act forward", "identity"): 4,
    ("bn_act forward", "raw"): 5,
    ("bn_act backward", "none"): 5,
    ("bn_act backward", "identity"): 7,
    ("bn_act backward", "raw"): 8,
}
# The same for the stem's pooled units, over x, where a quarter of its size is read or written too, with one byte of
# arg-max for each of these values.
POOL_PASSES = {
    ("scale_shift_relu_maxpool", ""): 1,
    ("scale_shift_relu_maxpool backward_reduce", ""): 1,
    ("scale_shift_relu_maxpool backward_apply", ""): 2,
}

# Arithmetic operations for each value of x, by the formulas of reference.py: a comparison is one. The pool's, whose
# windows overlap, are rounded up.
OPERATIONS = {
    ("moments", ""): 4,
    ("add_relu", ""): 2,
    ("scale_shift_act", "none"): 3,
    ("scale_shift_act", "identity"): 4,
    ("scale_shift_act", "raw"): 6,
    ("backward_reduce", "none"): 7,
    ("backward_reduce", "identity"): 5,  # the mask is that of the output: nothing is computed again
    ("backward_reduce", "raw"): 13,
    ("backward_apply", "none"): 8,
    ("backward_apply", "identity"): 5,
    ("backward_apply", "raw"): 16,
    ("scale_shift_relu_maxpool", ""): 6,
    ("scale_shift_relu_maxpool backward_reduce", ""): 2,
    ("scale_shift_relu_maxpool backward_apply", ""): 8,
}
# a composition computes what its parts do
_PARTS = {"bn_act forward": ("moments", "scale_shift_act"), "bn_act backward": ("backward_reduce", "backward_apply")}


class Prediction(NamedTuple):
    """One unit of a training step: its bytes over all calls on this shape, and their time at the bandwidth."""

    unit: str
    form: str
    shape: tuple[int, ...]
    calls: int
    bytes: int
    microseconds: float


def bytes_moved(unit: str, form: str, shape: Sequence[int], element_size: int) -> int:
    """Bytes of one call on an activation of `shape`; the stem's pool is 3x3 with stride 2 and padding 1."""
    values = math.prod(shape)
    if (unit, form) in PASSES:
        return PASSES[unit, form] * values * element_size
    pooled = math.prod(shape[:2]) * math.prod((size + 1) // 2 for size in shape[2:])
    return POOL_PASSES[unit, form] * values * element_size + pooled * (element_size + 1)


def operations(unit: str, form: str, shape: Sequence[int]) -> int:
    """Arithmetic operations of one call on an activation of `shape`."""
    parts = _PARTS.get(unit, (unit,))
    each = sum(OPERATIONS[part, "" if part == "moments" else form] for part in parts)
    return each * math.prod(shape)


def calls_of(name: str, projected: set[str]) -> list[tuple[str, str]]:
    """The units that a normalisation of a ResNet causes in a training step, by its name in the network.

    projected: the blocks with a projection, whose normalisation is applied in the pass that adds it.
    """
    block, _, own = name.rpartition(".")
    if name == "bn1":
        return [("moments", ""), *POOL_PASSES]
    if block.endswith("downsample"):
        return [("moments", "")]
    last = own == "bn3"
    form = "none" if not last else "raw" if block in projected else "identity"
    return [("moments", ""), *((unit, form) for unit in ("scale_shift_act", "backward_reduce", "backward_apply"))]


def predict(
    build: Callable[[], nn.Module], input_shape: tuple[int, ...], element_size: int, bandwidth: float
) -> list[Prediction]:
    """Every unit of one training step of a network of bottlenecks.

    Args:
        build (Callable[[], nn.Module]): makes the stock network.
        input_shape (tuple[int, ...]): (N, C, H, W).
        element_size (int): bytes of an activation's value.
        bandwidth (float): bytes per second that a copy reaches, read and written ones counted.

    Returns:
        list[Prediction]: one for each unit, form and shape, in the order of the forward pass.
    """
    shapes = batch_norm_shapes(build, input_shape)
    names = [name for shape in shapes for name in shape.names]
    projected = {name.rpartition(".downsample")[0] for name in names if ".downsample." in name}
    counts: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for shape in shapes:
        for name in shape.names:
            for unit, form in calls_of(name, projected):
                key = (unit, form, shape.shape)
                counts[key] = counts.get(key, 0) + 1
    found = []
    for (unit, form, size), count in counts.items():
        moved = count * bytes_moved(unit, form, size, element_size)
        found.append(Prediction(unit, form, size, count, moved, round(1e6 * moved / bandwidth, 2)))
    return found
