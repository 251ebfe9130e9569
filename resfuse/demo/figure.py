"""The demonstration's results as one picture."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files, on machines without a screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor

from resfuse.bench.environment import describe
from resfuse.demo.table import worst_verdicts

_STOCK, _FUSED, _BOUND, _INK = "#9aa3af", "#2563eb", "#dc2626", "#1f2937"
_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.axisbelow": True,
}


def draw(report: dict[str, Any], photos: Tensor, path: Path) -> None:
    """Write the picture: photographs, errors beside their bounds, times, memory and the loss curves.

    Args:
        report (dict): what demo.json holds.
        photos (Tensor): (N, 3, H, W) in [0, 1].
        path (Path): a .png file.
    """
    with plt.rc_context(_STYLE):
        figure = plt.figure(figsize=(13, 10), dpi=130)
        _frame(figure, report)
        _photos(_row(figure, max(len(photos), 8), top=0.9, bottom=0.775, left=0.045, wspace=0.04), photos)
        dtypes = report["parity"]["dtypes"]
        _parity(_row(figure, len(dtypes), top=0.735, bottom=0.45, left=0.155, wspace=0.06), dtypes)
        widths = {"width_ratios": (1.5, 0.62, 1.6), "wspace": 0.27}
        times, memory, curves = _row(figure, 3, top=0.36, bottom=0.105, left=0.075, **widths)
        _times(times, report["speed"])
        _memory(memory, report["speed"])
        _curves(curves, report["digits"], report["settings"])
        figure.savefig(path)
        plt.close(figure)


def _row(figure: Figure, count: int, **place: Any) -> list[Axes]:
    """`count` axes beside each other."""
    grid = figure.add_gridspec(1, count, right=0.98, **place)
    return [figure.add_subplot(grid[0, i]) for i in range(count)]


def _frame(figure: Figure, report: dict[str, Any]) -> None:
    settings, title = report["settings"], "resfuse: stock and fused networks on real images"
    size = settings["photo_size"]
    subtitle = (
        f"{settings['network']} on {settings['photos']} photographs of {size}x{size}; backend {report['backend']}"
    )
    figure.text(0.045, 0.965, title, va="top", fontsize=17, fontweight="bold")
    figure.text(0.045, 0.918, subtitle, color="#4b5563")
    caption = textwrap.fill(describe(report["environment"]), 170)
    figure.text(0.045, 0.022, caption, fontsize=8, color="#6b7280", va="bottom")


def _photos(axes: list[Axes], photos: Tensor) -> None:
    for axis in axes:
        axis.axis("off")
    for axis, photo in zip(axes, photos, strict=False):
        axis.imshow(photo.permute(1, 2, 0).numpy())


def _parity(axes: list[Axes], dtypes: dict[str, Any]) -> None:
    for axis, (name, record) in zip(axes, dtypes.items(), strict=True):
        verdicts = worst_verdicts(record)
        rows = range(len(verdicts))
        axis.hlines(rows, [v["stock"] for v in verdicts], [v["bound"] for v in verdicts], color="#e5e7eb", lw=5)
        axis.plot(
            [v["bound"] for v in verdicts], rows, "|", ms=13, mew=2.5, color=_BOUND, label="bound: 2 x stock + floor"
        )
        axis.plot([v["stock"] for v in verdicts], rows, "o", ms=8, color=_STOCK, label="stock")
        axis.plot([v["ours"] for v in verdicts], rows, "D", ms=5.5, color=_FUSED, label="fused")
        axis.set(xscale="log", yticks=list(rows), yticklabels=[v["quantity"] for v in verdicts])
        axis.invert_yaxis()
        axis.tick_params(labelleft=axis is axes[0])
        axis.set_title(f"Error, {name}" + (" autocast" if name != "float32" else ""))
        axis.set_xlabel("relative L2 error of one training step, against float64")
        axis.grid(axis="x", color="#eef0f3")
    axes[-1].legend(
        loc="lower right", bbox_to_anchor=(1.01, 0.99), ncols=3, frameon=False, fontsize=8.5, columnspacing=1
    )


def _bars(axis: Axes, labels: list[str], bars: dict[str, list[float]], spans: dict[str, Any], notes: list[str]) -> None:
    """Pairs of bars with a note above each pair; `spans` holds how far p20 and p80 are below and above a bar's end."""
    for offset, name, colour in ((-0.19, "stock", _STOCK), (0.19, "fused", _FUSED)):
        at = [i + offset for i in range(len(labels))]
        axis.bar(at, bars[name], 0.36, color=colour, label=name)
        if spans:
            axis.errorbar(at, bars[name], spans[name], fmt="none", ecolor=_INK, elinewidth=1, capsize=3)
    for i, note in enumerate(notes):
        top = max(values[i] + (spans[name][1][i] if spans else 0) for name, values in bars.items())
        axis.annotate(note, (i, top), (0, 5), textcoords="offset points", ha="center", fontweight="bold")
    axis.set_xticks(range(len(labels)), labels)
    axis.set_ylim(0, axis.get_ylim()[1] * 1.12)
    axis.grid(axis="y", color="#eef0f3")


def _times(axis: Axes, speed: list[dict[str, Any]]) -> None:
    cells = [(f"{mode}\n{record['dtype']}", record[mode]) for mode in ("training", "inference") for record in speed]
    bars, spans = {}, {}
    for name in ("stock", "fused"):
        p20, median, p80 = ([cell[name][key] for _, cell in cells] for key in ("p20_ms", "median_ms", "p80_ms"))
        bars[name] = median
        spans[name] = [[m - low for m, low in zip(median, p20, strict=True)],
                       [high - m for m, high in zip(median, p80, strict=True)]]  # fmt: skip
    notes = [f"{1 / cell['ratio']['of_medians']:.2f}x" for _, cell in cells]
    _bars(axis, [label for label, _ in cells], bars, spans, notes)
    axis.legend(loc="upper right", frameon=False, fontsize=8.5)
    batches = {record["dtype"]: record["batch"] for record in speed}
    one = len(set(batches.values())) == 1
    sizes = speed[0]["batch"] if one else ", ".join(f"{size} ({dtype})" for dtype, size in batches.items())
    axis.set_title(f"Time of a batch of {sizes}")
    axis.set_ylabel("ms, median with p20 to p80; above: speed-up", fontsize=8.5)


def _memory(axis: Axes, speed: list[dict[str, Any]]) -> None:
    bars = {name: [r["saved_bytes"][name] / 1e6 for r in speed] for name in ("stock", "fused")}
    notes = [f"{fused / stock:.2f}" for stock, fused in zip(bars["stock"], bars["fused"], strict=True)]
    _bars(axis, [r["dtype"] for r in speed], bars, {}, notes)
    axis.set_title("Saved for backward")
    axis.set_ylabel("MB; above: share of stock", fontsize=8.5)


def _curves(axis: Axes, digits: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, colour, width in (("stock", _STOCK, 2.6), ("fused", _FUSED, 1.4)):
        losses = digits[name]["losses"]
        window = [losses[max(0, i - 9) : i + 1] for i in range(len(losses))]
        label = f"{name}: {digits[name]['accuracy']:.1%} right, {digits[name]['seconds']:.0f} s"
        axis.plot(losses, color=colour, alpha=0.25, lw=1)
        axis.plot([sum(w) / len(w) for w in window], color=colour, lw=width, label=label)
    axis.set(yscale="log", xlabel="step", ylabel="loss; bold: mean of 10 steps")
    axis.set_title(f"{settings['digits_network']} on {settings['train_digits']} digits, epochs: {settings['epochs']}")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(color="#eef0f3")
    axis.legend(loc="upper right", frameon=False)
