"""The operators whose work has two candidates: each call takes the one that :mod:`resfuse.choices` names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from resfuse import choices
from resfuse._triton import composed
from resfuse._triton.conv_act import conv_act as fused_conv_act
from resfuse._triton.conv_stats import conv_stats as fused_conv_stats
from resfuse._triton.conv_stats_backward import conv_stats_backward as fused_backward
from resfuse._triton.conv_stats_backward import conv_stats_backward_ as fused_backward_in_place
from resfuse._triton.gemm import forward_axis
from resfuse._triton.launch import is_matrix


class Candidate(NamedTuple):
    """One way to compute conv_stats, its gradients, and conv_act."""

    conv_stats: Callable[..., tuple[Tensor, Tensor, Tensor]]
    conv_stats_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    conv_stats_backward_: Callable[..., tuple[Tensor, Tensor]]
    conv_act: Callable[..., tuple[Tensor, Tensor, Tensor]]


CANDIDATES = {
    "fused": Candidate(fused_conv_stats, fused_backward, fused_backward_in_place, fused_conv_act),
    "composed": Candidate(
        composed.conv_stats, composed.conv_stats_backward, composed.conv_stats_backward_, composed.conv_act
    ),
}


def _candidate(unit: str, x: Tensor, weight: Tensor, pairs: Sequence[Any]) -> Candidate:
    if is_matrix(x) and weight.shape[2:] == (1, 1):  # torch's convolution would multiply in tf32, by its default
        return CANDIDATES["fused"]
    conv = choices.Conv.of(weight.shape, *pairs)
    moves = zip(x.shape[2:], conv.kernel, conv.stride, conv.padding, conv.dilation, strict=True)
    height, width = (forward_axis(*move).rows for move in moves)
    return CANDIDATES[choices.choose(unit, x.device, x.dtype, conv, x.shape[0] * height * width)]


# Arguments are the schemas'; those that decide are named.


def conv_stats(
    x: Tensor, affine: Tensor | None, mean: Tensor | None, weight: Tensor, relu: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, y_mean, y_var)."""
    return _candidate("conv_stats", x, weight, rest[:4]).conv_stats(x, affine, mean, weight, relu, *rest)


def _backward(arguments: Sequence[Any]) -> Candidate:
    x, weight, pairs = arguments[7], arguments[10], arguments[12:16]
    return _candidate("conv_stats_backward", x, weight, pairs)


def conv_stats_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, sums)."""
    return _backward(arguments).conv_stats_backward(*arguments)


def conv_stats_backward_(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(grad_weight, sums); other becomes grad_x."""
    return _backward(arguments).conv_stats_backward_(*arguments)


def conv_act(
    x: Tensor, affine: Tensor | None, mean: Tensor | None, relu_x: bool, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, out_mean, out_var); it goes as conv_stats, the same product. A branch is the fused kernel's."""
    branch, pairs = rest[5], rest[9:13]
    candidate = _candidate("conv_stats", x, weight, pairs) if branch is None else CANDIDATES["fused"]
    return candidate.conv_act(x, affine, mean, relu_x, weight, *rest)
