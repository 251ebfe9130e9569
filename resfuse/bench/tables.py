"""Markdown tables of what the rows say, for the README and the pages of docs; losses are shown with wins.

Rows of quick runs are left out. The cells of a table's row come from one record, or for a unit from one run, so that
its ratios are between times that were taken in turn; different rows may come from different runs, so that a part of a
table can be measured again. Each machine has tables of its own, the one that was measured last first.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from resfuse.bench import series
from resfuse.bench.records import Record
from resfuse.bench.series import DTYPES, MODES, Curve, curves, grouped, newest, peer_name, shape_of
from resfuse.choices import Conv

_SPEED_NOTE = (
    "Median of interleaved samples; more images/s is better. `to` a peer is the speed-up of resfuse, below 1x is "
    "slower, and in brackets its 95 % bootstrap interval where there were enough rounds: where that holds 1, no "
    "difference is shown."
)
_OUTSIDE_NOTE = (
    "What a training step spends outside convolutions and the optimizer: its time less that of the same "
    "convolutions run bare, forward and both gradients, by the kernels that the variant uses, and less the "
    "optimizer's; the median over the rounds."
)
_MEMORY_NOTE = (
    "`saved` is what autograd keeps for backward, parameters left out; `peak` the most memory that a process of its "
    "own held, import included. Mode memory takes a few training steps and times nothing."
)
_BLOCKS_NOTE = (
    "One of each distinct block of the network. `saved` is what autograd keeps for backward; `peak` the most "
    "allocated at once."
)
_UNITS_NOTE = (
    "Bandwidth is bytes that the mathematics must move over the median time, `of a copy` its share of what "
    "`dst.copy_(src)` reached in the same rounds: median over the shapes, and the range. `to stock` is the "
    "geometric mean of the speed-ups over stock torch operators, and the range; below 1x is slower."
)
_CONVOLUTIONS_NOTE = (
    "Convolutions with statistics, in the shapes of the network. The roof is the slower of a matrix product at the "
    "measured rate, for the arithmetic, and of a copy, for the bytes: median over the shapes, and the range, as for "
    "`to stock`, the speed-up over the same by stock torch operators."
)
_OUTPUTS = {
    "kept": "Outputs, stock's too, go to mapped memory that the allocator keeps, as the copy does: no page faults.",
    "fresh": "Outputs go to fresh memory and pay page faults, up to as much as the pass itself; the copy's target is "
    "mapped.",
}
_SERVING_NOTE = (
    "Each engine in a process of its own, sampled in turn: images/s by the median over rounds, quantiles of single "
    "calls, seconds of loading and the first call, and the most memory beyond the imports. The last column is the "
    "speed-up of resfuse.fold over the engine, below 1x is slower."
)
_SCALING_NOTE = (
    "Time over the multiply-adds of the convolutions, in picoseconds; along threads times their number. Growth is "
    "linear where it stays within a quarter of the cheapest."
)


def measured(rows: Iterable[Record]) -> list[Record]:
    """The rows that are shown: those of quick runs are not."""
    return [row for row in rows if not row["quick"]]


def networks_of(rows: Iterable[Record]) -> list[Record]:
    """The newest row of each cell of a network, in the order of the tables."""
    return _ordered(newest(measured(rows), "model", "mode", "dtype", "batch", "size"))


def summary(models: Iterable[Record]) -> str:
    """The README's tables: whole networks that train and serve, with what they save; nothing without rows."""
    shown = [row for row in measured(models) if row["mode"] in ("training", "inference")]
    tables = [_speed(networks_of(_on(name, shown)), short=True) for name in series.machines(shown)]
    return "\n\n".join(tables) + "\n" if tables else ""


def _on(machine: str, rows: Iterable[Record]) -> list[Record]:
    return [row for row in rows if series.machine_of(row) == machine]


def render(
    models: Sequence[Record],
    units: Sequence[Record],
    blocks: Sequence[Record] = (),
    scaling: Sequence[Record] = (),
    serving: Sequence[Record] = (),
) -> str:
    """All tables with their captions; nothing where nothing was measured.

    Args:
        models, units, blocks, scaling, serving (Sequence[Record]): of the files of these names, oldest first.

    Returns:
        str: Markdown, ending in a line break unless it is empty.
    """
    files = [measured(rows) for rows in (models, units, blocks, scaling, serving)]
    machines = series.machines(sorted((row for rows in files for row in rows), key=lambda r: r["environment"]["date"]))
    pages = [_machine(*(_on(name, rows) for rows in files)) for name in machines]
    if len(machines) > 1:
        pages = [f"## {name}\n\n{page}" for name, page in zip(machines, pages, strict=True)]
    return "\n\n".join(pages) + "\n" if pages else ""


def _machine(
    models: list[Record], units: list[Record], blocks: list[Record], scaling: list[Record], serving: list[Record]
) -> str:
    """The tables of one machine."""
    networks = networks_of(models)
    timed = [row for row in networks if row["mode"] != "memory"]
    parts = [_section("Networks", _speed(timed))] if timed else []
    if outside := [row for row in timed if row.get("outside_ms")]:
        parts.append(_outside(outside))
    if networks:
        parts.append(_section("Memory", _memory(networks)))
    if distinct := newest(blocks, "model", "name", "shape", "mode", "dtype"):
        parts.append(_section("Blocks", _blocks(distinct)))
    latest = series.units(units)
    passes = [row for row in latest if "weight" not in row]
    for memory, note in _OUTPUTS.items():
        if alike := [row for row in passes if row.get("memory", "fresh") == memory]:
            parts.append(_section(f"Units, outputs in {memory} memory", _units(alike, f"{_UNITS_NOTE} {note}")))
    if products := [row for row in latest if "weight" in row]:
        parts.append(_section("Convolutions", _convolutions(products)))
    if served := newest(serving, "model", "dtype", "batch", "size"):
        parts.append(_section("Serving", _serving(served)))
    if scaling:
        parts.append(_section("Growth", _growth(scaling)))
    return "\n\n".join(parts)


def render_predictions(rows: list[Record]) -> str:
    """The table of what roofline.py predicted: a row for each unit and form, over all shapes of a step."""
    if not rows:
        return ""
    cells = []
    for (unit, form), group in grouped(rows, lambda row: (row["unit"], row["form"])).items():
        largest = max(group, key=lambda row: row["bytes"] / row["calls"])
        cells.append(
            [unit, form, str(sum(row["calls"] for row in group)), f"{sum(row['bytes'] for row in group) / 1e9:.1f}",
             f"{sum(row['microseconds'] for row in group) / 1e3:.2f}", shape_of(largest),
             f"{largest['microseconds'] / largest['calls']:.0f}"]
        )  # fmt: skip
    total = [f"{sum(row[key] for row in rows) / scale:.{digits}f}" for key, scale, digits in
             (("bytes", 1e9, 1), ("microseconds", 1e3, 2))]  # fmt: skip
    cells.append(["all", "", str(sum(row["calls"] for row in rows)), *total, "", ""])
    head = ["unit", "residual", "calls", "GB", "predicted ms", "largest shape", "predicted us of one call"]
    where = rows[0]
    caption = (
        f"Predicted, not measured: {where['model']}, one training step, batch {where['batch']}, {where['dtype']}, for "
        f"{where['gpu']}, whose copies reach {where['copy_gb_per_s']:.0f} GB/s."
    )
    return f"{_table(head, cells, left=2)}\n\n{caption}\n"


def render_products(rows: list[Record]) -> str:
    """The table of what products.py predicted: a row for each convolution and unit."""
    if not rows:
        return ""
    cells = []
    for row in rows:
        conv = Conv.from_list(row["conv"])
        on_cores = row["operations"] / row["peak_tflops"] / 1e6
        cells.append(
            [f"{conv.channels} to {conv.out_channels}, {row['size'][0]}x{row['size'][1]}", row["unit"],
             f"{row['bytes'] / 1e9:.2f}", f"{row['microseconds']:.0f}", f"{on_cores / row['microseconds']:.0%}",
             f"{row['composed_bytes'] / 1e9:.2f}", f"{row['composed_microseconds']:.0f}",
             f"{row['microseconds'] / row['composed_microseconds']:.2f}"]
        )  # fmt: skip
    head = ["1x1 convolution, map", "unit", "GB", "predicted us", "of it tensor cores", "composed GB",
            "composed, predicted us", "predicted ratio"]  # fmt: skip
    where = rows[0]
    caption = (
        f"Predicted, not measured: one call in {where['model']}, batch {where['batch']}, {where['dtype']}, for "
        f"{where['gpu']}, whose copies reach {where['copy_gb_per_s']:.0f} GB/s and whose tensor cores have "
        f"{where['peak_tflops']:.0f} TFLOP/s by its data sheet. Composed: torch's convolution with passes around it."
    )
    return f"{_table(head, cells, left=2)}\n\n{caption}\n"


def _section(title: str, text: str) -> str:
    return f"### {title}\n\n{text}"


def _table(head: list[str], rows: list[list[str]], left: int) -> str:
    """A Markdown table whose first `left` columns are text and the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def _ordered(records: list[Record]) -> list[Record]:
    return sorted(
        records, key=lambda r: (MODES.index(r["mode"]), r["model"], r["batch"], r["size"], DTYPES.index(r["dtype"]))
    )


_NAME = ["network", "", "dtype", "batch"]


def _name(record: Record) -> list[str]:
    return [record["model"], record["mode"], record["dtype"], str(record["batch"])]


def _speed(records: list[Record], short: bool = False) -> str:
    """images/s of eager and resfuse, and the speed-up over every peer that was measured somewhere.

    In short: over eager, torch.compile and, of all others, whoever was fastest; and what is saved for backward.
    """
    measured = dict.fromkeys(peer for record in records for peer in _gains(record))
    peers = [peer for peer in measured if peer in _USUAL] if short else list(measured)
    others = short and len(peers) < len(measured)
    head = [*_NAME, "eager images/s", "resfuse", *(f"to {peer_name(peer)}" for peer in peers)]
    rows = []
    for record in records:
        rates = (_value(record, name, "images_per_s") for name in ("eager", "fused"))
        gains = _gains(record)
        over = (_speedup(gains.get(peer)) for peer in peers)
        rows.append([*_name(record), *(_format(rate, ".1f") for rate in rates), *over])
        if others:
            rest = {peer: gain for peer, gain in gains.items() if peer not in _USUAL}
            best = max(rest, key=lambda peer: rest[peer]["of_medians"], default=None)
            rows[-1].append("" if best is None else f"{_speedup(rest[best])} {peer_name(best)}")
        if short:
            eager, fused = (_value(record, name, "saved_bytes") for name in ("eager", "fused"))
            rows[-1].append(_share(fused, eager))
    head += ["to the fastest other"] * others + ["saved for backward, to eager"] * short
    note = _SPEED_NOTE + _missing(records)
    return f"{_table(head, rows, left=3)}\n\n{_caption(records, note)}"


_USUAL = ("eager", "compile")


def _gains(record: Record) -> dict[str, Record]:
    """The ratios of the fused network's time to each peer's."""
    pairs = ((name.partition("/"), ratio) for name, ratio in record["ratios"].items())
    return {peer: ratio for (variant, _, peer), ratio in pairs if variant == "fused"}


def _missing(records: list[Record]) -> str:
    """Which peers were not measured, and why."""
    reasons: dict[str, str] = {}
    for record in records:
        reasons |= record.get("missing", {})
    return "".join(f" {peer_name(peer)} was not measured: {reason}." for peer, reason in reasons.items())


def _outside(records: list[Record]) -> str:
    rows = []
    for record in records:
        eager, fused = (record["outside_ms"].get(name) for name in ("eager", "fused"))
        rows.append([*_name(record), _format(eager, ".1f"), _format(fused, ".1f"), _share(fused, eager)])
    head = [*_NAME, "outside, eager ms", "resfuse ms", "to eager"]
    return f"{_table(head, rows, left=3)}\n\n{_caption(records, _OUTSIDE_NOTE)}"


def _memory(records: list[Record]) -> str:
    head = [*_NAME, "saved MB, eager", "resfuse", "to eager", "peak MB, eager", "resfuse", "to eager"]
    rows = [[*_name(record), *_held(record, "saved_bytes", ".0f"), *_held(record, "peak_rss_bytes", ".0f")]
            for record in records]  # fmt: skip
    return f"{_table(head, rows, left=3)}\n\n{_caption(records, _MEMORY_NOTE)}"


def _held(record: Record, key: str, form: str) -> list[str]:
    """MB of eager and of resfuse, and their ratio."""
    eager, fused = (_value(record, name, key) for name in ("eager", "fused"))
    return [_format(eager, form, 1e-6), _format(fused, form, 1e-6), _share(fused, eager)]


def _blocks(records: list[Record]) -> str:
    head = ["block", "of", "mode", "dtype", "input", "eager ms", "resfuse ms", "to eager", "saved MB, eager", "resfuse",
            "to eager", "peak MB, eager", "resfuse", "to eager"]  # fmt: skip
    rows = []
    for record in records:
        times = (_format(_value(record, name, "median_ms"), ".2f") for name in ("eager", "fused"))
        rows.append([f"{record['block']} {record['name']}", record["model"], record["mode"], record["dtype"],
                     shape_of(record), *times, _speedup(record["ratios"].get("fused/eager")),
                     *_held(record, "saved_bytes", ".1f"), *_held(record, "peak_bytes", ".1f")])  # fmt: skip
    return f"{_table(head, rows, left=5)}\n\n{_caption(records, _BLOCKS_NOTE)}"


def _value(record: Record, variant: str, key: str) -> float | None:
    return record["variants"].get(variant, {}).get(key)


def _format(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else format(value * scale, form)


def _share(ours: float | None, theirs: float | None) -> str:
    return "" if ours is None or theirs is None or theirs <= 0 else f"{ours / theirs:.2f}"


def _speedup(ratio: Record | None) -> str:
    if ratio is None:
        return ""
    low, high = ratio.get("low"), ratio.get("high")
    bounds = "" if low is None or high is None else f" [{1 / high:.2f}, {1 / low:.2f}]"
    return f"{1 / ratio['of_medians']:.2f}x{bounds}"


def _units(records: list[Record], note: str) -> str:
    rows = []
    for (unit, form, dtype), cells in sorted(
        grouped(records, lambda row: (row["unit"], row["form"], row["dtype"])).items()
    ):
        shares = [cell["share_of_copy"] for cell in cells]
        rates = [cell["gb_per_s"] for cell in cells]
        gains = [1 / cell["over_stock"]["of_medians"] for cell in cells if cell["over_stock"]]
        rows.append(
            [unit, form, dtype, f"{statistics.median(rates):.0f}", _spread(statistics.median(shares), shares, ".0%"),
             _spread(statistics.geometric_mean(gains), gains, ".2f", "x") if gains else ""]
        )  # fmt: skip
    head = ["unit", "form", "dtype", "GB/s", "of a copy", "to stock"]
    return f"{_table(head, rows, left=3)}\n\n{_caption(records, note)}"


def _serving(records: list[Record]) -> str:
    head = [
        "network",
        "dtype",
        "batch",
        "by",
        "images/s",
        "p50 ms",
        "p99 ms",
        "first call s",
        "memory MB",
        "resfuse.fold to it",
    ]
    rows = []
    for record in sorted(records, key=lambda r: (r["model"], r["batch"], DTYPES.index(r["dtype"]))):
        for name, found in record["variants"].items():
            held = found["peak_rss_bytes"] - found["imported_rss_bytes"]
            rows.append([record["model"], record["dtype"], str(record["batch"]), peer_name(name),
                         f"{found['images_per_s']:.1f}", f"{found['p50_ms']:.2f}", f"{found['p99_ms']:.2f}",
                         f"{found['first_call_s']:.2f}", f"{held / 1e6:.0f}",
                         _speedup(record["ratios"].get(f"folded/{name}"))])  # fmt: skip
    return f"{_table(head, rows, left=4)}\n\n{_caption(records, _SERVING_NOTE + _missing(records))}"


def _convolutions(records: list[Record]) -> str:
    rows = []
    for (unit, form, dtype), cells in sorted(grouped(records, lambda r: (r["unit"], r["form"], r["dtype"])).items()):
        rates = [cell["flops"] / cell["times"]["resfuse"]["median_ms"] / 1e6 for cell in cells]
        shares = [series.share_of_roof(cell) for cell in cells]
        gains = [1 / cell["over_stock"]["of_medians"] for cell in cells if cell["over_stock"]]
        rows.append([unit, form, dtype, _spread(statistics.median(rates), rates, ".0f"),
                     _spread(statistics.median(shares), shares, ".0%"),
                     _spread(statistics.geometric_mean(gains), gains, ".2f", "x") if gains else ""])  # fmt: skip
    head = ["unit", "form", "dtype", "GFLOP/s", "of its roof", "to stock"]
    return f"{_table(head, rows, left=3)}\n\n{_caption(records, _CONVOLUTIONS_NOTE)}"


def _spread(middle: float, values: list[float], form: str, unit: str = "") -> str:
    return f"{middle:{form}}{unit} ({min(values):{form}} to {max(values):{form}})"


def _growth(rows: list[Record]) -> str:
    cells = []
    for axis, found in curves(rows).items():
        for curve in found:
            costs = ", ".join(f"{v}: {cost:.3g}" for v, cost in zip(curve.values, curve.cost, strict=True))
            cells.append([axis, curve.subject, peer_name(curve.peer), costs, _linear(curve)])
    head = ["along", "of", "by", "ps a multiply-add", "linear"]
    return f"{_table(head, cells, left=5)}\n\n{_caption(rows, _SCALING_NOTE)}"


def _linear(curve: Curve) -> str:
    return f"{curve.flat[0]} to {curve.flat[-1]}" if len(curve.flat) > 1 else "nowhere"


def _caption(records: list[Record], note: str) -> str:
    """The note, then where the records were taken: each distinct environment once."""
    places = dict.fromkeys(place(record["environment"]) for record in records)
    shapes = dict.fromkeys(shape_of(record) for record in records if "unit" in record)
    over = f" Shapes: {', '.join(shapes)}." if shapes else ""
    return f"{note}{over} Measured on {'; '.join(places)}."


def place(where: dict[str, Any]) -> str:
    """An environment in words: machine, threads, torch, day and commit."""
    commit = f"commit {where['commit'][:9]}" if where["commit"] else "no commit"
    dirty = " with uncommitted changes" if where["dirty"] else ""
    return (
        f"{where['device_name']} ({where['capability']}), {where['threads']} threads, torch {where['torch']}, "
        f"{where['date'][:10]}, {commit}{dirty}"
    )
