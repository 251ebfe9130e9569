"""The `resfuse` command: what can be asked for on a command line. It needs the cli extra; the core never imports it."""

from __future__ import annotations

try:
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(f'resfuse: the command line needs {missing.name}: pip install "resfuse[cli]"') from None

from resfuse.cli import bench, compare, demo, doctor, explain, lists, profile, tune

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Fused residual kernels for PyTorch.")
app.command()(doctor.doctor)
app.add_typer(bench.app, name="bench")
app.command()(compare.compare)
app.command()(explain.explain)
app.command()(profile.profile)
app.command()(tune.tune)
app.command()(demo.demo)
app.command("list")(lists.names)


def main() -> None:
    """Run the command line."""
    app()
