"""`resfuse profile`: where a network's time goes, stock and fused, and what memory it holds along a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from resfuse.bench import profiling
from resfuse.bench.environment import describe, environment
from resfuse.bench.profiling import Profile
from resfuse.bench.workload import PRECISIONS, Task
from resfuse.cli.common import (
    at_least,
    checked_device,
    checked_dtypes,
    checked_model,
    console,
    made_folder,
    one_of,
    say,
    stop,
)

_MODES = ("training", "forward", "backward", "inference")
_SHOWN = 8


def profile(
    model: Annotated[str, typer.Argument(help="A network's name; resfuse list names them.")],
    mode: Annotated[str, typer.Option(help="training, forward, backward or inference.")] = "training",
    dtype: Annotated[str, typer.Option(help="float32, or what autocast runs in.")] = "float32",
    batch: Annotated[int, typer.Option(help="Images.")] = 8,
    size: Annotated[int, typer.Option(help="Their side in pixels.")] = 224,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Two images of 64x64.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the traces and profile.json.")] = Path("profile-out"),
) -> None:
    """Time every unit of a step, fused against stock, and draw the memory it holds.

    Writes a trace for each network, for chrome://tracing or ui.perfetto.dev, and profile.json.
    """
    checked_model(model)
    one_of("mode", mode, _MODES)
    (dtype,) = checked_dtypes([dtype], checked_device(device), (), PRECISIONS)
    at_least("batch", batch)
    at_least("size", size, 8)
    batch, size = (2, 64) if quick else (batch, size)
    made_folder(output)
    found = {}
    for name, variant in (("stock", "eager"), ("fused", "fused")):
        with console.status(f"{model}, {name}"):
            task = Task(model, variant, mode, dtype, batch, size, device)
            try:
                found[name] = profiling.profile_task(task, output / f"{name}.trace.json")
            except ValueError as error:  # the network does not take such images, or not all of its blocks can be fused
                raise stop(f"{model} {mode}, batch {batch} of {size}: {error}") from None
    where = environment(device)
    say(f"{model} {mode} {dtype}, batch {batch} of {size}; {describe(where)}")
    _show(found)
    record = {"model": model, "mode": mode, "dtype": dtype, "batch": batch, "size": size, "environment": where}
    record |= {name: {**part._asdict(), "peak_bytes": part.peak_bytes} for name, part in found.items()}
    (output / "profile.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    say(f"Written to {output}: {', '.join(sorted(path.name for path in output.glob('*.json')))}")


def _show(found: dict[str, Profile]) -> None:
    console.print(_units(found))
    for name, part in found.items():
        console.print(_operators(name, part))
    top = max(part.peak_bytes for part in found.values())
    for name, part in found.items():
        say(f"memory of a step, {name}: at most {part.peak_bytes / 1e6:.1f} MB more than before it")
        say(f"  {profiling.sparkline(part.memory, top)}")


def _units(found: dict[str, Profile]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("ms of a step", *found):
        table.add_column(title, justify="left" if title == "ms of a step" else "right")
    units = dict.fromkeys(unit for part in found.values() for unit in part.units)
    for unit in sorted(units, key=lambda unit: -max(part.units.get(unit, 0.0) for part in found.values())):
        table.add_row(unit, *(f"{part.units[unit]:.2f}" if unit in part.units else "" for part in found.values()))
    table.add_row("all, as the clock has it", *(f"{part.step_ms:.2f}" for part in found.values()), style="bold")
    return table


def _operators(name: str, part: Profile) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in (f"{name}: longest operators", "calls", "ms of a step"):
        table.add_column(title, justify="left" if title.startswith(name) else "right")
    for row in part.operators[:_SHOWN]:
        table.add_row(row["name"], f"{row['calls']:.0f}", f"{row['ms']:.2f}")
    return table
