"""The sections of the page: which charts and tables the rows allow, and a sentence where they allow none."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from resfuse.bench import series
from resfuse.bench.html import charts, unit_charts
from resfuse.bench.html.charts import Chart
from resfuse.bench.records import Record
from resfuse.bench.series import Measured

_TITLES = {"training": "Training step", "step": "Forward and backward", "forward": "Forward", "backward": "Backward",
           "inference": "Inference"}  # fmt: skip
_SPEED = (
    "Medians of samples taken in turn, relative to eager of the same cell; the number in a bar is images/s. "
    "Whiskers go from the 20 % to the 80 % quantile of the peer's own samples. Left of the dotted line is slower "
    "than eager."
)
_SERVING = (
    "Each engine loads a network from files in a process of its own, with the same number of threads, and the "
    "processes are sampled in turn. Bars are relative to eager, as above."
)
_RATIOS = (
    "The ratio of the medians with its 95 % bootstrap interval. Where the interval holds 1, no difference is shown, "
    "whatever the point says."
)
_ROOFLINE = (
    "Each point is a unit on one shape: what it computes a byte that it must move, and how fast. Slanted roofs are "
    "the bandwidth of a copy measured in the same rounds, flat ones the arithmetic of a matrix product. A point "
    "above its roof ran in a cache."
)
_UNITS = (
    "What bounds a unit is a copy of the same tensor, measured in the same rounds, for the bytes that the mathematics "
    "must move; or a matrix product, for its arithmetic, where that takes longer. Above 100 % a unit was faster than "
    "that. Circles are float32, diamonds bfloat16."
)
_SCALING = (
    "Time over the multiply-adds of the convolutions; along threads, the time of all threads together. A flat line "
    "is linear growth. Bands go from the 20 % to the 80 % quantile; linear is what stays within a quarter of the "
    "cheapest."
)
_SAVED = "What autograd keeps for backward, parameters left out."
_PEAK = "The most that a process of its own held, import included; on a GPU and for blocks, the most allocated at once."


class Card(NamedTuple):
    """One comparison in a nutshell."""

    title: str
    value: str
    note: str
    tone: str


class Section(NamedTuple):
    """A part of the page; without charts it says in `missing` what was not measured and how to."""

    name: str
    title: str
    text: str
    charts: list[Chart]
    missing: str


def sections(rows: Sequence[Record]) -> list[Section]:
    """All sections, in the order of the page."""
    units, blocks = series.units(rows), series.cells(rows, "blocks")
    networks = series.cells(rows, "models", "gpu-models")
    serving = series.cells(rows, "serving")
    roofline = [
        unit_charts.roofline("Roofline", g) for g in _by_device(units) if any(map(unit_charts.on_the_roofline, g))
    ]
    strips = []
    for group in _by_device(units):
        strips.append(unit_charts.shares("Share of the roof", group))
        if any(row.get("over_stock") for row in group):
            strips.append(unit_charts.gains("Speed-up over stock", group))
    growth = [charts.scaling(f"Along {axis}", axis, found) for axis, found in series.curves(rows).items()]
    served = [*_speeds(serving), *_latencies(serving)]
    judged = _intervals([*networks, *blocks, *serving])
    return [
        Section("networks", "Networks", _SPEED, _speeds(networks), _none("network was timed", "model resnet50")),
        Section("serving", "Serving", _SERVING, served, _none("folded network was timed")),
        Section("ratios", "Ratios", _RATIOS, judged, _none("ratio has an interval")),
        Section("blocks", "Blocks", _SPEED, _speeds(blocks), _none("block was timed", "block resnet50")),
        Section("roofline", "Roofline", _ROOFLINE, roofline, _none("arithmetic of a unit was counted", "unit")),
        Section("units", "Units", _UNITS, strips, _none("unit was timed", "unit")),
        Section("memory", "Memory", "", _memories([*networks, *blocks, *serving]), _none("memory was taken")),
        Section("scaling", "Scaling", _SCALING, growth, _none("growth was measured", "model resnet50 --scale all")),
    ]  # fmt: skip


def _none(what: str, command: str = "") -> str:
    return f"No {what}." + (f" Measure it with resfuse bench {command}." if command else "")


def _by_device(rows: Iterable[Record]) -> list[list[Record]]:
    return list(series.grouped(rows, series.machine_of).values())


def _speeds(found: Sequence[Measured]) -> list[Chart]:
    """A chart for each mode and device of the cells that have eager."""
    timed = [m for m in found if "eager" in m.measures and m.measures["eager"].median]
    groups = series.grouped(timed, lambda m: (m.cell.device, m.cell.mode))
    several = len({device for device, _ in groups}) > 1
    return [
        charts.speed(_TITLES.get(mode, mode) + (f", {device}" if several else ""), group)
        for (device, mode), group in groups.items()
    ]


def _latencies(found: Sequence[Measured]) -> list[Chart]:
    """Single calls, a chart for each batch: milliseconds of a large one would hide those of one image."""
    groups = series.grouped(found, lambda m: (m.cell.device, m.cell.batch))
    return [charts.latency(f"Latency, batch {batch}", group) for (_, batch), group in groups.items()]


def _intervals(found: Sequence[Measured]) -> list[Chart]:
    judged = [m for m in found if any(ratio.verdict for ratio in m.ratios)]
    groups = series.grouped(judged, lambda m: (m.cell.suite, m.cell.device))
    names = {"models": "Networks", "gpu-models": "Networks", "blocks": "Blocks", "serving": "Serving"}
    return [charts.ratios(names[suite], group) for (suite, _), group in groups.items()]


def _memories(found: Sequence[Measured]) -> list[Chart]:
    """Saved and peak memory of the cells that have any."""
    drawn = []
    for key, title, note in (("saved", "Saved for backward", _SAVED), ("peak", "Peak", _PEAK)):
        for suite, group in series.grouped(found, lambda m: m.cell.suite).items():
            weighed = [m for m in group if "eager" in m.measures and getattr(m.measures["eager"], key)]
            if weighed:
                chart = charts.memory(title + (", blocks" if suite == "blocks" else ""), weighed, key)
                drawn.append(chart._replace(note=note))
    return drawn


def cards(rows: Sequence[Record]) -> list[Card]:
    """For each mode and peer, our speed-up over the cells: geometric mean, range, and the verdicts of the intervals."""
    found = []
    cells = [m for m in series.cells(rows, "models", "gpu-models", "serving") if m.cell.mode in _TITLES]
    for title, group in series.grouped(cells, _what).items():
        all_ratios = [ratio for m in group for ratio in m.ratios if ratio.ours in ("fused", "folded")]
        for peer, ratios in series.grouped(all_ratios, lambda ratio: ratio.peer).items():
            gains = [1 / ratio.middle for ratio in ratios]
            mean = statistics.geometric_mean(gains)
            said = {v: sum(ratio.verdict == v for ratio in ratios) for v in ("faster", "slower", "no difference shown")}
            verdicts = "; ".join(f"{count} {verdict}" for verdict, count in said.items() if count)
            extent = f"{min(gains):.2f}x to {max(gains):.2f}x over {len(gains)} cells" if len(gains) > 1 else "1 cell"
            tone = "" if bool(said["faster"]) == bool(said["slower"]) else "good" if said["faster"] else "bad"
            note = f"{extent}; {verdicts}" if verdicts else extent
            found.append(Card(f"{title}, to {series.peer_name(peer)}", f"{mean:.2f}x", note, tone))
    return found


def _what(found: Measured) -> str:
    return "Serving" if found.cell.suite == "serving" else _TITLES[found.cell.mode]


class Table(NamedTuple):
    """Rows as text and numbers: what is the same in all of them, and a column for everything else."""

    title: str
    same: list[tuple[str, str]]
    head: list[str]
    body: list[list[Any]]


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    head = sorted(dict.fromkeys(key for row in rows for key in row), key=lambda key: "." in key)
    alike = [key for key in head if len({repr(row.get(key)) for row in rows}) == 1]
    head = [key for key in head if key not in alike]
    same = [(key, shown(rows[0][key])) for key in alike if key != "suite"]
    return Table(title, same, head, [[row.get(key) for key in head] for row in rows])


def raw_tables(rows: Sequence[Record]) -> list[Table]:
    """All rows, older ones too, flattened: a table for each suite."""
    return [
        _table(suite, [{**dict(_flatten(row)), **_run(row)} for row in group])
        for suite, group in series.grouped(rows, lambda row: row["suite"]).items()
    ]


def environments(rows: Iterable[Record]) -> Table:
    """Where rows were taken: each distinct environment once, the newest first."""
    found = {repr(where): where for row in rows if (where := row.get("environment"))}
    newest_first = sorted(found.values(), key=lambda where: where["date"], reverse=True)
    return _table("Environment", [{**dict(_flatten(where)), **_run({"environment": where})} for where in newest_first])


def _run(row: Record) -> dict[str, Any]:
    """What tells runs apart: minutes and a short commit."""
    where = row.get("environment", {})
    found = {"date": where.get("date", "")[:16].replace("T", " "), "commit": (where.get("commit") or "")[:9]}
    return {key: value for key, value in found.items() if value}


def _flatten(row: Record, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves with their dotted names, without the environment and single samples."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from () if key == "environment" else _flatten(value, f"{prefix}{key}.")
        elif value is not None and key != "values_ms":
            yield prefix + key, value


def shown(value: Any) -> str:
    """A value as a reader wants it: four digits, no null."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list):
        return "x".join(map(str, value)) if all(isinstance(v, int) for v in value) else ", ".join(map(str, value))
    return str(value)
