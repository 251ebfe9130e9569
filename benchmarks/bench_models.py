"""Networks as users train and serve them: images/s, memory, ratios to eager and to torch.compile, all channels_last.

The fused network first has to pass the parity bound; a wrong one is not timed. Each variant lives in a process of its
own, as users run it: what one leaves in the allocator does not slow or speed up another. The processes are sampled in
turn. Appends to benchmarks/results/models.jsonl; a run of part of the table (--only) leaves the other rows as they are.

Training cells also say what a step spends outside convolutions and the optimizer: its time, less that of its
convolutions run bare (resfuse.bench.convolutions: forward and both gradients, by the kernels that the variant uses, in
a process of their own), less that of the optimizer's step; the median over the rounds. Products and passes share
kernels in the fused network, so no profile of it can tell them apart; eager's part is taken in the same way. Products
that only folding needs count as outside. A small difference of large times: it may come out below zero.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse import fuse, models
from resfuse.bench import convolutions, parity
from resfuse.bench.environment import native_environment
from resfuse.bench.memory import model_tensors, peak_resident_bytes, saved_memory
from resfuse.bench.peers import import_torchvision
from resfuse.bench.records import append
from resfuse.bench.shapes import conv_shapes
from resfuse.bench.timing import Samples, compare, interleave, milliseconds

RESULTS = Path(__file__).parent / "results" / "models.jsonl"
VARIANTS = ("eager", "compile", "fused", "fused-compile")
BASELINES = ("eager", "compile")


class Cell(NamedTuple):
    """One row of the table, for each dtype. Mode memory takes a few training steps and times nothing."""

    model: str
    mode: str
    batch: int
    size: int


TABLE = (
    Cell("resnet18", "training", 16, 224),
    Cell("resnet18", "inference", 16, 224),
    Cell("resnet50", "training", 16, 224),
    Cell("resnet50", "inference", 16, 224),
    Cell("resnet50", "memory", 32, 224),
    Cell("resnext50_32x4d", "training", 16, 224),
    Cell("cifar_resnet20", "training", 32, 32),
)
QUICK = (Cell("resnet18", "training", 4, 64), Cell("resnet18", "inference", 4, 64), Cell("resnet18", "memory", 4, 64))


def stock(network: str) -> nn.Module:
    """The network as torchvision builds it, or resfuse.models where torchvision has none."""
    torchvision = import_torchvision().models
    return getattr(torchvision, network)() if hasattr(torchvision, network) else models.get_model(network)


def build(network: str, variant: str, seed: int = 0) -> nn.Module:
    """The network in channels_last as one of VARIANTS; the same weights for all."""
    torch.manual_seed(seed)
    model = stock(network).to(memory_format=torch.channels_last)
    if variant.startswith("fused"):
        fuse(model, backend="native", strict=True)
    return torch.compile(model) if variant.endswith("compile") else model


def batch_of(batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Random images in channels_last and labels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(batch) % 10


def lower_precision(dtype: str) -> torch.autocast:
    """autocast to `dtype`, or nothing for float32."""
    return torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32")


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, dtype: str) -> Tensor:
    """Mean cross entropy of a forward pass."""
    with lower_precision(dtype):
        outputs = model(images)
    return F.cross_entropy(outputs.float(), labels)


def workload(model: nn.Module, mode: str, dtype: str, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """What is timed: a training step with SGD and momentum, or a forward pass in evaluation mode without autograd.

    Mode optimizer is the step's last part alone, on gradients that stay.
    """
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

    if mode == "optimizer":
        step()
        return optimizer.step
    return step


def bare_convolutions(network: str, variant: str, dtype: str, images: Tensor) -> Callable[[], object]:
    """The convolutions of a training step alone, by the kernels that eager's or the fused network's use."""
    wanted = getattr(torch, dtype)
    tiled = convolutions.served_by_tiles(build(network, variant), wanted)
    shapes = conv_shapes(lambda: stock(network), tuple(images.shape))
    bare = convolutions.bare_convolutions(shapes, tiled, wanted)
    return lambda: convolutions.run(bare)


def check(network: str, dtype: str) -> None:
    """Refuse a fused network whose training step, outputs or gradients, is less exact than the bound allows."""
    verdicts = parity.judge_fused(build(network, "eager"), *batch_of(8, 64), getattr(torch, dtype))
    parity.refuse_a_wrong_result(verdicts, f"{network} {dtype}")


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
    if mode == "convolutions":
        run = bare_convolutions(network, variant, dtype, images)
    else:
        model = build(network, variant)
        run = workload(model, mode, dtype, images, labels)
    for line in sys.stdin:
        if line.strip() == "run":
            run()
            print("done", flush=True)
            continue
        found = {"imported_rss_bytes": start, "peak_rss_bytes": peak_resident_bytes()}
        if mode in ("training", "memory"):
            found["saved_bytes"] = saved_memory(
                lambda: loss_of(model, images, labels, dtype), model_tensors(model)
            ).bytes
        print(json.dumps(found), flush=True)
        return


def measure(cell: Cell, dtype: str, variants: Sequence[str], rounds: int) -> dict[str, Any]:
    """Time one cell, all variants in turn, or take its memory; the record without its environment."""
    record: dict[str, Any] = {**cell._asdict(), "dtype": dtype}
    rest = (dtype, str(cell.batch), str(cell.size))
    workers = {variant: Worker(cell.model, variant, cell.mode, *rest) for variant in variants}
    if cell.mode == "memory":
        for worker in 3 * list(workers.values()):
            worker()
        return {**record, "variants": {name: worker.memory() for name, worker in workers.items()}, "ratios": {}}
    parts = _parts(cell, variants, rest) if cell.mode == "training" else {}
    samples = interleave({**workers, **parts}, rounds=rounds, warmup=3)
    found: dict[str, dict[str, Any]] = {}
    for name, worker in workers.items():
        found[name] = milliseconds(samples[name])
        found[name]["images_per_s"] = round(1e3 * cell.batch / found[name]["median_ms"], 2)
        found[name] |= worker.memory()
    for worker in parts.values():
        worker.memory()
    ratios = {
        f"{name}/{baseline}": compare(samples, name, baseline)._asdict()
        for name in workers
        for baseline in BASELINES
        if name.startswith("fused") and baseline in workers
    }
    times = {name: milliseconds(samples[name]) for name in parts}
    return {**record, "variants": found, "ratios": ratios, "parts": times, "outside_ms": outside(samples)}


def _parts(cell: Cell, variants: Sequence[str], rest: tuple[str, ...]) -> dict[str, Worker]:
    """What is subtracted from a training step: for eager and fused the bare convolutions, and the optimizer."""
    split = [variant for variant in ("eager", "fused") if variant in variants]
    found = {f"{variant} convolutions": Worker(cell.model, variant, "convolutions", *rest) for variant in split}
    return {**found, "optimizer": Worker(cell.model, "eager", "optimizer", *rest)} if split else {}


def outside(samples: Samples) -> dict[str, float]:
    """Milliseconds of a training step outside convolutions and optimizer, by variant: see the head of this file."""
    return {
        name: round(
            1e3 * statistics.median(a - b - c for a, b, c in zip(step, bare, samples["optimizer"], strict=True)), 6
        )
        for name, step in samples.items()
        if (bare := samples.get(f"{name} convolutions")) is not None
    }


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
        rest = [f"outside {record['outside_ms'][name]:.1f} ms"] if name in record.get("outside_ms", {}) else []
        time = (
            f"{row['images_per_s']:8.1f} images/s  {row['median_ms']:9.1f} ms ({row['p20_ms']:.1f}-{row['p80_ms']:.1f})"
            if "median_ms" in row
            else ""
        )
        print(f"  {name:14} {'  '.join([time, *memory, *rest, *speedups])}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=dict.fromkeys(c.model for c in TABLE), metavar="MODEL",
        help="these networks' rows alone; the results keep the others",
    )  # fmt: skip
    parser.add_argument("--modes", nargs="+", default=["training", "memory", "inference"],
                        choices=["training", "memory", "inference"])  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", default=["eager", "compile", "fused"], choices=VARIANTS)
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs minutes of torch.compile")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="small and few; the report leaves such records out")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds = 3
    if options.no_compile:
        options.variants = [v for v in options.variants if not v.endswith("compile")]
    return options


def chosen(options: argparse.Namespace) -> list[Cell]:
    """The cells that the command line asks for."""
    table = QUICK if options.quick else TABLE
    return [c for c in table if c.mode in options.modes and (options.only is None or c.model in options.only)]


def main() -> None:
    """Measure every cell and append its record."""
    options = parse()
    if options.worker:
        work(*options.worker)
        return
    where = native_environment(options.dtypes)
    fixed = {"suite": "models", "quick": options.quick, "environment": where, "backend": "native"}
    cells = chosen(options)
    for network, dtype in dict.fromkeys((cell.model, dtype) for cell in cells for dtype in options.dtypes):
        check(network, dtype)
        for cell in cells:
            if cell.model == network:
                found = measure(cell, dtype, options.variants, options.rounds)
                record = {**fixed, "layout": "channels_last", **found}
                append(options.output, record)
                show(record)


if __name__ == "__main__":
    main()
