"""The demonstration's results as one table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from resfuse.bench.parity import FACTOR

Row = tuple[str, str, str, str, Text]
_TITLES = {"float32": "float32", "bfloat16": "bfloat16 autocast"}


def worst_verdicts(dtype_record: dict[str, Any]) -> list[dict[str, Any]]:
    """For each quantity, the verdict on the fused network that comes out worse."""
    found: dict[str, dict[str, Any]] = {}
    for verdict in dtype_record["verdicts"]:
        known = found.setdefault(verdict["quantity"], verdict)
        if (verdict["holds"], -verdict["ours"]) < (known["holds"], -known["ours"]):
            found[verdict["quantity"]] = verdict
    return list(found.values())


def results_table(report: dict[str, Any]) -> Table:
    """One table of everything the demonstration measured: a section a subject, stock beside fused.

    Args:
        report (dict): what demo.json holds.

    Returns:
        Table: to be printed by rich.
    """
    table = Table(box=box.SIMPLE_HEAD, title="resfuse demo", title_style="bold", pad_edge=False)
    table.add_column("")
    for name in ("stock", "fused", "fused / stock"):
        table.add_column(name, justify="right")
    table.add_column("")
    for title, rows in _sections(report):
        table.add_section()
        table.add_row(Text(title, style="bold cyan"))
        for label, stock, fused, ratio, note in rows:
            table.add_row(f"  {label}", stock, fused, ratio, note)
    return table


def _sections(report: dict[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    for name, record in report["parity"]["dtypes"].items():
        yield f"Error against float64, {_TITLES[name]}", [_verdict_row(v) for v in worst_verdicts(record)]
    speed = report["speed"]
    for mode, title in (("training", "Training step"), ("inference", "Inference")):
        yield f"{title}, median ms (p20 to p80)", [_time_row(_TITLES[r["dtype"]], r[mode]) for r in speed]
    yield "Kept for backward, MB", [_bytes_row(r) for r in speed]
    yield "ResNet-20 on handwritten digits", _digits_rows(report["digits"])


def _verdict_row(verdict: dict[str, Any]) -> Row:
    ours, stock = verdict["ours"], verdict["stock"]
    style, word = ("green", "holds") if verdict["holds"] else ("bold red", "BROKEN")
    ratio = f"{ours / stock:.2f}" if stock > 0 else "-"
    return verdict["quantity"], f"{stock:.1e}", f"{ours:.1e}", ratio, Text(f"{word}: <= {verdict['bound']:.1e}", style)


def _speed_note(ratio: float, paired: float) -> Text:
    style = "green" if ratio < 0.97 else "bold red" if ratio > 1.03 else ""
    return Text(f"{1 / ratio:.2f}x as fast (paired {1 / paired:.2f}x)", style)


def _time_row(label: str, record: dict[str, Any]) -> Row:
    times = [_time(record[name]) for name in ("stock", "fused")]
    ratio = record["ratio"]["of_medians"]
    return label, times[0], times[1], f"{ratio:.2f}", _speed_note(ratio, record["ratio"]["paired"])


def _time(quantiles: dict[str, Any]) -> str:
    median, low, high = (quantiles[key] for key in ("median_ms", "p20_ms", "p80_ms"))
    digits = 0 if median >= 100 else 1
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _bytes_row(record: dict[str, Any]) -> Row:
    stock, fused = (record["saved_bytes"][name] for name in ("stock", "fused"))
    return _TITLES[record["dtype"]], f"{stock / 1e6:.1f}", f"{fused / 1e6:.1f}", f"{fused / stock:.2f}", Text("")


def _digits_rows(digits: dict[str, Any]) -> list[Row]:
    stock, fused, ratio = digits["stock"], digits["fused"], digits["ratio"]
    seconds = f"{stock['seconds']:.1f}", f"{fused['seconds']:.1f}", f"{fused['seconds'] / stock['seconds']:.2f}"
    accuracies = f"{stock['accuracy']:.1%}", f"{fused['accuracy']:.1%}"
    last = [sum(r["losses"][-20:]) / len(r["losses"][-20:]) for r in (stock, fused)]
    first = stock["losses"][0], fused["losses"][0]
    note = _speed_note(ratio["of_medians"], ratio["paired"])
    return [
        ("seconds of training", *seconds, Text("")),
        ("one step, ms", _time(stock["step"]), _time(fused["step"]), f"{ratio['of_medians']:.2f}", note),
        ("loss of the first step", f"{first[0]:.4f}", f"{first[1]:.4f}", "", Text("")),
        ("loss, mean of last 20", f"{last[0]:.4f}", f"{last[1]:.4f}", "", Text("")),
        ("test accuracy", *accuracies, "", Text("")),
    ]


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader must know to judge the table, one sentence or two each."""
    settings, dtypes = report["settings"], report["parity"]["dtypes"]
    found = [
        f"Error: one training step of {settings['network']} on {settings['photos']} photographs of "
        f"{settings['photo_size']}x{settings['photo_size']}, relative L2 distance from the same step in float64. "
        "Stock is the more exact of its two memory layouts, fused the less exact of torchvision's and resfuse.models' "
        f"network. Bound: {FACTOR:g} times stock plus a floor for rounding.",
        "Gradients count as one long vector; a random network amplifies rounding, so single tensors say less. The last "
        "normalisation of each block starts at 0.2, else bfloat16 gradients of any implementation would be noise.",
    ]
    for name, record in dtypes.items():
        alone = record["errors"]["stock channels_last"]["outputs"]["together"]
        same = "agree bit for bit" if record["stock_networks_identical"] else "DIFFER"
        found.append(
            f"{_TITLES[name]}: stock in channels_last alone is off by {alone:.1e} in its outputs; the stock networks "
            f"of torchvision and resfuse.models {same}."
        )
    found.append(
        f"Times: the same photographs, channels_last, both networks sampled in turn; training is forward, backward and "
        f"SGD. Digits: {settings['train_digits']} to train, {settings['test_digits']} others to test, "
        f"{settings['epochs']} epochs, both networks in lockstep on the same batches."
    )
    return found
