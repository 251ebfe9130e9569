"""Rows of benchmarks as one self-contained page with interactive charts; it needs the report extra."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resfuse.bench.environment import describe
from resfuse.bench.html import sections
from resfuse.bench.records import Record

try:
    import jinja2
    from plotly.offline import get_plotlyjs
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f'the HTML report needs {missing.name}: pip install "resfuse[report]"', name=missing.name
    ) from None


def write_html(rows: Sequence[Record], path: Path) -> None:
    """Write the page: charts of the newest rows, the environment, and all rows in tables that can be sorted.

    The page holds its own scripts and data and is allowed no request. Kinds of rows that are missing leave their
    section out, with a sentence.

    Args:
        rows (Sequence[Record]): of any benchmarks, oldest first; quick ones are shown, and marked as such.
        path (Path): where to write; its folder is made.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("write_html needs rows, got none")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(rows), encoding="utf-8")


def render(rows: Sequence[Record]) -> str:
    """The page's text."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates.filters |= {"shown": sections.shown, "sortable": _sortable}
    parts = sections.sections(rows)
    drawn = [{"traces": chart.traces, "layout": chart.layout} for part in parts for chart in part.charts]
    return templates.get_template("page.html.jinja").render(
        sections=parts,
        cards=sections.cards(rows),
        environments=sections.environments(rows),
        where=_where(rows),
        tables=sections.raw_tables(rows),
        quick=sum(bool(row.get("quick")) for row in rows),
        count=len(rows),
        charts=_embedded(drawn),
        rows=_embedded(rows),
        style=_asset("page.css"),
        script=_asset("page.js"),
        plotly=get_plotlyjs(),
    )


def _where(rows: Sequence[Record]) -> str:
    """The newest environment in one line; predictions have none."""
    places = sorted((row["environment"] for row in rows if "environment" in row), key=lambda where: where["date"])
    return describe(places[-1]) if places else ""


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _embedded(value: Any) -> str:
    """JSON for the inside of a script element: whatever the values are, they cannot end it. NaN becomes null."""
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sortable(value: Any) -> str:
    """What a cell is sorted by: a number's full digits, a text in lower case."""
    if isinstance(value, bool) or value is None or isinstance(value, list):
        return sections.shown(value)
    return repr(value) if isinstance(value, int | float) else str(value).lower()
