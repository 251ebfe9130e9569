"""The reference engine: a plan in plain torch operators, for any device, and wherever torch has to see every operation:
export, tracing, torch.compile, gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.folding import plan as plans
from resfuse.folding.plan import INPUT, Plan, Step


def activated(step: Any, x: Tensor) -> Tensor:
    """What ends a step."""
    return x if step.activation == "identity" else getattr(F, step.activation)(x, *step.scalars)


def convolution(step: plans.Convolution, tensors: Mapping[str, Tensor], x: Tensor, *residual: Tensor) -> Tensor:
    bias = None if step.bias is None else tensors[step.bias].to(x.dtype)
    out = F.conv2d(x, tensors[step.weight], bias, step.stride, step.padding, step.dilation, step.groups)
    return activated(step, out + residual[0] if residual else out)


def scale_shift_act(step: plans.ScaleShiftAct, tensors: Mapping[str, Tensor], x: Tensor, *residual: Tensor) -> Tensor:
    if step.scale is None or step.shift is None:
        out = x
    else:
        channels = len(tensors[step.scale])
        if not isinstance(x, torch.fx.Proxy) and (x.dim() != 4 or x.shape[1] != channels):
            raise ValueError(f"the input of {step.names[0]} must be (N, {channels}, H, W), got {tuple(x.shape)}")
        scale, shift = (tensors[name][:, None, None] for name in (step.scale, step.shift))
        out = x.to(scale.dtype) * scale + shift
    return activated(step, out + residual[0] if residual else out).to(x.dtype)


def linear(step: plans.Linear, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    bias = None if step.bias is None else tensors[step.bias].to(x.dtype)
    return activated(step, F.linear(x, tensors[step.weight], bias))


def max_pool(step: plans.MaxPool, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return F.max_pool2d(x, step.kernel_size, step.stride, step.padding, step.dilation, step.ceil_mode)


def average_pool(step: plans.AveragePool, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return F.avg_pool2d(x, step.kernel_size, step.stride, step.padding, step.ceil_mode, step.count_include_pad)


def adaptive_pool(step: plans.AdaptivePool, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, step.output_size)


def flatten(step: plans.Flatten, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return torch.flatten(x, 1)


def pad_shortcut(step: plans.PadShortcut, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    kept = x[:, :, :: step.stride, :: step.stride]
    return F.pad(kept, (0, 0, 0, 0, 0, step.channels - x.shape[1]))


def concatenate(step: plans.Concatenate, tensors: Mapping[str, Tensor], *features: Tensor) -> Tensor:
    return torch.cat(features, 1)


STEPS: dict[str, Callable[..., Tensor]] = {
    "Convolution": convolution,
    "ScaleShiftAct": scale_shift_act,
    "Linear": linear,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "AdaptivePool": adaptive_pool,
    "Flatten": flatten,
    "PadShortcut": pad_shortcut,
    "Concatenate": concatenate,
}


def apply(step: Step, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], *inputs: Tensor) -> Tensor:
    """One step in plain torch."""
    if isinstance(step, plans.Stock):
        return modules[step.module](*inputs)
    return STEPS[type(step).__name__](step, tensors, *inputs)


def run(plan: Plan, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], x: Tensor) -> Tensor:
    """The whole plan."""
    values = {INPUT: x}
    for step, dying in zip(plan.steps, plan.dying(), strict=True):
        values[step.output] = apply(step, tensors, modules, *(values[value] for value in step.reads))
        for value in dying:
            del values[value]
    return values[plan.output]


def missing(plan: Plan, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this engine does not serve a plan: never."""
    return None


def prepare(plan: Plan, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], x: Tensor) -> Any:
    """What runs the plan on inputs like x, and its result for x."""
    return lambda x: run(plan, tensors, modules, x), run(plan, tensors, modules, x)
