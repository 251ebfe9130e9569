"""The figures of the README and the docs, in light and dark, from the same rows as the tables.

Each picture carries a digest of what it shows and of this file, so that a stale one is found without drawing it again:
pixels depend on the machine's fonts.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from PIL import Image, PngImagePlugin

matplotlib.use("Agg")  # draws into files, on machines without a screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resfuse.bench import series
from resfuse.bench.records import Record
from resfuse.bench.series import Measured, peer_name
from resfuse.bench.tables import measured, place

_DIGEST = "resfuse-digest"  # the key in the picture's text
_SHOWN = ("training", "inference")


class Theme(NamedTuple):
    """The colours of one version of a figure; `suffix` is of its file's name."""

    suffix: str
    paper: str
    ink: str
    soft: str
    grid: str
    peers: dict[str, str]
    other: str


LIGHT = Theme(
    "", "#ffffff", "#1b2430", "#566273", "#e6e9ee",
    {"eager": "#9aa3af", "compile": "#d9822b", "freeze": "#b4530a", "onnxruntime": "#8b5cf6", "openvino": "#14958a",
     "fused": "#2563eb", "folded": "#2563eb"}, "#c2487f",
)  # fmt: skip
DARK = Theme(
    "-dark", "#0d1117", "#e4e8ee", "#9aa7b7", "#262f3b",
    {"eager": "#6b7787", "compile": "#c9750c", "freeze": "#9a5410", "onnxruntime": "#8b5cf6", "openvino": "#0f8a80",
     "fused": "#3b82f6", "folded": "#3b82f6"}, "#d0578f",
)  # fmt: skip


class Bar(NamedTuple):
    """A bar: a peer's value in a row of the figure, with its spread, and the words in it."""

    peer: str
    value: float
    low: float
    high: float
    text: str


class Panel(NamedTuple):
    """A set of axes: rows of bars by label, relative to eager."""

    title: str
    rows: dict[str, list[Bar]]


def _cells(rows: Sequence[Record], *suites: str) -> list[Measured]:
    found = series.cells(measured(rows), *suites)
    return [m for m in found if "eager" in m.measures]


def _label(found: Measured) -> str:
    return f"{found.cell.subject}\n{found.cell.dtype}, batch {found.cell.batch}"


def _speed(found: Measured) -> list[Bar]:
    base = found.measures["eager"].median
    assert base is not None
    bars = []
    for peer in series.peers_of([found]):
        measure = found.measures[peer]
        if measure.median is not None:
            low, high = measure.p20 or measure.median, measure.p80 or measure.median
            text = f"{measure.images_per_s:,.4g}/s" if measure.images_per_s else f"{measure.median:,.4g} ms"
            bars.append(Bar(peer, base / measure.median, base / high, base / low, text))
    return bars


def networks(rows: Sequence[Record]) -> list[Panel]:
    """Speed of training steps and of inference, relative to eager."""
    return _panels(_cells(rows, "models"), {"training": "Training step", "inference": "Inference"})


def serving(rows: Sequence[Record]) -> list[Panel]:
    """Speed of folded networks and of the engines that serve, relative to eager."""
    return _panels(_cells(rows, "serving"), {"inference": "Serving"})


def _panels(found: Sequence[Measured], titles: dict[str, str]) -> list[Panel]:
    panels = []
    for mode, title in titles.items():
        timed = [m for m in found if m.cell.mode == mode and m.measures["eager"].median]
        panels += _by_machine(title, timed, found, _speed)
    return panels


def _by_machine(
    title: str, found: Sequence[Measured], figure: Sequence[Measured], bars: Callable[[Measured], list[Bar]]
) -> list[Panel]:
    """A panel for each machine, the one that was measured last first; it is named where the figure has several."""
    oldest = sorted((m.row for m in found), key=lambda row: row["environment"]["date"])
    machines, several = series.machines(oldest), len({m.cell.device for m in figure}) > 1
    return [
        Panel(
            f"{title}, {machine}" if several else title,
            {_label(m): bars(m) for m in found if m.cell.device == machine},
        )
        for machine in machines
    ]


def memory(rows: Sequence[Record]) -> list[Panel]:
    """What a training step keeps for backward and the most it held, relative to eager."""
    cells = [m for m in _cells(rows, "models") if m.cell.mode in ("training", "memory")]
    panels = []
    for key, title in (("saved", "Saved for backward"), ("peak", "Peak of a training process")):
        held = [m for m in cells if getattr(m.measures["eager"], key)]
        panels += _by_machine(title, held, cells, partial(_held, key=key))
    return panels


def _held(found: Measured, key: str) -> list[Bar]:
    base = getattr(found.measures["eager"], key)
    counts = {peer: getattr(found.measures[peer], key) for peer in series.peers_of([found])}
    return [Bar(peer, n / base, n / base, n / base, f"{n / 1e6:,.0f} MB") for peer, n in counts.items() if n]


FIGURES: dict[str, tuple[Callable[[Sequence[Record]], list[Panel]], str]] = {
    "networks": (networks, "speed relative to eager, more is better; bars: medians, whiskers: p20 to p80"),
    "memory": (memory, "memory relative to eager, less is better"),
    "serving": (serving, "speed relative to eager, more is better; bars: medians, whiskers: p20 to p80"),
}
"""Each figure's data and the line that says what its bars are."""


def markup(rows: Sequence[Record], folder: str) -> str:
    """HTML for Markdown pages that shows each figure of the rows, light or dark as its reader has it."""
    return "".join(
        f'''<picture>
  <source media="(prefers-color-scheme: dark)" srcset="{folder}/{name}{DARK.suffix}.png">
  <img alt="{name.capitalize()}: {scale.partition(";")[0]}" src="{folder}/{name}{LIGHT.suffix}.png">
</picture>

'''
        for name, (collect, scale) in FIGURES.items()
        if collect(rows)
    )


def write(rows: Sequence[Record], folder: Path) -> list[Path]:
    """Draw every figure that the rows allow, and remove those that they no longer allow.

    Args:
        rows (Sequence[Record]): of all files, oldest first; quick ones are left out.
        folder (Path): where the pictures are; it is made.

    Returns:
        list[Path]: the pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = _wanted(rows, folder)
    for name, (collect, scale) in FIGURES.items():
        for theme in (LIGHT, DARK):
            path = folder / f"{name}{theme.suffix}.png"
            if path not in wanted:
                path.unlink(missing_ok=True)
            elif digest_of(path) != wanted[path]:
                _draw(collect(rows), scale, _places(rows, name), theme, path, wanted[path])
    return list(wanted)


def stale(rows: Sequence[Record], folder: Path) -> list[Path]:
    """The pictures that are missing, not of these rows, or of rows that are gone."""
    wanted = _wanted(rows, folder)
    known = [folder / f"{name}{theme.suffix}.png" for name in FIGURES for theme in (LIGHT, DARK)]
    return [path for path in known if digest_of(path) != wanted.get(path)]


def digest_of(path: Path) -> str | None:
    """What a picture says it shows; None where there is none."""
    if not path.is_file():
        return None
    with Image.open(path) as picture:
        return picture.info.get(_DIGEST)


def _wanted(rows: Sequence[Record], folder: Path) -> dict[Path, str]:
    source = Path(__file__).read_text(encoding="utf-8")
    found: dict[Path, str] = {}
    for name, (collect, _) in FIGURES.items():
        if panels := collect(rows):
            shown = json.dumps([panels, _places(rows, name), source]).encode()
            digest = hashlib.sha256(shown).hexdigest()[:16]
            found |= {folder / f"{name}{theme.suffix}.png": digest for theme in (LIGHT, DARK)}
    return found


def _places(rows: Sequence[Record], name: str) -> list[str]:
    suite = "serving" if name == "serving" else "models"
    return list(dict.fromkeys(place(m.row["environment"]) for m in _cells(rows, suite)))


def _draw(panels: Sequence[Panel], scale: str, places: Iterable[str], theme: Theme, path: Path, digest: str) -> None:
    style: dict[Any, Any] = {
        "font.size": 9, "text.color": theme.ink, "xtick.color": theme.soft, "ytick.color": theme.ink,
        "figure.facecolor": theme.paper, "axes.facecolor": theme.paper, "axes.edgecolor": theme.grid,
        "axes.axisbelow": True,
    }  # fmt: skip
    for side in ("top", "right", "left"):
        style[f"axes.spines.{side}"] = False
    with plt.rc_context(style):
        heights = [sum(len(bars) + 0.9 for bars in panel.rows.values()) for panel in panels]
        inches = 0.155 * max(heights) + 1.45
        figure, axes = plt.subplots(1, len(panels), figsize=(5.4 * len(panels), inches), squeeze=False)
        for axis, panel in zip(axes[0], panels, strict=True):
            _bars(axis, panel, theme, max(heights))
        _frame(figure, panels, scale, places, theme, inches)
        _save(figure, path, digest)
        plt.close(figure)


def _save(figure: Figure, path: Path, digest: str) -> None:
    """A picture of few colours, a fifth of the bytes of one with all, that carries its digest."""
    buffer, text = io.BytesIO(), PngImagePlugin.PngInfo()
    figure.savefig(buffer, dpi=150)
    text.add_text(_DIGEST, digest)
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(path, optimize=True, pnginfo=text)


def _bars(axis: Axes, panel: Panel, theme: Theme, height: float) -> None:
    at, ticks = 0.0, []
    end = max(bar.high for bars in panel.rows.values() for bar in bars)
    for bars in panel.rows.values():
        ticks.append(at + (len(bars) - 1) / 2)
        for bar in bars:
            axis.barh(at, bar.value, 0.86, color=theme.peers.get(bar.peer, theme.other))
            if bar.high > bar.low:
                axis.plot([bar.low, bar.high], [at, at], color=theme.ink, lw=1, solid_capstyle="butt")
            axis.annotate(
                bar.text, (0, at), (3, 0), textcoords="offset points", va="center", fontsize=6.2, color="white"
            )
            at += 1
        at += 0.9
    axis.axvline(1, color=theme.ink, lw=0.9, ls=":")
    axis.set_yticks(ticks, list(panel.rows))
    axis.tick_params(length=0, labelsize=8)
    axis.tick_params(axis="y", labelsize=7.5)
    axis.set_ylim(height - 0.5, -0.8)
    axis.set_xlim(0, end * 1.03)
    axis.grid(axis="x", color=theme.grid, lw=0.8)
    axis.set_title(panel.title, loc="left", fontweight="bold", fontsize=10)


def _frame(
    figure: Figure, panels: Sequence[Panel], scale: str, places: Iterable[str], theme: Theme, inches: float
) -> None:
    """Peers above the panels, what the bars are and where they were measured below."""
    peers = dict.fromkeys(bar.peer for panel in panels for bars in panel.rows.values() for bar in bars)
    handles = [plt.Rectangle((0, 0), 1, 1, color=theme.peers.get(peer, theme.other)) for peer in peers]
    columns = min(len(peers), 3 * len(panels))
    lines = -(-len(peers) // columns)
    figure.legend(
        handles, [peer_name(peer) for peer in peers], loc="upper left", bbox_to_anchor=(0.012, 1), ncols=columns,
        frameon=False, handlelength=0.8, handleheight=0.8, columnspacing=1.4,
    )  # fmt: skip
    below = [scale, *places]
    figure.text(0.02, 0.08 / inches, "\n".join(below), color=theme.soft, fontsize=7, va="bottom", linespacing=1.35)
    left = 1.3 / (5.4 * len(panels))
    bottom, top = 0.36 + 0.14 * len(below), 0.44 + 0.18 * lines
    figure.subplots_adjust(left, bottom / inches, 0.985, 1 - top / inches, wspace=0.34)
