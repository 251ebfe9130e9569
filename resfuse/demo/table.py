"""The demonstration's results as one table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from resfuse.bench.parity import FACTOR

Row = tuple[str, str, str, str, Text]


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
    table = Table(box=box.SIMPLE_HEAD, title="resfuse demo", title_style="bold", padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("stock", "fused", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for title, rows in _sections(report):
        table.add_section()
        table.add_row(Text(title, style="bold cyan"))
        for label, stock, fused, ratio, note in rows:
            table.add_row(f" {label}", stock, fused, ratio, note)
    return table


def _sections(report: dict[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    for name, record in report["parity"]["dtypes"].items():
        yield f"Error, {name}", [_verdict_row(v) for v in worst_verdicts(record)]
    speed = report["speed"]
    for mode, title in (("training", "Training step, ms"), ("inference", "Inference, ms")):
        yield title, [_time_row(r["dtype"], r[mode]) for r in speed]
    yield "Saved for backward", [_bytes_row(r) for r in speed]
    yield report["settings"]["digits_network"], _digits_rows(report["digits"])


def _verdict_row(verdict: dict[str, Any]) -> Row:
    ours, stock = verdict["ours"], verdict["stock"]
    ratio = f"{ours / stock:.2f}" if stock > 0 else "-"
    bound = verdict["bound"]
    note = Text(f"<= {bound:.1e}", "green") if verdict["holds"] else Text(f"BROKEN {bound:.0e}", "bold red")
    return verdict["quantity"], f"{stock:.1e}", f"{ours:.1e}", ratio, note


def _speed_note(ratio: float, paired: float) -> Text:
    style = "green" if ratio < 0.97 else "bold red" if ratio > 1.03 else ""
    return Text(f"{1 / ratio:.2f}x ({1 / paired:.2f}x)", style)


def _time_row(label: str, record: dict[str, Any]) -> Row:
    times = [_time(record[name]) for name in ("stock", "fused")]
    ratio = record["ratio"]["of_medians"]
    return label, times[0], times[1], f"{ratio:.2f}", _speed_note(ratio, record["ratio"]["paired"])


def _time(quantiles: dict[str, Any]) -> str:
    median, low, high = (quantiles[key] for key in ("median_ms", "p20_ms", "p80_ms"))
    digits = 0 if median >= 100 else 1
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _bytes_row(record: dict[str, Any]) -> Row:
    stock, fused = (record["saved_bytes"][name] for name in ("stock", "fused"))
    return record["dtype"], f"{stock / 1e6:.1f} MB", f"{fused / 1e6:.1f} MB", f"{fused / stock:.2f}", Text("")


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
        ("loss, first step", f"{first[0]:.4f}", f"{first[1]:.4f}", "", Text("")),
        ("loss, last 20", f"{last[0]:.4f}", f"{last[1]:.4f}", "", Text("")),
        ("test accuracy", *accuracies, "", Text("")),
    ]


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader must know to judge the table, one paragraph each."""
    settings = report["settings"]
    size = settings["photo_size"]
    found = [
        f"Error: one training step of {settings['network']} on {settings['photos']} photographs of {size}x{size}, as "
        "relative L2 distance from the same step in float64, over all tensors of a quantity as one vector; median and "
        "worst are of single tensors. Fused is the less exact of torchvision's and resfuse.models' network. Stock is "
        "the more exact of its two memory layouts, for gradients the less exact, since there a few ReLUs near zero "
        f"decide by luck. Bound: {FACTOR:g} times stock plus a floor for rounding. The last normalisation of each "
        "block starts at 0.2, else bfloat16 gradients of any implementation are noise."
    ]
    for name, record in report["parity"]["dtypes"].items():
        errors = {layout: record["errors"][f"stock {layout}"] for layout in ("channels_last", "contiguous")}
        outputs, gradients = ([f"{e[q]['together']:.1e}" for e in errors.values()] for q in ("outputs", "gradients"))
        same = "agree bit for bit" if record["stock_networks_identical"] else "DIFFER"
        found.append(
            f"{name}: stock in channels_last and in contiguous is off by {outputs[0]} and {outputs[1]} in outputs, by "
            f"{gradients[0]} and {gradients[1]} in gradients; the stock networks of torchvision and "
            f"resfuse.models {same}."
        )
    found.append(
        "Times: median (p20-p80) on the same photographs, channels_last, both networks sampled in turn; training is "
        "forward, backward and SGD; bfloat16 is autocast. 1.20x (1.10x): 1.20 times as fast by the ratio of medians, "
        "1.10 by the median of the ratios within rounds."
    )
    found += [
        f"PyTorch emulates convolutions in {record['dtype']} on this processor, at many times the time: they run on "
        f"{record['batch']} photographs, in fewer rounds."
        for record in report["speed"]
        if record["batch"] < settings["photos"]
    ]
    found.append(
        f"Digits: {settings['train_digits']} real ones to train, {settings['test_digits']} others to test, epochs: "
        f"{settings['epochs']}; both networks take the same batches in lockstep."
    )
    return found
