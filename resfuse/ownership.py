"""Whether a backward may overwrite a tensor: the gradient that it was given, or what its own forward saved.

The rule is that of torch's own accumulation in place: no other reference to the tensor, and none to its memory. Here
the interpreter's references to the tensor count too. How many a tensor has that is nobody else's is not documented, so
it is measured once, on tensors that surely are.
"""

from __future__ import annotations

import functools
import sys
import threading
from typing import Any

import torch
from torch import Tensor

References = tuple[int, int, int]
"""Of the interpreter to a tensor, of torch to the tensor, and to its memory."""


def _references(tensor: Tensor) -> References:
    memory = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return sys.getrefcount(tensor), tensor._use_count(), memory  # type: ignore[attr-defined]


def _of_gradient(grad: Tensor) -> References:
    """The references as `owns` sees them, whose frame holds one too."""
    return _references(grad)


def _of_saved(*tensors: Tensor | None) -> set[References]:
    """The references as `owns_saved` sees them, whose frame holds one of each too."""
    return {_references(tensor) for tensor in tensors if tensor is not None}


class _Probe(torch.autograd.Function):
    """The identity, which counts the references to its gradient and to what it saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: list[Any]) -> Tensor:
        ctx.save_for_backward(x * 1)
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        ctx.found.append(_of_gradient(grad_out))
        (saved,) = ctx.saved_tensors
        ctx.found.append(_of_saved(saved))
        return grad_out, None


def _probe(found: list[Any]) -> None:
    sys.settrace(None)  # a debugger follows new threads too, and its view of a frame is a reference
    x = torch.zeros(2, device="cpu", requires_grad=True)
    torch.autograd.backward(_Probe.apply(x, found).mul(2).sum())


@functools.cache
def _of_one_owner() -> tuple[References, set[References]] | None:
    """The references to a gradient, and to a saved tensor, that are nobody else's; None where torch does not count.

    Measured in a thread of its own: what observes the caller, a dispatch mode or a debugger, may hold more of them.
    """
    if not (hasattr(torch.Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")):
        return None
    found: list[Any] = []
    thread = threading.Thread(target=_probe, args=(found,))
    thread.start()
    thread.join()
    return found[0], found[1]


def owns(grad: Tensor) -> bool:
    """Whether `grad`, an argument of a Function's backward and held by no other name there, is nobody else's.

    Not for code that torch.compile traces.
    """
    return (one := _of_one_owner()) is not None and _references(grad) == one[0]


def _graph_is_kept() -> bool:
    """Whether the running backward keeps what was saved (retain_graph=True); True where torch does not say."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is None or keeps()


def owns_saved(*tensors: Tensor | None) -> bool:
    """Whether these of ctx.saved_tensors, each unpacked in this backward to one name and no other, are nobody else's
    and are read for the last time. False under torch.compile."""
    if torch.compiler.is_compiling() or _graph_is_kept() or (one := _of_one_owner()) is None:
        return False
    return {_references(tensor) for tensor in tensors if tensor is not None} == one[1]
