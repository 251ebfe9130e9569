"""Engines: what runs a plan. Each has `missing` and `prepare`; the first that serves a device and dtype is chosen.

`prepare` runs the plan once: it returns what runs it again, and that first result.
"""

from __future__ import annotations

from types import ModuleType

import torch

from resfuse.folding.engines import cuda, onednn, reference, tiles
from resfuse.folding.plan import Plan

ENGINES: dict[str, ModuleType] = {"tiles": tiles, "onednn": onednn, "cuda": cuda, "reference": reference}
"""By name, the best first."""


def computed_by(name: str, plan: Plan, dtype: torch.dtype) -> dict[int, str]:
    """What computes each step when an engine runs a plan, in words, by the value that the step writes."""
    return tiles.computed_by(plan, dtype) if name == "tiles" else {step.output: name for step in plan.steps}


def choose(plan: Plan, device: torch.device, dtype: torch.dtype, requested: str | None) -> str:
    """The engine for a plan on this device in this dtype.

    Raises:
        ValueError: `requested` is no engine. RuntimeError: it does not serve this device or dtype.
    """
    if requested is None:
        return next(name for name, engine in ENGINES.items() if engine.missing(plan, device, dtype) is None)
    if requested not in ENGINES:
        raise ValueError(f"backend must be one of {', '.join(ENGINES)} or None, got {requested!r}")
    reason = ENGINES[requested].missing(plan, device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend={requested!r} does not serve this network: {reason}")
    return requested
