"""Residual blocks whose activations travel raw: what tile kernels serve, composed from the units of autograd_conv.

Each convolution normalises its input while it loads it and hands its own output on with what normalises it; only a
block's output is stored activated. Arguments have been checked by :mod:`resfuse.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resfuse._calls import autocasts, bump_versions, serving_backend
from resfuse.autograd_conv import conv_norm, conv_norm_act
from resfuse.backends import folds, why_not_raw
from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters
from resfuse.raw import Raw, as_pair

Layer = tuple[Conv2dParameters, BatchNorm2dParameters]


def _dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if autocasts(x.device.type) else x.dtype


def why_not_convs(convs: Sequence[Conv2dParameters], device: str, dtype: torch.dtype) -> str | None:
    """Why these convolutions of activations of `dtype` are left to torch; None where tile kernels can serve them."""
    fewest = min(size for conv in convs for size in (conv.weight.shape[0], conv.weight.shape[1] * conv.groups))
    if (reason := why_not_raw(device, dtype, fewest)) is not None:
        return reason
    for conv in convs:
        if conv.groups != 1:
            return f"a convolution has {conv.groups} groups"
        if conv.weight.dtype not in (dtype, torch.float32):
            return f"a weight is {conv.weight.dtype}"
        if conv.padding == "same" and any(k % 2 == 0 for k in conv.weight.shape[2:]):
            return "padding is uneven"
        if (conv.padding == "same" and set(as_pair(conv.stride)) != {1}) or (
            not isinstance(conv.padding, str) and min(as_pair(conv.padding)) < 0
        ):
            return "torch refuses such padding"
    return None


def why_not(x: Tensor, convs: Sequence[Conv2dParameters], backend: str | None) -> str | None:
    """Why this call leaves its convolutions to torch; None where tile kernels serve it."""
    if serving_backend("bn_act", x, backend) != "native":
        return "the reference runs"
    if x.numel() == 0 or not x.is_contiguous(memory_format=torch.channels_last):
        return "x is empty or not channels_last"
    return why_not_convs(convs, x.device.type, _dtype(x))


def _as_input(x: Tensor) -> Tensor:
    """x in the dtype of the convolutions, channels_last."""
    return x.to(_dtype(x)).contiguous(memory_format=torch.channels_last)


def _is_pointwise(conv: Conv2dParameters) -> bool:
    ones = ((1, 1), (1,), 1)
    return tuple(conv.weight.shape[2:]) == (1, 1) and conv.stride in ones and conv.padding in (0, (0, 0), (0,), "same")


def _close(
    x: Raw,
    layer: Layer,
    residual: Raw | None,
    relu_x: bool,
    relu: bool,
    folding: bool | None,
) -> Tensor:
    """A block's last convolution with its normalisation, residual and activation."""
    conv, bn = layer
    pixels = x.x.shape[0] * x.x.shape[2] * x.x.shape[3]
    fold = _is_pointwise(conv) and folds(conv.weight.shape[1], conv.weight.shape[0], pixels, folding)
    return conv_norm_act(x, conv, bn, residual, relu_x, relu, fold=fold)


def conv_bn_act(x: Tensor, layer: Layer, residual: Tensor | None, activation: str) -> Tensor:
    """act(BN(conv(x)) + residual)."""
    r = None if residual is None else Raw(_as_input(residual))
    x = _as_input(x)
    with torch.autocast(x.device.type, enabled=False):
        out = _close(Raw(x), layer, r, False, activation == "relu", False)
    bump_versions(layer[1])
    return out


def residual_chain(
    x: Tensor,
    layers: list[Layer],
    shortcut: Tensor | Layer | None,
    activation: str,
    folding: bool | None,
) -> Tensor:
    """act(BN(conv(... act(BN(conv(x))) ...)) + shortcut)."""
    relu = activation == "relu"
    x = _as_input(x)
    added = _as_input(shortcut) if isinstance(shortcut, Tensor) else None
    norms = [bn for _, bn in layers]
    with torch.autocast(x.device.type, enabled=False):
        frozen = not torch.is_grad_enabled() and not any(bn.training for bn in norms)
        step = _frozen_step if frozen else conv_norm
        y, through = Raw(x), x
        for i, (conv, bn) in enumerate(layers[:-1]):
            needs_through = i == 0 and added is None and x.requires_grad
            y, passed = step(y, conv, bn, relu, through=needs_through)
            through = passed if needs_through else through
        if isinstance(shortcut, tuple):
            norms.append(shortcut[1])
            residual, _ = step(Raw(through), *shortcut, False)
        else:
            residual = Raw(through if added is None else added)
        out = _close(y, layers[-1], residual, relu, relu, folding)
    bump_versions(*norms)
    return out


def _frozen_step(
    x: Raw, conv: Conv2dParameters, bn: BatchNorm2dParameters, relu: bool, *, through: bool = False
) -> tuple[Raw, Tensor]:
    """Inference: the convolution with folded weight and activation, nothing left for the reader."""
    return Raw(conv_norm_act(x, conv, bn, None, False, relu, fold=False)), x.x
