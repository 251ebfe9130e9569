"""Residual blocks of networks, forward, backward and both, stock and fused: see resfuse.bench.blocks.

Appends to benchmarks/results/blocks.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resfuse.bench import blocks
from resfuse.bench.environment import native_environment
from resfuse.bench.records import append
from resfuse.bench.workload import PRECISIONS

RESULTS = Path(__file__).parent / "results" / "blocks.jsonl"


def main() -> None:
    """Measure every row and append its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--modes", nargs="+", default=list(blocks.MODES), choices=blocks.MODES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=PRECISIONS)
    parser.add_argument("--variants", nargs="+", default=["eager", "fused"], choices=blocks.VARIANTS)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", type=int, help="side of the network's input")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="small and few; the report leaves such records out")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    batch, size = (2, 64) if options.quick else (16, 224)
    batch, size = options.batch or batch, options.size or size
    where = native_environment(options.dtypes, options.device)
    for model in options.models:
        plan = blocks.Plan(model, batch, size, options.modes, options.dtypes, options.variants,
                           rounds=options.rounds, device=options.device, quick=options.quick)  # fmt: skip
        for record in blocks.run(plan, where):
            append(options.output, record)
            print("\n".join(blocks.lines(record)), flush=True)


if __name__ == "__main__":
    main()
