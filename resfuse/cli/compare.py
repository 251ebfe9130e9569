"""`resfuse compare`: what became faster or slower between two files of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from resfuse.bench import comparison
from resfuse.bench.comparison import FASTER, SLOWER, Change
from resfuse.bench.records import Record, parse
from resfuse.cli.common import OK, WRONG, console, say, stop

_STYLES = {FASTER: "green", SLOWER: "bold red"}


def compare(
    before: Annotated[Path, typer.Argument(help="Rows of the earlier run, .json or .jsonl.")],
    after: Annotated[Path, typer.Argument(help="Rows of the later run.")],
    as_json: Annotated[bool, typer.Option("--json", help="The changes as a JSON list.")] = False,
    fail: Annotated[bool, typer.Option("--fail", help="Exit with 1 if anything is slower.")] = False,
) -> None:
    """Say what changed between two runs: a verdict only where the 95 % interval of the ratio excludes 1.

    Times are compared relative to a yardstick that was sampled in turn with them, such as eager: a machine that is
    slower as a whole changes nothing.
    """
    rows = _read(before), _read(after)
    try:
        changes = comparison.compare_runs(*rows)
    except ValueError as error:
        raise stop(error) from None
    if as_json:
        print(json.dumps([{**change._asdict(), "verdict": change.verdict} for change in changes], indent=1))
    else:
        _show(changes)
        for difference in comparison.differences(*rows):
            say(f"The runs differ in {difference}.", "yellow")
    slower = any(change.verdict == SLOWER for change in changes)
    raise typer.Exit(WRONG if fail and slower else OK)


def _read(path: Path) -> list[Record]:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise stop(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise stop(f"{path} holds no rows: {error}") from None


def _show(changes: list[Change]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("measured", "name", "against", "after / before", "95 %", "verdict"):
        table.add_column(title, justify="right" if title in ("after / before", "95 %") else "left")
    for change in changes:
        known = change.low is not None and change.high is not None
        bounds = f"{change.low:.3f} to {change.high:.3f}" if known else "too few samples"
        table.add_row(
            " ".join(part for part in change.cell if part), change.name, change.against or "", f"{change.ratio:.3f}",
            bounds, Text(change.verdict, _STYLES.get(change.verdict, "dim")),
        )  # fmt: skip
    console.print(table)
    counts = {kind: sum(change.verdict == kind for change in changes) for kind in (SLOWER, FASTER)}
    say(
        f"{len(changes)} compared: {counts[SLOWER]} slower, {counts[FASTER]} faster. Where nothing changed, about 1 in "
        f"20 intervals excludes 1 by luck: {len(changes) / 20:.1f} of these."
    )
