"""The oneDNN engine: convolutions whose bias, residual and activation are their epilogue, with weights packed once.

Its ReLU is max(x, 0) of the processor: it gives 0 for NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse import ops
from resfuse.folding import plan as plans
from resfuse.folding.engines import calls, reference
from resfuse.folding.plan import Plan, Step

# how the epilogue names an activation: attribute, scalars if they are not the step's, algorithm
_EPILOGUES: dict[str, tuple[str, list[float], str]] = {
    "identity": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "silu": ("swish", [], ""),
    "gelu": ("gelu", [], "none"),
    "hardswish": ("hardswish", [], ""),
    "hardsigmoid": ("hardsigmoid", [], ""),
    "sigmoid": ("sigmoid", [], ""),
    "tanh": ("tanh", [], ""),
    "leaky_relu": ("leaky_relu", [], ""),
    "hardtanh": ("hardtanh", [], ""),
}
# steps that write a tensor of their own, which nothing else refers to
_FRESH = (plans.Convolution, plans.ScaleShiftAct, plans.PadShortcut, plans.Concatenate)


def missing(plan: Plan, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this engine does not serve a plan; None where it does."""
    if device.type != "cpu":
        return f"oneDNN computes on CPUs, not on {device.type}"
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    if dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    return f"oneDNN has no fast convolutions in {dtype} on this processor"


def prepare(plan: Plan, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], x: Tensor) -> calls.Prepared:
    """Pack the weights for inputs like x, in one run of the plan; other inputs are served too.

    Args:
        plan (Plan): what to compute.
        tensors (Mapping[str, Tensor]), modules (Mapping[str, nn.Module]): what its steps name.
        x (Tensor): (N, C, H, W), in the plan's dtype and memory format.

    Returns:
        calls.Prepared: any number of threads may run it at once.
    """
    producers = {step.output: step for step in plan.steps}
    lent = {step.input for step in plan.steps if isinstance(step, plans.Stock)}  # results may be views of these

    def make(step: Step, inputs: list[Tensor], dying: tuple[int, ...]) -> calls.Run:
        if isinstance(step, plans.Convolution):
            own = step.residual in dying and isinstance(producers[step.residual], _FRESH)
            free = own and step.residual != step.input and step.residual not in lent
            return _convolution_runner(step, tensors, inputs, free)
        if isinstance(step, plans.ScaleShiftAct) and step.activation in ("identity", "relu"):
            return _pass_runner(step, tensors)
        return partial(reference.apply, step, tensors, modules)

    return calls.prepare(plan, x, make)


def _convolution_runner(
    step: plans.Convolution, tensors: Mapping[str, Tensor], inputs: list[Tensor], free: bool
) -> calls.Run:
    """`free`: the residual's memory may be written over."""
    geometry: tuple[Any, ...] = (list(step.padding), list(step.stride), list(step.dilation), step.groups)
    if step.residual is not None:
        step.check_sum(_output_shape(step, tensors[step.weight], inputs[0]), inputs[1].shape)
    weight = torch.ops.mkldnn._reorder_convolution_weight(tensors[step.weight], *geometry, list(inputs[0].shape))
    bias = None if step.bias is None else tensors[step.bias]
    if step.residual is None:
        return _pointwise_runner(step, weight, bias, geometry)
    bias = None if bias is None else bias.to(weight.dtype)  # a sum takes no other
    convolution_add_ = torch.ops.mkldnn._convolution_pointwise_.binary
    behind = "relu" if step.activation == "relu" else None  # nor another activation behind it

    def add(x: Tensor, residual: Tensor) -> Tensor:
        # in another layout torch falls back to a sum that knows no bfloat16
        written = free and residual.is_contiguous(memory_format=torch.channels_last)
        out = residual if written else residual.clone(memory_format=torch.channels_last)
        out = convolution_add_(out, x, weight, bias, *geometry, "add", 1.0, behind, [], "")
        return out if behind == "relu" else reference.activated(step, out)

    return add


def _pointwise_runner(
    step: plans.Convolution, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]
) -> calls.Run:
    """A convolution that adds nothing; an activation that the epilogue does not know is a pass behind it."""
    convolution = torch.ops.mkldnn._convolution_pointwise.default
    if step.activation not in _EPILOGUES:
        return lambda x: reference.activated(step, convolution(x, weight, bias, *geometry, "none", [], ""))
    attribute, scalars, algorithm = _EPILOGUES[step.activation]
    scalars = scalars or list(step.scalars)
    return lambda x: convolution(x, weight, bias, *geometry, attribute, scalars, algorithm)


def _output_shape(step: plans.Convolution, weight: Tensor, x: Tensor) -> torch.Size:
    geometry = (step.stride, step.padding, step.dilation, step.groups)
    return F.conv2d(x.to("meta"), weight.to("meta"), None, *geometry).shape


def _pass_runner(step: plans.ScaleShiftAct, tensors: Mapping[str, Tensor]) -> calls.Run:
    """A pass over memory, by the native kernel where there is one."""
    if ops.missing_native["cpu"] is not None or step.scale is None or step.shift is None:
        return partial(reference.scale_shift_act, step, tensors)
    scale, shift, relu = tensors[step.scale], tensors[step.shift], step.activation == "relu"
    return lambda x, residual=None: ops.scale_shift_act(x, scale, shift, residual, None, None, relu)
