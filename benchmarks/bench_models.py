"""Networks as users train and serve them, beside eager, torch.compile and other peers: see resfuse.bench.networks.

Appends to benchmarks/results/models.jsonl; a run of part of the table (--only) leaves the other rows as they are. With
--scaling the cost of a step along batch, image size, depth and threads goes to benchmarks/results/scaling.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resfuse.bench import networks, peers, scaling
from resfuse.bench.environment import native_environment
from resfuse.bench.networks import Cell
from resfuse.bench.records import append
from resfuse.bench.workload import PRECISIONS

RESULTS = Path(__file__).parent / "results"
TABLE = (
    Cell("resnet18", "training", 16, 224),
    Cell("resnet18", "inference", 16, 224),
    Cell("resnet50", "forward", 16, 224),
    Cell("resnet50", "backward", 16, 224),
    Cell("resnet50", "training", 16, 224),
    Cell("resnet50", "inference", 16, 224),
    Cell("resnet50", "memory", 32, 224),
    Cell("resnext50_32x4d", "training", 16, 224),
    Cell("cifar_resnet20", "training", 32, 32),
)
QUICK = tuple(Cell("resnet18", mode, 4, 64) for mode in ("forward", "backward", "training", "inference", "memory"))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=dict.fromkeys(c.model for c in TABLE), metavar="MODEL",
        help="these networks' rows alone; the results keep the others",
    )  # fmt: skip
    modes = list(dict.fromkeys(cell.mode for cell in TABLE))
    parser.add_argument("--modes", nargs="+", default=modes, choices=modes)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=PRECISIONS)
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["eager", "compile", "fused"],
        choices=[*peers.PEERS, *peers.OURS, "all"],
        help="all: every peer that a row can have",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs minutes of torch.compile")
    parser.add_argument("--scaling", nargs="*", choices=scaling.AXES, metavar="AXIS",
                        help="cost along these axes in place of the table; all four if none is named")  # fmt: skip
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="small and few; the report leaves such records out")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if "all" in options.variants:
        options.variants = [*peers.PEERS, *peers.OURS]
    if options.no_compile:
        options.variants = [v for v in options.variants if "compile" not in v and v != "freeze"]
    return options


def chosen(options: argparse.Namespace) -> list[Cell]:
    """The cells that the command line asks for."""
    table = QUICK if options.quick else TABLE
    return [c for c in table if c.mode in options.modes and (options.only is None or c.model in options.only)]


def main() -> None:
    """Measure every cell and append its record."""
    options = parse()
    where = native_environment(options.dtypes)
    if options.scaling is None:
        rounds = options.rounds or (6 if options.quick else 9)
        plan = networks.Plan(chosen(options), options.dtypes, options.variants, rounds, parts=True, quick=options.quick)
        rows, output = networks.run(plan, where), options.output or RESULTS / "models.jsonl"
    else:
        points = scaling.points(options.scaling or scaling.AXES, quick=options.quick)
        rows = scaling.run(points, options.dtypes, where, rounds=options.rounds or 6, quick=options.quick)
        output = options.output or RESULTS / "scaling.jsonl"
    measured = []
    for record in rows:
        append(output, record)
        measured.append(record)
        print("\n".join(networks.lines(record)), flush=True)
    print("\n".join(scaling.findings(measured)))


if __name__ == "__main__":
    main()
