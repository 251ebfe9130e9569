"""What the launchers of products share: checks of their tensors, and the precision of a dot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_image(x: Tensor, name: str, *, like: Tensor | None = None, shape: Sequence[int] | None = None) -> None:
    """x is a channels_last activation that is not empty; of like's dtype and device, and of this shape."""
    if x.dim() != 4 or x.numel() == 0 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{name} must be channels_last (N, C, H, W) and not empty, got {_described(x)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32 for products in Triton, got {x.dtype}")
    if like is not None and (x.dtype != like.dtype or x.device != like.device):
        raise TypeError(f"{name} must be {like.dtype} on {like.device}, got {x.dtype} on {x.device}")
    if shape is not None and tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")


def check_prologue(affine: Tensor | None, mean: Tensor | None, like: Tensor, name: str = "affine") -> None:
    """affine is float32 (2, C) beside a mean (C,), for like's channels and on its device, or None."""
    if affine is None:
        return
    channels = like.shape[1]
    if tuple(affine.shape) != (2, channels) or affine.dtype != torch.float32 or not affine.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32 (2, {channels}), got {_described(affine)}")
    _check_device(affine, like.device, name)
    if mean is None:
        raise ValueError(f"{name} needs a mean")
    check_vector(mean, channels, like.device, f"the mean beside {name}")


def check_vector(vector: Tensor, size: int, device: torch.device, name: str) -> None:
    """A per-channel vector."""
    if tuple(vector.shape) != (size,) or vector.dtype != torch.float32 or not vector.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32 ({size},), got {_described(vector)}")
    _check_device(vector, device, name)


def check_matrix(matrix: Tensor, rows: int, columns: int, dtype: torch.dtype, device: torch.device, name: str) -> None:
    """A matrix, or a 1x1 convolution's weight, that is dense."""
    if matrix.numel() != rows * columns or matrix.shape[0] != rows or not matrix.is_contiguous():
        raise ValueError(f"{name} must be contiguous ({rows}, {columns}), got {_described(matrix)}")
    if matrix.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {matrix.dtype}")
    _check_device(matrix, device, name)


def _check_device(x: Tensor, device: torch.device, name: str) -> None:
    """A kernel would read another device's memory."""
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")


def _described(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)} and strides {tuple(x.stride())}"


def is_matrix(x: Tensor) -> bool:
    """Whether x is a float32 matrix, an image of one pixel for each row: what the algebra of folding multiplies."""
    return x.dtype == torch.float32 and x.shape[2:] == (1, 1)


def precision(x: Tensor) -> str:
    """How a dot of float32 multiplies: in tf32 only where torch's own products may, and never matrices, whose products
    are variances and differences that cancel.

    fp32_precision is what every switch of torch sets; allow_tf32 raises where a newer one is set.
    """
    activation = x.is_cuda and x.dtype == torch.float32 and not is_matrix(x)
    return "tf32" if activation and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
