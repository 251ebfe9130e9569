"""Gradient checkpointing that leaves running statistics as one forward pass leaves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from resfuse.models.parts import check_positive_int


@contextmanager
def _statistics_kept(modules: tuple[nn.Module, ...]) -> Iterator[None]:
    """Running statistics that are updated inside are those of copies, dropped in the end.

    Copies, not None: stock batch normalisation saves its statistics for backward, and a recomputation must save as many
    tensors as the forward pass did.
    """
    norms = [m for module in modules for m in module.modules() if isinstance(m, _NormBase) and m.training]
    buffers = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: None if b is None else b.clone() for name, b in norm._buffers.items()})
    try:
        yield
    finally:
        for norm, kept in zip(norms, buffers, strict=True):
            norm._buffers.update(kept)


def recomputed(function: Callable[..., Tensor], *inputs: Tensor, modules: tuple[nn.Module, ...]) -> Tensor:
    """``function(*inputs)``, of which only the inputs are kept for backward: the rest is computed again there.

    Args:
        function (Callable): what to compute.
        *inputs (Tensor): its arguments.
        modules (tuple[nn.Module, ...]): the modules it calls; their running statistics are updated once, not again in
            the recomputation, whether they are stock or fused.

    Returns:
        Tensor: the result. Random draws (dropout) are repeated as they were.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)

    if torch.compiler.is_compiling():  # the compiler recomputes in its own graph, which writes buffers once
        return checkpoint(function, *inputs, use_reentrant=False)

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), _statistics_kept(modules)

    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


class CheckpointedSequential(nn.Sequential):
    """A Sequential that keeps for backward only the input of every ``every``-th module, and recomputes the rest.

    Of n modules about ``n / every`` inputs are kept, and ``every`` modules are whole in memory at a time: least near
    the square root of n. The price is one more forward pass. Names and state_dict are those of a Sequential.

    Args:
        *modules (nn.Module): in order, stock or fused.
        every (int): how many modules are recomputed together.

    Raises:
        TypeError: ``every`` is not an int. ValueError: it is below 1.
    """

    def __init__(self, *modules: Any, every: int = 1) -> None:
        check_positive_int("every", every)
        super().__init__(*modules)
        self.every = every

    def forward(self, x: Tensor) -> Tensor:
        modules = tuple(self)
        for start in range(0, len(modules), self.every):
            part = modules[start : start + self.every]
            x = recomputed(partial(_chain, part), x, modules=part)
        return x

    def extra_repr(self) -> str:
        return f"every={self.every}"


def _chain(modules: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def make_stage(blocks: list[nn.Module], checkpoint_every: int | None) -> nn.Sequential:
    """The blocks of a stage one after the other, checkpointed unless ``checkpoint_every`` is None."""
    if checkpoint_every is None:
        return nn.Sequential(*blocks)
    check_positive_int("checkpoint_every", checkpoint_every)
    return CheckpointedSequential(*blocks, every=checkpoint_every)
