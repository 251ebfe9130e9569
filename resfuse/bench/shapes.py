"""Shapes: what a network normalises and what it convolves, found by running it without memory."""

from __future__ import annotations

import math
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
        return math.prod(self.shape)


class ConvShape(NamedTuple):
    """One convolution: its name, the shapes of its input, output and weight, and how it moves."""

    name: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


Visit = Callable[[str, nn.Module, Tensor, Tensor], None]


def _run_on_meta(
    build: Callable[[], nn.Module], input_shape: tuple[int, ...], kind: type[nn.Module], visit: Visit
) -> None:
    """Run a network without memory or arithmetic; visit(name, module, input, output) each call of a `kind`."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, inputs, output: visit(name, module, inputs[0], output)

    with torch.device("meta"), torch.no_grad():
        model = build()
        for name, module in model.named_modules():
            if isinstance(module, kind):
                module.register_forward_hook(hook_of(name))
        model(torch.empty(input_shape))


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

    def visit(name: str, _: nn.Module, x: Tensor, __: Tensor) -> None:
        found.setdefault(tuple(x.shape), []).append(name)

    _run_on_meta(build, input_shape, _BatchNorm, visit)
    return [NormShape(shape, tuple(names)) for shape, names in found.items()]


def conv_shapes(build: Callable[[], nn.Module], input_shape: tuple[int, ...]) -> list[ConvShape]:
    """A network's convolutions, in the order of the forward pass; arguments as :func:`batch_norm_shapes`.

    Returns:
        list[ConvShape]: one entry a call.

    Raises:
        NotImplementedError: a convolution whose padding is given by name.
    """
    found: list[ConvShape] = []

    def visit(name: str, conv: nn.Module, x: Tensor, y: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        if isinstance(conv.padding, str):
            raise NotImplementedError(f"{name}: padding {conv.padding!r} is not resolved here")
        read, written, weight = (tuple(tensor.shape) for tensor in (x, y, conv.weight))
        found.append(ConvShape(name, read, written, weight, conv.stride, conv.padding, conv.dilation, conv.groups))

    _run_on_meta(build, input_shape, nn.Conv2d, visit)
    return found
