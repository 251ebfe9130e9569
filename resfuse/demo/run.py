"""The demonstration from start to end: its parts in order, the progress bars and the files it writes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from resfuse import backends
from resfuse.bench.environment import describe, environment
from resfuse.demo import data, digits, parity, speed
from resfuse.demo.figure import draw
from resfuse.demo.settings import FULL, Settings
from resfuse.demo.table import notes, results_table


def choose_backend(requested: str | None) -> tuple[str, str | None]:
    """The backend of the whole demonstration, and why it is not the native one where nobody asked for another.

    Args:
        requested (str | None): "native", "triton", "reference", or None for native if there is one.

    Returns:
        tuple[str, str | None]: the backend, and one line to print or None.

    Raises:
        ValueError: no backend has this name. RuntimeError: the requested backend is missing on the CPU.
    """
    if requested is not None:
        return backends.choose("bn_act", "cpu", torch.float32, requested), None
    reason = backends.missing("bn_act", "native", "cpu", torch.float32)
    if reason is None:
        return "native", None
    return "reference", f"The native backend is missing, running on plain torch (backend reference): {reason}."


def run(output: Path, settings: Settings = FULL, backend: str | None = None, console: Console | None = None) -> bool:
    """Measure, print the table, and write demo.json and demo.png.

    Args:
        output (Path): folder for the files, made if it is missing.
        settings (Settings): how much of everything.
        backend (str | None): as in :func:`choose_backend`.
        console (Console | None): where to print.

    Returns:
        bool: whether every parity bound holds.

    Raises:
        ValueError, RuntimeError: as :func:`choose_backend`, before anything is measured.
        OSError: there can be no such folder, before anything is measured.
    """
    console = console or Console()
    chosen, line = choose_backend(backend)
    if line is not None:
        console.print(line, style="yellow", soft_wrap=True)
    where = environment()
    console.print(describe(where), style="dim", highlight=False, soft_wrap=True)
    output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    photos = data.load_photos(settings.photos, settings.photo_size)
    report: dict[str, Any] = {"environment": where, "backend": chosen, "settings": asdict(settings)}
    report.update(_measure(photos, settings, chosen, console))
    report["seconds"] = round(time.perf_counter() - start, 1)
    (output / "demo.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, photos, output / "demo.png")
    _print(report, output, console)
    return report["parity"]["holds"]


def _measure(photos: torch.Tensor, settings: Settings, backend: str, console: Console) -> dict[str, Any]:
    images = data.normalise(photos)
    numbers = data.load_digits(settings.train_digits, settings.test_digits)
    parts: dict[str, tuple[str, int, Callable[[Callable[[], object]], Any]]] = {
        "parity": (
            f"{settings.network} against float64",
            parity.ticks(settings),
            lambda tick: parity.measure(images, settings, backend, tick),
        ),
        "speed": (
            "times, stock and fused in turn",
            speed.ticks(settings),
            lambda tick: speed.measure(images, settings, backend, tick),
        ),
        "digits": (
            f"{settings.digits_network} learns digits, twice",
            digits.ticks(settings),
            lambda tick: digits.measure(numbers, settings, backend, tick),
        ),
    }
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    found = {}
    with Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(title, total=total, start=False) for name, (title, total, _) in parts.items()}
        for name, (_, _, measure) in parts.items():
            task = tasks[name]
            progress.start_task(task)
            found[name] = measure(lambda task=task: progress.advance(task))  # type: ignore[misc]
    return found


def _print(report: dict[str, Any], output: Path, console: Console) -> None:
    console.print(results_table(report))
    for note in notes(report):
        console.print(note, style="dim", highlight=False)
    held = report["parity"]["holds"]
    verdict = "[green]Every parity bound holds.[/]" if held else "[bold red]A parity bound is broken.[/]"
    console.print(
        f"{verdict} {report['seconds']:.0f} s. Written: {output / 'demo.json'}, {output / 'demo.png'}",
        highlight=False,
        soft_wrap=True,
    )
