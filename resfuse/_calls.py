"""What every public function does between its checks and its kernel: backend, autocast, layout and versions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from resfuse.backends import choose
from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is running."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def serving_backend(unit: str, x: Tensor, requested: str | None) -> str:
    """The backend that serves this call: the chosen one, or reference where torch has to see every operation."""
    chosen = choose(unit, x.device.type, x.dtype, requested)
    return "reference" if chosen != "reference" and transformed() else chosen


def autocasts(device: str) -> bool:
    """Whether autocast is on for this type of device; devices that have none, such as meta, answer False."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def as_dense(x: Tensor) -> Tensor:
    """x itself if it is channels_last or contiguous, else a contiguous copy."""
    if x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous():
        return x
    return x.contiguous()


def bump_versions(*norms: BatchNorm2dParameters | None) -> None:
    """Tell autograd that the operators have changed the running statistics, as torch's own in-place operators do."""
    if torch.compiler.is_compiling():
        return
    for bn in norms:
        if bn is None or not bn.training or bn.running_mean is None:
            continue
        for tensor in (bn.running_mean, bn.running_var, bn.num_batches_tracked):
            if tensor is not None and not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)


def convolve(x: Tensor, conv: Conv2dParameters) -> Tensor:
    """The convolution itself, by torch."""
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
