"""folded_weight, the moments that it needs, and its backward: algebra on K-by-C matrices, which have no pixels.

Products go through the kernels that convolve, which take a matrix's rows for pixels; the rest is torch's operators, a
pass over a small matrix each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resfuse._triton.candidates import conv_act, conv_stats_backward

_UNIT = ([1, 1], [0, 0], [1, 1], 1)
_NONE = (None,) * 5


def _as_image(matrix: Tensor) -> Tensor:
    return matrix[:, :, None, None]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T."""
    shift = a.new_zeros(b.shape[0])
    inputs = (_as_image(a), None, None, False, _as_image(b), None, shift)
    return conv_act(*inputs, *_NONE, [1, 1], False, *_UNIT, False)[0].flatten(1)


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """a^T b."""
    like = torch.empty(a.shape[1], b.shape[1], 1, 1, dtype=torch.float32, device=a.device)
    return conv_stats_backward(
        _as_image(a), *_NONE, False, _as_image(b), None, None, like, False, *_UNIT, None, False, True
    )[1].flatten(1)  # fmt: skip


def folded_moments(weight: Tensor, a_mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, var) of W a from those of a."""
    var = (_product(weight, covariance) * weight).sum(1)
    return (weight * a_mean).sum(1), var.clamp_min_(0)  # a sum of rounded terms may fall below


def folded_weight(
    weight: Tensor, scale: Tensor, bias: Tensor | None, a_mean: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """(W', shift): scale*W in like's dtype, and the shift that keeps the mean of BN's output."""
    folded = (weight * scale[:, None]).to(like.dtype)
    through = (folded.float() * a_mean).sum(1)
    return folded, -through if bias is None else bias - through


def folded_weight_backward(
    gram: Tensor,
    grad_bias: Tensor,
    weight: Tensor,
    a_mean: Tensor,
    covariance: Tensor,
    var: Tensor,
    scale: Tensor,
    pixels: int,
    eps: float,
    like: Tensor,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(grad_weight_bn, grad_weight, W', correction, row), the latter three for the input's gradient."""
    invstd = torch.rsqrt(var + eps)
    centered = gram - torch.outer(grad_bias, a_mean)
    grad_weight_bn = invstd * (centered * weight).sum(1)
    slope = scale * invstd * grad_weight_bn
    channels = weight.shape[1]
    grad_weight, folded = weight.new_empty(0, channels), like.new_empty(0, channels)
    correction, row = weight.new_empty(0, channels), weight.new_empty(0)
    if need_weight:
        grad_weight = centered * scale[:, None] - _product(weight, covariance) * slope[:, None]
    if need_x:
        folded = (weight * scale[:, None]).to(like.dtype)
        correction = _gram(weight * (slope / -pixels)[:, None], weight)
        correction = correction.to(like.dtype).float()  # as kernels multiply it, so that row cancels its mean
        row = (folded.float() * (grad_bias / -pixels)[:, None]).sum(0) - (correction * a_mean[:, None]).sum(0)
    return grad_weight_bn, grad_weight, folded, correction, row
