"""What every public function does between its checks and its kernel: backend, autocast, layout and versions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from resfuse import autograd_norm, autograd_wide, reference
from resfuse.autograd import MomentsFunction
from resfuse.backends import choose, emulated
from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters, Moments
from resfuse.raw import geometry


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is running."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def serving_backend(unit: str, x: Tensor, requested: str | None) -> str:
    """The backend that serves this call: the chosen one, or reference where torch has to see every operation."""
    chosen = choose(unit, x.device.type, x.dtype, requested)
    return "reference" if chosen != "reference" and transformed() else chosen


def autocasts(device: str) -> bool:
    """Whether autocast is on for this type of device; devices that have none, such as meta, answer False."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def as_dense(x: Tensor) -> Tensor:
    """x itself if it is channels_last or contiguous, else a contiguous copy."""
    if x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous():
        return x
    return x.contiguous()


def convolved_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a convolution of `dtype` runs in: autocast's, which leaves float64 alone, or its own."""
    return torch.get_autocast_dtype(device) if dtype != torch.float64 and autocasts(device) else dtype


def bump_versions(*norms: BatchNorm2dParameters | None) -> None:
    """Tell autograd that the operators have changed the running statistics, as torch's own in-place operators do."""
    if torch.compiler.is_compiling():
        return
    for bn in norms:
        if bn is None or not bn.training or bn.running_mean is None:
            continue
        for tensor in (bn.running_mean, bn.running_var, bn.num_batches_tracked):
            if tensor is not None and not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)


def beside_statistics(conv: Conv2dParameters, bn: BatchNorm2dParameters | None) -> Conv2dParameters:
    """conv before bn: the batch's mean cancels its bias, whose gradient is zero then, not a sum's rounding errors."""
    if conv.bias is None or bn is None or not bn.training:
        return conv
    nowhere = torch.zeros_like(conv.bias, dtype=torch.bool)
    return conv._replace(bias=torch.where(nowhere, conv.bias, conv.bias.detach()))


def convolve(x: Tensor, conv: Conv2dParameters, bn: BatchNorm2dParameters | None = None) -> Tensor:
    """The convolution itself, by torch; in float32 where torch would emulate the dtype. `bn` normalises the result."""
    conv = beside_statistics(conv, bn)
    dtype = convolved_dtype(x.device.type, x.dtype)
    if emulated(x.device.type, dtype) and not isinstance(conv.padding, str) and not transformed():
        return autograd_wide.convolve(x.to(dtype), conv.weight, conv.bias, geometry(conv))
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def beside(residual: Tensor, x: Tensor) -> Tensor:
    """residual in x's dtype and memory order."""
    residual = residual.to(x.dtype)
    if residual.stride() == x.stride():
        return residual
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return residual.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def bn_act(
    x: Tensor,
    bn: BatchNorm2dParameters,
    residual: Tensor | None,
    residual_bn: BatchNorm2dParameters | None,
    activation: str,
    backend: str | None,
    *,
    owned: bool = False,
    moments: Moments | None = None,
    return_moments: bool = False,
) -> Any:
    """bn_act on checked arguments. `owned`: nobody else reads x or a raw residual, see :func:`autograd_norm.bn_act`."""
    if residual is not None and residual.dtype != x.dtype:
        residual = residual.to(x.dtype)
    chosen = serving_backend("bn_act", x, backend)
    if chosen == "reference":
        out = reference.bn_act(x, bn, residual, residual_bn, activation, moments)
        return (out, _moments_of(out)) if return_moments else out
    x = as_dense(x)
    if residual is not None:
        residual = beside(residual, x)
    taken = return_moments and x.numel() > 0
    options: Any = {"owned": owned, "moments": moments, "return_moments": taken}
    found = autograd_norm.bn_act(x, bn, residual, residual_bn, activation == "relu", chosen, **options)
    bump_versions(bn, residual_bn)
    if taken:
        return found[0], Moments(*found[1:])
    return (found, _moments_of(found)) if return_moments else found


def _moments_of(out: Tensor) -> Moments:
    """Moments by the reference; zeros of an empty activation."""
    return Moments(*(reference.moments(out) if out.numel() > 0 else reference.empty_moments(out)))


def add_moments(x: Tensor, residual: Tensor | None, backend: str | None) -> tuple[Tensor, Moments]:
    """x + residual and its moments, in one pass, on checked arguments."""
    chosen = serving_backend("bn_act", x, backend)
    if chosen == "reference":
        out = reference.add_moments(x, residual)[0]
        return out, _moments_of(out)
    if x.numel() == 0:
        return x if residual is None else x + residual, _moments_of(x)
    x = as_dense(x)
    if residual is None:
        return x, Moments(*MomentsFunction.apply(x, chosen))
    out, *found = autograd_norm.AddMomentsFunction.apply(x, beside(residual, x), chosen)
    return out, Moments(*found)
