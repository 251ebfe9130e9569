"""What the units of a ResNet-50 training step should take on a GPU: predictions, written as such, never measurements.

Bytes from stated counts over the bandwidth that a copy was measured to reach on that GPU; of convolutions, operations
over its tensor cores' peak where these take longer. Replaces predicted.jsonl and predicted_products.jsonl in
benchmarks/results, from which report.py makes the tables of docs/cuda.md and docs/triton.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from resfuse import models
from resfuse.bench import products
from resfuse.bench.records import append
from resfuse.bench.roofline import predict

RESULTS = Path(__file__).parent / "results" / "predicted.jsonl"
# GB/s of a device-to-device copy of several gigabytes by torch, bytes read and written: measured
COPIES = {"NVIDIA H200": 4300.0}
# 10^12 operations per second of dense products of 16-bit values: NVIDIA's data sheet
PEAKS = {"NVIDIA H200": 989.0}


def write(path: Path, predictions: Sequence[Any], fixed: dict[str, Any]) -> None:
    """The predictions as the file's only rows."""
    path.unlink(missing_ok=True)
    for prediction in predictions:
        append(path, {**fixed, **prediction._asdict()})


def main() -> None:
    """Write a row for each unit and shape, and print the sum."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="NVIDIA H200", help="its name, which the rows carry")
    parser.add_argument("--bandwidth", type=float, help="GB/s of a measured copy, for a GPU that is not known here")
    parser.add_argument("--peak", type=float, help="10^12 operations per second of its tensor cores, likewise")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS, help="of passes; that of products lies beside it")
    options = parser.parse_args()
    bandwidth = options.bandwidth or COPIES.get(options.gpu)
    if bandwidth is None:
        parser.error(f"no copy has been measured on {options.gpu!r}: give --bandwidth, or one of {', '.join(COPIES)}")
    dtype, shape = getattr(torch, options.dtype), (options.batch, 3, 224, 224)
    found = predict(models.resnet50, shape, dtype.itemsize, bandwidth * 1e9)
    fixed = {"suite": "roofline", "predicted": True, "gpu": options.gpu, "copy_gb_per_s": bandwidth,
             "model": "resnet50", "batch": options.batch, "dtype": options.dtype}  # fmt: skip
    write(options.output, found, fixed)
    peak = options.peak or PEAKS.get(options.gpu)
    if peak is not None:
        of_products = products.predict(models.resnet50, shape, dtype, bandwidth * 1e9, peak * 1e12)
        beside = options.output.with_name(f"{options.output.stem}_products.jsonl")
        write(beside, of_products, {**fixed, "suite": "roofline_products", "peak_tflops": peak})
    moved, time = sum(p.bytes for p in found), sum(p.microseconds for p in found)
    print(f"predicted for {options.gpu} at {bandwidth:.0f} GB/s: {moved / 1e9:.1f} GB and {time / 1e3:.2f} ms a step")


if __name__ == "__main__":
    main()
