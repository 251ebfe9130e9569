"""Comparison of two sides, each of one run or more: what became faster or slower, as far as intervals say.

Runs happen at different times, maybe on machines of different speed. So ours is compared relative to a yardstick that
each run has sampled in turn with it: (ours / yardstick, after) over (ours / yardstick, before). What slows down the
machine slows down both. Only where no run has a yardstick are times themselves compared.

Of one run a side the interval holds the noise within a run alone. Two runs of one build differ by more, as each has its
own place in memory, its own neighbours and its own clock: some intervals then exclude 1 though nothing changed. With
three runs or more on both sides together, the spread from run to run is measured, and the interval holds it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from resfuse.bench.records import Record, cell, timings
from resfuse.bench.timing import interval, interval_of_runs

Run = Sequence[Record]
"""Rows, as :func:`resfuse.bench.records.read` gives them."""

# what ours is held against, the first that both rows have
YARDSTICKS = ("stock", "eager", "copy", "eager-contiguous", "compile")
FASTER, SLOWER, UNDECIDED = "faster", "slower", "no difference shown"


class Change(NamedTuple):
    """How one timing of one cell changed.

    Attributes:
        cell: what was measured, of :func:`resfuse.bench.records.cell`.
        name: the implementation, as "fused".
        against: its yardstick; None where times themselves are compared.
        ratio: after over before; below 1 is faster.
        low, high: where the ratio lies with 95 % confidence; None where a row has too few samples, or keeps none.
        runs: how many there are before and after; of one each, the interval holds the noise within a run alone.
    """

    cell: tuple[str, ...]
    name: str
    against: str | None
    ratio: float
    low: float | None
    high: float | None
    runs: tuple[int, int] = (1, 1)

    @property
    def verdict(self) -> str:
        """FASTER or SLOWER where the interval excludes 1, else UNDECIDED."""
        if self.low is None or self.high is None or self.low <= 1 <= self.high:
            return UNDECIDED
        return SLOWER if self.low > 1 else FASTER


def compare_runs(before: Sequence[Run], after: Sequence[Run]) -> list[Change]:
    """Every timing that both sides have, in the order of the rows; of a cell that a run has twice, the last row.

    Args:
        before, after (Sequence[Run]): one run or more of each side.

    Raises:
        ValueError: the sides have no cell in common.
    """
    old, new = _cells(before), _cells(after)
    shared = [key for key in new if key in old]
    if not shared:
        raise ValueError(f"the two sides have no cell in common: {len(old)} and {len(new)} cells")
    return [change for key in shared for change in _changes(key, old[key], new[key])]


def _cells(runs: Sequence[Run]) -> dict[tuple[str, ...], list[dict[str, Record]]]:
    """The timings of each cell, of every run that has it."""
    found: dict[tuple[str, ...], list[dict[str, Record]]] = {}
    for run in runs:
        for key, row in {cell(row): row for row in run}.items():
            found.setdefault(key, []).append(timings(row))
    return found


def _changes(key: tuple[str, ...], old: list[dict[str, Record]], new: list[dict[str, Record]]) -> list[Change]:
    names = [name for name in new[0] if all(name in run for run in (*old, *new))]
    yardstick = next((name for name in YARDSTICKS if name in names), None)
    ours = [name for name in names if name not in YARDSTICKS]
    return [_change(key, name, yardstick if name in ours else None, old, new) for name in ours or names]


def _change(
    key: tuple[str, ...], name: str, yardstick: str | None, old: list[dict[str, Record]], new: list[dict[str, Record]]
) -> Change:
    columns = [name] if yardstick is None else [name, yardstick]
    sides = [[tuple(_values(run[column]) for column in columns) for run in side] for side in (old, new)]
    before, after = ([_relative([statistics.median(column) for column in run]) for run in side] for side in sides)
    ratio = math.exp(statistics.mean(map(math.log, after)) - statistics.mean(map(math.log, before)))
    runs = len(old), len(new)
    if runs != (1, 1):
        return Change(key, name, yardstick, ratio, *interval_of_runs(before, after), runs)
    low, high = interval(lambda m: _relative(m[len(columns) :]) / _relative(m[: len(columns)]), sides[0] + sides[1])
    return Change(key, name, yardstick, ratio, low, high)


def _relative(medians: Sequence[Any]) -> Any:
    """Ours over its yardstick where there is one; of floats, or of tensors of resamples."""
    return medians[0] / medians[1] if len(medians) > 1 else medians[0]


def _values(timing: Record) -> list[float]:
    """A timing's samples; of rows from before samples were kept, the median alone, which bears no interval."""
    return timing.get("values_ms") or [timing["median_ms"]]


def differences(before: Sequence[Run], after: Sequence[Run]) -> list[str]:
    """What differs between the machines and libraries of two sides: each a sentence, for who reads the verdicts."""
    keys = ("device_name", "capability", "driver", "threads", "torch", "triton", "python")
    found = []
    for key in keys:
        old, new = ({str(row["environment"].get(key)) for run in runs for row in run} for runs in (before, after))
        if old != new:
            found.append(f"{key}: {', '.join(sorted(old))} before, {', '.join(sorted(new))} after")
    return found
