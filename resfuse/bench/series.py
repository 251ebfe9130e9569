"""What the rows of benchmarks say, a cell an entry and the newest of each: ready to be drawn or put into tables.

Everything that shows rows starts here: the page of resfuse.bench.html, the figures and the tables of the README.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from resfuse.bench.records import Record

PEERS = {
    "fused": "resfuse",
    "folded": "resfuse.fold",
    "fused-compile": "resfuse, compiled",
    "eager-contiguous": "eager, contiguous",
    "compile": "torch.compile",
    "compile-max-autotune": "torch.compile, max-autotune",
    "freeze": "torch.compile, freezing",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
"""What the peers of a row are called where they are shown; others go by their own name."""

OURS = ("fused", "fused-compile", "folded")
DTYPES = ("float32", "bfloat16", "float16", "float64")
MODES = ("training", "step", "forward", "backward", "inference", "memory")

Item = TypeVar("Item")


class Cell(NamedTuple):
    """What was measured and where. Peers are compared within a cell, never across cells."""

    suite: str
    subject: str
    mode: str
    dtype: str
    batch: int | None
    size: int | None
    device: str
    threads: int | None


class Measure(NamedTuple):
    """One peer in a cell: times in ms, memory in bytes; None for what was not measured."""

    median: float | None
    p20: float | None
    p80: float | None
    images_per_s: float | None
    saved: int | None
    peak: int | None


class Ratio(NamedTuple):
    """Our time over a peer's in one cell: below 1 we are faster. Without an interval, old rows, no verdict is given."""

    ours: str
    peer: str
    middle: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str | None:
        """What the interval allows to say; None without one."""
        if self.low is None or self.high is None:
            return None
        return "faster" if self.high < 1 else "slower" if self.low > 1 else "no difference shown"


class Measured(NamedTuple):
    """A cell with its peers, in the order of the row, and the ratios between them."""

    cell: Cell
    measures: dict[str, Measure]
    ratios: list[Ratio]
    row: Record


def peer_name(peer: str) -> str:
    """What a peer is called where it is shown."""
    return PEERS.get(peer, peer)


def cells(rows: Iterable[Record], *suites: str) -> list[Measured]:
    """The newest row of each cell of the suites, ordered by mode, subject, batch, size and dtype.

    A row holds all peers of its cell, sampled in turn. Rows of one peer each, taken one after another where two do not
    fit into memory together, are joined if one run wrote them.
    """
    found: dict[Cell, Measured] = {}
    for row in rows:
        if row["suite"] not in suites:
            continue
        measured = _measured(row)
        known = found.get(measured.cell)
        if known is not None and "variants" not in row and run_of(known.row) == run_of(row):
            measured = known._replace(measures={**known.measures, **measured.measures})
        found[measured.cell] = measured
    return sorted(found.values(), key=_order)


def _measured(row: Record) -> Measured:
    where = row["environment"]
    subject = " ".join(row[key] for key in ("model", "name") if row.get(key))
    cell = Cell(
        row["suite"], subject, row.get("mode", "inference"), row["dtype"], row.get("batch"), row.get("size"),
        machine_of(row), where["threads"],
    )  # fmt: skip
    variants = row["variants"] if "variants" in row else {row["variant"]: row}
    named = ((name.partition("/"), found) for name, found in row.get("ratios", {}).items())
    ratios = [ratio_of(ours, peer, found) for (ours, _, peer), found in named]
    return Measured(cell, {name: _measure(found) for name, found in variants.items()}, ratios, row)


def ratio_of(ours: str, peer: str, found: Record) -> Ratio:
    """A row's ratio; old rows have no interval."""
    return Ratio(ours, peer, found["of_medians"], found.get("low"), found.get("high"))


def _measure(found: Record) -> Measure:
    median, p20, p80 = (found.get(f"{key}_ms") for key in ("median", "p20", "p80"))
    peak = found.get("peak_rss_bytes", found.get("peak_bytes"))
    return Measure(median, p20, p80, found.get("images_per_s"), found.get("saved_bytes"), peak)


def _order(measured: Measured) -> tuple[Any, ...]:
    cell = measured.cell
    return (cell.device, _place(cell.mode, MODES), cell.subject, cell.batch or 0, cell.size or 0,
            _place(cell.dtype, DTYPES), cell.threads or 0)  # fmt: skip


def _place(name: str, known: Sequence[str]) -> tuple[int, str]:
    """The place of a name among those that are known; all others after them, by name."""
    return (known.index(name), "") if name in known else (len(known), name)


def run_of(row: Record) -> str:
    """What the rows of one run share: the time at which it started."""
    return row["environment"]["date"]


def newest(rows: Iterable[Record], *keys: str) -> list[Record]:
    """For each value of `keys` the last row, in the order of first appearance."""
    return list({repr([row.get(key) for key in keys]): row for row in rows}.values())


def machine_of(row: Record) -> str:
    """The processor or GPU of a row, and its instruction set: a cloud gives many processors one name."""
    where = row["environment"]
    return f"{where['device_name']} ({where['capability']})"


def machines(rows: Iterable[Record]) -> list[str]:
    """The processors and GPUs of some rows, the one that was measured last first: rows of two are never compared."""
    return list(dict.fromkeys(machine_of(row) for row in list(rows)[::-1]))


def units(rows: Iterable[Record]) -> list[Record]:
    """The rows of units, each unit's of the run that measured it last: its shapes belong together."""
    alike = newest((row for row in rows if row["suite"] == "units"),
                   "unit", "form", "dtype", "backend", "shape", "weight", "stride")  # fmt: skip

    def unit(row: Record) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in ("unit", "form", "dtype", "backend"))

    last = {name: max(map(run_of, group)) for name, group in grouped(alike, unit).items()}
    return [row for row in alike if run_of(row) == last[unit(row)]]


def grouped(items: Iterable[Item], key: Callable[[Item], Any]) -> dict[Any, list[Item]]:
    """The items by their key, in the order of first appearance."""
    found: dict[Any, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def peers_of(measured: Iterable[Measured]) -> list[str]:
    """The peers of some cells, ours last."""
    names = dict.fromkeys(name for found in measured for name in found.measures)
    return sorted(names, key=lambda name: name in OURS)


def unit_name(row: Record) -> str:
    """A unit and the form of its residual or of its weight, if it has one."""
    return row["unit"] + (f", {row['form']}" if row["form"] not in ("", "none") else "")


def shape_of(row: Record) -> str:
    """A row's shape as 16x64x112x112."""
    return "x".join(map(str, row["shape"]))


def share_of_roof(row: Record) -> float:
    """How much of what bounds a unit it reaches: a copy's bandwidth, or a matrix product's arithmetic if that is less.

    Old rows know the copy alone.
    """
    if row.get("flops") is None or not row.get("matmul_gflop_per_s"):
        return row["share_of_copy"]
    least_ms = max(row["bytes"] / row["copy_gb_per_s"], row["flops"] / row["matmul_gflop_per_s"]) / 1e6
    return least_ms / row["times"]["resfuse"]["median_ms"]


class Curve(NamedTuple):
    """One peer along one axis of growth: values of the axis, and what a unit of work costs there, with its spread.

    Cost is the time over the multiply-adds of the network's convolutions, in picoseconds; along the axis of threads
    the time of all threads together. Where growth is linear, it is flat.
    """

    subject: str
    peer: str
    values: list[int]
    cost: list[float]
    low: list[float]
    high: list[float]

    @property
    def flat(self) -> list[int]:
        """The values around the cheapest one whose cost is within a quarter of it: there growth is linear."""
        cheapest = self.cost.index(min(self.cost))
        dear = [i for i, cost in enumerate(self.cost) if cost > 1.25 * self.cost[cheapest]]
        first = max((i + 1 for i in dear if i < cheapest), default=0)
        last = min((i for i in dear if i > cheapest), default=len(self.cost))
        return self.values[first:last]


def curves(rows: Iterable[Record]) -> dict[str, list[Curve]]:
    """The scaling rows by their axis: the newest of each point, a curve for each peer."""
    points = newest((row for row in rows if row["suite"] == "scaling"),
                    "axis", "value", "mode", "dtype", "model", "batch", "size", "threads")  # fmt: skip
    found: dict[str, list[Curve]] = {}
    for (axis, *_), group in grouped(points, _curve_of).items():
        group = sorted(group, key=lambda row: row["value"])
        for peer in dict.fromkeys(name for row in group for name in row["variants"]):
            found.setdefault(axis, []).append(_curve(axis, peer, [row for row in group if peer in row["variants"]]))
    return found


def _curve_of(row: Record) -> tuple[Any, ...]:
    """What is the same along a curve; along the axis of depth every point is a network of its own."""
    model = "" if row["axis"] == "depth" else row["model"]
    fixed = (None if row["axis"] == key else row.get(key) for key in ("batch", "size", "threads"))
    return row["axis"], model, row["mode"], row["dtype"], *fixed


def _curve(axis: str, peer: str, rows: list[Record]) -> Curve:
    threads = [row["value"] if axis == "threads" else 1 for row in rows]
    scale = [1e9 * count / row["work"] for count, row in zip(threads, rows, strict=True)]
    cost, low, high = (
        [row["variants"][peer][f"{key}_ms"] * s for row, s in zip(rows, scale, strict=True)]
        for key in ("median", "p20", "p80")
    )
    model = "depth" if axis == "depth" else rows[0]["model"]
    subject = f"{model} {rows[0]['mode']}, {rows[0]['dtype']}"
    return Curve(subject, peer, [row["value"] for row in rows], cost, low, high)
