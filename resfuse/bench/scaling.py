"""Scaling: the cost of a network along batch, image size, depth and threads, and where it stops growing linearly.

Along batch, size and depth a point's work is the multiply-adds of its convolutions; cost is linear where the time of a
multiply-add stays the same. Along threads the work is fixed; there time times threads is what should stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from resfuse.bench.gate import Refusals
from resfuse.bench.networks import Cell, Checks, measure
from resfuse.bench.records import Record
from resfuse.bench.shapes import conv_shapes
from resfuse.bench.timing import Tick
from resfuse.bench.workload import stock

AXES = ("batch", "size", "depth", "threads")
VARIANTS = ("eager", "fused")
BROKEN = 1.25
"""A point costs more than linear growth allows where a unit of its work takes this many times the best point's."""


class Point(NamedTuple):
    """One point of a curve; threads 0 leaves torch's choice."""

    axis: str
    value: int
    cell: Cell
    threads: int = 0


def points(axes: Sequence[str], model: str = "resnet50", mode: str = "training", quick: bool = False) -> list[Point]:
    """The points of each axis around a step of `model`, small enough for the largest to fit two cores' patience.

    Args:
        axes (Sequence[str]): of AXES.
        model (str): for all axes but depth, which takes the ImageNet ResNets.
        mode (str): of :data:`resfuse.bench.workload.MODES`.
        quick (bool): the first point and the middle one, which end soon.

    Returns:
        list[Point]: axis after axis.
    """
    cores = torch.get_num_threads()
    threads = sorted({*(2**k for k in range(cores.bit_length())), cores})
    values = {
        "batch": [1, 2, 4, 8, 16, 32, 64],
        "size": [64, 96, 128, 192, 256, 384, 512],
        "depth": [18, 34, 50, 101, 152],
        "threads": threads,
    }
    found = []
    for axis in axes:
        along = values[axis] if not quick else sorted({values[axis][0], values[axis][len(values[axis]) // 2]})
        for value in along:
            cell = {
                "batch": Cell(model, mode, value, 64),
                "size": Cell(model, mode, 2, value),
                "depth": Cell(f"resnet{value}", mode, 4, 96),
                "threads": Cell(model, mode, 8, 96),
            }[axis]
            found.append(Point(axis, value, cell, value if axis == "threads" else 0))
    return found


def work(cell: Cell) -> int:
    """Multiply-adds of the convolutions in one forward pass over the batch."""
    shapes = conv_shapes(lambda: stock(cell.model), (cell.batch, 3, cell.size, cell.size))
    return sum(math.prod(conv.output) * math.prod(conv.weight[1:]) for conv in shapes)


def run(
    chosen: Sequence[Point],
    dtypes: Sequence[str],
    where: Record,
    *,
    rounds: int = 6,
    device: str = "cpu",
    quick: bool = False,
    variants: Sequence[str] = VARIANTS,
    tick: Tick = lambda _: None,
) -> Iterator[Record]:
    """Measure point after point, as :func:`resfuse.bench.networks.run` measures rows; each network is checked once."""
    fixed = {"suite": "scaling", "quick": quick, "environment": where, "backend": "native",
             "layout": "channels_last"}  # fmt: skip
    checks, refusals = Checks(device), Refusals()
    for dtype in dtypes:
        for point in chosen:
            with refusals.skip():
                note = checks(point.cell.model, dtype)
                found = measure(point.cell, dtype, variants, rounds, device=device, threads=point.threads, tick=tick)
                place = {"axis": point.axis, "value": point.value, "threads": point.threads or torch.get_num_threads()}
                yield {**fixed, **place, "work": work(point.cell), **found, **note}
    refusals.end()


def curves(records: Sequence[Record]) -> dict[tuple[str, ...], list[tuple[int, float]]]:
    """By axis, mode, dtype and variant: (value, cost of a unit of work over that of the cheapest point), in order."""
    found: dict[tuple[str, ...], dict[int, float]] = {}
    for record in records:
        if record["suite"] != "scaling":
            continue
        for variant, row in record["variants"].items():
            factor = record["threads"] if record["axis"] == "threads" else 1
            cost = row["median_ms"] * factor / record["work"]
            key = (record["axis"], record["mode"], record["dtype"], variant)
            found.setdefault(key, {})[record["value"]] = cost
    return {key: _relative(sorted(costs.items())) for key, costs in found.items()}


def _relative(costs: list[tuple[int, Any]]) -> list[tuple[int, float]]:
    best = min(cost for _, cost in costs)
    return [(value, cost / best) for value, cost in costs]


def findings(records: Sequence[Record]) -> list[str]:
    """For each curve one sentence: whether cost grows linearly, and where it does not."""
    found = []
    for (axis, mode, dtype, variant), curve in curves(records).items():
        if len(curve) < 2:
            continue
        broken = [f"{value} ({cost:.2f}x)" for value, cost in curve if cost > BROKEN]
        how = f"linear but for {axis} {', '.join(broken)}" if broken else "linear"
        said = "time times threads" if axis == "threads" else "time of a multiply-add"
        found.append(
            f"{variant} {mode} {dtype} along {axis} {curve[0][0]} to {curve[-1][0]}: {how}; {said} over the best "
            f"point's, at most {max(cost for _, cost in curve):.2f}"
        )
    return found
