"""Digits part: a small ResNet learns handwritten digits twice from the same start, stock and fused, in lockstep.

Its pieces (:func:`batches`, :func:`trainer`, :func:`held_out`) also serve the test of a whole training run.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse import fuse
from resfuse.bench.timing import compare, milliseconds
from resfuse.demo.data import ImageSet
from resfuse.demo.parity import to_layout
from resfuse.demo.settings import Settings
from resfuse.models import get_model

_PEAK_RATE = 0.1


def ticks(settings: Settings) -> int:
    """How often :func:`measure` calls tick."""
    return settings.epochs * (settings.train_digits // settings.digits_batch)


def measure(
    digits: ImageSet, settings: Settings, backend: str | None, tick: Callable[[], object], seed: int = 0
) -> dict[str, Any]:
    """Train both networks on the same batches in the same order, one step of each in turn.

    Args:
        digits (ImageSet): training and test part.
        settings (Settings): the network, batch size and epochs.
        backend (str | None): for the fused network.
        tick (Callable[[], object]): called after every pair of steps.
        seed (int): of the weights and of the order of batches.

    Returns:
        dict: for "stock" and "fused" the loss of every step, test accuracy, seconds of all steps and quantiles of one;
        and fused over stock.
    """
    torch.manual_seed(seed)
    stock = to_layout(get_model(settings.digits_network, in_channels=1), torch.channels_last)
    models = {"stock": stock, "fused": fuse(copy.deepcopy(stock), backend=backend, strict=True)}
    total = ticks(settings)
    steps = {name: trainer(model, total) for name, model in models.items()}
    losses: dict[str, list[float]] = {name: [] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for i, (images, labels) in enumerate(batches(digits, settings, seed)):
        for name in list(models)[:: 1 if i % 2 else -1]:  # neither is always first
            start = time.perf_counter()
            losses[name].append(steps[name](images, labels))
            seconds[name].append(time.perf_counter() - start)
        tick()
    found = {
        name: {
            "losses": [round(loss, 6) for loss in losses[name]],
            "accuracy": held_out(model, digits)[1],
            "seconds": sum(seconds[name]),
            "step": milliseconds(seconds[name]),
        }
        for name, model in models.items()
    }
    return {**found, "ratio": compare(seconds, "fused", "stock")._asdict()}


def batches(digits: ImageSet, settings: Settings, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in channels_last and labels, every epoch in another order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    size = settings.digits_batch
    for _ in range(settings.epochs):
        order = torch.randperm(len(digits.train_labels), generator=generator)
        for i in range(len(order) // size):
            rows = order[i * size : (i + 1) * size]
            images = digits.train_images[rows].contiguous(memory_format=torch.channels_last)
            yield images, digits.train_labels[rows]


def trainer(
    model: nn.Module, total: int, *, peak_rate: float = _PEAK_RATE, autocast: torch.dtype | None = None
) -> Callable[[Tensor, Tensor], float]:
    """A function that takes one of `total` steps and returns its loss; the rate rises to its peak, then falls to 0."""
    optimizer = torch.optim.SGD(model.parameters(), lr=peak_rate, momentum=0.9, weight_decay=5e-4)
    warm = max(1, total // 10)
    fall = max(1, total - warm)

    def rate(step: int) -> float:
        return (step + 1) / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / fall)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()

    def step(images: Tensor, labels: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss.item()

    return step


@torch.no_grad()
def held_out(model: nn.Module, digits: ImageSet) -> tuple[float, float]:
    """Mean cross entropy and accuracy on the test part, in evaluation mode."""
    model.eval()
    images = digits.test_images.contiguous(memory_format=torch.channels_last)
    outputs = torch.cat([model(part) for part in images.split(200)])
    accuracy = (outputs.argmax(1) == digits.test_labels).float().mean().item()
    return F.cross_entropy(outputs, digits.test_labels).item(), accuracy
