"""The charts of the page, as plotly.js takes them: plain data, whose colours are names of the page's style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from resfuse.bench.series import OURS, Curve, Measured, Ratio, peer_name, peers_of

Trace = dict[str, Any]

_COLOURS = {
    "fused": "resfuse", "folded": "resfuse", "fused-compile": "resfuse-2", "eager": "eager",
    "stock": "eager", "eager-contiguous": "eager-2", "compile": "compile", "compile-max-autotune": "compile-2",
    "freeze": "compile-2", "onnxruntime": "onnxruntime", "openvino": "openvino",
}  # fmt: skip
VERDICTS = {"faster": "good", "slower": "bad", "no difference shown": "muted"}


class Chart(NamedTuple):
    """A titled drawing: `scale` says what its bars or points stand for, `traces` and `layout` are plotly.js's."""

    title: str
    scale: str
    traces: list[Trace]
    layout: dict[str, Any]
    note: str = ""


def colour(name: str) -> str:
    """A colour of the style sheet, which the page resolves in light and dark."""
    return f"var(--{name})"


def peer_colour(peer: str) -> str:
    """A peer's colour, the same in every chart."""
    return colour(_COLOURS.get(peer, "other"))


def two_lines(first: str, rest: str) -> str:
    """A label in two lines, the second smaller: narrow enough for a phone."""
    return f"{first}<br><span style='font-size:85%'>{rest}</span>"


def label_of(found: Measured, mode: bool = False) -> str:
    """A cell as a label; with its mode where a chart holds several."""
    cell = found.cell
    rest = [cell.dtype]
    if cell.suite == "blocks":
        rest.append("x".join(map(str, found.row["shape"])))
    elif cell.batch is not None:
        rest.append(f"batch {cell.batch}")
    return two_lines(f"{cell.subject} {cell.mode}" if mode else cell.subject, ", ".join(rest))


def bar_layout(rows: int, groups: int, **axis: Any) -> dict[str, Any]:
    """Horizontal bars, `groups` for each of `rows` labels, the first label on top."""
    return {
        "height": 44 + rows * max(36, 15 * groups + 12),
        "barmode": "group",
        "bargap": 0.22,
        "bargroupgap": 0.08,
        "yaxis": {"autorange": "reversed", "automargin": True, "ticks": "", "fixedrange": True, "showgrid": False},
        "xaxis": {"fixedrange": True, "nticks": 6, "tickangle": 0, **axis},
        "shapes": [one()],
    }


def one() -> dict[str, Any]:
    """The line at which two things are equal."""
    return {"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper",
            "line": {"color": colour("ink"), "width": 1.2, "dash": "dot"}}  # fmt: skip


def _bars(peer: str, rows: list[dict[str, Any]]) -> Trace:
    """A peer's bars, of rows that hold label, value, text and hover, and low and high where there is a spread."""
    trace: Trace = {
        "type": "bar", "orientation": "h", "name": peer_name(peer), "y": [row["label"] for row in rows],
        "x": [row["value"] for row in rows], "hovertext": [row["hover"] for row in rows], "hoverinfo": "text",
        "text": [row["text"] for row in rows], "textposition": "inside", "insidetextanchor": "start", "textangle": 0,
        "constraintext": "none", "insidetextfont": {"color": colour("on-bar"), "size": 10},
        "marker": {"color": peer_colour(peer)},
    }  # fmt: skip
    if "low" in rows[0]:
        trace["error_x"] = {
            "type": "data", "symmetric": False, "array": [row["high"] - row["value"] for row in rows],
            "arrayminus": [row["value"] - row["low"] for row in rows], "thickness": 1.3, "width": 3,
            "color": colour("ink"),
        }  # fmt: skip
    return trace


def speed(title: str, found: Sequence[Measured], baseline: str = "eager") -> Chart:
    """Bars of speed relative to the baseline's median, with the spread of each peer's own samples."""
    traces = []
    for peer in peers_of(found):
        rows = []
        for measured in found:
            base, ours = measured.measures[baseline].median, measured.measures.get(peer)
            if not base or ours is None or not ours.median:
                continue
            low, high = ours.p20 or ours.median, ours.p80 or ours.median
            rate = "" if ours.images_per_s is None else f"{ours.images_per_s:,.4g}"
            about = f"{ours.median:,.4g} ms, p20 {low:,.4g} to p80 {high:,.4g}"
            about += f"<br>{rate} images/s" if rate else ""
            rows.append({
                "label": label_of(measured), "value": base / ours.median, "low": base / high, "high": base / low,
                "text": f"{rate}/s" if rate else f"{ours.median:,.4g} ms",
                "hover": f"<b>{peer_name(peer)}</b><br>{label_of(measured)}<br>"
                f"{base / ours.median:.2f}x {peer_name(baseline)}<br>{about}{_ratio_to(measured, peer)}",
            })  # fmt: skip
        if rows:
            traces.append(_bars(peer, rows))
    layout = bar_layout(len(found), len(traces), rangemode="tozero")
    return Chart(title, f"speed; {peer_name(baseline)} is 1, more is better", traces, layout, _not_measured(found))


def _ratio_to(found: Measured, peer: str) -> str:
    """Each ratio of ours to this peer, or of this one of ours to every peer, with its interval."""
    said = [
        f"<br>{peer_name(ratio.ours)} to {peer_name(ratio.peer)}: {_speedup(ratio)}"
        for ratio in found.ratios
        if peer in (ratio.ours, ratio.peer) and ratio.verdict is not None
    ]
    return "".join(said)


def _speedup(ratio: Ratio) -> str:
    assert ratio.low is not None and ratio.high is not None
    return f"{1 / ratio.middle:.3f}x [{1 / ratio.high:.3f}, {1 / ratio.low:.3f}]"


def _not_measured(found: Sequence[Measured]) -> str:
    """Which peers are missing from some rows, and why."""
    missing: dict[str, str] = {}
    for measured in found:
        missing |= measured.row.get("missing", {})
    return "".join(f" {peer_name(peer)} was not measured: {reason}." for peer, reason in missing.items())


def ratios(title: str, found: Sequence[Measured]) -> Chart:
    """Our speed-up over each peer with the interval of the ratio, coloured by what the interval allows to say."""
    points: dict[str, list[tuple[str, Ratio]]] = {name: [] for name in VERDICTS}
    labels = []
    for measured in found:
        for ratio in measured.ratios:
            if ratio.verdict is None or ratio.ours not in OURS:
                continue
            ours = "" if ratio.ours == "fused" else f"{peer_name(ratio.ours)} "
            cell = measured.cell
            rest = f"{cell.dtype}, {ours}to {peer_name(ratio.peer)}"
            labels.append(two_lines(f"{cell.subject} {cell.mode}", rest))
            points[ratio.verdict].append((labels[-1], ratio))
    traces: list[Trace] = []
    for verdict, rows in points.items():
        if rows:
            middle, low, high = ([1 / getattr(r, end) for _, r in rows] for end in ("middle", "high", "low"))
            token = colour(VERDICTS[verdict])
            spread = {"type": "data", "symmetric": False, "array": [h - m for h, m in zip(high, middle, strict=True)],
                      "arrayminus": [m - b for m, b in zip(middle, low, strict=True)], "thickness": 3, "width": 0,
                      "color": token}  # fmt: skip
            traces.append({
                "type": "scatter", "mode": "markers", "name": verdict, "x": middle, "y": [name for name, _ in rows],
                "hovertext": [f"{name}<br>{_speedup(r)}, {verdict}" for name, r in rows], "hoverinfo": "text",
                "error_x": spread, "marker": {"color": token, "size": 9},
            })  # fmt: skip
    layout = bar_layout(len(labels), 1)
    layout["yaxis"] |= {"categoryorder": "array", "categoryarray": labels, "showgrid": True}
    return Chart(title, "speed-up of resfuse; right of 1 is faster", traces, layout)


def memory(title: str, found: Sequence[Measured], key: str, baseline: str = "eager") -> Chart:
    """Bars of memory relative to the baseline's; `key` is the attribute of a measure, saved or peak."""
    traces = []
    for peer in peers_of(found):
        rows = []
        for measured in found:
            held = getattr(measured.measures[peer], key) if peer in measured.measures else None
            if held is None:
                continue
            share, label = held / getattr(measured.measures[baseline], key), label_of(measured, mode=True)
            text = f"{held / 1e6:,.0f} MB"
            hover = f"<b>{peer_name(peer)}</b><br>{label}<br>{text}, {share:.2f} of {peer_name(baseline)}'s"
            rows.append({"label": label, "value": share, "text": text, "hover": hover})
        if rows:
            traces.append(_bars(peer, rows))
    layout = bar_layout(len(found), len(traces), rangemode="tozero")
    return Chart(title, f"memory; {peer_name(baseline)} is 1, less is better", traces, layout)


def latency(title: str, found: Sequence[Measured]) -> Chart:
    """Single calls in ms: a point at the median and a line to the 99 % quantile, for each peer."""
    traces: list[Trace] = []
    labels = [label_of(measured) for measured in found]
    for index, peer in enumerate(peers := peers_of(found)):
        rows = [(i, m.row["variants"][peer]) for i, m in enumerate(found) if peer in m.measures]
        at = [i + 0.7 * ((index + 0.5) / len(peers) - 0.5) for i, _ in rows]
        p50, p99 = ([row[key] for _, row in rows] for key in ("p50_ms", "p99_ms"))
        token = peer_colour(peer)
        first = [f"<br>loading and the first call: {row['first_call_s']:.3g} s" for _, row in rows]
        traces.append({
            "type": "scatter", "mode": "markers", "name": peer_name(peer), "x": p50, "y": at, "hoverinfo": "text",
            "hovertext": [f"<b>{peer_name(peer)}</b><br>{labels[i]}<br>p50 {low:.4g} ms, p99 {high:.4g} ms{more}"
                          for (i, _), low, high, more in zip(rows, p50, p99, first, strict=True)],
            "marker": {"color": token, "size": 8},
            "error_x": {"type": "data", "symmetric": False, "array": [h - m for h, m in zip(p99, p50, strict=True)],
                        "arrayminus": [0] * len(rows), "thickness": 2, "width": 4, "color": token},
        })  # fmt: skip
    layout = bar_layout(len(found), len(traces), rangemode="tozero", ticksuffix=" ms")
    layout["yaxis"] |= {"tickvals": list(range(len(found))), "ticktext": labels, "zeroline": False}
    return Chart(title, "point: p50, end of the line: p99; less is better", traces, {**layout, "shapes": []})


def scaling(title: str, axis: str, curves: Sequence[Curve]) -> Chart:
    """What a multiply-add costs along one axis of growth, with the spread: flat where growth is linear."""
    subjects = dict.fromkeys(curve.subject for curve in curves)
    dashes = dict(zip(subjects, ("solid", "dash", "dot", "dashdot"), strict=False))
    traces: list[Trace] = []
    for curve in curves:
        token, name = peer_colour(curve.peer), f"{peer_name(curve.peer)}, {curve.subject}"
        traces.append({
            "type": "scatter", "mode": "lines", "x": curve.values + curve.values[::-1], "fill": "toself",
            "y": curve.high + curve.low[::-1], "line": {"width": 0}, "fillcolor": token, "opacity": 0.18,
            "hoverinfo": "skip", "meta": name,
        })  # fmt: skip
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": name,
            "x": curve.values, "y": curve.cost, "marker": {"color": token, "size": 7}, "hoverinfo": "text",
            "line": {"color": token, "width": 2, "dash": dashes.get(curve.subject, "solid")},
            "hovertext": [f"<b>{name}</b><br>{axis} {value}: {cost:.3g} ps a multiply-add"
                          for value, cost in zip(curve.values, curve.cost, strict=True)],
        })  # fmt: skip
    values = sorted({value for curve in curves for value in curve.values})
    layout = {
        "height": 400,
        "xaxis": {"type": "log", "title": {"text": axis}, "tickvals": values, "ticktext": [str(v) for v in values]},
        "yaxis": {"title": {"text": "ps"}, "rangemode": "tozero"},
        "hovermode": "closest",
    }  # fmt: skip
    scale = "time a multiply-add" + (", times the threads" if axis == "threads" else "")
    return Chart(title, scale, traces, layout, " ".join(_said(axis, curve) for curve in curves))


def _said(axis: str, curve: Curve) -> str:
    """In words, where growth is linear and how much dearer it is elsewhere."""
    name = f"{peer_name(curve.peer)}, {curve.subject}"
    flat, worst = curve.flat, max(curve.cost) / min(curve.cost)
    at = curve.values[curve.cost.index(max(curve.cost))]
    if len(flat) == len(curve.values):
        return f"{name}: linear from {flat[0]} to {flat[-1]}, within {worst - 1:.0%}."
    where = f"from {flat[0]} to {flat[-1]}" if len(flat) > 1 else f"nowhere around {flat[0]}"
    return f"{name}: linear {where}; at {axis} {at} a multiply-add costs {worst:.1f} times the cheapest."
