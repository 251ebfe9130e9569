"""Shapes: the activations that a network normalises, found by running it without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class NormShape(NamedTuple):
    """One distinct activation shape (N, C, H, W), and the names of the batch normalisations that read it."""

    shape: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def numel(self) -> int:
        """Number of values."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def batch_norm_shapes(build: Callable[[], nn.Module], input_shape: tuple[int, ...]) -> list[NormShape]:
    """The distinct shapes of what a network's batch normalisations read, in the order of the forward pass.

    The network is built and run on the meta device: no memory, no arithmetic.

    Args:
        build (Callable[[], nn.Module]): makes the network; stock blocks only, since a fused block does not call its
            children.
        input_shape (tuple[int, ...]): (N, C, H, W).

    Returns:
        list[NormShape]: every shape once.
    """
    found: dict[tuple[int, ...], list[str]] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.setdefault(tuple(inputs[0].shape), []).append(name)

        return hook

    with torch.device("meta"), torch.no_grad():
        model = build()
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(remember(name))
        model(torch.empty(input_shape))
    return [NormShape(shape, tuple(names)) for shape, names in found.items()]
