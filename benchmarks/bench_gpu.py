"""A ResNet's training step on one NVIDIA GPU: images/s and memory, stock, compiled and fused, with and without graphs.

Mixed precision, channels_last, SGD with momentum. The fused network first has to pass the parity bound. Variants run
one after another, since together they may not fit into memory, and each appends its record as soon as it is measured.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse import choices, fuse, models
from resfuse.bench import parity
from resfuse.bench.environment import gpu_state, native_environment
from resfuse.bench.memory import model_tensors, saved_memory
from resfuse.bench.records import append
from resfuse.bench.timing import interleave, milliseconds

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
# what a variant is made of: a network, what torch.compile makes of it, and a CUDA graph of the whole step
NETWORKS = ("eager", "fused", "triton", "compile", "fused-compile")
VARIANTS = tuple(network + graph for network in NETWORKS for graph in ("", "-graph"))


def backend_of(variant: str) -> str | None:
    """Whose kernels a fused network runs on: its convolutions are Triton's or, with native kernels, cuDNN's."""
    kind = variant.partition("-")[0]
    return {"fused": "native", "triton": "triton"}.get(kind)


def build(network: str, variant: str, device: str) -> nn.Module:
    """One of VARIANTS, in training mode; the same weights for all."""
    torch.manual_seed(0)
    model = models.get_model(network).to(device, memory_format=torch.channels_last)
    if (backend := backend_of(variant)) is not None:
        fuse(model, backend=backend, strict=True)
    return torch.compile(model) if "compile" in variant else model


def batch_of(batch: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Random images in channels_last and labels."""
    images = torch.randn(batch, 3, size, size, device=device, generator=torch.Generator(device).manual_seed(1))
    return images.contiguous(memory_format=torch.channels_last), torch.arange(batch, device=device) % 1000


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean cross entropy of a forward pass under autocast."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        outputs = model(images)
    return F.cross_entropy(outputs.float(), labels)


def training_step(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """What is timed: forward, backward and an update, on tensors that stay where they are."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, images, labels, dtype).backward()
        optimizer.step()

    return step


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """The step as a CUDA graph; it has run a few times before, so that nothing is set up while it is captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def measure(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time one variant; the record without its environment."""
    dtype = getattr(torch, options.dtype)
    images, labels = batch_of(options.batch, options.size, "cuda")
    model = build(options.model, variant, "cuda")
    torch.cuda.reset_peak_memory_stats()
    step = training_step(model, images, labels, dtype)
    run = captured(step) if variant.endswith("graph") else step
    # several steps a sample: as in training, the host runs ahead of the GPU
    times = milliseconds(interleave({variant: run}, rounds=options.rounds, warmup=5, seconds_per_sample=0.2)[variant])
    found = {
        "variant": variant,
        **times,
        "images_per_s": round(1e3 * options.batch / times["median_ms"], 1),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "gpu": gpu_state(),
    }
    if variant in ("eager", "fused", "triton"):
        found["saved_bytes"] = saved_memory(lambda: loss_of(model, images, labels, dtype), model_tensors(model)).bytes
    return found


def check(network: str, dtype: str, backend: str, batch: int, device: str = "cuda", size: int = 128) -> None:
    """Refuse a fused network whose training step is less exact than the bound allows, or whose kernels are missing.

    The batch is that of the steps that are timed, so that Triton compiles the same kernels for both.
    """
    stock = build(network, "eager", device)
    verdicts = parity.judge_fused(stock, *batch_of(batch, size, device), getattr(torch, dtype), backend)
    parity.refuse_a_wrong_result(verdicts, f"{network} {dtype} {backend}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Measure every variant and append its record."""
    options = parse()
    kernels = list(dict.fromkeys(filter(None, map(backend_of, options.variants))))
    where = native_environment([], "cuda")
    torch.backends.cudnn.benchmark = True  # for all variants alike
    for backend in kernels:
        check(options.model, options.dtype, backend, options.batch)
    for variant in options.variants:
        cell = {"suite": "gpu-models", "model": options.model, "mode": "training", "dtype": options.dtype,
                "batch": options.batch, "size": options.size, "layout": "channels_last",
                "backend": backend_of(variant)}  # fmt: skip
        if cell["backend"] == "triton":
            cell["choices"] = "measured" if choices.table_of(where["device_name"]) else "by rule"
        record = {**cell, **measure(variant, options), "environment": where}
        append(options.output, record)
        print(
            f"{options.model} batch {options.batch} {variant:20} {record['images_per_s']:9.1f} images/s "
            f"{record['median_ms']:8.3f} ms  peak {record['peak_bytes'] / 1e9:.1f} GB",
            flush=True,
        )
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
