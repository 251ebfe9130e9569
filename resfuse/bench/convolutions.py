"""Bare convolutions: those of a network's training step, by the kernels that it uses, with nothing between them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resfuse import explain, ops
from resfuse.bench.shapes import ConvShape
from resfuse.fusion import stretches


class BareConv(NamedTuple):
    """One convolution of a step, ready to call: its output; the gradients of its input and its weight."""

    forward: Callable[[], Tensor]
    backward: Callable[[], tuple[Tensor | None, Tensor]]


def served_by_tiles(model: nn.Module, dtype: torch.dtype) -> tuple[str, ...]:
    """The convolutions that resfuse's own kernels run, as :func:`resfuse.explain` says.

    Args:
        model (nn.Module): stock or fused; unchanged.
        dtype (torch.dtype): of the activations, as autocast has it.

    Returns:
        tuple[str, ...]: their qualified names.
    """
    model = copy.deepcopy(model).to(dtype)
    names = {id(module): name for name, module in model.named_modules()}
    blocks = [model.get_submodule(block.name) for block in explain(model).blocks if block.fused]
    tiled = [convs for block in blocks for convs, reason in stretches(block) if reason is None]
    return tuple(names[id(conv)] for convs in tiled for conv in convs)


def bare_convolutions(shapes: Iterable[ConvShape], tiled: tuple[str, ...], dtype: torch.dtype) -> list[BareConv]:
    """The convolutions of a training step on random operands in channels_last, one memory for each distinct shape.

    Args:
        shapes (Iterable[ConvShape]): in the order of the forward pass; the first reads images, which have no gradient.
        tiled (tuple[str, ...]): of :func:`served_by_tiles`: these run by resfuse's kernels, which take float32 weights,
            the others by torch's.
        dtype (torch.dtype): of the activations.

    Returns:
        list[BareConv]: in the same order.
    """
    generator = torch.Generator().manual_seed(0)
    pool: dict[tuple[int, ...], Tensor] = {}

    def activation(shape: tuple[int, ...]) -> Tensor:
        if shape not in pool:
            value = torch.randn(shape, generator=generator).to(dtype)
            pool[shape] = value.contiguous(memory_format=torch.channels_last)
        return pool[shape]

    found = []
    for i, shape in enumerate(shapes):
        weight = torch.randn(shape.weight, generator=generator).contiguous(memory_format=torch.channels_last)
        make = _tiles if shape.name in tiled else _torch
        found.append(make(shape, activation(shape.input), activation(shape.output), weight, i > 0))
    return found


def _torch(shape: ConvShape, x: Tensor, grad: Tensor, weight: Tensor, need_x: bool) -> BareConv:
    weight = weight.to(x.dtype)
    options = (shape.stride, shape.padding, shape.dilation, False, (0, 0), shape.groups)

    def backward() -> tuple[Tensor | None, Tensor]:
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *options, (need_x, True, False))[:2]

    return BareConv(lambda: torch.ops.aten.convolution(x, weight, None, *options), backward)


def _tiles(shape: ConvShape, x: Tensor, grad: Tensor, weight: Tensor, need_x: bool) -> BareConv:
    moves = {"stride": shape.stride, "padding": shape.padding, "dilation": shape.dilation, "groups": shape.groups}
    operands = {"x": x, "weight": weight, **moves}

    def backward() -> tuple[Tensor | None, Tensor]:
        found = _bare(ops.conv_stats_backward, **operands, grad_y=grad, need_x=need_x, need_weight=True)
        return found[0] if need_x else None, found[1]

    return BareConv(lambda: _bare(ops.conv_stats, **operands)[0], backward)


def _bare(operator: Any, **operands: Any) -> Any:
    """Call a fused operator with what a bare convolution has; everything else is absent."""
    left_out = {"bool": False, "Optional[Tensor]": None}
    return operator(
        *(operands[a.name] if a.name in operands else left_out[str(a.type)] for a in operator._schema.arguments)
    )


def run(convolutions: list[BareConv]) -> None:
    """All of them once, forward and then backward; nothing is kept."""
    for conv in convolutions:
        conv.forward()
    for conv in reversed(convolutions):
        conv.backward()
