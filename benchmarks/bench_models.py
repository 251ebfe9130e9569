"""Networks as users train and serve them: images/s, memory, ratios to eager and to torch.compile, all channels_last.

The fused network first has to pass the parity bound; a wrong one is not timed. Each variant lives in a process of its
own, as users run it: what one leaves in the allocator does not slow or speed up another. The processes are sampled in
turn. Appends to benchmarks/results/models.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse import fuse
from resfuse.bench import parity
from resfuse.bench.environment import native_environment
from resfuse.bench.memory import model_tensors, peak_resident_bytes, saved_memory
from resfuse.bench.peers import import_torchvision
from resfuse.bench.records import append
from resfuse.bench.timing import compare, interleave, milliseconds

RESULTS = Path(__file__).parent / "results" / "models.jsonl"
VARIANTS = ("eager", "compile", "fused", "fused-compile")
BASELINES = ("eager", "compile")


def build(network: str, variant: str, seed: int = 0) -> nn.Module:
    """torchvision's network in channels_last as one of VARIANTS; the same weights for all."""
    torch.manual_seed(seed)
    model = getattr(import_torchvision().models, network)().to(memory_format=torch.channels_last)
    if variant.startswith("fused"):
        fuse(model, backend="native", strict=True)
    return torch.compile(model) if variant.endswith("compile") else model


def batch_of(batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Random images in channels_last and labels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(batch) % 1000


def lower_precision(dtype: str) -> torch.autocast:
    """autocast to `dtype`, or nothing for float32."""
    return torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32")


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, dtype: str) -> Tensor:
    """Mean cross entropy of a forward pass."""
    with lower_precision(dtype):
        outputs = model(images)
    return F.cross_entropy(outputs.float(), labels)


def workload(model: nn.Module, mode: str, dtype: str, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """What is timed: a training step with SGD and momentum, or a forward pass in evaluation mode without autograd."""
    if mode == "inference":
        model.eval()

        def infer() -> Tensor:
            with torch.inference_mode(), lower_precision(dtype):
                return model(images)

        return infer
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, images, labels, dtype).backward()
        optimizer.step()

    return step


def check(network: str, dtype: str) -> None:
    """Refuse a fused network whose training step, outputs or gradients, is less exact than the bound allows."""
    images, labels = batch_of(8, 64)
    autocast = None if dtype == "float32" else getattr(torch, dtype)
    weights = parity.condition(build(network, "eager")).state_dict()

    def step(variant: str, layout: torch.memory_format, precision: torch.dtype = torch.float32) -> parity.Step:
        model = build(network, variant)
        model.load_state_dict(weights)
        model = model.to(precision, memory_format=layout)
        data = images.to(precision, memory_format=layout)
        return parity.training_step(model, data, labels, autocast if precision == torch.float32 else None)

    exact = step("eager", torch.channels_last, torch.float64)
    layouts = (torch.channels_last, torch.contiguous_format)
    stock = [parity.step_errors(step("eager", layout), exact) for layout in layouts]
    ours = parity.step_errors(step("fused", torch.channels_last), exact)
    for verdict in parity.judge(ours, stock, getattr(torch, dtype)):
        if not verdict.holds:
            raise SystemExit(
                f"refusing to time a wrong result: {network} {dtype} {verdict.quantity} is off by {verdict.ours:.2e}, "
                f"allowed {verdict.bound:.2e}"
            )


class Worker:
    """A fresh process that holds one variant and runs its workload once for each call."""

    def __init__(self, *cell: str) -> None:
        command = [sys.executable, __file__, "--worker", *cell]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, word: str) -> str:
        """Send a word and wait for the answer, the next line that the process prints."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(word, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended with {self.process.wait()}")
        return answer

    def __call__(self) -> None:
        self.ask("run")

    def memory(self) -> dict[str, int]:
        """The process's memory after the import and at most, and the bytes kept for backward; it ends here."""
        found = json.loads(self.ask("memory"))
        self.process.communicate()
        return found


def work(network: str, variant: str, mode: str, dtype: str, batch: str, size: str) -> None:
    """The other side of :class:`Worker`."""
    import_torchvision()
    start = peak_resident_bytes()
    images, labels = batch_of(int(batch), int(size))
    model = build(network, variant)
    run = workload(model, mode, dtype, images, labels)
    for line in sys.stdin:
        if line.strip() == "run":
            run()
            print("done", flush=True)
            continue
        found = {"imported_rss_bytes": start, "peak_rss_bytes": peak_resident_bytes()}
        if mode == "training":
            found["saved_bytes"] = saved_memory(
                lambda: loss_of(model, images, labels, dtype), model_tensors(model)
            ).bytes
        print(json.dumps(found), flush=True)
        return


def measure(network: str, mode: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time one cell, all variants in turn; the record without its environment."""
    cell = {"model": network, "mode": mode, "dtype": dtype, "batch": options.batch, "size": options.size}
    rest = [mode, dtype, str(options.batch), str(options.size)]
    workers = {variant: Worker(network, variant, *rest) for variant in options.variants}
    samples = interleave(workers, rounds=options.rounds, warmup=3)
    found: dict[str, dict[str, Any]] = {}
    for name, worker in workers.items():
        found[name] = milliseconds(samples[name])
        found[name]["images_per_s"] = round(1e3 * options.batch / found[name]["median_ms"], 2)
        found[name] |= worker.memory()
    ratios = {
        f"{name}/{baseline}": compare(samples, name, baseline)._asdict()
        for name in workers
        for baseline in BASELINES
        if name.startswith("fused") and baseline in workers
    }
    return {**cell, "variants": found, "ratios": ratios}


def show(record: dict[str, Any]) -> None:
    """Print one cell, a line a variant."""
    print(f"{record['model']} {record['mode']} {record['dtype']}, batch {record['batch']} of {record['size']}")
    for name, row in record["variants"].items():
        speedups = [
            f"{1 / record['ratios'][key]['of_medians']:.2f}x {b} ({1 / record['ratios'][key]['paired']:.2f}x paired)"
            for b in BASELINES
            if (key := f"{name}/{b}") in record["ratios"]
        ]
        sizes = ("saved", "saved_bytes"), ("peak", "peak_rss_bytes")
        memory = [f"{label} {row[key] / 1e6:.0f} MB" for label, key in sizes if key in row]
        print(
            f"  {name:14} {row['images_per_s']:8.1f} images/s  {row['median_ms']:9.1f} ms "
            f"({row['p20_ms']:.1f}-{row['p80_ms']:.1f})  {'  '.join(memory + speedups)}",
            flush=True,
        )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--modes", nargs="+", default=["training", "inference"], choices=["training", "inference"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", default=["eager", "compile", "fused"], choices=VARIANTS)
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs minutes of torch.compile")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="small and few; the report leaves such records out")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.models, options.batch, options.size, options.rounds = ["resnet18"], 4, 64, 3
    if options.no_compile:
        options.variants = [v for v in options.variants if not v.endswith("compile")]
    return options


def main() -> None:
    """Measure every cell and append its record."""
    options = parse()
    if options.worker:
        work(*options.worker)
        return
    where = native_environment(options.dtypes)
    fixed = {"suite": "models", "quick": options.quick, "environment": where, "backend": "native"}
    for network in options.models:
        for dtype in options.dtypes:
            check(network, dtype)
            for mode in options.modes:
                record = {**fixed, "layout": "channels_last", **measure(network, mode, dtype, options)}
                append(options.output, record)
                show(record)


if __name__ == "__main__":
    main()
