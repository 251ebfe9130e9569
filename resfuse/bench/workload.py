"""What is timed of a network: its variants, its batch, and a training step, its parts, or a forward pass to call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from resfuse import fuse, models
from resfuse.bench import convolutions, parity, peers
from resfuse.bench.shapes import conv_shapes

MODES = ("forward", "backward", "training", "inference", "memory")
PRECISIONS = ("float32", "bfloat16", "float16")
"""What networks and blocks run in: as they are, or autocast to what it lowers to."""


class Task(NamedTuple):
    """What one process runs.

    Attributes:
        model: a network's name.
        variant: of :data:`resfuse.bench.peers.PEERS` or OURS.
        mode: of MODES; or "optimizer", the last part of a training step, or "convolutions", bare ones.
        dtype: of PRECISIONS.
        batch, size: images, and their side in pixels.
        device: "cpu" or "cuda".
        threads: of torch; 0 leaves them as they are.
    """

    model: str
    variant: str
    mode: str
    dtype: str
    batch: int
    size: int
    device: str = "cpu"
    threads: int = 0


class Workload(NamedTuple):
    """A task, ready to run.

    Attributes:
        run: what is timed.
        prepare: what each run needs ahead of it, untimed; None where nothing.
        outputs: the network's outputs on the batch, in the task's mode and precision.
        loss: a forward pass that builds a graph; None where nothing is kept for backward.
        model: None where an engine holds the weights, or nothing does.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None
    outputs: Callable[[], Tensor] | None = None
    loss: Callable[[], Tensor] | None = None
    model: nn.Module | None = None


def stock(network: str) -> nn.Module:
    """The network as torchvision builds it, or resfuse.models where torchvision is missing or has none.

    Raises:
        ValueError: neither has it, with the nearest names.
    """
    try:
        torchvision = peers.import_torchvision().models
    except ImportError:
        return models.get_model(network)
    known = network in torchvision.list_models()
    return torchvision.get_model(network, weights=None) if known else models.get_model(network)


def build(network: str, variant: str, device: str = "cpu", seed: int = 0) -> nn.Module:
    """The network in channels_last as one of the variants; the same weights for all, of weakened branches."""
    torch.manual_seed(seed)
    model = parity.weaken(stock(network)).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if variant.startswith("fused"):
        fuse(model, backend="native", strict=True)
    return peers.as_module("compile" if variant == "fused-compile" else variant, model)


def batch_of(
    batch: int, size: int, device: str = "cpu", layout: torch.memory_format = torch.channels_last, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return images.to(device, memory_format=layout), torch.arange(batch, device=device) % 10


def lower_precision(device: str, dtype: str) -> torch.autocast:
    """autocast to `dtype`, or nothing for float32.

    Raises:
        ValueError: `dtype` is none of PRECISIONS: torch would warn, and run in float32.
    """
    if dtype not in PRECISIONS:
        raise ValueError(f"networks run in {', '.join(PRECISIONS)}, got {dtype!r}")
    return torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32")


@contextlib.contextmanager
def nothing_dropped(model: nn.Module) -> Iterator[None]:
    """Within: dropout passes everything on, so that outputs in training mode can be compared."""
    layers = [module for module in model.modules() if isinstance(module, _DropoutNd)]
    shares = [layer.p for layer in layers]
    try:
        for layer in layers:
            layer.p = 0.0
        yield
    finally:
        for layer, share in zip(layers, shares, strict=True):
            layer.p = share


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, dtype: str) -> Tensor:
    """Mean cross entropy of a forward pass."""
    with lower_precision(images.device.type, dtype):
        outputs = model(images)
    return F.cross_entropy(outputs.float(), labels)


def workload(task: Task) -> Workload:
    """Everything that a task needs, built in this process."""
    layout = torch.contiguous_format if task.variant == "eager-contiguous" else torch.channels_last
    images, labels = batch_of(task.batch, task.size, task.device, layout)
    if task.mode == "convolutions":
        return Workload(bare_convolutions(task, images))
    if task.variant in peers.PEERS and peers.PEERS[task.variant].package is not None:
        model = build(task.model, "eager", task.device).eval()
        run = peers.engine(task.variant, model, images, task.dtype)
        return Workload(run, outputs=run)
    model = build(task.model, task.variant, task.device)
    return _inference(model, task, images) if task.mode == "inference" else _training(model, task, images, labels)


def _inference(model: nn.Module, task: Task, images: Tensor) -> Workload:
    model.eval()
    # Inductor freezes under no_grad alone
    mode = torch.no_grad if task.variant == "freeze" else torch.inference_mode

    def infer() -> Tensor:
        with mode(), lower_precision(task.device, task.dtype):
            return model(images)

    return Workload(infer, outputs=infer, model=model)


def _training(model: nn.Module, task: Task, images: Tensor, labels: Tensor) -> Workload:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    kept: list[Tensor] = []

    def outputs() -> Tensor:
        with lower_precision(task.device, task.dtype), nothing_dropped(model):
            return model(images).detach()

    def loss() -> Tensor:
        return loss_of(model, images, labels, task.dtype)

    def forward() -> None:
        kept.append(loss())

    def ahead_of_backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        kept[:] = [loss()]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    if task.mode == "optimizer":
        step()
        return Workload(optimizer.step)
    rest = outputs, loss, model
    if task.mode == "forward":
        return Workload(forward, kept.clear, *rest)
    if task.mode == "backward":
        return Workload(lambda: kept.pop().backward(), ahead_of_backward, *rest)
    return Workload(step, None, *rest)


def bare_convolutions(task: Task, images: Tensor) -> Callable[[], object]:
    """The convolutions of a training step alone, by the kernels that eager's or the fused network's use."""
    wanted = getattr(torch, task.dtype)
    tiled = convolutions.served_by_tiles(build(task.model, task.variant), wanted)
    shapes = conv_shapes(lambda: stock(task.model), tuple(images.shape))
    bare = convolutions.bare_convolutions(shapes, tiled, wanted)
    return lambda: convolutions.run(bare)
