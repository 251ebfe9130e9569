"""The public functions: checks, autocast, layout and backend choice around the units and their compositions.

Arguments are checked before anything is computed, so an error leaves running statistics and counters as they were.
`backend` is None (the best that serves the call), "native", "triton" or "reference"; one that is named and missing
raises. Under torch.func transforms and forward-mode differentiation, functions run on :mod:`resfuse.reference`.

Every function computes float16 and bfloat16 activations in float32, rounds once at the end, and gives identical bits
from run to run. Under autocast, residuals follow the convolutions' dtype; normalisation parameters stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resfuse import _calls, _checks, reference
from resfuse._calls import as_dense, autocasts, beside, bump_versions, serving_backend
from resfuse.autograd import (
    AddReLUFunction,
    FinalizeFunction,
    MomentsFunction,
    ScaleShiftActFunction,
)
from resfuse.blocks import basic_block as basic_block
from resfuse.blocks import bottleneck as bottleneck
from resfuse.blocks import conv_bn_act as conv_bn_act
from resfuse.blocks import conv_bn_act_chain as conv_bn_act_chain
from resfuse.blocks import conv_stats as conv_stats
from resfuse.blocks import preact_block as preact_block
from resfuse.parameters import BatchNorm2dParameters, Moments
from resfuse.pooling import bn_relu_maxpool as bn_relu_maxpool
from resfuse.pooling import conv_bn_relu_maxpool as conv_bn_relu_maxpool


def _any_order_dense(x: Tensor) -> bool:
    """Whether x's elements fill a stretch of memory, in any order of its dimensions."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return True
    return not torch.compiler.is_compiling() and torch._prims_common.is_non_overlapping_and_dense_or_false(x)


def add_relu(x: Tensor, residual: Tensor, *, backend: str | None = None) -> Tensor:
    """ReLU of a sum: out = max(x + residual, 0), in one pass, rounded once.

    Args:
        x (Tensor): any shape; float16, bfloat16, float32 or float64; any strides.
        residual (Tensor): x's shape, dtype and device.
        backend (str | None): see the module's description.

    Returns:
        Tensor: x's shape and dtype; x's memory order where x is dense, else contiguous.

    Raises:
        TypeError: an argument is no dense floating-point tensor, or residual's dtype is not x's.
        ValueError: residual's shape or device is not x's, or `backend` is no backend's name.
        RuntimeError: the requested backend does not serve this call.
    """
    _checks.check_floating("x", x)
    _checks.check_residual(residual, x.shape, x, cast=autocasts(x.device.type))
    chosen = serving_backend("add_relu", x, backend)
    if chosen == "reference":
        return reference.add_relu(x, residual.to(x.dtype))
    if not _any_order_dense(x):
        x = x.contiguous()
    if residual.stride() != x.stride() or residual.dtype != x.dtype:
        residual = torch.empty_like(x).copy_(residual)
    return AddReLUFunction.apply(x, residual, chosen)


def moments(x: Tensor, *, backend: str | None = None) -> Moments:
    """Per-channel statistics: mean = E[x] and biased var = E[(x - mean)^2] over N, H and W.

    Args:
        x (Tensor): (N, C, H, W); float16, bfloat16, float32 or float64; any strides; channels_last is fastest.
        backend (str | None): see the module's description.

    Returns:
        Moments: mean and var, (C,), float32, or float64 for float64; NaN where N*H*W is 0.

    Raises:
        TypeError, ValueError: x is not as described. RuntimeError: the requested backend does not serve this call.

    Numerics: deviations are summed around a center near each tile's mean, and tiles are merged pairwise in float64
    (Chan, Golub, LeVeque 1979), so no digits are lost where |mean| is much larger than the standard deviation.
    """
    _checks.check_image("x", x)
    chosen = serving_backend("moments", x, backend)
    if chosen == "reference":
        return Moments(*reference.moments(x))
    return Moments(*MomentsFunction.apply(as_dense(x), chosen))


def finalize(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    count: int = 0,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = 0.1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalisation as two vectors: scale = weight / sqrt(var + eps), shift = bias - mean * scale.

    Args:
        mean, var (Tensor): (C,) float32 or float64; var is biased (divided by count).
        weight, bias (Tensor | None): (C,), any floating dtype; 1 and 0 where absent.
        eps (float): positive.
        count (int): values per channel behind mean and var; 0 leaves running_mean and running_var alone, 1 has no
            unbiased variance to update them with.
        running_mean, running_var (Tensor | None): (C,), updated in place:
            running <- (1 - momentum) * running + momentum * batch, with var * count / (count - 1), the unbiased one.
        num_batches_tracked (Tensor | None): () int64, incremented.
        momentum (float | None): in [0, 1]; None is the cumulative average 1 / num_batches_tracked.
        backend (str | None): see the module's description.

    Returns:
        tuple[Tensor, Tensor]: scale and shift, (C,), mean's dtype.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; nothing has been updated.
    """
    _checks.check_floating("mean", mean, 1)
    parameters = BatchNorm2dParameters(
        running_mean, running_var, weight, bias, True, momentum, eps, num_batches_tracked
    )
    _checks.check_vector("var", var, mean.shape[0], mean.device)
    _checks.check_batch_norm(parameters, (2, mean.shape[0], 1, 1), mean.device)
    if count < 0 or (count == 1 and running_mean is not None):
        raise ValueError(f"count must be 0, or more than 1 with running statistics, got {count}")
    if mean.dtype not in (torch.float32, torch.float64) or var.dtype != mean.dtype:
        raise TypeError(f"mean and var must both be float32 or float64, got {mean.dtype} and {var.dtype}")
    chosen = serving_backend("finalize", mean, backend)
    if chosen == "reference":
        return reference.finalize(
            mean, var, weight, bias, eps, count=count, running_mean=running_mean, running_var=running_var,
            num_batches_tracked=num_batches_tracked, momentum=momentum,
        )  # fmt: skip
    mean, var = mean.contiguous(), var.contiguous()
    out = FinalizeFunction.apply(
        mean, var, weight, bias, eps, count, running_mean, running_var, num_batches_tracked, momentum, chosen
    )
    bump_versions(parameters)
    return out


def scale_shift_act(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    activation: str = "relu",
    *,
    backend: str | None = None,
) -> Tensor:
    """Normalise, add and activate in one pass: out = act(x*scale + shift + r).

    r is absent, `residual`, or residual*residual_scale + residual_shift.

    Args:
        x (Tensor): (N, C, H, W); float16, bfloat16, float32 or float64; any strides; channels_last is fastest.
        scale, shift (Tensor): (C,), float32, or float64 beside a float64 x.
        residual (Tensor | None): x's shape, dtype and device.
        residual_scale, residual_shift (Tensor | None): (C,) like scale; both or none, and only with a residual.
        activation (str): "relu" or "identity".
        backend (str | None): see the module's description.

    Returns:
        Tensor: (N, C, H, W) in x's dtype; x's memory order where x is dense, else contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described, or the requested backend is missing.
    """
    _checks.check_image("x", x)
    _checks.check_activation_name(activation)
    vectors = {"scale": scale, "shift": shift, "residual_scale": residual_scale, "residual_shift": residual_shift}
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, vector in vectors.items():
        _checks.check_vector(name, vector, x.shape[1], x.device)
        if vector is not None and vector.dtype != wanted:
            raise TypeError(f"{name} must be {wanted} beside an x of {x.dtype}, got {vector.dtype}")
    if (residual_scale is None) != (residual_shift is None) or (residual is None and residual_scale is not None):
        raise ValueError("residual_scale and residual_shift must be given together, and with a residual")
    if residual is not None:
        _checks.check_residual(residual, x.shape, x, cast=autocasts(x.device.type))
    chosen = serving_backend("scale_shift_act", x, backend)
    if chosen == "reference":
        return reference.scale_shift_act(x, scale, shift, residual, residual_scale, residual_shift, activation)
    x = as_dense(x)
    residual = None if residual is None else beside(residual, x)
    dense = [None if v is None else v.contiguous() for v in vectors.values()]
    arguments = (x, dense[0], dense[1], residual, dense[2], dense[3], activation == "relu")
    return ScaleShiftActFunction.apply(*arguments, chosen)


def bn_act(
    x: Tensor,
    bn: BatchNorm2dParameters,
    residual: Tensor | None = None,
    residual_bn: BatchNorm2dParameters | None = None,
    activation: str = "relu",
    *,
    moments: Moments | None = None,
    return_moments: bool = False,
    backend: str | None = None,
) -> Any:
    """Batch normalisation, residual and activation: out = act(BN(x) + r).

    BN(x) = (x - mean) / sqrt(var + eps) * weight + bias, with the batch's mean and biased variance if bn.training,
    else the running ones; r is absent, `residual`, or BN_r(residual). In training the running statistics and the
    counter are updated in place, as by :class:`torch.nn.BatchNorm2d`.

    Args:
        x (Tensor): (N, C, H, W); float16, bfloat16, float32 or float64; any strides; channels_last is fastest.
        bn (BatchNorm2dParameters): its vectors are (C,), each of any floating dtype.
        residual (Tensor | None): x's shape, dtype and device.
        residual_bn (BatchNorm2dParameters | None): normalises the residual: the raw output of a projection.
        activation (str): "relu" or "identity".
        moments (Moments | None): x's, where whoever wrote x handed them on; else they are taken here, in a pass.
        return_moments (bool): hand on the output's moments, from the pass that writes it, for its normalisation.
        backend (str | None): see the module's description.

    Returns:
        Tensor, or tuple[Tensor, Moments] with return_moments: (N, C, H, W) in x's dtype; x's memory order where x is
        dense, else contiguous. Kept for backward are x, a raw residual, and the output where a residual was added or
        its moments are handed on: nothing normalised.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described, there is one value per channel in
            training, or the requested backend is missing; nothing has been updated.
    """
    _checks.check_image("x", x)
    _checks.check_activation_name(activation)
    _checks.check_norms(x, x.shape, bn, residual, residual_bn, cast=autocasts(x.device.type))
    _checks.check_moments(moments, x)
    return _calls.bn_act(
        x, bn, residual, residual_bn, activation, backend, moments=moments, return_moments=return_moments
    )
