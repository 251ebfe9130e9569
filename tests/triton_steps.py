"""The operators of a network's step as it runs on a GPU, with their arguments, recorded on the meta device.

The fused network chooses as it does on a GPU without CUDA kernels; nothing is computed.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import resfuse
from resfuse import choices, ops

Call = tuple[str, tuple[Any, ...]]  # an operator's name and its arguments


class _Operators(TorchDispatchMode):
    """Notes every operator of ours; torch's convolutions keep channels_last, as on a GPU and not on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "resfuse":
            assert func._overloadname == "triton" and not kwargs, func
            self.calls.append((func._schema.name.partition("::")[2], args))
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and args[0].is_contiguous(memory_format=torch.channels_last):
            result = result.contiguous(memory_format=torch.channels_last)
        return result


def by_the_rule(unit: str, device: torch.device, dtype: torch.dtype, conv: choices.Conv, pixels: int | None = None):
    """What :func:`choices.choose` says on a GPU that nobody measured."""
    return choices.rule(dtype, conv)


def all_fused(*_: Any) -> str:
    """What it says where our kernels were measured to be faster for every convolution."""
    return "fused"


@contextlib.contextmanager
def choosing(choose: Callable[..., str]) -> Iterator[None]:
    """`choose` says who convolves."""
    with mock.patch.object(choices, "choose", choose):
        yield


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """The meta device has Triton's kernels, and what runs without autocast, of which it knows nothing, is plain."""
    with (
        mock.patch.dict(ops.missing_triton, {"meta": None}),
        mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()),
    ):
        yield


def step(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    choose: Callable[..., str],
    *,
    order: torch.memory_format = torch.channels_last,
    training: bool = True,
    **options: Any,
) -> list[Call]:
    """The operators of one training step, or of inference; `options` are those of :func:`resfuse.fuse`.

    Convolutions have weights of `dtype`, normalizations float32 ones.
    """
    with torch.device("meta"):
        model = build().to(memory_format=order).train(training)
        images = torch.empty(shape, dtype=dtype).contiguous(memory_format=order)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(dtype)
    operators = _Operators()
    with choosing(choose), _as_on_a_gpu(), operators, torch.set_grad_enabled(training):
        out = resfuse.fuse(model, **options)(images)
        if training:
            out.float().sum().backward()
    return operators.calls
