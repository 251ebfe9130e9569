"""Blocks whose activations travel raw: what tile kernels serve, composed from the units of the autograd modules.

Each convolution normalises its input while it loads it and hands its own output on with what normalises it; only a
block's output is stored activated. Arguments have been checked by :mod:`resfuse.functional`; `backend` is the caller's,
None where it did not choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resfuse import autograd_pool, backends
from resfuse._calls import bump_versions, convolved_dtype, serving_backend
from resfuse.autograd import MomentsFunction
from resfuse.autograd_conv import conv_norm, conv_norm_act
from resfuse.autograd_folding import expand_norm_act
from resfuse.autograd_preact import conv_add, norm
from resfuse.backends import convolving, joins_row_taps, why_not_raw
from resfuse.choices import Conv, any_fused
from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters, Moments, Window
from resfuse.raw import Raw, as_pair, geometry
from resfuse.reference import PreactLayer

Layer = tuple[Conv2dParameters, BatchNorm2dParameters]


def _group_channels(conv: Conv2dParameters) -> tuple[int, int]:
    """Channels out of and into one group."""
    return conv.weight.shape[0] // conv.groups, conv.weight.shape[1]


def _joins_row_taps(conv: Conv2dParameters, dtype: torch.dtype) -> bool:
    return conv.groups == 1 and joins_row_taps(tuple(conv.weight.shape), as_pair(conv.dilation)[1], dtype)


def why_not_convs(
    convs: Sequence[Conv2dParameters], device: str, dtype: torch.dtype, backend: str | None = None
) -> str | None:
    """Why these convolutions of activations of `dtype` are left to torch; None where our kernels can serve them."""
    sizes = [size * conv.groups for conv in convs if not _joins_row_taps(conv, dtype) for size in _group_channels(conv)]
    fewest = min(sizes) if sizes else None
    grouped = [size for conv in convs if conv.groups > 1 for size in _group_channels(conv)]
    if (reason := why_not_raw(device, dtype, fewest, min(grouped) if grouped else None, backend)) is not None:
        return reason
    for conv in convs:
        if conv.weight.dtype not in (dtype, torch.float32):
            return f"a weight is {conv.weight.dtype}"
        if conv.padding == "same" and any(k % 2 == 0 for k in conv.weight.shape[2:]):
            return "padding is uneven"
    if backend is None and device != "cpu":
        shapes = tuple(tuple(Conv.of(conv.weight.shape, *geometry(conv)).as_list()) for conv in convs)
        if not any_fused(device, dtype, shapes):
            return "torch's convolutions, and passes around them, are taken to be faster for each of these shapes"
    return None


def why_not(x: Tensor, convs: Sequence[Conv2dParameters], backend: str | None) -> str | None:
    """Why this call leaves its convolutions to torch; None where our kernels serve it."""
    if serving_backend("bn_act", x, backend) == "reference":
        return "the reference runs"
    if x.numel() == 0 or not x.is_contiguous(memory_format=torch.channels_last):
        return "x is empty or not channels_last"
    return why_not_convs(convs, x.device.type, convolved_dtype(x.device.type, x.dtype), backend)


def _as_input(x: Tensor) -> Tensor:
    """x in the dtype of the convolutions, channels_last."""
    return x.to(convolved_dtype(x.device.type, x.dtype)).contiguous(memory_format=torch.channels_last)


def _is_pointwise(conv: Conv2dParameters) -> bool:
    """Whether a convolution is a product with a matrix at every pixel that it reads, and so can fold."""
    padded = conv.padding not in (0, (0, 0), (0,), "same", "valid")
    return conv.groups == 1 and tuple(conv.weight.shape[2:]) == (1, 1) and not padded


def folds_from(layer: Layer, folding: bool | None, *, projection: bool = False) -> int | None:
    """From how many pixels on a block's last layer folds; None where never. Only a projection may be strided.

    It is 1x1, its statistics are the batch's, and the rule or the caller says.
    """
    conv, bn = layer
    if not (bn.training and _is_pointwise(conv) and (projection or set(as_pair(conv.stride)) == {1})):
        return None
    return backends.folds_from(conv.weight.shape[1], conv.weight.shape[0], folding)


def _folds(x: Tensor, layer: Layer, folding: bool | None, *, projection: bool = False) -> bool:
    """Whether this layer folds for x."""
    pixels = x.shape[0]
    for size, step in zip(x.shape[2:], as_pair(layer[0].stride), strict=True):
        pixels *= -(-size // step)
    least = folds_from(layer, folding, projection=projection)
    return least is not None and pixels >= least


def _close(
    x: Raw,
    layer: Layer,
    shortcut: Tensor | None,
    projection: Layer | None,
    relu_x: bool,
    relu: bool,
    folding: bool | None,
    moments: bool,
    backend: str,
) -> Any:
    """A block's last convolution with its normalisation, shortcut and activation; optionally the moments of its output.

    A projection's statistics are the shortcut's own; where both convolutions fold, they are one product.
    """
    conv, bn = layer
    if _folds(x.x, layer, folding):
        if projection is not None and shortcut is not None and _folds(shortcut, projection, folding, projection=True):
            stride, branch, residual = as_pair(projection[0].stride), (shortcut, *projection), None
        else:
            stride, branch, residual = [1, 1], None, _residual(shortcut, projection, backend)
        return expand_norm_act(
            x, conv.weight, conv.bias, bn, residual, branch, stride, relu_x, relu, backend, moments=moments
        )  # fmt: skip
    residual = _residual(shortcut, projection, backend)
    return conv_norm_act(x, conv, bn, residual, relu_x, relu, backend, moments=moments)


def _residual(shortcut: Tensor | None, projection: Layer | None, backend: str) -> Raw | None:
    """What a block's last pass adds: nothing, a tensor, or the raw output of a projection."""
    if shortcut is None or projection is None:
        return None if shortcut is None else Raw(shortcut)
    return _step(Raw(shortcut), *projection, False, backend)[0]


def conv_bn_act(
    x: Tensor, layer: Layer, residual: Tensor | None, activation: str, moments: bool, backend: str | None
) -> Any:
    """act(BN(conv(x)) + residual); with `moments`, (out, Moments)."""
    r = None if residual is None else _as_input(residual)
    x = _as_input(x)
    with torch.autocast(x.device.type, enabled=False):
        kernels = convolving(x.device.type, backend)
        out = _close(Raw(x), layer, r, None, False, activation == "relu", False, moments, kernels)
    bump_versions(layer[1])
    return (out[0], Moments(*out[1:])) if moments else out


def residual_chain(
    x: Tensor,
    layers: list[Layer],
    shortcut: Tensor | Layer | None,
    activation: str,
    last_activation: str,
    folding: bool | None,
    moments: bool,
    backend: str | None,
) -> Any:
    """last_act(BN(conv(... act(BN(conv(x))) ...)) + shortcut), where None adds nothing; with `moments`, (out, Moments).

    What reads x, as x itself and a projection do, is given it by the first convolution.
    """
    relu, kernels = activation == "relu", convolving(x.device.type, backend)
    reads_x = shortcut is x or isinstance(shortcut, tuple)
    x = _as_input(x)
    projection = shortcut if isinstance(shortcut, tuple) else None
    added = _as_input(shortcut) if isinstance(shortcut, Tensor) and not reads_x else None
    with torch.autocast(x.device.type, enabled=False):
        y, through = Raw(x), x
        for i, (conv, bn) in enumerate(layers[:-1]):
            y, passed = _step(y, conv, bn, relu, kernels, through=i == 0 and reads_x and x.requires_grad)
            through = passed if i == 0 else through
        added = through if reads_x else added
        last_relu = last_activation == "relu"
        out = _close(y, layers[-1], added, projection, relu, last_relu, folding, moments, kernels)
    bump_versions(*[bn for _, bn in layers], *([] if projection is None else [projection[1]]))
    return (out[0], Moments(*out[1:])) if moments else out


def _step(
    x: Raw, conv: Conv2dParameters, bn: BatchNorm2dParameters, relu: bool, backend: str, *, through: bool = False
) -> tuple[Raw, Tensor]:
    """A convolution and what normalises its output, and x for a shortcut (see :func:`autograd_conv.conv_norm`).

    In inference the normalisation is folded into the weight and the output activated: nothing is left for its reader.
    """
    if bn.training or torch.is_grad_enabled():
        return conv_norm(x, conv, bn, relu, backend, through=through)
    return Raw(conv_norm_act(x, conv, bn, None, relu, relu, backend)), x.x


def conv_bn_relu_maxpool(x: Tensor, layer: Layer, window: Window, backend: str | None) -> Tensor:
    """maxpool(relu(BN(conv(x))))."""
    x = _as_input(x)
    with torch.autocast(x.device.type, enabled=False):
        out = autograd_pool.conv_bn_relu_maxpool(x, *layer, window, convolving(x.device.type, backend))
    bump_versions(layer[1])
    return out


def conv_stats(
    x: Tensor, conv: Conv2dParameters, residual: Tensor | None, backend: str | None
) -> tuple[Tensor, Moments]:
    """conv(x) + residual, and its moments."""
    added = None if residual is None else _as_input(residual)
    x = _as_input(x)
    with torch.autocast(x.device.type, enabled=False):
        out, *moments = conv_add(Raw(x), conv, added, False, convolving(x.device.type, backend), moments=True)
    return out, Moments(*moments)


def preact_chain(
    x: Tensor,
    layers: list[PreactLayer],
    shortcut: Tensor | Conv2dParameters | None,
    activation: str,
    moments: Moments | None,
    return_moments: bool,
    backend: str | None,
) -> Any:
    """conv(act(BN(... conv(act(BN(x))) ...))) + shortcut; `moments` are x's, where they are known.

    Without a first normalisation x is read as it is. With `return_moments`, (out, Moments).
    """
    relu, kernels = activation == "relu", convolving(x.device.type, backend)
    identity = shortcut is x
    norms = [bn for bn, _ in layers]
    x = _as_input(x)
    with torch.autocast(x.device.type, enabled=False):
        y, through = Raw(x), x
        if norms[0] is not None:
            if moments is None and norms[0].training:
                moments = Moments(*MomentsFunction.apply(x, kernels))
            y = norm(x, moments, norms[0], kernels)
        first = y
        for i, ((_, conv), bn) in enumerate(zip(layers[:-1], norms[1:], strict=True)):
            assert bn is not None
            y, passed = conv_norm(y, conv, bn, relu, kernels, through=i == 0 and identity and x.requires_grad)
            through = passed if i == 0 else through
        if isinstance(shortcut, Conv2dParameters):
            residual = conv_add(first, shortcut, None, relu, kernels, moments=False)
        else:
            residual = through if identity else None if shortcut is None else _as_input(shortcut)
        out = conv_add(y, layers[-1][1], residual, relu, kernels, moments=return_moments)
    bump_versions(*norms)
    return (out[0], Moments(*out[1:])) if return_moments else out
