"""Which backend serves which unit: what is available, and the choice for one call."""

from __future__ import annotations

from typing import NamedTuple

import torch

from resfuse import ops

BACKENDS = ("native", "triton", "reference")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What native libraries implement, and Triton's kernels too. bn_act is moments, finalize and scale_shift_act;
# bn_relu_maxpool is moments, finalize and scale_shift_relu_maxpool. Who convolves is a question of its own:
# `why_not_raw`.
_UNITS = frozenset({"add_relu", "moments", "finalize", "scale_shift_act", "bn_act", "bn_relu_maxpool"})


# From here on tile kernels win over torch's convolutions and passes around them, by measurement: narrower ones leave
# lanes of the register tile empty. AVX2's tiles are narrower than AVX-512's.
_TILE_CHANNELS = (
    {torch.float32: 64, torch.bfloat16: 32} if ops.tile_lanes == 16 else {torch.float32: 16, torch.bfloat16: 16}
)
# The same for the channels of one group, by measurement: sixteen lanes read the channels of all groups that they belong
# to, so of a depthwise convolution's multiply-adds fifteen in sixteen meet zeros.
_TILE_GROUP_CHANNELS = {torch.float32: 2, torch.bfloat16: 2}
# A convolution of an image's few channels reads the taps of a kernel's row as one pixel (row_taps.h, whose limit the
# first is), and wins from so many output channels on: measured with AVX2 (docs/performance-log.md, entry 23), and taken
# over for AVX-512, but not for products of bfloat16, where torch's are twice as fast as of float32.
_ROW_TAPS_CHANNELS, _ROW_TAPS_OUTPUTS = 8, 64
# What Triton's products are made for: tensor cores, and float32.
_TRITON_PRODUCTS = (torch.float16, torch.bfloat16, torch.float32)
# Up to here train-time folding costs no time, by measurement: see `folds_from`.
_FOLD_CHANNELS = 256


class Status(NamedTuple):
    """Whether a backend can be used on a kind of device, and why not."""

    backend: str
    device: str
    available: bool
    reason: str


def available() -> list[Status]:
    """What this installation can run: one entry for each backend and kind of device.

    Returns:
        list[Status]: backend, device type, whether it is available, and the reason where it is not.
    """
    found = []
    for backend, missing_kernels in (("native", ops.missing_native), ("triton", ops.missing_triton)):
        for device, reason in missing_kernels.items():
            if reason is None and device == "cuda" and not torch.cuda.is_available():
                reason = "torch finds no CUDA device"
            found.append(Status(backend, device, reason is None, reason or ""))
    found.append(Status("reference", "any", True, ""))
    return found


def missing(unit: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` does not serve `unit` on this device and dtype; None where it does."""
    if backend == "reference":
        return None
    if backend == "triton":
        reason = ops.missing_triton.get(device, f"there are no Triton kernels for {device}")
    else:
        reason = ops.missing_native.get(device, f"there is no native library for {device}")
    if reason is not None:
        return reason
    if unit not in _UNITS:
        return f"{backend} kernels do not have it"
    if dtype not in DTYPES:
        return f"it has no kernel for {dtype}"
    return None


def _candidates(device: str) -> tuple[str, ...]:
    """The backends of a kind of device, best first. Triton's interpreter, on the CPU, is for tests: never a choice."""
    return ("native", "reference") if device == "cpu" else ("native", "triton", "reference")


def why_none(unit: str, device: str, dtype: torch.dtype) -> str | None:
    """Why no backend has kernels for `unit`, so that plain torch would run; None where one has."""
    if choose(unit, device, dtype) != "reference":
        return None
    return missing(unit, "native", device, dtype)


def convolving(device: str, requested: str | None = None) -> str:
    """The backend whose kernels convolve raw activations: the CPU's are native, a GPU's are Triton's."""
    return "native" if device == "cpu" and requested is None else requested or "triton"


def choose(unit: str, device: str, dtype: torch.dtype, requested: str | None = None) -> str:
    """The backend for one call.

    Args:
        unit (str): name of the unit or composition.
        device (str): device type of the activation.
        dtype (torch.dtype): dtype of the activation.
        requested (str | None): a backend that must serve the call; None takes the best that does.

    Returns:
        str: "native", "triton" or "reference".

    Raises:
        ValueError: `requested` is no backend's name.
        RuntimeError: the requested backend does not serve this call.
    """
    if requested is None:
        return next(backend for backend in _candidates(device) if missing(unit, backend, device, dtype) is None)
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {requested!r}")
    reason = missing(unit, requested, device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend={requested!r} does not serve {unit} on {device}: {reason}")
    return requested


def why_not_raw(
    device: str,
    dtype: torch.dtype,
    channels: int | None = None,
    group_channels: int | None = None,
    requested: str | None = None,
) -> str | None:
    """Why activations do not travel raw, to be normalised by the convolution that reads them; None where they do.

    Args:
        device (str): device type of the activations.
        dtype (torch.dtype): their dtype.
        channels (int | None): the fewest channels into or out of a convolution; None asks about kernels alone.
        group_channels (int | None): the fewest into or out of one group of a grouped one; None where none is grouped.
        requested (str | None): the backend that must serve the call; None where the caller did not choose.

    Returns:
        str | None: the reason.
    """
    kernels = convolving(device, requested)
    if kernels == "triton":
        reason = ops.missing_triton.get(device, "Triton has no kernels for it")
        if reason is not None:
            return f"there are no convolution kernels for {device}: {reason}"
        return None if dtype in _TRITON_PRODUCTS else f"Triton's convolutions have no kernel for {dtype}"
    if kernels != "native" or device != "cpu":
        return f"there are no convolution kernels for {device}"
    if ops.missing_native["cpu"] is not None:
        return ops.missing_native["cpu"]
    if dtype not in ops.tile_dtypes:
        return f"this processor has no convolution kernels for {dtype}"
    if channels is not None and channels < _TILE_CHANNELS[dtype]:
        return f"torch is faster below {_TILE_CHANNELS[dtype]} channels in {dtype}, here {channels}"
    if group_channels is not None and group_channels < _TILE_GROUP_CHANNELS[dtype]:
        fewest = _TILE_GROUP_CHANNELS[dtype]
        return f"torch is faster below {fewest} channels per group in {dtype}, here {group_channels}"
    return None


def joins_row_taps(weight: tuple[int, ...], dilation: int, dtype: torch.dtype) -> bool:
    """Whether tile kernels serve a dense convolution although its input has few channels, as an image has.

    Args:
        weight (tuple[int, ...]): the weight's shape, (K, C, kH, kW).
        dilation (int): horizontal; taps that lie apart are no run of memory.
        dtype (torch.dtype): of the activations.
    """
    out, channels, *kernel = weight
    few = channels < _ROW_TAPS_CHANNELS and min(kernel) > 1 and dilation == 1
    return few and out >= _ROW_TAPS_OUTPUTS and ops.tile_operands.get(dtype) == torch.float32


def emulated(device: str, dtype: torch.dtype) -> bool:
    """Whether torch's convolutions of this dtype are emulated: bfloat16 on a CPU that has no instruction for it."""
    return device == "cpu" and ops.tile_operands.get(dtype, dtype) != dtype


def folds_from(in_channels: int, out_channels: int, requested: bool | None = None) -> int | None:
    """From how many pixels on an expanding 1x1 convolution is folded with its batch normalisation in training.

    Folding trades one write and four reads of the output for C*C*M multiply-adds twice and algebra on K-by-C matrices,
    so it may pay where the map is large beside the channels, and it keeps no second activation of the output's size.
    Measured on ResNet-50, time is the same at every stage up to 256 channels, and memory falls with each; for a
    projection, whose C*C*M is larger beside C*K*M, the limit is the same. Measured on a CPU: on a GPU, where products
    are cheaper beside memory, the same limit is an assumption.

    Args:
        in_channels, out_channels (int): C and K.
        requested (bool | None): the caller's choice; None takes the measured rule.

    Returns:
        int | None: M = N*H*W from which it folds; below, and where None, the convolution's output is kept and
        normalised in the pass that adds the residual.
    """
    if requested is not None:
        return 0 if requested else None
    return 4 * in_channels if out_channels > in_channels and in_channels <= _FOLD_CHANNELS else None
