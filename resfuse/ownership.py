"""Whether a backward may overwrite the gradient that it was given: whether nobody else can read it again.

The rule is that of torch's own accumulation in place: no other reference to the tensor, and none to its memory. Here
the interpreter's references to the tensor count too. How many a gradient has that is nobody else's is not documented,
so it is measured once, on one that surely is.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor


def _references(grad: Tensor) -> tuple[int, int, int]:
    """References of the interpreter to the tensor, of torch to the tensor, and to its memory."""
    memory = torch._C._storage_Use_Count(grad.untyped_storage()._cdata)
    return sys.getrefcount(grad), grad._use_count(), memory  # type: ignore[attr-defined]


class _Probe(torch.autograd.Function):
    """The identity, which counts the references to its gradient."""

    found: tuple[int, int, int] | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        _Probe.found = _measure(grad_out)
        return grad_out


def _measure(grad: Tensor) -> tuple[int, int, int]:
    """The references as `owns` sees them, whose frame holds one too."""
    return _references(grad)


@functools.cache
def _of_one_owner() -> tuple[int, int, int] | None:
    """The references to a gradient that is nobody else's; None where this torch does not count them."""
    if not (hasattr(torch.Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")):
        return None
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        x = torch.zeros(2, device="cpu", requires_grad=True)
        torch.autograd.backward(_Probe.apply(x).mul(2).sum())
    return _Probe.found


def owns(grad: Tensor) -> bool:
    """Whether `grad`, an argument of a Function's backward and held by no other name there, is nobody else's.

    Not for code that torch.compile traces.
    """
    return (one := _of_one_owner()) is not None and _references(grad) == one
