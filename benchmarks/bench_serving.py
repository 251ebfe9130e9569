"""Inference: resfuse.fold beside torch, torch.compile with freezing, ONNX Runtime and OpenVINO, by latency and memory.

Each engine serves in a process of its own, from files that are written before (resfuse.bench.serving), with the same
number of threads; the processes are sampled in turn. Before anything is timed, the folded network's error against
float64 has to be at most twice that of torch in the same dtype, so torch's is always measured, and every other engine
has to compute the same network. A cell is a network, a batch and a dtype: images/s and
the quantiles of single calls, p99 among them, seconds of loading and the first call, and memory: the most that the
process held, and what it held when everything was imported. `fold_first_s` are the seconds of fold and its first call,
from a network in memory. Appends to benchmarks/results/serving.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resfuse.bench import parity, serving
from resfuse.bench.environment import native_environment
from resfuse.bench.gate import PEER_BOUND
from resfuse.bench.records import append
from resfuse.bench.timing import Samples, compare, milliseconds, quantile
from resfuse.demo.data import PHOTOS, load_photos, normalise

RESULTS = Path(__file__).parent / "results" / "serving.jsonl"
SECONDS_PER_SAMPLE = 0.4


class Cell(NamedTuple):
    """One row of the table, for each dtype."""

    model: str
    batch: int
    size: int


TABLE = tuple(Cell(model, batch, 224) for model in ("resnet50", "resnet18") for batch in (1, 8))
QUICK = (Cell("resnet18", 2, 64),)


class Worker:
    """A fresh process that serves one network by one engine."""

    def __init__(self, variant: str, cell: Cell, folder: Path, dtype: str, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", variant, cell.model, str(folder), dtype, str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question: str) -> Any:
        """What the worker answers to a line."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(question, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended with {self.process.wait()}")
        return json.loads(answer)

    def end(self) -> dict[str, int]:
        """The worker's memory; the process ends."""
        found = self.ask("memory")
        self.process.communicate()
        return found


def measure(cell: Cell, dtype: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One cell, all engines in turn; the record without its environment."""
    missing = {name: reason for name in options.variants if (reason := serving.why_missing(name, dtype)) is not None}
    names = [name for name in options.variants if name not in missing]
    workers, found = {}, {}
    for name in names:  # one after the other: loading is timed, too
        workers[name] = Worker(name, cell, folder, dtype, options.threads)
        found[name] = {"first_call_s": round(workers[name].ask("first"), 3), "error": workers[name].ask("error")}
    refuse_a_wrong_result(found, cell, dtype)
    samples, every = sampled(workers, options.rounds)
    for name, worker in workers.items():
        found[name] |= latencies(samples[name], every[name]) | worker.end()
        found[name]["images_per_s"] = round(1e3 * cell.batch / found[name]["median_ms"], 2)
    if "folded" in found:
        worker = Worker("fold", cell, folder, dtype, options.threads)
        found["folded"]["fold_first_s"] = round(worker.ask("first"), 3)
        worker.end()
    ratios = {f"folded/{name}": compare(samples, "folded", name)._asdict() for name in names if name != "folded"}
    ratios = ratios if "folded" in names else {}
    return {**cell._asdict(), "dtype": dtype, "variants": found, "ratios": ratios, "missing": missing}


def sampled(workers: dict[str, Worker], rounds: int) -> tuple[Samples, Samples]:
    """Seconds of calls by worker: the median of each round, and those of every call."""
    calls = {name: calls_per_sample(worker) for name, worker in workers.items()}
    names = list(workers)
    samples: Samples = {name: [] for name in names}
    every: Samples = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            seconds = workers[name].ask(f"run {calls[name]}")
            every[name] += seconds
            samples[name].append(quantile(seconds, 0.5))
    return samples, every


def calls_per_sample(worker: Worker) -> int:
    """So many calls that a sample is long beside a busy moment of the machine; also the warm-up."""
    return max(1, min(200, round(SECONDS_PER_SAMPLE / min(worker.ask("run 5")))))


def latencies(samples: Sequence[float], every: Sequence[float]) -> dict[str, Any]:
    """Quantiles over the rounds' medians, and those of single calls."""
    single = {f"p{q}_ms": round(1e3 * quantile(every, q / 100), 6) for q in (50, 99)}
    values = [round(1e3 * value, 6) for value in samples]
    return {**milliseconds(samples), **single, "calls": len(every), "values_ms": values}


def refuse_a_wrong_result(found: dict[str, Any], cell: Cell, dtype: str) -> None:
    """Raise SystemExit if folded is less exact than the bound allows, or another engine computes something else."""
    ours = 2 * found["eager"]["error"] + parity.FLOOR[getattr(torch, dtype)]
    for name, row in found.items():
        error, bound = row["error"], ours if name == "folded" else PEER_BOUND
        if not error <= bound:
            raise SystemExit(
                f"refusing to time a wrong result: {cell.model} {dtype} {name} is off by {error:.2e}, "
                f"allowed {bound:.2e}"
            )


def show(record: dict[str, Any]) -> None:
    """Print one cell, a line an engine."""
    print(f"{record['model']} {record['dtype']}, batch {record['batch']} of {record['size']}")
    for name, row in record["variants"].items():
        ratio = record["ratios"].get(f"folded/{name}")
        memory = (row["peak_rss_bytes"] - row["imported_rss_bytes"]) / 1e6
        print(
            f"  {name:12} {row['images_per_s']:8.1f} images/s  p50 {row['p50_ms']:8.2f} ms  p99 {row['p99_ms']:8.2f} ms"
            f"  first call {row['first_call_s']:6.2f} s  memory {memory:5.0f} MB  off by {row['error']:.1e}"
            + ("" if ratio is None else f"  folded is {1 / ratio['of_medians']:.2f}x"),
            flush=True,
        )
    for name, reason in record["missing"].items():
        print(f"  {name:12} {reason}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=["resnet50", "resnet18"], help="these networks alone")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", default=list(serving.VARIANTS), choices=serving.VARIANTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="small and few; no table shows such records")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.variants = [name for name in serving.VARIANTS if name == "eager" or name in options.variants]
    if options.quick:
        options.rounds = 2
    return options


def photographs(cell: Cell) -> torch.Tensor:
    """Real images, as many as the cell's batch, the same again where there are too few."""
    photos = normalise(load_photos(len(PHOTOS), cell.size))
    chosen = photos[torch.arange(cell.batch) % len(photos)]
    return chosen.contiguous(memory_format=torch.channels_last)


def main() -> None:
    """Measure every cell and append its record."""
    options = parse()
    if options.worker:
        serving.work(*options.worker)
        return
    torch.set_num_threads(options.threads)
    where = native_environment(options.dtypes)
    fixed = {"suite": "serving", "quick": options.quick, "environment": where, "backend": "native"}
    for cell in QUICK if options.quick else TABLE:
        if cell.batch not in options.batches or (options.only is not None and cell.model not in options.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            onnx = not {"onnxruntime", "openvino"}.isdisjoint(options.variants)
            serving.write(cell.model, photographs(cell), tuple(options.dtypes), Path(folder), onnx=onnx)
            for dtype in options.dtypes:
                found = measure(cell, dtype, Path(folder), options)
                record = {**fixed, "layout": "channels_last", "threads": options.threads, **found}
                append(options.output, record)
                show(record)


if __name__ == "__main__":
    main()
