"""How kernels are cut into programs: block sizes, warps and stages as data, and what of them a GPU has room for.

Configurations are few, chosen from the shape by stated rules, and those that exceed a target's shared memory or
registers are dropped before anything is compiled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import triton

_REGISTER_BYTES = 4
_MOST_REGISTERS = 255  # of a thread
_WARP = 32


class Target(NamedTuple):
    """What a program may use of one architecture's multiprocessor."""

    capability: int
    shared_bytes: int


TARGETS = {
    80: Target(80, 163 * 1024),
    90: Target(90, 227 * 1024),
    100: Target(100, 227 * 1024),
}


class Pass(NamedTuple):
    """A memory-bound pass: a program's tile of pixels by channels."""

    pixels: int
    channels: int
    warps: int


class Product(NamedTuple):
    """A product: a program's tile of the output, (block_m, block_n), the depth of one step, and steps in flight."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int

    def shared_bytes(self, itemsize: int, operands: int = 1) -> int:
        """Shared memory of the steps in flight; `operands` is how many activations a step loads beside the weight."""
        step = self.block_k * (operands * self.block_m + self.block_n)
        return self.stages * step * itemsize

    def registers(self, accumulators: int = 1) -> int:
        """Registers of a thread that the accumulators take."""
        return accumulators * self.block_m * self.block_n // (_WARP * self.warps)

    def fits(self, target: Target, itemsize: int, *, operands: int = 1, accumulators: int = 1) -> bool:
        """Whether a program has room for it: half of a thread's registers are left to what is loaded and computed."""
        return (
            self.shared_bytes(itemsize, operands) <= target.shared_bytes
            and self.registers(accumulators) <= _MOST_REGISTERS // 2 + 1
        )


def pruned(configs: Iterable[Product], target: Target, itemsize: int, **needs: int) -> list[Product]:
    """The configurations that a target has room for."""
    return [config for config in configs if config.fits(target, itemsize, **needs)]


# Bytes of one operand that a program of a pass holds: four 16-byte vectors for each thread of four warps. Sums take
# registers, so beside them it is half, and the windows over a pixel are loads enough.
PASS_BYTES, REDUCTION_BYTES, POOL_BYTES = 8192, 4096, 2048
_PASS_CHANNELS = 128


def pass_over(pixels: int, channels: int, itemsize: int, *, channels_last: bool, tile_bytes: int) -> Pass:
    """The tile of a pass: whole rows of channels as far as they go, or a stretch of one channel's pixels."""
    elements, pixels = tile_bytes // itemsize, max(pixels, 1)
    if not channels_last:
        return Pass(min(elements, triton.next_power_of_2(pixels)), 1, 4)
    width = min(_PASS_CHANNELS, triton.next_power_of_2(channels))
    return Pass(min(elements // width, triton.next_power_of_2(pixels)), width, 4)
