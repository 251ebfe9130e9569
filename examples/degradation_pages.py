"""What examples/degradation.py shows: the papers' figures, a table, and both in a page of the documentation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws into files, on machines without a screen
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from resumable import TrainingError
from rich.console import Console
from rich.table import Table

from resfuse.bench.environment import describe, environment

START, END = "<!-- run:start -->", "<!-- run:end -->"
FIGURES = {
    "curves": "Training error (thin) and test error (bold).",
    "gradients": "L2 norm of the loss's gradient to each convolution's weight, before and after training.",
    "surface": "The loss around the trained deep networks, along two random directions normalised by filter.",
    "surface-3d": "The same surfaces, seen from the side.",
}
_COLOURS = ("#9aa3af", "#dc2626", "#2563eb", "#059669", "#d97706")
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eef0f3",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


class Result(NamedTuple):
    """What one network showed.

    Attributes:
        dataset, name: what was trained, and on what.
        seen: losses, points (step, training and test error), gradients and cpu_seconds of its training.
        surface: rows of losses, of the deep plain and residual networks.
    """

    dataset: str
    name: str
    seen: dict[str, Any]
    surface: list[list[float]] | None

    @property
    def errors(self) -> tuple[float, float]:
        """Of training and test set, in the end."""
        _, train, test = self.seen["points"][-1]
        return train, test


def draw(results: list[Result], depths: tuple[int, int], folder: Path) -> None:
    """Stage 3: write a .png for each of FIGURES, with a row for each data set."""
    datasets = list(dict.fromkeys(result.dataset for result in results))
    of = {dataset: {r.name: r for r in results if r.dataset == dataset} for dataset in datasets}
    with plt.rc_context(_STYLE):
        for name, (columns, draw_row) in _DRAWN.items():
            shape = {"projection": "3d"} if name.endswith("3d") else None
            size = (3.6 * columns, 2.9 * len(datasets))
            figure, axes = plt.subplots(len(datasets), columns, figsize=size, squeeze=False, subplot_kw=shape)
            for row, dataset in zip(axes, datasets, strict=True):
                draw_row(figure, row, of[dataset], depths)
                for axis in row:
                    axis.set_title(f"{dataset}: {axis.get_title('left') or axis.get_title()}")
            figure.tight_layout()
            figure.savefig(folder / f"{name}.png", dpi=100)
            plt.close(figure)


def _curves(figure: Figure, axes: list[Axes], found: dict[str, Result], depths: tuple[int, int]) -> None:
    kinds = {kind: [f"{kind}-{depth}" for depth in depths] for kind in ("plain", "residual")}
    others = [name for name in found if name not in kinds["plain"] + kinds["residual"]]
    panels = [*kinds.items(), ("orders of the unit", [kinds["residual"][1], *others])]
    for axis, (title, names) in zip(axes, panels, strict=True):
        for name, colour in zip(names, _COLOURS, strict=False):
            steps, train, test = zip(*found[name].seen["points"], strict=True)
            axis.plot(steps, train, color=colour, lw=0.9)
            axis.plot(steps, test, color=colour, lw=2, label=name)
        axis.set(title=title, xlabel="step", ylabel="error, %", ylim=(0, 100))
        axis.legend()


def _gradients(figure: Figure, axes: list[Axes], found: dict[str, Result], depths: tuple[int, int]) -> None:
    names = [f"{kind}-{depth}" for depth in depths for kind in ("plain", "residual")]
    for axis, (when, title) in zip(axes, (("start", "before training"), ("end", "after training")), strict=True):
        for name, colour in zip(names, ("#fca5a5", "#93c5fd", "#dc2626", "#2563eb"), strict=True):
            norms = found[name].seen["gradients"][when]
            axis.plot(range(1, len(norms) + 1), norms, color=colour, label=name, marker=".", ms=4)
        axis.set(title=title, xlabel="convolution, from the input on", ylabel="norm of gradient", yscale="log")
        axis.legend()


def _surfaces(found: dict[str, Result]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Name, coordinates and log10 of the losses of each network that has a surface; cut where the lowest one ends."""
    surfaces = {name: np.log10(np.maximum(r.surface, 1e-4)) for name, r in found.items() if r.surface is not None}
    ceiling = min(np.nanmax(losses) for losses in surfaces.values())
    along = np.linspace(-1, 1, len(next(iter(surfaces.values()))))
    return [(name, along, np.nan_to_num(losses, nan=ceiling).clip(max=ceiling)) for name, losses in surfaces.items()]


def _contours(figure: Figure, axes: list[Axes], found: dict[str, Result], depths: tuple[int, int]) -> None:
    surfaces = _surfaces(found)
    lowest, highest = (f([losses for *_, losses in surfaces]) for f in (np.min, np.max))
    levels = np.linspace(lowest, max(highest, lowest + 1e-3), 21)
    for axis, (name, along, losses) in zip(axes, surfaces, strict=True):
        filled = axis.contourf(along, along, losses, levels, cmap="viridis")
        axis.contour(along, along, losses, levels[::2], colors="white", linewidths=0.5)
        axis.set(title=name, aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        axis.grid(False)
        figure.colorbar(filled, ax=axis, label="log10 of loss", shrink=0.85, format="%.1f")


def _sides(figure: Figure, axes: list[Any], found: dict[str, Result], depths: tuple[int, int]) -> None:
    surfaces = _surfaces(found)
    lowest, highest = (f([losses for *_, losses in surfaces]) for f in (np.min, np.max))
    for axis, (name, along, losses) in zip(axes, surfaces, strict=True):
        axis.plot_surface(*np.meshgrid(along, along), losses, cmap="viridis", rstride=1, cstride=1, lw=0)
        axis.set(title=name, zlim=(lowest, max(highest, lowest + 1e-3)), xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        axis.set_zlabel("log10 of loss")


_DRAWN = {"curves": (3, _curves), "gradients": (2, _gradients), "surface": (2, _contours), "surface-3d": (2, _sides)}


def verdicts(results: list[Result], depths: tuple[int, int], images: int) -> list[str]:
    """Whether depth made the training error worse, of plain and of residual networks, in one sentence each.

    An error is a share of so many images: what lies within two standard errors of such shares is no difference.
    """
    errors = {(r.dataset, r.name): r.errors[0] for r in results}
    sentences = []
    for dataset in dict.fromkeys(r.dataset for r in results):
        for kind in ("plain", "residual"):
            shallow, deep = (errors[dataset, f"{kind}-{depth}"] for depth in depths)
            spread = math.sqrt(sum(error * (100 - error) for error in (shallow, deep)) / images)
            word = "worse than" if deep - shallow > 2 * spread else "no worse than"
            sentences.append(
                f"{dataset}: {kind}-{depths[1]} is {word} {kind}-{depths[0]} on its training set, "
                f"{deep:.1f}% errors against {shallow:.1f}%."
            )
    return sentences


def _rows(results: list[Result]) -> list[tuple[str, ...]]:
    head = ("data set", "network", "training error, %", "test error, %", "last loss", "CPU seconds")
    return [head] + [
        (r.dataset, r.name, *(f"{e:.1f}" for e in r.errors), f"{np.mean(r.seen['losses'][-20:]):.3f}",
         f"{r.seen['cpu_seconds']:.0f}") for r in results
    ]  # fmt: skip


def print_table(results: list[Result], depths: tuple[int, int], images: int, console: Console) -> None:
    head, *rows = _rows(results)
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for sentence in verdicts(results, depths, images):
        console.print(sentence, highlight=False)


def publish(
    results: list[Result], depths: tuple[int, int], images: int, folder: Path, page: Path, command: str, device: str
) -> None:
    """Stage 4: copy the figures beside the page, and write them, the table and the command between its markers."""
    where = describe(environment(device.partition(":")[0]))  # before anything is written into a clean checkout
    text = page.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise TrainingError(f"{page} must hold {START} and after it {END}, once each")
    (page.parent / "figures").mkdir(exist_ok=True)
    pictures = []
    for name, caption in FIGURES.items():
        with Image.open(folder / f"{name}.png") as picture:  # fewer colours take a third of the bytes
            small = picture.convert("RGB").quantize(96)
        small.save(page.parent / "figures" / f"degradation-{name}.png", optimize=True)
        pictures.append(f"![{name}](figures/degradation-{name}.png)\n\n{caption}\n")
    head, *rows = _rows(results)
    lines = [f"| {' | '.join(row)} |" for row in (head, ("---", "---", *["---:"] * 4), *rows)]
    parts = [
        f"    {command}\n",
        f"On {where}.\n",
        *(f"* {sentence}" for sentence in verdicts(results, depths, images)),
        "",
        *lines,
        "",
        f"Errors are shares of {images} images, so differences within two standard errors of them count as none. "
        "Last loss is the mean over the last 20 batches, CPU seconds those of the training steps.\n",
        "\n".join(pictures),
    ]
    before, rest = text.split(START)
    after = rest.split(END)[1]
    page.write_text(f"{before}{START}\n" + "\n".join(parts) + f"{END}{after}", encoding="utf-8")
