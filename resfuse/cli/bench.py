"""`resfuse bench`: units, blocks and networks, measured on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from resfuse.bench import blocks, networks, peers, scaling, unit_peers, units
from resfuse.bench.environment import describe, environment
from resfuse.bench.networks import Cell
from resfuse.bench.records import Record, append
from resfuse.bench.timing import Tick
from resfuse.bench.workload import MODES, PRECISIONS
from resfuse.cli.common import (
    INTERRUPTED,
    UNUSABLE,
    WRONG,
    all_of,
    at_least,
    check_writable,
    checked_device,
    checked_dtypes,
    checked_model,
    import_or_stop,
    say,
    shape_of,
    stop,
)

app = typer.Typer(no_args_is_help=True, help="Measure units, blocks and networks, beside stock PyTorch and its peers.")

Dtypes = Annotated[list[str] | None, typer.Option("--dtype", help="Once for each, or with commas.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Batch = Annotated[int | None, typer.Option(help="Images.")]
Size = Annotated[int | None, typer.Option(help="Their side in pixels.")]
Rounds = Annotated[int | None, typer.Option(help="Samples of each; below 6 no ratio has an interval.")]
Quick = Annotated[bool, typer.Option("--quick", help="Small and few, for a first look.")]
Output = Annotated[Path, typer.Option(help="File of rows, appended to.")]
Html = Annotated[Path | None, typer.Option(help="Also write a page with charts of these rows.")]
_FOLDER = Path("bench-out")
_BOTH = ("float32", "bfloat16")


@app.command()
def unit(
    names: Annotated[list[str] | None, typer.Argument(help="Units; all if none is named.")] = None,
    model: Annotated[str, typer.Option(help="The network whose layers give the shapes.")] = "resnet50",
    shape: Annotated[str | None, typer.Option(help="One activation NxCxHxW instead.")] = None,
    everything: Annotated[bool, typer.Option("--all-shapes", help="Every shape, not one a map size.")] = False,
    peer: Annotated[list[str] | None, typer.Option(help="Further implementations: resfuse list unit-peers.")] = None,
    dtype: Dtypes = None,
    device: Device = "cpu",
    batch: Batch = None,
    size: Size = None,
    rounds: Rounds = None,
    quick: Quick = False,
    output: Output = _FOLDER / "units.jsonl",
    html: Html = None,
) -> None:
    """Single passes and convolutions: time, GB/s, share of what a copy reaches, and stock PyTorch's time."""
    dtypes = checked_dtypes(dtype, checked_device(device), _BOTH)
    rivals = all_of("peer", peer, unit_peers.PACKAGES)
    for name in rivals:
        if (why := unit_peers.why_missing(name, device)) is not None:
            raise stop(f"peer {name} is not measured here: {why}")
    plan = units.Plan.chosen(
        quick, device=device, dtypes=dtypes, model=checked_model(model), everything=everything, peers=rivals,
        units=all_of("unit", names, units.UNITS), shape=shape_of(shape) if shape else None,
        batch=at_least("batch", batch), size=at_least("size", size, 8), rounds=at_least("rounds", rounds),
    )  # fmt: skip
    try:
        count = units.count(plan)
    except ValueError as error:  # the network does not take such images
        raise stop(error) from None
    if count == 0:
        raise stop(f"nothing to measure: {units.why_nothing(plan)}")
    where, first = environment(device), [True]

    def text(record: Record) -> list[str]:
        return [*([units.HEAD] if first and first.pop() else []), units.line(record)]

    _measure(lambda tick: units.run(plan, where, tick), count, where, text, output, html)


@app.command()
def block(
    model: Annotated[str, typer.Argument(help="The network whose blocks are measured.")] = "resnet50",
    only: Annotated[list[str] | None, typer.Option(help="Class names of blocks.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="forward, backward, step, inference.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Beside eager: compile.")] = None,
    dtype: Dtypes = None,
    device: Device = "cpu",
    batch: Batch = None,
    size: Size = None,
    rounds: Rounds = None,
    quick: Quick = False,
    output: Output = _FOLDER / "blocks.jsonl",
    html: Html = None,
) -> None:
    """Residual blocks of a network: forward, backward, both and inference; time, saved bytes, peak memory."""
    for name, value, least in (("batch", batch, 1), ("size", size, 8), ("rounds", rounds, 1)):
        at_least(name, value, least)
    others = [name for name in blocks.VARIANTS if name in ("eager", "fused", *all_of("peer", peer, ("compile",)))]
    plan = blocks.Plan(
        checked_model(model), batch or (2 if quick else 16), size or (64 if quick else 224),
        all_of("mode", mode, blocks.MODES, blocks.MODES),
        checked_dtypes(dtype, checked_device(device), _BOTH, PRECISIONS), others, tuple(only or ()),
        rounds or (6 if quick else 9), device, quick,
    )  # fmt: skip
    try:
        count = len(blocks.rows(plan))
    except ValueError as error:
        raise stop(error) from None
    where = environment(device)
    _measure(lambda tick: blocks.run(plan, where, tick), count, where, blocks.lines, output, html)


@app.command()
def model(
    names: Annotated[list[str], typer.Argument(help="Networks; resfuse list names them.")],
    mode: Annotated[list[str] | None, typer.Option(help="forward, backward, training, inference, memory.")] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="What to compare with, resfuse list peers; or all. Eager alone if not given."),
    ] = None,
    scale: Annotated[
        list[str] | None, typer.Option(help="Measure along batch, size, depth or threads instead; or all.")
    ] = None,
    dtype: Dtypes = None,
    device: Device = "cpu",
    batch: Batch = None,
    size: Size = None,
    rounds: Rounds = None,
    quick: Quick = False,
    output: Output = _FOLDER / "models.jsonl",
    html: Html = None,
) -> None:
    """Whole networks: images/s, peak memory and saved bytes of each step, fused, eager and any peer, in turn."""
    names = [checked_model(name) for name in names]
    dtypes = checked_dtypes(dtype, checked_device(device), _BOTH, PRECISIONS)
    batch, size, rounds = (at_least(*given) for given in (("batch", batch), ("size", size, 8), ("rounds", rounds)))
    modes = all_of("mode", mode, MODES, ("training", "inference"))
    where = environment(device)
    if scale:
        _check_alone(names, modes if mode else modes[:1], peer=peer, batch=batch, size=size)
        points = scaling.points(_axes(scale), names[0], modes[0], quick)
        count = len(points) * len(dtypes)
        measured = _measure(
            lambda tick: scaling.run(points, dtypes, where, rounds=rounds or 6, device=device, quick=quick, tick=tick),
            count, where, networks.lines, output, html,
        )  # fmt: skip
        for finding in scaling.findings(measured):
            say(finding)
        return
    cells = [
        Cell(name, m, batch or (4 if quick else 16), size or (96 if quick else 224)) for name in names for m in modes
    ]
    plan = networks.Plan(cells, dtypes, _variants(peer), rounds or (6 if quick else 9), device, quick=quick)
    _measure(lambda tick: networks.run(plan, where, tick), len(plan.rows), where, networks.lines, output, html)


def _check_alone(names: list[str], modes: list[str], **fixed: object) -> None:
    """Stop where --scale would leave out something that was asked for."""
    if len(names) > 1 or len(modes) > 1:
        raise stop(f"--scale measures one network in one mode, got {', '.join(names)} in {', '.join(modes)}")
    for option, value in fixed.items():
        if value:
            raise stop(f"--scale chooses what it compares and its shapes itself: leave out --{option}")


def _axes(scale: list[str]) -> list[str]:
    return list(scaling.AXES) if scale == ["all"] else all_of("scale", scale, scaling.AXES)


def _variants(peer: list[str] | None) -> list[str]:
    if peer == ["all"]:
        return [*peers.PEERS, *peers.OURS]
    return list(dict.fromkeys(["eager", *all_of("peer", peer, {**peers.PEERS, **peers.OURS}), "fused"]))


def _measure(
    rows: Callable[[Tick], Iterator[Record]],
    count: int,
    where: Record,
    text: Callable[[Record], list[str]],
    output: Path,
    html: Path | None,
) -> list[Record]:
    """Keep and show each row as soon as it is there; the rows.

    Args:
        rows (Callable): given a function that is told the share of a row done, the rows.
        count (int): how many there will be.
        where (Record): the environment.
        text (Callable[[Record], list[str]]): a row's lines.
        output (Path): a .jsonl file, appended to.
        html (Path | None): a page, written at the end, also at an early one.

    Raises:
        typer.Exit: with 1 where a result is wrong, whose row is left out; with 2 where the network does not take what
            it is given or a file cannot be written; with 130 at Ctrl-C. What is measured is kept.
    """
    page = import_or_stop("resfuse.bench.html", "a report page", "report") if html else None
    for path in (output, html):
        if path is not None:
            check_writable(path)
    say(describe(where), "dim")
    measured: list[Record] = []
    ended = _collect(rows, count, text, output, measured)
    say(f"{len(measured)} of {count} rows are in {output}" if measured else "nothing was measured")
    if page is not None and html is not None and measured:
        try:
            page.write_html(measured, html)
        except OSError as error:
            raise stop(f"cannot write {html}: {error.strerror}") from None
        say(f"Written: {html}")
    if ended is not None:
        raise stop(*ended)
    return measured


def _collect(
    rows: Callable[[Tick], Iterator[Record]],
    count: int,
    text: Callable[[Record], list[str]],
    output: Path,
    measured: list[Record],
) -> tuple[object, int] | None:
    """Put each row into the file and into `measured`, under a progress bar; what ended it early, and its exit code."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("measuring", total=count)
        try:
            for record in rows(lambda share: progress.advance(task, share)):
                append(output, record)
                measured.append(record)
                progress.update(task, completed=len(measured), description=f"{len(measured)} of {count}")
                for line in text(record):
                    progress.console.print(escape(line), highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            return "interrupted", INTERRUPTED
        except (SystemExit, RuntimeError) as error:  # a result was refused, or a process ended
            return error, WRONG
        except ValueError as error:  # the network does not take such images, or not all of its blocks can be fused
            return error, UNUSABLE
        except OSError as error:
            return f"cannot write {output}: {error.strerror}", UNUSABLE
    return None
