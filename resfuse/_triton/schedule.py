"""How a product is divided among programs: tile sizes and slabs, from its shape alone.

The number of slabs decides the order of sums, so it does not ask how many processors a GPU has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from resfuse._triton import configs
from resfuse._triton.gemm import Product

_PROGRAMS = 528  # four for each multiprocessor of the largest GPU: enough to even out, few enough to keep a weight


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


def slabs_of(config: configs.Product, rows: int, blocks: int, groups: int, single: bool = False) -> Schedule:
    """Rows divided into slabs, so that there are about as many programs as _PROGRAMS."""
    tiles = triton.cdiv(rows, config.block_m)
    wanted = max(1, _PROGRAMS // (blocks * groups))
    return Schedule(config, blocks, tiles, triton.cdiv(tiles, wanted), single)


def forward_schedule(product: Product, dtype: torch.dtype) -> Schedule:
    """Of conv_stats."""
    half = dtype != torch.float32
    block_n = _block(product.out_channels, 128)
    block_k = _block(product.channels, 128 if half and product.taps == 1 else 64 if half else 32)
    block_m = 128 if product.pixels >= 4096 else 64
    single = product.taps == 1 and product.channels <= block_k
    config = configs.Product(block_m, block_n, block_k, 3, 8 if block_m * block_n > 8192 else 4)
    return slabs_of(config, product.pixels, triton.cdiv(product.out_channels, block_n), product.groups, single)


def input_schedule(part: Product, dtype: torch.dtype) -> Schedule:
    """Of the gradient to the input, or of one phase of it: its rows are input pixels."""
    half = dtype != torch.float32
    block_n = _block(part.channels, 128)
    block_k = _block(part.out_channels, 64 if half else 32)
    block_m = 128 if part.pixels >= 4096 else 64
    single = part.taps == 1 and part.out_channels <= block_k
    config = configs.Product(block_m, block_n, block_k, 3, 8 if block_m * block_n > 8192 else 4)
    return slabs_of(config, part.pixels, triton.cdiv(part.channels, block_n), part.groups, single)


def weight_schedule(product: Product, dtype: torch.dtype) -> Schedule:
    """Of the gradient to the weight: a block is output channels by input channels at one tap."""
    half = dtype != torch.float32
    block_n, block_k = _block(product.out_channels, 128), _block(product.channels, 128)
    config = configs.Product(64 if half else 32, block_n, block_k, 3, 8 if block_n * block_k > 8192 else 4)
    blocks = triton.cdiv(product.out_channels, config.block_n) * triton.cdiv(product.channels, config.block_k)
    return slabs_of(config, product.pixels, blocks * product.taps, product.groups)
