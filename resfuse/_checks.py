"""What :mod:`resfuse.functional` demands of its arguments, raised before anything is computed or changed.

Messages name the argument, the rule and the value. Types follow stock PyTorch: ValueError for rank and values,
RuntimeError for channels, TypeError for types and dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resfuse.backends import DTYPES
from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters, Size, Window

ACTIVATIONS = ("relu", "identity")
MAX_WINDOW = 256  # positions of a pool's window: the native arg-max is one byte


def check_activation_name(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_floating(name: str, tensor: Tensor, rank: int | None = None) -> None:
    """tensor is dense, of a supported dtype and, where asked, of this rank."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if rank is not None and tensor.dim() != rank:
        raise ValueError(f"{name} must be {rank}D, got {tensor.dim()}D input of shape {tuple(tensor.shape)}")


def check_image(name: str, x: Tensor) -> None:
    """x is (N, C, H, W) of a supported dtype."""
    check_floating(name, x, 4)


def check_residual(residual: Tensor, shape: Sequence[int], x: Tensor, *, cast: bool, name: str = "residual") -> None:
    """residual has the shape of what it is added to, x's device and, unless autocast will cast it, x's dtype."""
    check_floating(name, residual)
    if tuple(residual.shape) != tuple(shape):
        raise ValueError(f"{name} must have x's shape {tuple(shape)}, got {tuple(residual.shape)}")
    if residual.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {residual.device}")
    if residual.dtype != x.dtype and not cast:
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {residual.dtype}")


def check_vector(name: str, vector: Tensor | None, channels: int, device: torch.device) -> None:
    """vector is absent or (C,), floating, on the activation's device."""
    if vector is None:
        return
    check_floating(name, vector)
    if vector.dim() != 1 or vector.shape[0] != channels:
        raise RuntimeError(f"{name} must have shape ({channels},), one value per channel, got {tuple(vector.shape)}")
    if vector.device != device:
        raise ValueError(f"{name} must be on x's device {device}, got {vector.device}")


def check_eps(name: str, eps: float) -> None:
    if not eps > 0:
        raise ValueError(f"{name} must be positive, got {eps}")


def check_momentum(name: str, momentum: float | None) -> None:
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"{name} must be None or in [0, 1], got {momentum}")


def check_batch_norm(bn: BatchNorm2dParameters, shape: Sequence[int], device: torch.device, prefix: str = "") -> None:
    """bn can normalise an activation of `shape` (N, C, H, W) on `device`."""
    for field in ("running_mean", "running_var", "weight", "bias"):
        check_vector(prefix + field, getattr(bn, field), shape[1], device)
    check_eps(f"{prefix}eps", bn.eps)
    check_momentum(f"{prefix}momentum", bn.momentum)
    if (bn.running_mean is None) != (bn.running_var is None):
        raise ValueError(f"{prefix}running_mean and {prefix}running_var must be given together or not at all")
    if not bn.training:
        if bn.running_mean is None:
            raise ValueError(f"{prefix}running_mean and {prefix}running_var must be given when training is False")
        return
    batches = bn.num_batches_tracked
    if batches is not None and (batches.dtype != torch.int64 or batches.numel() != 1 or batches.device != device):
        raise TypeError(
            f"{prefix}num_batches_tracked must be one int64 on {device}, got {batches.numel()} of {batches.dtype} "
            f"on {batches.device}"
        )
    if shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(shape)}")


def check_norms(
    x: Tensor,
    shape: Sequence[int],
    bn: BatchNorm2dParameters,
    residual: Tensor | None,
    residual_bn: BatchNorm2dParameters | None,
    *,
    cast: bool,
) -> None:
    """bn, and a residual with or without its own normalisation, fit an activation of `shape` with x's device."""
    check_batch_norm(bn, shape, x.device)
    if residual is not None:
        check_residual(residual, shape, x, cast=cast)
    if residual_bn is not None:
        if residual is None:
            raise ValueError("residual must be given with residual_bn, got None")
        check_batch_norm(residual_bn, shape, x.device, "residual ")


def _check_numbers(name: str, value: Any, least: int) -> tuple[int, int]:
    """(vertical, horizontal) of a convolution's argument: one int or a pair, each at least `least`."""
    numbers = value if isinstance(value, Sequence) else (value,)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if len(numbers) not in (1, 2) or min(numbers) < least:
        raise RuntimeError(f"{name} must be one int or two, at least {least}, got {value!r}")
    return numbers[0], numbers[-1]


def _check_geometry(conv: Conv2dParameters, shape: Sequence[int], prefix: str) -> tuple[int, int]:
    """Height and width of conv's output; stride, padding and dilation are ones that torch accepts."""
    stride = _check_numbers(f"{prefix}stride", conv.stride, 1)
    dilation = _check_numbers(f"{prefix}dilation", conv.dilation, 1)
    if conv.padding == "same":
        if stride != (1, 1):
            raise RuntimeError(f"{prefix}stride must be 1 with padding='same', got {conv.stride!r}")
        return shape[2], shape[3]
    if isinstance(conv.padding, str) and conv.padding != "valid":
        raise RuntimeError(f"{prefix}padding must be numbers, 'same' or 'valid', got {conv.padding!r}")
    padding = (0, 0) if conv.padding == "valid" else _check_numbers(f"{prefix}padding", conv.padding, 0)
    kernel = conv.weight.shape[2:]
    reach = [shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1 for i in (0, 1)]
    if reach[0] < 0 or reach[1] < 0:
        raise RuntimeError(
            f"{prefix}weight of shape {tuple(conv.weight.shape)} must fit into the padded input, got an input of shape "
            f"{tuple(shape)} with padding={conv.padding}"
        )
    return reach[0] // stride[0] + 1, reach[1] // stride[1] + 1


def _check_conv_dtype(name: str, tensor: Tensor, x: Tensor, cast: bool) -> None:
    """tensor has x's dtype, or one that autocast casts beside x: it leaves float64 and integers alone."""
    left_alone = torch.float64 in (tensor.dtype, x.dtype) or not tensor.is_floating_point()
    if tensor.dtype != x.dtype and (left_alone or not cast):
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")


def check_conv(
    conv: Conv2dParameters, shape: Sequence[int], x: Tensor, *, cast: bool, prefix: str = ""
) -> tuple[int, int, int, int]:
    """The shape of conv's output, once it is sure that conv can read an activation of `shape` beside x.

    Weights have x's device and, unless autocast casts them, x's dtype.
    """
    weight, bias = conv.weight, conv.bias
    check_floating(f"{prefix}weight", weight, 4)
    for name, tensor in ((f"{prefix}weight", weight), (f"{prefix}bias", bias)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
        _check_conv_dtype(name, tensor, x, cast)
    if shape[1] != weight.shape[1] * conv.groups:
        raise RuntimeError(
            f"{prefix}weight of shape {tuple(weight.shape)} with groups={conv.groups} must be given "
            f"{weight.shape[1] * conv.groups} channels, got an input of shape {tuple(shape)}"
        )
    if weight.shape[0] % conv.groups != 0:
        raise RuntimeError(f"{prefix}groups must divide the {weight.shape[0]} output channels, got {conv.groups}")
    if min(weight.shape[0], *weight.shape[2:]) < 1:
        raise RuntimeError(f"{prefix}weight must have outputs and a kernel, got shape {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise RuntimeError(f"{prefix}bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    return shape[0], weight.shape[0], *_check_geometry(conv, shape, prefix)


def check_chain(
    x: Tensor,
    layers: Sequence[tuple[Conv2dParameters, BatchNorm2dParameters]],
    shortcut: Tensor | tuple[Conv2dParameters, BatchNorm2dParameters] | None,
    *,
    cast: bool,
) -> None:
    """A chain fits together: every convolution its input, every normalisation, and a shortcut the last."""
    check_image("x", x)
    if len(layers) == 0:
        raise ValueError("layers must hold at least one (conv, bn), got none")
    shape: Sequence[int] = x.shape
    for i, (conv, bn) in enumerate(layers, 1):
        shape = check_conv(conv, shape, x, cast=cast, prefix=f"conv{i}.")
        check_batch_norm(bn, shape, x.device, f"bn{i}.")
    if isinstance(shortcut, Tensor):
        check_residual(shortcut, shape, x, cast=cast, name="shortcut")
    elif shortcut is not None:
        found = check_conv(shortcut[0], x.shape, x, cast=cast, prefix="shortcut conv.")
        check_batch_norm(shortcut[1], found, x.device, "shortcut bn.")
        if tuple(found) != tuple(shape):
            raise ValueError(f"shortcut must have the residual branch's shape {tuple(shape)}, got {tuple(found)}")


def check_preact_chain(
    x: Tensor,
    layers: Sequence[tuple[BatchNorm2dParameters | None, Conv2dParameters]],
    shortcut: Tensor | Conv2dParameters | None,
    moments: Sequence[Tensor] | None,
    *,
    cast: bool,
) -> None:
    """A pre-activation unit fits together: every normalisation and convolution its input, and the shortcut the last."""
    check_image("x", x)
    if len(layers) == 0:
        raise ValueError("layers must hold at least one (bn, conv), got none")
    shape: Sequence[int] = x.shape
    for i, (bn, conv) in enumerate(layers, 1):
        if bn is not None:
            check_batch_norm(bn, shape, x.device, f"bn{i}.")
        elif i > 1:
            raise ValueError(f"layers[{i - 1}] must begin with a batch normalisation: only the first may have None")
        elif moments is not None:
            raise ValueError("moments must be None where layers[0] does not normalise x")
        shape = check_conv(conv, shape, x, cast=cast, prefix=f"conv{i}.")
    if isinstance(shortcut, Tensor):
        check_residual(shortcut, shape, x, cast=cast, name="shortcut")
    elif shortcut is not None:
        found = check_conv(shortcut, x.shape, x, cast=cast, prefix="shortcut conv.")
        if tuple(found) != tuple(shape):
            raise ValueError(f"shortcut must have the residual branch's shape {tuple(shape)}, got {tuple(found)}")
    check_moments(moments, x)


def check_moments(moments: Sequence[Tensor] | None, x: Tensor) -> None:
    """Moments that were handed on are those of an activation like x."""
    if moments is None:
        return
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if len(moments) != 2:
        raise ValueError(f"moments must be (mean, var), got {len(moments)} values")
    for name, vector in zip(("moments.mean", "moments.var"), moments, strict=True):
        check_vector(name, vector, x.shape[1], x.device)
        if vector.dtype != wanted:
            raise TypeError(f"{name} must be {wanted} beside an x of {x.dtype}, got {vector.dtype}")


def _check_pair(name: str, value: Size, least: int) -> tuple[int, int]:
    """(vertical, horizontal) of a number or of a pair of them, each at least `least`."""
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) for v in pair):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return pair[0], pair[1]


def check_window(kernel_size: Size, stride: Size, padding: Size) -> Window:
    """kernel_size, stride and padding as pairs that make sense together."""
    kernel = _check_pair("kernel_size", kernel_size, 1)
    window = kernel, _check_pair("stride", stride, 1), _check_pair("padding", padding, 0)
    if kernel[0] * kernel[1] > MAX_WINDOW:
        raise ValueError(f"kernel_size must have at most {MAX_WINDOW} positions, got {kernel[0]}x{kernel[1]}")
    if any(p > k // 2 for p, k in zip(window[2], kernel, strict=True)):
        raise ValueError(f"padding must be at most half of kernel_size {kernel}, got {window[2]}")
    return window


def check_window_fits(window: Window, shape: Sequence[int]) -> None:
    """At least one window fits into an activation of `shape`."""
    kernel, _, padding = window
    if any(shape[2 + i] < 1 or shape[2 + i] + 2 * padding[i] < kernel[i] for i in (0, 1)):
        raise RuntimeError(
            f"kernel_size {kernel} must fit into the padded input, got an input of shape {tuple(shape)} with "
            f"padding={padding}"
        )
