"""Profiles of a network: where its time goes, unit by unit, stock and fused, and the memory it holds along a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resfuse.bench.memory import profiler, timeline_in, trace_events
from resfuse.bench.workload import Task, workload

# The first whose part of a name an operator has is its unit. A fused convolution normalises and sums too.
_UNITS = (
    ("fused convolution", ("resfuse::conv_", "resfuse::expand_", "resfuse::second_moments")),
    ("fused normalisation", ("resfuse::moments", "resfuse::finalize", "resfuse::scale_shift_act")),
    ("fused add and ReLU", ("resfuse::add_relu",)),
    ("fused pool", ("resfuse::scale_shift_relu_maxpool",)),
    ("convolution", ("conv", "reorder")),
    ("normalisation", ("batch_norm", "var_mean")),
    ("pool", ("pool",)),
    ("optimizer", ("Optimizer", "_foreach_", "_fused_sgd")),
    ("ReLU", ("relu", "threshold", "clamp_min")),
    ("linear and loss", ("mm", "linear", "softmax", "nll_loss", "cross_entropy")),
    ("add, multiply and copy", ("add", "mul", "div", "copy", "clone", "zero_", "fill_", "empty")),
    ("autograd's nodes", ("Backward", "Function", "AccumulateGrad")),
)
OTHER = "other"
STEPS, WARMUP = 3, 2


class Profile(NamedTuple):
    """One variant under the profiler.

    Attributes:
        step_ms: wall time of a step, profiled; the profiler's own cost is in it.
        units: milliseconds of a step by unit.
        operators: name, calls and milliseconds of a step, the longest first.
        memory: (milliseconds since the first allocation, bytes held above those before) of one step.
        trace: the file that chrome://tracing and Perfetto read.
    """

    step_ms: float
    units: dict[str, float]
    operators: list[dict[str, Any]]
    memory: list[tuple[float, int]]
    trace: str

    @property
    def peak_bytes(self) -> int:
        """The most memory of the step above what existed before it."""
        return max((held for _, held in self.memory), default=0)


def unit_of(operator: str) -> str:
    """The unit that an operator's time counts for."""
    return next((unit for unit, parts in _UNITS if any(part in operator for part in parts)), OTHER)


def profile_task(task: Task, trace: Path) -> Profile:
    """Run a task a few times under torch.profiler, and write the trace of the last step.

    Args:
        task (Task): what to run.
        trace (Path): a .json file; its folder exists.
    """
    load = workload(task)
    for _ in range(WARMUP):
        _once(load.prepare, load.run)
    cuda = [torch.profiler.ProfilerActivity.CUDA] if task.device == "cuda" else []
    activities = [torch.profiler.ProfilerActivity.CPU, *cuda]
    with profiler(activities) as timed:
        for _ in range(STEPS):
            with torch.profiler.record_function("step"):
                _once(load.prepare, load.run)
    with profiler(activities, profile_memory=True, record_shapes=True) as traced:
        _once(load.prepare, load.run)
    traced.export_chrome_trace(str(trace))
    memory = [(moment / 1e3, held) for moment, held in timeline_in(trace_events(trace))]
    operators, whole = _operators(timed, task.device)
    units: dict[str, float] = {}
    for row in operators:
        units[unit_of(row["name"])] = units.get(unit_of(row["name"]), 0.0) + row["ms"]
    return Profile(whole, units, operators, memory, str(trace))


def _once(prepare: Any, run: Any) -> None:
    if prepare is not None:
        prepare()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _operators(profile: torch.profiler.profile, device: str) -> tuple[list[dict[str, Any]], float]:
    """Operators by their own time, the longest first, and the wall time of a step; milliseconds a step."""
    found, whole = [], 0.0
    for event in profile.key_averages():
        if event.key == "step":
            whole = max(whole, event.cpu_time_total / 1e3 / STEPS)
            continue
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if spent > 0 and not event.key.startswith(("ProfilerStep", "autograd::engine")):
            found.append({"name": event.key, "calls": event.count / STEPS, "ms": spent / 1e3 / STEPS})
    return sorted(found, key=lambda row: -row["ms"]), whole


_BARS = " ▁▂▃▄▅▆▇█"


def sparkline(memory: Sequence[tuple[float, int]], top: int, width: int = 60) -> str:
    """Memory over time as one line of bars: in each slice of time the most that was held, full at `top` bytes."""
    if not memory or top <= 0:
        return ""
    span = memory[-1][0] - memory[0][0] or 1.0
    most, held = [0] * width, 0
    reached = 0
    for moment, level in memory:
        at = min(width - 1, int((moment - memory[0][0]) / span * width))
        for slot in range(reached, at + 1):
            most[slot] = max(most[slot], held)
        reached, held = at, level
        most[at] = max(most[at], level)
    return "".join(_BARS[min(8, max(0, round(8 * value / top)))] for value in most)
