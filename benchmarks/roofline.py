"""What the units of a ResNet-50 training step should take on a GPU: predictions, written as such, never measurements.

Bytes from stated counts over the bandwidth that a copy was measured to reach on that GPU. Replaces
benchmarks/results/predicted.jsonl, from which report.py makes the table of docs/cuda.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from resfuse import models
from resfuse.bench.records import append
from resfuse.bench.roofline import predict

RESULTS = Path(__file__).parent / "results" / "predicted.jsonl"
# GB/s of a device-to-device copy of several gigabytes by torch, bytes read and written: measured
COPIES = {"NVIDIA H200": 4300.0}


def main() -> None:
    """Write a row for each unit and shape, and print the sum."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="NVIDIA H200", help="its name, which the rows carry")
    parser.add_argument("--bandwidth", type=float, help="GB/s of a measured copy, for a GPU that is not known here")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    bandwidth = options.bandwidth or COPIES.get(options.gpu)
    if bandwidth is None:
        parser.error(f"no copy has been measured on {options.gpu!r}: give --bandwidth, or one of {', '.join(COPIES)}")
    element_size = getattr(torch, options.dtype).itemsize
    found = predict(models.resnet50, (options.batch, 3, 224, 224), element_size, bandwidth * 1e9)
    fixed = {"suite": "roofline", "predicted": True, "gpu": options.gpu, "copy_gb_per_s": bandwidth,
             "model": "resnet50", "batch": options.batch, "dtype": options.dtype}  # fmt: skip
    options.output.unlink(missing_ok=True)
    for prediction in found:
        append(options.output, {**fixed, **prediction._asdict()})
    moved, time = sum(p.bytes for p in found), sum(p.microseconds for p in found)
    print(f"predicted for {options.gpu} at {bandwidth:.0f} GB/s: {moved / 1e9:.1f} GB and {time / 1e3:.2f} ms a step")


if __name__ == "__main__":
    main()
