"""The CUDA engine: for each convolution the fastest of several kernels, measured, and the network as one CUDA graph.

It has not run on a GPU yet; `make gpu-check` runs its tests (tests/test_gpu_fold.py).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse import backends, ops
from resfuse.folding import plan as plans
from resfuse.folding.engines import calls, reference
from resfuse.folding.plan import Plan, Step

_MAX_SHAPES = 16  # of which each has kernels of its own and a graph, which keeps the memory of its activations
_log = logging.getLogger(__name__)
_WARMUP, _CALLS = 3, 10

Measure = Callable[[calls.Run, list[Tensor]], float]
"""Seconds that a run takes on these inputs."""


def missing(plan: Plan, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this engine does not serve a plan; None where it does."""
    if device.type != "cuda":
        return f"it computes on NVIDIA GPUs, not on {device.type}"
    if torch.version.cuda is None or not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    return None if dtype in (torch.float32, torch.float16, torch.bfloat16) else f"cuDNN fuses nothing in {dtype}"


def prepare(plan: Plan, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], x: Tensor) -> calls.Prepared:
    """Choose kernels and capture a graph for x's shape, in one run of the plan; likewise for each shape that comes.

    Args:
        plan (Plan): what to compute.
        tensors (Mapping[str, Tensor]), modules (Mapping[str, nn.Module]): what its steps name.
        x (Tensor): (N, C, H, W), in the plan's dtype and memory format.

    Returns:
        calls.Prepared: threads take turns. A plan with stock modules is never captured: what they do may wait for the
        host.
    """

    def make(step: Step, inputs: list[Tensor], dying: tuple[int, ...]) -> calls.Run:
        if isinstance(step, plans.Convolution):
            return fastest(candidates(step, tensors), inputs)
        return partial(reference.apply, step, tensors, modules)

    captured = not any(isinstance(step, plans.Stock) for step in plan.steps)
    run = _Shapes(lambda x: calls.prepare(plan, x, make), captured)
    return run, run(x)


def candidates(step: plans.Convolution, tensors: Mapping[str, Tensor]) -> dict[str, calls.Run]:
    """What computes a convolution, by name: "plain" always does, the others where they are built and fit."""
    weight, bias = tensors[step.weight], None if step.bias is None else tensors[step.bias]
    found: dict[str, calls.Run] = {"plain": partial(reference.convolution, step, tensors)}
    if bias is None or step.activation not in ("identity", "relu"):
        return found
    relu = step.activation == "relu"
    if backends.missing("bn_act", "native", weight.device.type, weight.dtype) is None:
        found["pass"] = partial(_convolution_and_pass, step, weight, torch.ones_like(bias), bias, relu)
    if relu and weight.is_cuda:
        found["cudnn"] = partial(_cudnn, step, weight, bias.to(weight.dtype))
    if weight.is_cuda and _has_triton():
        found["triton"] = partial(_triton, step, weight, bias, relu)
    return found


def _has_triton() -> bool:
    """Whether conv_act has a Triton kernel for GPUs."""
    operator, key = "resfuse::conv_act.triton", "CUDA"
    exists = "triton" in torch.ops.resfuse.conv_act.overloads()
    return exists and torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def _convolution_and_pass(
    step: plans.Convolution, weight: Tensor, one: Tensor, bias: Tensor, relu: bool, x: Tensor, *residual: Tensor
) -> Tensor:
    """The convolution, and one pass over its output."""
    out = F.conv2d(x, weight, None, step.stride, step.padding, step.dilation, step.groups)
    ops.scale_shift_act_(out, one, bias, residual[0] if residual else None, None, None, relu)
    return out


def _cudnn(step: plans.Convolution, weight: Tensor, bias: Tensor, x: Tensor, *residual: Tensor) -> Tensor:
    """cuDNN's fused convolution, always with ReLU."""
    geometry: Any = (step.stride, step.padding, step.dilation, step.groups)
    if residual:
        return torch.cudnn_convolution_add_relu(x, weight, residual[0], 1.0, bias, *geometry)
    return torch.cudnn_convolution_relu(x, weight, bias, *geometry)


def _triton(step: plans.Convolution, weight: Tensor, bias: Tensor, relu: bool, x: Tensor, *residual: Tensor) -> Tensor:
    """conv_act with the folded weight as it is."""
    added = residual[0] if residual else None
    nothing: Any = (None, None, None, None, (1, 1))  # of a raw residual and a second branch
    geometry: Any = (step.stride, step.padding, step.dilation, step.groups)
    operator = torch.ops.resfuse.conv_act.triton
    return operator(x, None, None, False, weight, None, bias, added, *nothing, relu, *geometry, False)[0]


def fastest(found: Mapping[str, calls.Run], inputs: list[Tensor], seconds: Measure | None = None) -> calls.Run:
    """The candidate that takes the least time on these inputs. One that refuses them is out; "plain" takes all."""
    measure = seconds or _device_seconds
    times: dict[str, float] = {}
    for name, run in found.items():
        try:
            times[name] = measure(run, inputs)
        except (RuntimeError, NotImplementedError) as error:  # whether a kernel takes a shape, only it knows
            if name == "plain":
                raise
            _log.info("%s is out for inputs of %s: %s", name, [tuple(x.shape) for x in inputs], error)
    return found[min(times, key=times.__getitem__)]


def _device_seconds(run: calls.Run, inputs: list[Tensor]) -> float:
    for _ in range(_WARMUP):
        run(*inputs)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_CALLS):
        run(*inputs)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / _CALLS


class _Shapes:
    """The network for each shape of its input: the steps that were chosen for it, and a graph of them."""

    def __init__(self, prepare: Callable[[Tensor], calls.Prepared], captured: bool) -> None:
        self._prepare, self._captured = prepare, captured
        self._steps: dict[torch.Size, Callable[[Tensor], Tensor]] = {}
        self._graphs: dict[torch.Size, _Graph] = {}
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        if self._steps and torch.cuda.is_current_stream_capturing():  # nothing can be measured now
            return self._steps_for(x)(x)
        with self._lock, torch.cuda.device(x.device):
            if x.shape not in self._steps and len(self._steps) < _MAX_SHAPES:
                steps, out = self._prepare(x)
                if self._captured:
                    self._graphs[x.shape] = _Graph(steps, x)
                self._steps[x.shape] = steps
                return out
            graph = self._graphs.get(x.shape)
            if graph is not None:
                return graph(x)
        return self._steps_for(x)(x)

    def _steps_for(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Those of its shape, or else of the first one, as they are."""
        return self._steps.get(x.shape) or next(iter(self._steps.values()))


class _Graph:
    """One captured run, with the memory that it reads and writes."""

    def __init__(self, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._input = x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP):  # what is set up at first calls cannot be captured
                run(self._input)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph, self._done = torch.cuda.CUDAGraph(), torch.cuda.Event()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._output = run(self._input)

    def __call__(self, x: Tensor) -> Tensor:
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)  # another stream may still read what the last call wrote
        self._input.copy_(x)
        self._graph.replay()
        out = self._output.clone()  # the caller's own
        self._done.record(stream)
        return out
