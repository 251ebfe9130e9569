"""The `resfuse` command: what can be asked for on a command line. It needs the cli extra; the core never imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from resfuse import backends
from resfuse.bench.environment import describe, environment

_INSTALL = 'pip install "resfuse[demo]"'
try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as missing:
    raise SystemExit(f"resfuse: the command line needs {missing.name}: {_INSTALL}") from None

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Fused residual kernels for PyTorch.")


@app.command()
def doctor() -> None:
    """Say which backends this installation can run, and why not the others."""
    console = Console()
    console.print(describe(environment()), highlight=False, soft_wrap=True)
    for status in backends.available():
        state = "[green]available[/]" if status.available else f"missing: {status.reason}"
        console.print(f"  {status.backend:10} {status.device:5} {state}", highlight=False, soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path("demo-out"),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller everything, for a first look.")] = False,
    backend: Annotated[str | None, typer.Option(help="native or reference; the best there is if not given.")] = None,
) -> None:
    """Compare stock and fused networks on real images: exactness, time, memory, and a training run.

    Exits with 1 if a parity bound is broken, and with 2 if the demonstration cannot run.
    """
    try:
        from resfuse.demo.run import choose_backend, run
        from resfuse.demo.settings import FULL, QUICK
    except ModuleNotFoundError as missing:
        raise _stop(f"the demo needs {missing.name}: {_INSTALL}") from None
    try:
        choose_backend(backend)
    except (ValueError, RuntimeError) as error:
        raise _stop(str(error)) from None
    held = run(output, QUICK if quick else FULL, backend)
    raise typer.Exit(0 if held else 1)


def _stop(reason: str) -> typer.Exit:
    typer.echo(f"resfuse: {reason}", err=True)
    return typer.Exit(2)


def main() -> None:
    """Run the command line."""
    app()
