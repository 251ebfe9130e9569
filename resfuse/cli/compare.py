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
from resfuse.bench.records import Record, check, parse
from resfuse.cli.common import OK, WRONG, console, say, stop

_STYLES = {FASTER: "green", SLOWER: "bold red"}


def compare(
    before: Annotated[str, typer.Argument(help="Rows of the earlier run, .json or .jsonl; with commas, of several.")],
    after: Annotated[str, typer.Argument(help="Rows of the later run, or of several.")],
    as_json: Annotated[bool, typer.Option("--json", help="The changes as a JSON list.")] = False,
    fail: Annotated[bool, typer.Option("--fail", help="Exit with 1 if anything is slower.")] = False,
) -> None:
    """Say what changed between two sides: a verdict only where the 95 % interval of the ratio excludes 1.

    Times are compared relative to a yardstick that was sampled in turn with them, such as eager: a machine that is
    slower as a whole changes nothing. One run a side shows the noise within a run alone, and two runs of one build
    differ by more; give three of each, as a1.jsonl,a2.jsonl,a3.jsonl b1.jsonl,b2.jsonl,b3.jsonl.
    """
    sides = [[_read(Path(path)) for path in paths.split(",") if path] for paths in (before, after)]
    try:
        changes = comparison.compare_runs(*sides)
    except ValueError as error:
        raise stop(error) from None
    if as_json:
        print(json.dumps([{**change._asdict(), "verdict": change.verdict} for change in changes], indent=1))
    else:
        _show(changes)
        for difference in comparison.differences(*sides):
            say(f"The runs differ in {difference}.", "yellow")
    slower = any(change.verdict == SLOWER for change in changes)
    raise typer.Exit(WRONG if fail and slower else OK)


def _read(path: Path) -> list[Record]:
    try:
        rows = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise stop(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise stop(f"{path} holds no rows: {error}") from None
    for number, row in enumerate(rows, 1):
        try:
            check(row)
        except ValueError as error:
            raise stop(f"{path}, row {number}: {error}") from None
    return rows


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
    say(f"{len(changes)} compared: {counts[SLOWER]} slower, {counts[FASTER]} faster.")
    single = sum(change.runs == (1, 1) for change in changes)
    if single:
        say(
            f"{single} of these are of one run a side: their intervals hold the noise within a run, not what differs "
            "from run to run of the same build. Believe a verdict that three runs a side give too.",
            "yellow",
        )
    if single < len(changes):
        rest = len(changes) - single
        luck = f"about 1 in 20 intervals excludes 1 by luck where nothing changed: {rest / 20:.1f}"
        say(f"Of the {rest} of several runs, {luck}.")
