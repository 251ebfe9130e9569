"""Units on ResNet-50's activations and convolutions, beside stock torch and a copy: see resfuse.bench.units.

Appends to benchmarks/results/units.jsonl, which holds CPUs: a GPU's rows need --output.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resfuse.bench import units
from resfuse.bench.environment import native_environment
from resfuse.bench.records import append
from resfuse.bench.unit_peers import PACKAGES

RESULTS = Path(__file__).parent / "results" / "units.jsonl"


def main() -> None:
    """Measure every row and append its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--backend", choices=["native", "triton"])
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", type=int, help="side of the network's input")
    parser.add_argument("--dtypes", nargs="+")
    parser.add_argument("--only", nargs="+", metavar="UNIT", choices=units.UNITS, dest="units",
                        help="these units' rows alone; the results keep the others")  # fmt: skip
    parser.add_argument("--all-shapes", action="store_true", dest="everything", help="not one a map size")
    parser.add_argument("--peers", nargs="+", choices=PACKAGES, help="measured where they are installed")
    parser.add_argument("--peer-seconds", type=float, help="no peer is made ready later than this")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="small and few; the report leaves such records out")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = vars(parser.parse_args())
    output = options.pop("output")
    plan = units.Plan.chosen(**options)
    where = native_environment(plan.dtypes, plan.device, plan.backend)
    print(units.HEAD)
    for record in units.run(plan, where):
        append(output, record)
        print(units.line(record), flush=True)


if __name__ == "__main__":
    main()
