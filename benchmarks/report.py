"""The tables and figures of README.md and docs, generated from benchmarks/results; `--check` only compares.

`--html FILE` writes the interactive page of all results instead, which needs the report extra.

README.md shows networks in short, docs/benchmarks.md everything that was measured, docs/cuda.md and docs/triton.md
predictions, as such.
Tables stand between two markers; pictures are in docs/figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resfuse.bench import figures
from resfuse.bench.records import Record, read
from resfuse.bench.tables import render, render_predictions, render_products, summary

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
_FILES = ("models", "units", "blocks", "scaling", "serving", "predicted")


def pages(results: Path) -> dict[str, str]:
    """Each page's path below the root, and the text between its markers."""
    rows = {name: read(results / f"{name}.jsonl") for name in _FILES}
    return {
        "README.md": figures.markup(drawn(results), "docs/figures") + summary(rows["models"]),
        "docs/benchmarks.md": render(rows["models"], rows["units"], rows["blocks"], rows["scaling"], rows["serving"]),
        "docs/cuda.md": render_predictions(rows["predicted"]),
        "docs/triton.md": render_products(read(results / "predicted_products.jsonl")),
    }


def drawn(results: Path) -> list[Record]:
    """The rows that the figures show."""
    return [row for name in ("models", "serving") for row in read(results / f"{name}.jsonl")]


def replace_block(text: str, block: str) -> str:
    """`text` with what is between the markers replaced by `block`; the lines of the markers stay.

    Raises:
        ValueError: `text` does not hold one start marker followed by one end marker.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"the text must hold {START} and after it {END}, once each")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{block}{END}{after}"


def check(root: Path, results: Path) -> list[Path]:
    """The pages and figures below the root that are not those of the results."""
    stale = []
    for name, block in pages(results).items():
        text = (root / name).read_text(encoding="utf-8")
        if text != replace_block(text, block):
            stale.append(root / name)
    return stale + figures.stale(drawn(results), root / "docs" / "figures")


def write(root: Path, results: Path) -> None:
    """Rewrite the tables and figures below the root."""
    for name, block in pages(results).items():
        text = (root / name).read_text(encoding="utf-8")
        (root / name).write_text(replace_block(text, block), encoding="utf-8")
    figures.write(drawn(results), root / "docs" / "figures")


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the tables and figures, or with --check say whether they are those of the results; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if anything is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose pages are meant")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results of the root")
    parser.add_argument("--html", type=Path, help="write all results as one interactive page, and nothing else")
    options = parser.parse_args(arguments)
    results = options.results or options.root / "benchmarks" / "results"
    if options.html:
        from resfuse.bench.html import write_html

        write_html([row for name in _FILES for row in read(results / f"{name}.jsonl")], options.html)
        return 0
    if not options.check:
        write(options.root, results)
        return 0
    stale = check(options.root, results)
    for path in stale:
        print(f"{path}: not that of {results}; run python benchmarks/report.py")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
