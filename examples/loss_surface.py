"""What a network's loss looks like around its weights, and what reaches each of its layers in backward."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gradient_norms(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """The L2 norm of the loss's gradient to the weight of every convolution, from the input on, in training mode."""
    model = copy.deepcopy(model).train()  # running statistics of the model stay
    F.cross_entropy(model(images), labels).backward()
    return [module.weight.grad.norm().item() for module in model.modules() if isinstance(module, nn.Conv2d)]


class Plane(NamedTuple):
    """Where a surface is taken: weights by name, and two directions of the same shapes."""

    center: dict[str, Tensor]
    across: dict[str, Tensor]
    up: dict[str, Tensor]


def directions(model: nn.Module, seed: int) -> Plane:
    """Two random directions, normalised by filter: each filter of theirs is as long as the network's own.

    So surfaces of networks whose weights differ in scale can be compared. Norms and biases, vectors, do not move.

    Source: Li et al., Visualizing the Loss Landscape of Neural Nets, 2018.
    """
    generator = torch.Generator().manual_seed(seed)
    center = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() > 1}

    def direction() -> dict[str, Tensor]:
        return {name: _like(weight, generator) for name, weight in center.items()}

    return Plane(center, direction(), direction())


def _like(weight: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(weight.shape, generator=generator).to(weight.device)
    length, wanted = (t.flatten(1).norm(dim=1).view(-1, *[1] * (t.dim() - 1)) for t in (drawn, weight))
    return drawn * (wanted / length)


def coordinates(count: int) -> list[float]:
    """`count` points from -1 to 1."""
    return torch.linspace(-1, 1, count).tolist()


@torch.no_grad()
def surface_row(
    model: nn.Module, plane: Plane, up: float, across: list[float], images: Tensor, labels: Tensor
) -> list[float]:
    """The loss at ``center + up * plane.up + a * plane.across`` for each a, in evaluation mode; the model stays."""
    weights = dict(model.named_parameters())
    losses = []
    model.eval()
    for a in across:
        for name, center in plane.center.items():
            weights[name].copy_(center + up * plane.up[name] + a * plane.across[name])
        losses.append(F.cross_entropy(model(images), labels).item())
    for name, center in plane.center.items():
        weights[name].copy_(center)
    return losses
