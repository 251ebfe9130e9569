"""The tile engine: runs of a plan's steps in one call of `run_plan`, over an arena, with weights packed once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resfuse import ops
from resfuse.folding import plan as plans
from resfuse.folding.engines import calls, reference
from resfuse.folding.lowering import Lowering
from resfuse.folding.plan import INPUT, Plan, Step

_ACTIVATIONS = ("identity", "relu")
_MAX_PROGRAMS = 64  # shapes that one run of steps remembers


def missing(plan: Plan, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this engine does not serve a plan; None where it does."""
    if device.type != "cpu":
        return f"tile kernels compute on CPUs, not on {device.type}"
    if ops.missing_native["cpu"] is not None:
        return ops.missing_native["cpu"]
    if dtype not in ops.tile_dtypes:
        return f"this processor has no tile kernels for {dtype}"
    return None


def _split(plan: Plan) -> Plan:
    """The plan with activations that `run_plan` does not know as steps of their own behind their products."""
    steps: list[Step] = []
    fresh = max((step.output for step in plan.steps), default=INPUT)
    for step in plan.steps:
        if isinstance(step, plans.Convolution | plans.Linear) and step.activation not in _ACTIVATIONS:
            fresh += 1
            ending: dict[str, Any] = {"activation": step.activation, "scalars": step.scalars}
            steps.append(replace(step, output=fresh, activation="identity", scalars=()))
            steps.append(plans.ScaleShiftAct(fresh, step.output, step.names, **ending))
        else:
            steps.append(step)
    return Plan(tuple(steps), plan.output)


def prepare(plan: Plan, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], x: Tensor) -> calls.Prepared:
    """Cut the plan into runs of steps that `run_plan` knows, and steps in plain torch.

    Args:
        plan (Plan): what to compute.
        tensors (Mapping[str, Tensor]), modules (Mapping[str, nn.Module]): what its steps name.
        x (Tensor): (N, C, H, W), in the plan's dtype. Weights are packed for it; other shapes are served too.

    Returns:
        calls.Prepared: any number of threads may run it at once.
    """
    plan = _split(plan)
    pieces = [_piece(plan, steps, tensors, modules) for steps in _cut(plan)]

    def run(x: Tensor) -> Tensor:
        values = {INPUT: x}
        for piece in pieces:
            outputs = piece.call(*[values[value] for value in piece.reads])
            for value in piece.dying:
                del values[value]
            values.update(zip(piece.writes, outputs, strict=True))
        return values[plan.output]

    return run, run(x)


def computed_by(plan: Plan, dtype: torch.dtype) -> dict[int, str]:
    """What computes each step, in words, by the value that the step writes."""
    split = _split(plan)
    pixels = _pixels(split)
    native = {step.output for steps in _cut(split) if _worthwhile(steps, pixels) for step in steps}
    name = "tiles" if ops.tile_operands[dtype] == dtype else f"tiles in {ops.tile_operands[dtype]}"
    found = {step.output: name if step.output in native else "torch" for step in split.steps}
    own = {INPUT, *(step.output for step in plan.steps)}
    for step in split.steps:
        if isinstance(step, plans.ScaleShiftAct) and step.input in native - own:
            found[step.output] = f"{name}, {step.activation} by torch"
    return found


class _Piece(NamedTuple):
    """Steps that run together: what computes them, what they read from before and leave for later."""

    call: Callable[..., list[Tensor]]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    dying: tuple[int, ...]


def _pixels(plan: Plan) -> dict[int, bool]:
    """The values of one pixel, and whether they are flattened: global averages, and what flattens or multiplies them.

    A linear layer multiplies channels only behind a Flatten: else the last axis of maps.
    """
    found: dict[int, bool] = {}
    for step in plan.steps:
        if isinstance(step, plans.AdaptivePool) and step.output_size == (1, 1):
            found[step.output] = False
        elif step.input in found:
            flat = found[step.input]
            if isinstance(step, plans.Flatten) or (isinstance(step, plans.Linear) and flat):
                found[step.output] = True
            elif isinstance(step, plans.ScaleShiftAct) and step.residual is None:
                found[step.output] = flat
    return found


def _native(step: Step, pixels: Mapping[int, bool]) -> bool:
    """Whether `run_plan` knows a step."""
    if isinstance(step, plans.Convolution | plans.ScaleShiftAct):
        return step.activation in _ACTIVATIONS and step.input not in pixels
    if isinstance(step, plans.MaxPool):
        inside = all(2 * p <= k for p, k in zip(step.padding, step.kernel_size, strict=True))
        return step.dilation == (1, 1) and not step.ceil_mode and inside and step.input not in pixels
    if isinstance(step, plans.Linear):
        return step.activation in _ACTIVATIONS and pixels.get(step.input, False)
    return isinstance(step, plans.AdaptivePool | plans.Flatten) and step.output in pixels


def _cut(plan: Plan) -> list[list[Step]]:
    """The plan's steps in runs: those that `run_plan` takes together, and the others one by one."""
    pixels = _pixels(plan)
    runs = [list(steps) for _, steps in groupby(plan.steps, lambda step: _native(step, pixels))]
    cut: list[list[Step]] = []
    for steps in runs:
        cut += [steps] if _worthwhile(steps, pixels) else [[step] for step in steps]
    return cut


def _worthwhile(steps: list[Step], pixels: Mapping[int, bool]) -> bool:
    """Whether `run_plan` takes these steps: it knows them all, and what they compute pays for two copies."""
    multiplies = any(isinstance(step, plans.Convolution | plans.Linear) for step in steps)
    return multiplies and all(_native(step, pixels) for step in steps)


def _piece(plan: Plan, steps: list[Step], tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> _Piece:
    written = {step.output for step in steps}
    index = {step.output: i for i, step in enumerate(plan.steps)}
    last = index[steps[-1].output]
    later = {value for step in plan.steps[last + 1 :] for value in step.reads} | {plan.output}
    reads = tuple(dict.fromkeys(value for step in steps for value in step.reads if value not in written))
    writes = tuple(sorted(written & later))
    dying = tuple(value for value in reads if value not in later)
    if _worthwhile(steps, _pixels(plan)):
        return _Piece(_Native(steps, reads, writes, tensors), reads, writes, dying)
    (step,) = steps
    return _Piece(lambda *inputs: [reference.apply(step, tensors, modules, *inputs)], reads, writes, dying)


class _Native:
    """A run of steps as one call; programs by shape, weights packed once."""

    def __init__(
        self, steps: list[Step], reads: tuple[int, ...], writes: tuple[int, ...], tensors: Mapping[str, Tensor]
    ) -> None:
        self._lowering = Lowering(steps, reads, writes, tensors)
        self._programs: dict[tuple[torch.Size, ...], tuple[list[Tensor], list[int], list[int]]] = {}
        self._flat = [
            isinstance(step, plans.Flatten | plans.Linear) for v in writes for step in steps if step.output == v
        ]
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        images = [(x[:, :, None, None] if x.dim() == 2 else x).to(self._lowering.dtype) for x in inputs]
        shapes = tuple(x.shape for x in images)
        found = self._programs.get(shapes)
        if found is None:
            with self._lock:
                found = self._programs.get(shapes) or self._lowering.lower(shapes)
                if len(self._programs) >= _MAX_PROGRAMS:
                    self._programs = {}
                self._programs[shapes] = found
        outputs = ops.run_plan(images, *found)
        flattened = (out.flatten(1) if flat else out for out, flat in zip(outputs, self._flat, strict=True))
        return [out.to(inputs[0].dtype) for out in flattened]
