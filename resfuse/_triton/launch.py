"""What the launchers of products share: checks of their tensors, the precision of a dot, slabs of pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Programs that fill a large GPU twice; a constant, so that the order of sums depends on the shape alone.
_PROGRAMS = 512
_SLAB_PIXELS = 4096  # a float32 sum over pixels runs no longer


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


def check_prologue(affine: Tensor | None, mean: Tensor | None, channels: int, name: str = "affine") -> None:
    """affine is float32 (2, channels) beside a mean (channels,), or None."""
    if affine is None:
        return
    if tuple(affine.shape) != (2, channels) or affine.dtype != torch.float32 or not affine.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32 (2, {channels}), got {_described(affine)}")
    if mean is None:
        raise ValueError(f"{name} needs a mean")
    check_vector(mean, channels, f"the mean beside {name}")


def check_vector(vector: Tensor, size: int, name: str) -> None:
    if tuple(vector.shape) != (size,) or vector.dtype != torch.float32 or not vector.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32 ({size},), got {_described(vector)}")


def check_matrix(matrix: Tensor, rows: int, columns: int, name: str) -> None:
    """A matrix, or a 1x1 convolution's weight, that is dense."""
    if matrix.numel() != rows * columns or matrix.shape[0] != rows or not matrix.is_contiguous():
        raise ValueError(f"{name} must be contiguous ({rows}, {columns}), got {_described(matrix)}")


def _described(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)} and strides {tuple(x.stride())}"


def precision(x: Tensor) -> str:
    """How a dot of float32 multiplies: in tf32 only where torch's own products may."""
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def slab_of(rows: int, block: int, programs: int) -> int:
    """Rows of a slab, a multiple of `block`: as many slabs as fill the GPU where each takes `programs` programs."""
    blocks = triton.cdiv(rows, block)
    slabs = max(min(blocks, triton.cdiv(_PROGRAMS, programs)), triton.cdiv(rows, _SLAB_PIXELS))
    return triton.cdiv(blocks, slabs) * block


def pixels_of(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def strided(size: int, stride: int) -> int:
    """Outputs of a 1x1 convolution along an axis."""
    return -(-size // stride)
