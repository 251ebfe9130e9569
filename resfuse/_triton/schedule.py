"""How a product is divided among programs: tile sizes and slabs, from its shape alone.

The number of slabs decides the order of sums, so it does not ask how many processors a GPU has. Rows of a tile, the
channels it writes and those of one step follow these rules, with which a thread has registers enough (the compile gate
checks them; kernel.py has the exceptions): 128 rows by up to 64 channels for large maps, fewer for small ones and for
float32, since a prologue's vectors, moments, and what an epilogue loads take registers beside the sums; all channels of
a 1x1 convolution in one step up to 128 (64 where two activations are loaded), else steps of 64 or 32, of 16 in float32;
as many steps in flight, up to three, as the shared memory of every target has room for. Triton 3.6 spills earlier than
3.9 does: where it did, rows are fewer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from resfuse._triton import configs
from resfuse._triton.gemm import Product

_PROGRAMS = 528  # four for each multiprocessor of the largest GPU: enough to even out, few enough to keep a weight
_LARGE_MAP = 4096  # pixels


class Schedule(NamedTuple):
    """One launch: a grid of blocks of channels and slabs of row tiles."""

    config: configs.Product
    blocks: int
    tiles: int
    slab_tiles: int
    single: bool = False

    @property
    def slabs(self) -> int:
        """Programs along the rows."""
        return triton.cdiv(self.tiles, self.slab_tiles)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the kernel."""
        c = self.config
        return {
            "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k,
            "num_warps": c.warps, "num_stages": c.stages, "enable_fp_fusion": False,
        }  # fmt: skip


def _block(size: int, largest: int) -> int:
    """The power of two that holds `size`, no smaller than a product's tile may be."""
    return max(16, min(largest, triton.next_power_of_2(size)))


def _config(
    block_m: int, block_n: int, block_k: int, dtype: torch.dtype, operands: int, warps: int | None = None
) -> configs.Product:
    """A configuration of the most stages that every target has room for."""
    if warps is None:
        warps = 8 if block_m * block_n >= 2048 else 4
    candidates = [configs.Product(block_m, block_n, block_k, stages, warps) for stages in (3, 2, 1)]
    smallest = min(configs.TARGETS.values(), key=lambda target: target.shared_bytes)
    return configs.pruned(candidates, smallest, dtype.itemsize, operands=operands)[0]


def _slabs(config: configs.Product, rows: int, step: int, blocks: int, groups: int, single: bool = False) -> Schedule:
    """Rows divided into slabs of tiles of `step`, so that there are about _PROGRAMS programs."""
    tiles = triton.cdiv(rows, step)
    wanted = max(1, _PROGRAMS // (blocks * groups))
    return Schedule(config, blocks, tiles, triton.cdiv(tiles, wanted), single)


def _rows(pixels: int, dtype: torch.dtype) -> int:
    return 128 if pixels >= _LARGE_MAP and dtype != torch.float32 else 64


def _depth(channels: int, taps: int, dtype: torch.dtype, step: int, operands: int) -> int:
    """Channels of one step: all of a 1x1 convolution's, where they are few, else `step`; 16 in float32."""
    if dtype == torch.float32:
        return 16
    whole = 128 // operands
    return _block(channels, whole if taps == 1 and channels <= whole else step)


def _rowwise(
    product: Product, dtype: torch.dtype, channels_in: int, channels_out: int, step: int, operands: int,
    rows: int | None = None,
) -> Schedule:  # fmt: skip
    """Of a product that writes a row for each of its rows; `operands` are the activations that a step loads."""
    block_n = _block(channels_out, 64 if dtype != torch.float32 else 32)
    block_k = _depth(channels_in, product.taps, dtype, step, operands)
    config = _config(rows or _rows(product.pixels, dtype), block_n, block_k, dtype, operands)
    single = product.taps == 1 and channels_in <= block_k
    blocks = triton.cdiv(channels_out, block_n)
    return _slabs(config, product.pixels, config.block_m, blocks, product.groups, single)


def forward_schedule(product: Product, dtype: torch.dtype) -> Schedule:
    """Of conv_stats."""
    return _rowwise(product, dtype, product.channels, product.out_channels, 64, 1)


def input_schedule(part: Product, dtype: torch.dtype, computed: bool, masked: bool) -> Schedule:
    """Of the gradient to the input, or of one phase of it: its rows are input pixels.

    Steps are narrower where dY is `computed` from two activations, and rows fewer where they are a strided phase's, or
    several taps read a dY that is `masked` by a ReLU.
    """
    strided = part.width.result_step * part.height.result_step > 1
    rows = 64 if computed and (strided or (masked and part.taps > 1)) else None
    return _rowwise(part, dtype, part.out_channels, part.channels, *((32, 2) if computed else (64, 1)), rows)


def weight_schedule(product: Product, dtype: torch.dtype) -> Schedule:
    """Of the gradient to the weight: (output channels, input channels) at one tap, a step being a tile of pixels."""
    half = dtype != torch.float32
    block_m, block_n = _block(product.out_channels, 128 if half else 64), _block(product.channels, 64)
    config = _config(block_m, block_n, 64 if half else 32, dtype, 2)
    blocks = triton.cdiv(product.out_channels, block_m) * triton.cdiv(product.channels, block_n)
    return _slabs(config, product.pixels, config.block_k, blocks * product.taps, product.groups)


def act_schedule(product: Product, dtype: torch.dtype, *, plain: bool, crowded: bool) -> Schedule:
    """Of conv_act; `plain` where its epilogue has no scale, moments, branch or raw residual, `crowded` where a scale,
    moments or a raw residual meet a prologue.

    A per-channel vector of an epilogue takes a register for every fourth channel: without them tiles may be larger.
    Beside them a prologue has room for fewer rows, unless its own vectors are the same in every step.
    """
    half = dtype != torch.float32
    deep = plain and product.taps == 1 and product.channels <= 128
    block_k = _block(product.channels, 128 if deep else 64) if half else 16
    single = product.taps == 1 and product.channels <= block_k
    block_n = _block(product.out_channels, (128 if single and plain else 64) if half else 32)
    rows = 64 if crowded and not single else _rows(product.pixels, dtype)
    config = _config(rows, block_n, block_k, dtype, 1, warps=8)
    blocks = triton.cdiv(product.out_channels, block_n)
    return _slabs(config, product.pixels, config.block_m, blocks, product.groups, single)


# Programs of four warps that sum over pixels: what each one sums is written and read once more.
_SUMMING_PROGRAMS = 264


def _summing(config: configs.Product, pixels: int, blocks: int, programs: int) -> Schedule:
    """Pixels divided into slabs of `programs` programs each; a step is a tile of block_k pixels."""
    tiles = triton.cdiv(pixels, config.block_k)
    wanted = max(1, _SUMMING_PROGRAMS * 4 // (config.warps * programs))
    return Schedule(config, blocks, tiles, triton.cdiv(tiles, wanted))


# A step's column sums take as many registers as it has elements: wide blocks take few pixels at once.


def second_moments_schedule(pixels: int, channels: int, dtype: torch.dtype) -> Schedule:
    """Of second_moments: (channels, channels)."""
    if dtype == torch.float32:
        config = _config(64, 64, 32, dtype, 1)
    else:
        config = _config(64, 64, 64, dtype, 1) if channels <= 64 else _config(128, 128, 32, dtype, 1)
    blocks = triton.cdiv(channels, config.block_m)
    return _summing(config, pixels, blocks, blocks * (blocks + 1) // 2)


def expand_weight_schedule(pixels: int, channels: int, out_channels: int, dtype: torch.dtype) -> Schedule:
    """Of G in the backward of folding: (output channels, channels)."""
    if dtype == torch.float32:
        config = _config(64, 64, 32, dtype, 2)
    else:
        config = _config(128, 64, 64, dtype, 2) if channels <= 64 else _config(128, 128, 32, dtype, 2)
    blocks = triton.cdiv(channels, config.block_n)
    return _summing(config, pixels, blocks, blocks * triton.cdiv(out_channels, config.block_m))


def expand_input_schedule(pixels: int, channels: int, dtype: torch.dtype) -> Schedule:
    """Of the gradient to the input of a folded convolution."""
    half = dtype != torch.float32
    config = _config(128, 64, 32, dtype, 1) if half else _config(32, 64, 16, dtype, 1, warps=4)
    return _slabs(config, pixels, config.block_m, triton.cdiv(channels, config.block_n), 1)
