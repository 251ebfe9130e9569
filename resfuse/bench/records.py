"""Records: measurements as JSON lines, appended by benchmarks and read by the report.

A record, or row, is one object on one line. All rows have suite, quick (few rounds, small shapes: no table shows them),
environment, backend, layout and dtype. What was timed is in times (units) or variants (everything else): by name, the
quantiles of :func:`resfuse.bench.timing.milliseconds`. A ratio is :class:`resfuse.bench.timing.Ratio` as an object.

* units: unit, form, shape, bytes, flops, times {resfuse, copy, stock, composed, ...}, ratios {"resfuse/stock": ...},
  gb_per_s, copy_gb_per_s, share_of_copy, matmul_gflop_per_s, roofline_ms and share_of_roofline (of a measured copy and
  product), missing (peers for which no time was left); over_stock repeats the ratio to stock.
* blocks: model, block, name, names, shape, batch, size, mode (forward, backward, step, inference), variants with
  images_per_s and, where it is known, saved_bytes and peak_bytes, ratios {"fused/eager": ...}.
* models: model, batch, size, mode (forward, backward, training, inference, memory), variants with images_per_s, error,
  saved_bytes, peak_rss_bytes, peak_bytes (of a GPU), ratios, missing (peers that were not measured, and why), note
  (what the check of the whole network could not prove).
* scaling: as models, and axis (batch, size, depth, threads), value, threads, work (multiply-adds of a forward pass).
* serving: model, batch, size, threads, variants with p50_ms and p99_ms of single calls, calls, images_per_s,
  first_call_s, fold_first_s, error, imported_rss_bytes, peak_rss_bytes, ratios {"folded/openvino": ...}, missing.
* gpu-models: model, batch, size, mode, variant, and its quantiles, images_per_s and peak_bytes in the row itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# what tells the rows of a suite apart, beside dtype
_CELL = {
    "units": ("unit", "form", "shape", "weight", "stride"),
    "blocks": ("model", "block", "name", "shape", "mode"),
    "models": ("model", "mode", "batch", "size"),
    "scaling": ("axis", "value", "model", "mode", "batch", "size", "threads"),
    "serving": ("model", "batch", "size", "threads"),
    "gpu-models": ("model", "mode", "batch", "size", "variant"),
}


def cell(record: Record) -> tuple[str, ...]:
    """What a record measures, as text: equal for two records of the same cell, taken at any time on any machine.

    Raises:
        ValueError: the record belongs to no suite that is known here.
    """
    suite = record.get("suite")
    if suite not in _CELL:
        raise ValueError(f"suite must be one of {', '.join(_CELL)}, got {suite!r}")
    parts = (record.get(key) for key in (*_CELL[suite], "dtype"))
    return suite, *("x".join(map(str, part)) if isinstance(part, list) else str(part or "") for part in parts)


def timings(record: Record) -> dict[str, Record]:
    """What a record has timed, by name; what it holds without a time, as memory, is left out."""
    named = record.get("times") or record.get("variants") or {}
    if "variant" in record:
        named = {record["variant"]: record}
    return {name: found for name, found in named.items() if "median_ms" in found}


def check(record: Record) -> None:
    """Raise ValueError where a record is not one that runs can be compared by, with what is wrong."""
    cell(record)
    if not isinstance(record.get("environment"), dict):
        raise ValueError(f"environment must be an object, got {record.get('environment')!r}")
    for key in ("times", "variants"):
        if not isinstance(record.get(key, {}), dict) or not all(
            isinstance(t, dict) for t in record.get(key, {}).values()
        ):
            raise ValueError(f"{key} must be an object of objects")
    for name, found in timings(record).items():
        values = found.get("values_ms", [])
        for value in (found["median_ms"], *(values if isinstance(values, list) else [values])):
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"times of {name} must be positive numbers, got {value!r}")


def append(path: Path, record: Record) -> None:
    """Add one record to a .jsonl file, making its folder and the file where they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def read(path: Path) -> list[Record]:
    """The records of a .jsonl file in the order they were written; none where there is no file."""
    if not path.is_file():
        return []
    return parse(path.read_text(encoding="utf-8"))


def parse(text: str) -> list[Record]:
    """The records of a text: JSON lines, or one JSON list of them.

    Raises:
        ValueError: it is neither.
    """
    if text.lstrip().startswith("["):
        found = json.loads(text)
    else:
        found = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not isinstance(found, Sequence) or not all(isinstance(row, dict) for row in found):
        raise ValueError("records must be JSON objects, one a line or in one list")
    return list(found)
