"""The charts of units: the roofline, how much of it each reaches, and the speed-up over stock."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from resfuse.bench.html.charts import VERDICTS, Chart, Trace, bar_layout, colour, two_lines
from resfuse.bench.records import Record
from resfuse.bench.series import grouped, ratio_of, shape_of, share_of_roof, unit_name

_PALETTE = tuple(f"unit-{i}" for i in range(1, 13))
_SYMBOLS = {"float32": "circle", "bfloat16": "diamond", "float16": "square", "float64": "cross"}
_DASHES = {"float32": "solid", "bfloat16": "dash", "float16": "dot", "float64": "dashdot"}


def on_the_roofline(row: Record) -> bool:
    """Whether the row says how much arithmetic a call is."""
    return row.get("flops") is not None


def roofline(title: str, rows: Sequence[Record]) -> Chart:
    """Every unit at its arithmetic intensity, under a copy's bandwidth and the arithmetic of a matrix product."""
    placed = [row for row in rows if on_the_roofline(row)]
    points = {id(row): (row["flops"] / row["bytes"], row["flops"] / _ms(row) / 1e6) for row in placed}
    span = min(x for x, _ in points.values()) / 1.6, max(x for x, _ in points.values()) * 1.6
    traces = [_roof(dtype, group, span) for dtype, group in grouped(placed, lambda row: row["dtype"]).items()]
    for index, (unit, group) in enumerate(grouped(placed, lambda row: row["unit"]).items()):
        traces.append({
            "type": "scatter", "mode": "markers", "name": unit, "x": [points[id(row)][0] for row in group],
            "y": [points[id(row)][1] for row in group], "hoverinfo": "text",
            "hovertext": [_hover(row, "<br>{:.3g} operations a byte, {:.4g} GFLOP/s".format(*points[id(row)]))
                          for row in group],
            "marker": {"color": colour(_PALETTE[index % len(_PALETTE)]), "size": 9, "opacity": 0.85,
                       "symbol": [_SYMBOLS.get(row["dtype"], "x") for row in group],
                       "line": {"width": 1, "color": colour("paper")}},
        })  # fmt: skip
    layout = {
        "height": 560,
        "xaxis": {"type": "log", "title": {"text": "arithmetic intensity, operations a byte"}, "dtick": 1},
        "yaxis": {"type": "log", "title": {"text": "GFLOP/s"}, "dtick": 1},
        "hovermode": "closest",
    }
    left = sorted({unit_name(row) for row in rows} - {unit_name(row) for row in placed})
    note = f" Not on it, since the rows do not count their arithmetic: {'; '.join(left)}." if left else ""
    return Chart(title, "a point a shape; circles float32, diamonds bfloat16", traces, layout, note)


def _ms(row: Record) -> float:
    return row["times"]["resfuse"]["median_ms"]


def _roof(dtype: str, rows: Sequence[Record], span: tuple[float, float]) -> Trace:
    """What bounds a dtype: the median copy, and the arithmetic of a matrix product where it was measured."""
    copy = statistics.median(row["copy_gb_per_s"] for row in rows)
    products = [row["matmul_gflop_per_s"] for row in rows if row.get("matmul_gflop_per_s")]
    xs, name = list(span), f"{dtype}: copy {copy:.0f} GB/s"
    if products:
        top = statistics.median(products)
        name += f", product {top:,.0f} GFLOP/s"
        xs = [span[0], top / copy, span[1]] if span[0] < top / copy < span[1] else xs
    ys = [min(x * copy, top) if products else x * copy for x in xs]
    return {"type": "scatter", "mode": "lines", "x": xs, "y": ys, "name": name, "hoverinfo": "name",
            "line": {"color": colour("ink"), "width": 1.6, "dash": _DASHES.get(dtype, "solid")}}  # fmt: skip


def _hover(row: Record, rest: str = "") -> str:
    stock = row.get("over_stock")
    said = f"<br>{1 / stock['of_medians']:.2f}x stock" if stock else ""
    if stock and stock.get("low") is not None:
        said += f" [{1 / stock['high']:.2f}, {1 / stock['low']:.2f}]"
    return (
        f"<b>{unit_name(row)}</b>, {row['dtype']}, {shape_of(row)}<br>{_ms(row):.3g} ms, {row['gb_per_s']:.1f} GB/s, "
        f"{row['share_of_copy']:.0%} of a copy{rest}{said}"
    )


def shares(title: str, rows: Sequence[Record]) -> Chart:
    """How much of what bounds it each unit reaches, a point for each shape."""
    traces = [
        _strip(dtype, colour("resfuse" if dtype == "float32" else "compile"), group, [share_of_roof(r) for r in group])
        for dtype, group in grouped(rows, lambda row: row["dtype"]).items()
    ]
    layout = _strip_layout(rows, rangemode="tozero", tickformat=".0%")
    return Chart(title, "100% is the roof; a point a shape", traces, layout)


def gains(title: str, rows: Sequence[Record]) -> Chart:
    """Speed-up over the same mathematics by stock operators, a point for each shape, by what its interval says."""

    def verdict(row: Record) -> str:
        return ratio_of("resfuse", "stock", row["over_stock"]).verdict or "without an interval"

    compared = [row for row in rows if row.get("over_stock")]
    traces = [
        _strip(name, colour(VERDICTS.get(name, "muted")), group, [1 / r["over_stock"]["of_medians"] for r in group])
        for name, group in sorted(grouped(compared, verdict).items())
    ]
    layout = _strip_layout(compared, type="log", dtick="D2")
    return Chart(title, "speed-up; right of 1 is faster; a point a shape", traces, layout)


def _strip(name: str, token: str, rows: Sequence[Record], values: list[float]) -> Trace:
    return {
        "type": "scatter", "mode": "markers", "name": name, "x": values, "y": [_label(row) for row in rows],
        "hovertext": [_hover(row) for row in rows], "hoverinfo": "text",
        "marker": {"color": token, "size": 9, "opacity": 0.7,
                   "symbol": [_SYMBOLS.get(row["dtype"], "x") for row in rows]},
    }  # fmt: skip


def _label(row: Record) -> str:
    """A unit in two lines at most: narrow enough for a phone."""
    unit, _, rest = row["unit"].partition(" ")
    second = ", ".join(part for part in (rest, row["form"]) if part and part != "none")
    return two_lines(unit, second) if second else unit


def _strip_layout(rows: Sequence[Record], **axis: Any) -> dict[str, Any]:
    """A line for each unit, by name."""
    names = sorted({_label(row) for row in rows})
    layout = bar_layout(len(names), 1, **axis)
    layout["height"] = 44 + 34 * len(names)
    layout["yaxis"] |= {"categoryorder": "array", "categoryarray": names, "showgrid": True}
    return layout
