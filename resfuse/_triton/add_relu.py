"""add_relu in Triton: out = relu(x + residual), and its backward.

Forward reads two activations and writes one; backward reads grad_out and the output and writes the gradient of both
inputs, grad_out where the output is above 0. A program takes a stretch of memory: the order of dimensions is no matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse._triton.kernel import Kernel
from resfuse._triton.tiles import activate, active_gradient
from resfuse._triton.walk import beside

_BYTES = 8192  # of each operand, for each program


@Kernel
@triton.jit
def add_relu_kernel(x_ptr, residual_ptr, out_ptr, size, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    z = tl.load(x_ptr + at, mask=inside).to(COMPUTE) + tl.load(residual_ptr + at, mask=inside).to(COMPUTE)
    tl.store(out_ptr + at, activate(z, True).to(out_ptr.dtype.element_ty), mask=inside)


@Kernel
@triton.jit
def add_relu_backward_kernel(grad_ptr, out_ptr, grad_in_ptr, size, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    grad = tl.load(grad_ptr + at, mask=inside)
    out = tl.load(out_ptr + at, mask=inside).to(COMPUTE)
    tl.store(grad_in_ptr + at, active_gradient(grad.to(COMPUTE), out, True).to(grad.dtype), mask=inside)


def _over_memory(kernel, first: Tensor, second: Tensor) -> Tensor:
    out = torch.empty_like(first)
    beside(out, first=first, second=second)  # what has gaps does not keep its strides
    if out.numel() == 0:
        return out
    compute = tl.float64 if first.dtype == torch.float64 else tl.float32
    block = _BYTES // first.element_size()
    kernel[(triton.cdiv(out.numel(), block),)](
        first, second, out, out.numel(), COMPUTE=compute, BLOCK=block, num_warps=4, enable_fp_fusion=False
    )
    return out


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    return _over_memory(add_relu_kernel, x, residual)


def add_relu_backward(grad_out: Tensor, out: Tensor) -> Tensor:
    return _over_memory(add_relu_backward_kernel, grad_out, out)
