"""Which candidate computes a unit that holds a convolution on a GPU: our fused kernel, or the composition.

The composition is a pass that materialises what the convolution reads, torch's convolution (cuDNN's), and a pass over
what it wrote. A table of measurements decides, keyed by device name, unit, dtype and shape: the user's, which `resfuse
tune` writes, or one that ships for a GPU measured before. A shape that was not measured follows a rule. A GPU without
the shared memory that the fused kernels need composes.

A table is a JSON file: {"device": name, "rows": [...]}, each row {"unit", "dtype", "conv", "pixels", "fused_ms",
"composed_ms"}; `conv` is a :class:`Conv` as a list, `pixels` those of the output over all images. Between shapes that
differ in pixels alone the nearest counts, within a factor of two.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

CANDIDATES = ("fused", "composed")
UNITS = ("conv_stats", "conv_stats_backward")

# A 1x1 convolution of 16-bit activations does 2*C*K operations on the 2*(C + K) bytes that each pixel must move. Where
# C*K/(C + K) is below what a GPU does while a byte arrives (about 200 on an H200), memory decides its time, and the
# fused kernel has no passes; the limit leaves room for a product slower than cuDNN's. Predicted, not measured.
_INTENSITY = 128
_PIXELS_RATIO = 2  # a measurement speaks for shapes this much larger or smaller


class Conv(NamedTuple):
    """A convolution, whatever the size of its maps."""

    channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @staticmethod
    def of(
        weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
    ) -> Conv:
        """From a weight's shape (K, C / groups, kH, kW) and a convolution's arguments as pairs."""
        out, channels, *size = weight_shape
        kernel, stride, padding, dilation = ((int(a), int(b)) for a, b in (size, stride, padding, dilation))
        return Conv(channels * groups, out, kernel, stride, padding, dilation, groups)

    def as_list(self) -> list[int]:
        """As rows of tables keep it: numbers in order."""
        return [n for field in self for n in (field if isinstance(field, tuple) else (field,))]

    @staticmethod
    def from_list(numbers: Sequence[int]) -> Conv:
        """What as_list gave."""
        c, k, *pairs, groups = numbers
        kernel, stride, padding, dilation = ((pairs[i], pairs[i + 1]) for i in range(0, 8, 2))
        return Conv(c, k, kernel, stride, padding, dilation, groups)


Key = tuple[str, str, tuple[int, ...]]
Table = Mapping[Key, Sequence[tuple[int, str]]]


def _key(unit: str, dtype: torch.dtype, conv: Conv) -> Key:
    return unit, str(dtype).removeprefix("torch."), tuple(conv.as_list())


def read(rows: Iterable[Mapping[str, Any]]) -> Table:
    """A table's rows as lists of (pixels, the faster candidate) by unit, dtype and convolution."""
    table: dict[Key, list[tuple[int, str]]] = {}
    for row in rows:
        faster = min(CANDIDATES, key=lambda candidate: row[f"{candidate}_ms"])
        table.setdefault((row["unit"], row["dtype"], tuple(row["conv"])), []).append((row["pixels"], faster))
    return table


def lookup(table: Table, unit: str, dtype: torch.dtype, conv: Conv, pixels: int | None) -> str | None:
    """The faster candidate by measurement; None where nothing near was measured.

    Without `pixels`, where maps of any size are asked about: "fused" if it is the faster for one of them.
    """
    found = table.get(_key(unit, dtype, conv), ())
    if pixels is None:
        return min((faster for _, faster in found), key=CANDIDATES.index, default=None)
    near = [(abs(math.log(measured / pixels)), faster) for measured, faster in found]
    distance, faster = min(near, default=(math.inf, ""))
    return faster if distance <= math.log(_PIXELS_RATIO) else None


def rule(dtype: torch.dtype, conv: Conv) -> str:
    """Without a measurement: fused where a 1x1 convolution is bound by memory, else composed.

    In float32 cuDNN may multiply in TF32 where our products may not, so there too it convolves.
    """
    pointwise = conv.kernel == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    intensity = conv.channels * conv.out_channels / (conv.channels + conv.out_channels)
    return "fused" if pointwise and dtype.itemsize == 2 and intensity < _INTENSITY else "composed"


def file_name(device: str) -> str:
    """The name of a device's table."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def user_directory() -> Path:
    """Where `resfuse tune` keeps tables: under XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resfuse" / "choices"


@functools.cache
def table_of(device: str) -> Table:
    """The table of a device by its name, read once in a process: the user's, or the one that ships, or none."""
    for directory in (user_directory(), Path(__file__).with_name("_triton") / "choices"):
        path = directory / file_name(device)
        if path.is_file():
            return read(json.loads(path.read_text())["rows"])
    return {}


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def has_room(index: int) -> bool:
    """Whether a multiprocessor has the shared memory that our products are scheduled for; else they do not launch."""
    from resfuse._triton.configs import TARGETS

    found = getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin", 0)
    return found >= min(target.shared_bytes for target in TARGETS.values())


def choose(unit: str, device: torch.device, dtype: torch.dtype, conv: Conv, pixels: int | None = None) -> str:
    """The candidate for one call of a unit.

    Args:
        unit (str): "conv_stats" or "conv_stats_backward".
        device (torch.device): where the activation is; on a CPU Triton interprets, for tests of the fused kernel.
        dtype (torch.dtype): the activation's.
        conv (Conv): the convolution.
        pixels (int | None): of its output, over all images; None asks about maps of any size.

    Returns:
        str: "fused" or "composed".
    """
    if device.type != "cuda":
        return "fused"
    index = torch.cuda.current_device() if device.index is None else device.index
    if not has_room(index):
        return "composed"
    measured = lookup(table_of(_device_name(index)), unit, dtype, conv, pixels)
    return rule(dtype, conv) if measured is None else measured


def any_fused(device: str, dtype: torch.dtype, convs: tuple[tuple[int, ...], ...]) -> bool:
    """Whether our kernels compute any of these convolutions, as lists, forward or backward, for maps of some size.

    If none, activations need not travel raw. torch.compile takes the answer as a constant: it reads a file.
    """
    where = torch.device(device)
    return any(choose(unit, where, dtype, Conv.from_list(conv)) == "fused" for conv in convs for unit in UNITS)


# what torch.compiler.assume_constant_result sets; called here, it would import the whole compiler with resfuse
any_fused._dynamo_marked_constant = True  # type: ignore[attr-defined]
