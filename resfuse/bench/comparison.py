"""Comparison of two runs: what became faster or slower from one file of rows to the other, as far as intervals say.

Two runs happen at different times, maybe on machines of different speed. So ours is compared relative to a yardstick
that both runs have sampled in turn with it: (ours / yardstick, after) over (ours / yardstick, before). What slows down
the machine slows down both. Only where no run has a yardstick are times themselves compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from resfuse.bench.records import Record, cell, timings
from resfuse.bench.timing import interval

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
    """

    cell: tuple[str, ...]
    name: str
    against: str | None
    ratio: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """FASTER or SLOWER where the interval excludes 1, else UNDECIDED."""
        if self.low is None or self.high is None or self.low <= 1 <= self.high:
            return UNDECIDED
        return SLOWER if self.low > 1 else FASTER


def compare_runs(before: Sequence[Record], after: Sequence[Record]) -> list[Change]:
    """Every timing that both runs have, in the order of `after`; of a cell that a run has twice, the last row.

    Args:
        before, after (Sequence[Record]): rows, as :func:`resfuse.bench.records.read` gives them.

    Raises:
        ValueError: the runs have no cell in common.
    """
    old, new = ({cell(row): row for row in rows} for rows in (before, after))
    shared = [key for key in new if key in old]
    if not shared:
        raise ValueError(f"the two files have no cell in common: {len(old)} rows and {len(new)} rows")
    return [change for key in shared for change in _changes(key, timings(old[key]), timings(new[key]))]


def _changes(key: tuple[str, ...], old: dict[str, Record], new: dict[str, Record]) -> list[Change]:
    names = [name for name in new if name in old]
    yardstick = next((name for name in YARDSTICKS if name in names), None)
    ours = [name for name in names if name not in YARDSTICKS]
    return [_change(key, name, yardstick if name in ours else None, old, new) for name in ours or names]


def _change(
    key: tuple[str, ...], name: str, yardstick: str | None, old: dict[str, Record], new: dict[str, Record]
) -> Change:
    columns = [name] if yardstick is None else [name, yardstick]
    runs = [tuple(_values(run[column]) for column in columns) for run in (old, new)]
    before, after = (_relative([statistics.median(column) for column in run]) for run in runs)
    low, high = interval(lambda m: _relative(m[len(columns) :]) / _relative(m[: len(columns)]), runs)
    return Change(key, name, yardstick, after / before, low, high)


def _relative(medians: Sequence[Any]) -> Any:
    """Ours over its yardstick where there is one; of floats, or of tensors of resamples."""
    return medians[0] / medians[1] if len(medians) > 1 else medians[0]


def _values(timing: Record) -> list[float]:
    """A timing's samples; of rows from before samples were kept, the median alone, which bears no interval."""
    return timing.get("values_ms") or [timing["median_ms"]]


def differences(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    """What differs between the machines and libraries of two runs: each a sentence, for whoever reads the verdicts."""
    keys = ("device_name", "capability", "driver", "threads", "torch", "triton", "python")
    found = []
    for key in keys:
        old, new = ({str(row["environment"].get(key)) for row in rows} for rows in (before, after))
        if old != new:
            found.append(f"{key}: {', '.join(sorted(old))} before, {', '.join(sorted(new))} after")
    return found
