"""Speed part: a training step and an inference pass timed stock and fused, and the bytes kept for backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse import fuse
from resfuse.bench.memory import model_tensors, saved_memory
from resfuse.bench.timing import Samples, compare, interleave, milliseconds
from resfuse.demo.parity import build, to_layout
from resfuse.demo.settings import Settings

_WARMUP = 2


def ticks(settings: Settings) -> int:
    """How often :func:`measure` calls tick."""
    return sum(2 * (3 * settings.rounds_of(name) + 2 * _WARMUP) for name in settings.dtypes)


def measure(
    photos: Tensor, settings: Settings, backend: str | None, tick: Callable[[], object]
) -> list[dict[str, Any]]:
    """Time both networks in turn, from the same weights, both in channels_last.

    Args:
        photos (Tensor): (N, 3, H, W) float32, normalised.
        settings (Settings): the network, the dtypes and the number of rounds.
        backend (str | None): for the fused network.
        tick (Callable[[], object]): called after every pass.

    Returns:
        list[dict]: for each dtype the quantiles of both modes in milliseconds, fused over stock as the ratio of medians
        and as the median of paired ratios, and the bytes saved for backward.
    """
    found = []
    for name in settings.dtypes:
        images, rounds = photos[: settings.photos_of(name)], settings.rounds_of(name)
        autocast = None if name == "float32" else getattr(torch, name)
        stock = to_layout(build("torchvision", settings.network), torch.channels_last)
        models = {"stock": stock, "fused": fuse(copy.deepcopy(stock), backend=backend, strict=True)}
        record: dict[str, Any] = {"dtype": name, "batch": len(images), "size": settings.photo_size}
        record["saved_bytes"] = {n: _saved_bytes(model, images, autocast) for n, model in models.items()}
        steps = {n: training_step(model, images, autocast) for n, model in models.items()}
        record["training"] = _summary(interleave(steps, rounds=rounds, warmup=_WARMUP, tick=tick))
        passes = {n: inference_pass(model, images, autocast) for n, model in models.items()}
        record["inference"] = _summary(interleave(passes, rounds=2 * rounds, warmup=_WARMUP, tick=tick))
        found.append(record)
    return found


def training_step(model: nn.Module, images: Tensor, autocast: torch.dtype | None) -> Callable[[], None]:
    """A function that takes one step: forward, cross entropy, backward, SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    labels = torch.arange(len(images))
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        _loss(model, images, labels, autocast).backward()
        optimizer.step()

    return step


def inference_pass(model: nn.Module, images: Tensor, autocast: torch.dtype | None) -> Callable[[], Tensor]:
    """A function that runs the model in evaluation mode without autograd."""
    model.eval()

    def infer() -> Tensor:
        with torch.inference_mode(), _autocast(images, autocast):
            return model(images)

    return infer


def _loss(model: nn.Module, images: Tensor, labels: Tensor, autocast: torch.dtype | None) -> Tensor:
    with _autocast(images, autocast):
        outputs = model(images)
    return F.cross_entropy(outputs.float(), labels)


def _autocast(images: Tensor, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(images.device.type, dtype, enabled=dtype is not None)


def _saved_bytes(model: nn.Module, images: Tensor, autocast: torch.dtype | None) -> int:
    labels = torch.arange(len(images))
    return saved_memory(lambda: _loss(model.train(), images, labels, autocast), model_tensors(model)).bytes


def _summary(samples: Samples) -> dict[str, Any]:
    quantiles = {name: milliseconds(values) for name, values in samples.items()}
    return {**quantiles, "ratio": compare(samples, "fused", "stock")._asdict()}
