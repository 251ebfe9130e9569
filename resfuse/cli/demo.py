"""`resfuse demo`: stock and fused networks on real images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resfuse.cli.common import OK, WRONG, checked_backend, import_or_stop, made_folder


def demo(
    output: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path("demo-out"),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller everything, for a first look.")] = False,
    backend: Annotated[str | None, typer.Option(help="native or reference; the best there is if not given.")] = None,
) -> None:
    """Compare stock and fused networks on real images: exactness, time, memory, and a training run.

    Exits with 1 if a parity bound is broken, and with 2 if the demonstration cannot run.
    """
    run, settings = (import_or_stop(f"resfuse.demo.{name}", "the demo", "demo") for name in ("run", "settings"))
    chosen = checked_backend(backend)
    held = run.run(made_folder(output), settings.QUICK if quick else settings.FULL, chosen)
    raise typer.Exit(OK if held else WRONG)
