"""The tables of README.md and docs/cuda.md, generated from benchmarks/results; `--check` only compares.

docs/cuda.md shows predictions, as such, and the README measurements: the newest record of each cell.
Records of quick runs are left out. A cell of a table comes from one record or from one run, so that its ratios are
between times that were taken in turn; different rows may come from different runs, so that part of a table can be
measured again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from resfuse.bench.records import Record, read

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
_MODES = ("training", "memory", "inference")


def newest(records: list[Record], *keys: str) -> list[Record]:
    """For each value of `keys` the last record that is not quick, in the order of first appearance."""
    found: dict[str, Record] = {}
    for record in records:
        if not record["quick"]:
            found[repr([record[key] for key in keys])] = record
    return list(found.values())


def render(models: list[Record], units: list[Record]) -> str:
    """The text between the markers: tables with their captions, or nothing where nothing was measured.

    Args:
        models (list[Record]): of bench_models.py, oldest first.
        units (list[Record]): of bench_units.py, oldest first.

    Returns:
        str: Markdown, ending in a line break unless it is empty.
    """
    parts = []
    models = newest(models, "model", "mode", "dtype", "batch", "size")
    units = _last_runs(newest(units, "unit", "form", "dtype", "shape"))
    timed = [record for record in models if record["mode"] != "memory"]
    if timed:
        parts += [_speed_table(timed), _caption(timed, _SPEED_NOTE)]
    if models:
        parts += [_memory_table(models), _caption(models, _MEMORY_NOTE)]
    for memory, note in _OUTPUTS.items():
        if alike := [record for record in units if record.get("memory", "fresh") == memory]:
            parts += [_units_table(alike), _caption(alike, f"{_UNITS_NOTE} {note}")]
    return "\n\n".join(parts) + "\n" if parts else ""


def render_predictions(rows: list[Record]) -> str:
    """The table of what roofline.py predicted: a row for each unit and form, over all shapes of a step."""
    if not rows:
        return ""
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in rows:
        groups.setdefault((row["unit"], row["form"]), []).append(row)
    cells = []
    for (unit, form), group in groups.items():
        largest = max(group, key=lambda row: row["bytes"] / row["calls"])
        cells.append(
            [unit, form, str(sum(row["calls"] for row in group)), f"{sum(row['bytes'] for row in group) / 1e9:.1f}",
             f"{sum(row['microseconds'] for row in group) / 1e3:.2f}", "x".join(map(str, largest["shape"])),
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


def _last_runs(records: list[Record]) -> list[Record]:
    """Of each row's records those of the run that measured it last: its shapes belong together."""

    def row(record: Record) -> tuple[str, ...]:
        return record["unit"], record["form"], record["dtype"]

    last: dict[tuple[str, ...], str] = {}
    for record in records:
        last[row(record)] = max(record["environment"]["date"], last.get(row(record), ""))
    return [record for record in records if record["environment"]["date"] == last[row(record)]]


def _table(head: list[str], rows: list[list[str]], left: int) -> str:
    """A Markdown table whose first `left` columns are text and the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


_SPEED_NOTE = (
    "Median of interleaved samples; more images/s is better. `outside` is what a training step spends outside "
    "convolutions and the optimizer: its time less that of the same convolutions run bare, forward and both gradients, "
    "by the kernels that the variant uses, and less the optimizer's; the median over the rounds."
)
_MEMORY_NOTE = (
    "`saved` is what autograd keeps for backward, parameters left out; `peak` the most memory that a process of its "
    "own held, import included. Mode memory takes a few training steps and times nothing."
)


def _ordered(records: list[Record]) -> list[Record]:
    return sorted(records, key=lambda r: (_MODES.index(r["mode"]), r["model"], r["batch"], r["dtype"] != "float32"))


def _name(record: Record) -> list[str]:
    return [record["model"], record["mode"], record["dtype"], str(record["batch"])]


_NAME = ["network", "", "dtype", "batch"]


def _speed_table(records: list[Record]) -> str:
    head = [*_NAME, "eager images/s", "torch.compile", "resfuse", "to eager", "to compile",
            "outside, eager ms", "resfuse ms", "to eager"]  # fmt: skip
    return _table(head, [_speed_row(record) for record in _ordered(records)], left=3)


def _speed_row(record: Record) -> list[str]:
    rates = [_value(record, name, "images_per_s") for name in ("eager", "compile", "fused")]
    outside = [record.get("outside_ms", {}).get(name) for name in ("eager", "fused")]
    return [
        *_name(record),
        *(_format(rate, ".1f") for rate in rates),
        *(_speedup(record["ratios"].get(f"fused/{name}")) for name in ("eager", "compile")),
        *(_format(ms, ".1f") for ms in outside),
        _share(outside[1], outside[0]),
    ]


def _memory_table(records: list[Record]) -> str:
    head = [*_NAME, "saved MB, eager", "resfuse", "to eager", "peak MB, eager", "resfuse", "to eager"]
    return _table(head, [_memory_row(record) for record in _ordered(records)], left=3)


def _memory_row(record: Record) -> list[str]:
    cells = _name(record)
    for key in ("saved_bytes", "peak_rss_bytes"):
        eager, fused = (_value(record, name, key) for name in ("eager", "fused"))
        cells += [_format(eager, ".0f", 1e-6), _format(fused, ".0f", 1e-6), _share(fused, eager)]
    return cells


def _value(record: Record, variant: str, key: str) -> float | None:
    return record["variants"].get(variant, {}).get(key)


def _format(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else format(value * scale, form)


def _share(ours: float | None, theirs: float | None) -> str:
    return "" if ours is None or theirs is None or theirs <= 0 else f"{ours / theirs:.2f}"


def _speedup(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{1 / ratio['of_medians']:.2f}x"


_UNITS_NOTE = (
    "Bandwidth is bytes that the mathematics must move over the median time, `of a copy` its share of what "
    "`dst.copy_(src)` reached in the same rounds: median over the shapes, and the range. `to stock` is the geometric "
    "mean of the speed-ups over stock torch operators, and the range; below 1x is slower."
)
_OUTPUTS = {
    "kept": "Outputs, stock's too, go to mapped memory that the allocator keeps, as the copy does: no page faults.",
    "fresh": "Outputs go to fresh memory and pay page faults, up to as much as the pass itself; the copy's target is "
    "mapped.",
}


def _units_table(records: list[Record]) -> str:
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["unit"], record["form"], record["dtype"]), []).append(record)
    rows = []
    for (unit, form, dtype), cells in sorted(groups.items()):
        shares = [cell["share_of_copy"] for cell in cells]
        rates = [cell["gb_per_s"] for cell in cells]
        gains = [1 / cell["over_stock"]["of_medians"] for cell in cells if cell["over_stock"]]
        rows.append(
            [unit, form, dtype, f"{statistics.median(rates):.0f}", _spread(statistics.median(shares), shares, ".0%"),
             _spread(statistics.geometric_mean(gains), gains, ".2f", "x") if gains else ""]
        )  # fmt: skip
    return _table(["unit", "residual", "dtype", "GB/s", "of a copy", "to stock"], rows, left=3)


def _spread(middle: float, values: list[float], form: str, unit: str = "") -> str:
    return f"{middle:{form}}{unit} ({min(values):{form}} to {max(values):{form}})"


def _caption(records: list[Record], note: str) -> str:
    """The note, then where the records were taken: each distinct environment once."""
    places = dict.fromkeys(_place(record["environment"]) for record in records)
    shapes = dict.fromkeys("x".join(map(str, record["shape"])) for record in records if "shape" in record)
    over = f" Shapes: {', '.join(shapes)}." if shapes else ""
    return f"{note}{over} Measured on {'; '.join(places)}."


def _place(where: dict[str, Any]) -> str:
    commit = f"commit {where['commit'][:9]}" if where["commit"] else "no commit"
    dirty = " with uncommitted changes" if where["dirty"] else ""
    return (
        f"{where['device_name']} ({where['capability']}), {where['threads']} threads, torch {where['torch']}, "
        f"{where['date'][:10]}, {commit}{dirty}"
    )


def replace_block(text: str, block: str) -> str:
    """`text` with what is between the markers replaced by `block`; the lines of the markers stay.

    Raises:
        ValueError: `text` does not hold one start marker followed by one end marker.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"the text must hold {START} and after it {END}, once each")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{block}{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the tables, or with --check say whether they are those of the results; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the tables are stale")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--cuda-page", type=Path, default=ROOT / "docs" / "cuda.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    measured = render(read(options.results / "models.jsonl"), read(options.results / "units.jsonl"))
    predicted = render_predictions(read(options.results / "predicted.jsonl"))
    stale = 0
    for page, block in ((options.readme, measured), (options.cuda_page, predicted)):
        text = page.read_text(encoding="utf-8")
        wanted = replace_block(text, block)
        if not options.check:
            page.write_text(wanted, encoding="utf-8")
        elif text != wanted:
            print(f"{page}: the tables are not those of {options.results}; run python benchmarks/report.py")
            stale = 1
    return stale


if __name__ == "__main__":
    raise SystemExit(main())
