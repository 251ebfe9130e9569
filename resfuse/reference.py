"""The mathematics: one differentiable function in plain torch for every unit and every composition.

This file is the definition. Every backend is tested against it, and it is what runs where no backend serves. It is
differentiable to any order. Statistics and per-channel vectors are computed in float32 for float16 and bfloat16
activations and in the activation's own dtype otherwise; outputs have the activation's dtype.

Shapes: activations (N, C, H, W), per-channel vectors (C,). Variances are biased (divided by M = N*H*W); only
running_var is unbiased, as in :class:`torch.nn.BatchNorm2d`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters, Size


def activate(z: Tensor, activation: str) -> Tensor:
    """act(z): "relu" is max(z, 0) with relu(NaN) = NaN and gradient 0 at 0; "identity" is z."""
    return F.relu(z) if activation == "relu" else z


def _accumulate(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _per_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """relu(x + residual)."""
    return F.relu(_accumulate(x) + _accumulate(residual)).to(x.dtype)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean = E[x], var = E[(x - mean)^2] over N, H, W; var is biased."""
    a = _accumulate(x)
    mean = a.mean((0, 2, 3))
    return mean, (a - _per_channel(mean)).square().mean((0, 2, 3))


def empty_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Moments for an empty batch: zeros, so that its gradients are zeros, as stock's, and not NaN."""
    zeros = _accumulate(x).new_zeros(x.shape[1])
    return zeros, zeros.clone()


def add_moments(x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """out = x + residual, and its moments."""
    out = x if residual is None else (_accumulate(x) + _accumulate(residual)).to(x.dtype)
    return out, *moments(out)


def finalize(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    count: int = 0,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = None,
) -> tuple[Tensor, Tensor]:
    """scale = weight / sqrt(var + eps), shift = bias - mean * scale; running statistics are updated in place.

    running <- (1 - momentum) * running + momentum * batch, with the unbiased variance var * count / (count - 1).
    momentum None averages over all batches seen: 1 / num_batches_tracked. An empty batch (count 0) is only counted.
    """
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias.to(shift.dtype)
    with torch.no_grad():
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if running_mean is not None and running_var is not None and count > 0:
            _update_running_statistics(mean, var, count, running_mean, running_var, num_batches_tracked, momentum)
    return scale, shift


def _update_running_statistics(
    mean: Tensor,
    var: Tensor,
    count: int,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> None:
    factor: float | Tensor = 0.0 if momentum is None else momentum
    if momentum is None and num_batches_tracked is not None:
        factor = num_batches_tracked.to(mean.dtype).reciprocal()
    unbiased = var * (count / max(count - 1, 1))
    for running, batch in ((running_mean, mean), (running_var, unbiased)):
        running.copy_((1 - factor) * running.to(batch.dtype) + factor * batch)


def scale_shift_act(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """act(x*scale + shift + r), with r absent, residual, or residual*residual_scale + residual_shift."""
    z = _accumulate(x) * _per_channel(scale) + _per_channel(shift)
    if residual is not None:
        r = _accumulate(residual)
        if residual_scale is not None and residual_shift is not None:
            r = r * _per_channel(residual_scale) + _per_channel(residual_shift)
        z = z + r
    return activate(z, activation).to(x.dtype)


def scale_shift_relu_maxpool(
    x: Tensor, scale: Tensor, shift: Tensor, kernel_size: Size, stride: Size, padding: Size
) -> Tensor:
    """maxpool(relu(x*scale + shift)): the tail of the stem. Of equal values the first in a window is selected."""
    return F.max_pool2d(scale_shift_act(x, scale, shift), kernel_size, stride, padding)


def _conv(x: Tensor, conv: Conv2dParameters) -> Tensor:
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    return F.conv2d(x, conv.weight.to(x.dtype), bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def conv_stats(
    x: Tensor,
    conv: Conv2dParameters,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "relu",
) -> tuple[Tensor, Tensor, Tensor]:
    """y = conv(act(x*scale + shift)), and the moments of y. Zero padding pads the activated input, not x."""
    a = x if scale is None or shift is None else scale_shift_act(x, scale, shift, activation=activation)
    y = _conv(a, conv)
    mean, var = moments(y)
    return y, mean, var


def folded_weight(
    a: Tensor, weight: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W' and b' with conv1x1(a, W') + b' = BN(conv1x1(a, W)) in training, and the statistics of conv1x1(a, W).

    They follow from the mean s and covariance S of the input's C channels, for each output channel k:
    mean_k = w_k . s and var_k = w_k . S w_k; then W' = scale_k * w_k and b' = shift_k.
    Source: the identity Var[w . a] = w . Cov[a] w.
    """
    pixels = _accumulate(a).permute(0, 2, 3, 1).flatten(0, 2)
    mean_in = pixels.mean(0)
    centered = pixels - mean_in
    covariance = centered.T @ centered / pixels.shape[0]
    matrix = weight.flatten(1).to(covariance.dtype)
    mean = matrix @ mean_in
    var = ((matrix @ covariance) * matrix).sum(1)
    scale, shift = finalize(mean, var, bn_weight, bn_bias, eps)
    return (matrix * scale[:, None]).view_as(weight), shift, mean, var


def expand_bn_act(
    a: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> tuple[Tensor, Tensor, Tensor]:
    """act(BN(conv1x1(a)) + residual) as one convolution with a folded weight, and the batch statistics it used.

    For a projection shortcut, concatenate: the sum of two folded 1x1 convolutions is one over concatenated channels.
    """
    folded, bias, mean, var = folded_weight(a, weight, bn_weight, bn_bias, eps)
    z = F.conv2d(_accumulate(a), folded) + _per_channel(bias)
    if residual is not None:
        z = z + _accumulate(residual)
    return activate(z, activation).to(a.dtype), mean, var


def normalized(x: Tensor, affine: Tensor | None, mean: Tensor | None, activation: str = "relu") -> Tensor:
    """act((x - mean)*scale + bias): what the reader of a raw activation computes. affine is (2, C): bias, scale."""
    if affine is None or mean is None:
        return x
    z = (_accumulate(x) - _per_channel(mean)) * _per_channel(affine[1]) + _per_channel(affine[0])
    return activate(z, activation).to(x.dtype)


def conv_norm(
    x: Tensor,
    affine: Tensor | None,
    mean: Tensor | None,
    conv: Conv2dParameters,
    bn: BatchNorm2dParameters,
    activation: str = "relu",
) -> tuple[Tensor, Tensor, Tensor]:
    """y = conv(act((x - mean)*scale + bias)), and what normalises y: (y - y_mean)*scale + bias is BN(y).

    y_mean is a constant beside which bias and scale are differentiable: a change of y's mean moves the bias. So the
    gradient of scale is that of the deviation, sum dz*(y - y_mean), which does not cancel where |mean| >> std.

    Returns:
        y, its affine (2, K): bias and scale, and y_mean (K,).
    """
    y = _conv(normalized(x, affine, mean, activation), conv)
    if bn.training:
        y_mean, var = moments(y)
    else:
        assert bn.running_mean is not None and bn.running_var is not None
        dtype = _accumulate(x[:0]).dtype
        y_mean, var = bn.running_mean.to(dtype, copy=True), bn.running_var.to(dtype, copy=True)
    return y, affine_beside(y_mean, var, bn.weight, bn.bias, bn.eps), y_mean.detach()


def affine_beside(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(bias, scale) that normalise beside a constant mean: a change of the mean moves the bias."""
    scale, _ = finalize(mean, var, weight, None, eps)
    moved = -(mean - mean.detach()) * scale
    return torch.stack([moved if bias is None else moved + bias.to(moved.dtype), scale])


def conv_add(x: Tensor, conv: Conv2dParameters, residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """out = conv(x) + residual, and its moments: how a pre-activation block ends."""
    return add_moments(_conv(x, conv), residual)


def conv_bias_act(
    x: Tensor, conv: Conv2dParameters, residual: Tensor | None = None, activation: str = "relu"
) -> Tensor:
    """act(conv(x) + bias + residual): inference with a folded weight, and fine-tuning with a frozen one."""
    z = _conv(x, conv)
    if residual is not None:
        z = _accumulate(z) + _accumulate(residual)
    return activate(z, activation).to(x.dtype)


def batch_norm_affine(
    x: Tensor, bn: BatchNorm2dParameters, given: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a batch normalisation of x: from its moments in training, else from the running statistics.

    given: the moments, where whoever wrote x handed them on.
    """
    if not bn.training and bn.running_mean is not None and bn.running_var is not None:
        dtype = _accumulate(x[:0]).dtype
        # copies: a later update in place must not reach what autograd has kept
        mean, var = bn.running_mean.to(dtype, copy=True), bn.running_var.to(dtype, copy=True)
        return finalize(mean, var, bn.weight, bn.bias, bn.eps)
    if given is None:
        given = moments(x) if x.numel() > 0 else empty_moments(x)
    mean, var = given
    return finalize(
        mean,
        var,
        bn.weight,
        bn.bias,
        bn.eps,
        count=x.shape[0] * x.shape[2] * x.shape[3],
        running_mean=bn.running_mean,
        running_var=bn.running_var,
        num_batches_tracked=bn.num_batches_tracked,
        momentum=bn.momentum,
    )


def bn_act(
    x: Tensor,
    bn: BatchNorm2dParameters,
    residual: Tensor | None = None,
    residual_bn: BatchNorm2dParameters | None = None,
    activation: str = "relu",
    moments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """act(BN(x) + r), with r absent, residual, or BN_r(residual); `moments` are x's, where they are known."""
    scale, shift = batch_norm_affine(x, bn, moments)
    if residual is None or residual_bn is None:
        return scale_shift_act(x, scale, shift, residual, activation=activation)
    return scale_shift_act(x, scale, shift, residual, *batch_norm_affine(residual, residual_bn), activation)


def bn_relu_maxpool(
    x: Tensor,
    bn: BatchNorm2dParameters,
    kernel_size: Size,
    stride: Size,
    padding: Size,
    moments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """maxpool(relu(BN(x))); `moments` are x's, where they are known."""
    return scale_shift_relu_maxpool(x, *batch_norm_affine(x, bn, moments), kernel_size, stride, padding)


def conv_bn_act(
    x: Tensor,
    conv: Conv2dParameters,
    bn: BatchNorm2dParameters,
    residual: Tensor | None = None,
    residual_bn: BatchNorm2dParameters | None = None,
    activation: str = "relu",
) -> Tensor:
    """act(BN(conv(x)) + r)."""
    return bn_act(_conv(x, conv), bn, residual, residual_bn, activation)


Shortcut = Tensor | tuple[Conv2dParameters, BatchNorm2dParameters] | None


def conv_bn_act_chain(
    x: Tensor,
    layers: Sequence[tuple[Conv2dParameters, BatchNorm2dParameters]],
    shortcut: Shortcut = None,
    activation: str = "relu",
    last_activation: str | None = None,
) -> Tensor:
    """last_act(BN(conv(... act(BN(conv(x))) ...)) + shortcut): a plain chain, or the residual unit of any depth.

    shortcut: None for nothing, a tensor (x itself: the identity), (conv, bn) for a projection BN(conv(x)).
    last_activation: None for `activation`.
    """
    residual_bn = None
    if isinstance(shortcut, tuple):
        projection, residual_bn = shortcut
        residual: Tensor | None = _conv(x, projection)
    else:
        residual = shortcut
    for conv, bn in layers[:-1]:
        x = conv_bn_act(x, conv, bn, activation=activation)
    conv, bn = layers[-1]
    return conv_bn_act(x, conv, bn, residual, residual_bn, last_activation or activation)


def basic_block(
    x: Tensor,
    conv1: Conv2dParameters,
    bn1: BatchNorm2dParameters,
    conv2: Conv2dParameters,
    bn2: BatchNorm2dParameters,
    shortcut: Shortcut = None,
    activation: str = "relu",
) -> Tensor:
    """The two-layer residual unit of ResNet-18 and -34; shortcut None is x. Source: arXiv:1512.03385, figure 5 left."""
    return conv_bn_act_chain(x, [(conv1, bn1), (conv2, bn2)], x if shortcut is None else shortcut, activation)


def bottleneck(
    x: Tensor,
    conv1: Conv2dParameters,
    bn1: BatchNorm2dParameters,
    conv2: Conv2dParameters,
    bn2: BatchNorm2dParameters,
    conv3: Conv2dParameters,
    bn3: BatchNorm2dParameters,
    shortcut: Shortcut = None,
    activation: str = "relu",
) -> Tensor:
    """The three-layer residual unit of ResNet-50 and deeper; shortcut None is x. Source: arXiv:1512.03385, figure 5."""
    layers = [(conv1, bn1), (conv2, bn2), (conv3, bn3)]
    return conv_bn_act_chain(x, layers, x if shortcut is None else shortcut, activation)


PreactLayer = tuple[BatchNorm2dParameters | None, Conv2dParameters]
"""What normalises a layer's input, None only where the first layer's comes activated, and what convolves it."""


def preact_block(
    x: Tensor,
    layers: Sequence[PreactLayer],
    shortcut: Tensor | Conv2dParameters | None = None,
    activation: str = "relu",
    moments: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """conv(act(BN(... conv(act(BN(x))) ...))) + shortcut, and the moments of this sum; `moments` are x's.

    shortcut: None for nothing, a tensor (x itself: the identity), or a convolution of act(BN(x)), a projection.
    Without a first normalisation the first convolution and a projection read x.
    """
    y = first = x
    for i, (bn, conv) in enumerate(layers):
        if bn is not None:
            y = bn_act(y, bn, activation=activation, moments=moments if i == 0 else None)
        first = y if i == 0 else first
        y = _conv(y, conv)
    return add_moments(y, _conv(first, shortcut) if isinstance(shortcut, tuple) else shortcut)
