"""What `run_plan` runs: steps over values in an arena, as the integers that csrc/cpu/serving/program.h reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from enum import IntEnum

from resfuse import ops

Pair = tuple[int, int]

PANEL = 32
"""Most output channels that a tile kernel writes at once: vectors of parameters and pixels are padded to it."""
_LINE = 64  # bytes of a cache line
_SLACK = 128  # bytes after every value, which a vector may read
_ONE, _NONE = (1, 1), (0, 0)


class StepKind(IntEnum):
    """What a step does."""

    LOAD = 0
    STORE = 1
    CONVOLUTION = 2
    WINOGRAD = 3
    CONVOLUTION_POOL = 4
    MAX_POOL = 5
    GLOBAL_POOL = 6
    MAP = 7


@dataclass
class Value:
    """An activation: its place in the arena, in bytes, and its size; a local one holds one chunk's images only."""

    offset: int
    local: int
    images: int
    height: int
    width: int
    channels: int
    pixel_step: int
    halo: int

    def bytes(self, element_size: int) -> int:
        rows, columns = self.height + 2 * self.halo, self.width + 2 * self.halo
        return _round_up(self.images * rows * columns * self.pixel_step * element_size + _SLACK, _LINE)

    def like(self, other: Value) -> bool:
        """Whether a pixel lies at the same place in both, once they begin at the same byte."""
        return astuple(replace(self, offset=0)) == astuple(replace(other, offset=0))


@dataclass(frozen=True)
class Chunk:
    """The steps [first, last), which take `images` images at a time."""

    first: int
    last: int
    images: int


@dataclass(frozen=True)
class Step:
    """One step; values, constants and tensors by index, -1 where there is none."""

    kind: StepKind
    input: int = -1
    second: int = -1
    residual: int = -1
    output: int = -1
    weight: int = -1
    bias: int = -1
    relu: int = 0
    groups: int = 1
    run: int = 0
    kernel: Pair = _ONE
    stride: Pair = _ONE
    padding: Pair = _NONE
    dilation: Pair = _ONE
    size: Pair = _NONE
    pool_kernel: Pair = _ONE
    pool_stride: Pair = _ONE
    pool_padding: Pair = _NONE
    second_stride: Pair = _ONE

    def reads(self) -> list[int]:
        return [] if self.kind == StepKind.LOAD else [v for v in (self.input, self.second, self.residual) if v >= 0]

    def writes(self) -> list[int]:
        return [] if self.kind == StepKind.STORE else [self.output]


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def pixel_step(channels: int, element_size: int) -> int:
    """Values between pixels: whole panels, and no stride that puts a register tile's pixels into few cache sets."""
    lines = _round_up(channels, PANEL) * element_size // _LINE
    return (lines + (lines % 16 == 0)) * _LINE // element_size


def encode(
    images: int, values: Sequence[Value], chunks: Sequence[Chunk], steps: Sequence[Step], element_size: int
) -> list[int]:
    """Give every value its place, and write the program down.

    Args:
        images (int): of the whole batch.
        values (Sequence[Value]): their offsets are set here.
        chunks (Sequence[Chunk]): they cover the steps, in order.
        steps (Sequence[Step]): each value is written before it is read.
        element_size (int): bytes of an element.

    Returns:
        list[int]: the program.
    """
    size = _place(values, chunks, steps, element_size)
    data = [ops.tile_lanes, images, size, len(values), len(chunks), len(steps)]
    for rows in (map(astuple, values), map(astuple, chunks), map(astuple, steps)):
        for row in rows:
            data += _flat(row)
    return data


def _flat(fields: Iterable[int | Pair]) -> list[int]:
    return [int(i) for field in fields for i in (field if isinstance(field, tuple) else (field,))]


def _lives(values: Sequence[Value], chunks: Sequence[Chunk], steps: Sequence[Step]) -> list[tuple[int, int]]:
    """The first and the last step that needs each value's memory."""
    chunk_of = [chunk for chunk in chunks for _ in range(chunk.first, chunk.last)]
    lives: list[tuple[int, int]] = [(len(steps), -1)] * len(values)
    for index, step in enumerate(steps):
        for value in (*step.reads(), *step.writes()):
            # what outlives a chunk is there for all of its rounds
            own = (index, index) if values[value].local else (chunk_of[index].first, chunk_of[index].last - 1)
            lives[value] = (min(lives[value][0], own[0]), max(lives[value][1], own[1]))
    return lives


def _place(values: Sequence[Value], chunks: Sequence[Chunk], steps: Sequence[Step], element_size: int) -> int:
    """Set the offsets so that values whose lives overlap do not; return the arena's size.

    A sum is written over the residual that dies with it.
    """
    lives, over = _lives(values, chunks, steps), {}
    for index, step in enumerate(steps):
        if step.residual >= 0 and step.residual != step.input and values[step.residual].like(values[step.output]):
            ends = lives[step.residual][1]
            last_of_chunk = next(c.last - 1 for c in chunks if c.first <= index < c.last)
            reads = sum(step.residual in later.reads() for later in steps[index + 1 :])
            if reads == 0 and ends in (index, last_of_chunk):
                over[step.output] = step.residual
    placed: list[tuple[int, int, int]] = []  # offset, end, value
    for value in sorted(range(len(values)), key=lambda v: lives[v]):
        offset = 0
        if value in over:
            offset = values[over[value]].offset
        else:
            size = values[value].bytes(element_size)
            for begin, end, other in sorted(placed):
                if lives[other][0] <= lives[value][1] and lives[value][0] <= lives[other][1]:
                    if offset + size <= begin:
                        break
                    offset = max(offset, end)
        values[value].offset = offset
        placed.append((offset, offset + values[value].bytes(element_size), value))
    return max((end for _, end, _ in placed), default=0)
