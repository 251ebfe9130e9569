"""A folded network's file: plain data, written whole or not at all, and checked when it is read."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resfuse.folding import plan as plans
from resfuse.folding.plan import INPUT, Plan, Step
from resfuse.ops import accumulate_dtype


def write(path: str | os.PathLike[str], data: Any) -> None:
    """Write data to a file beside its place, then rename it: a failure leaves the old file. A link stays a link."""
    target = Path(path).resolve()
    fresh = target.with_name(f"{target.name}.{uuid.uuid4().hex}")  # of its own: two may save to one place
    try:
        with fresh.open("xb") as file:
            torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str], device: str | torch.device) -> Any:
    """What a file holds, mapped; ValueError, with its path, if it cannot be read."""
    torch.empty(0, device=device)  # a device that is not there is no fault of the file
    Path(path).open("rb").close()  # a missing or forbidden file is reported by Python
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=True)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # damaged bytes surface as almost any type
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path} cannot be read as a folded network: {type(error).__name__}: {reason}") from error


def check_tensors(plan: Plan, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raise ValueError unless each step has its tensors, of dtypes and shapes that fit what it reads.

    Args:
        plan (Plan): steps of which none is stock: a file holds no modules.
        tensors (Mapping[str, Tensor]): by name.
        dtype (torch.dtype): of weights; vectors have its accumulation dtype.
    """
    for name, tensor in tensors.items():
        wanted = accumulate_dtype(dtype) if tensor.dim() == 1 else dtype
        if tensor.dtype != wanted:
            raise ValueError(f"{name} must be {wanted}, got {tensor.dtype}")
    channels: dict[int, int | None] = {INPUT: None}
    pooled: dict[int, int] = {}  # the pixels of what adaptive pools write
    flat: set[int] = set()  # what a linear layer multiplies the channels of: of maps it is the last axis
    for step in plan.steps:
        lacking = [name for name in step.tensors if name not in tensors]
        if lacking or isinstance(step, plans.Stock):
            raise ValueError(f"{step} lacks {', '.join(lacking) or 'its module'}")
        shapes = [tuple(tensors[name].shape) for name in step.tensors]
        made = _channels(step, shapes, [channels[value] for value in step.reads], step.input in flat)
        if isinstance(step, plans.Flatten) or (step.input in flat and isinstance(step, plans.Linear | plans.Ending)):
            flat.add(step.output)
        if isinstance(step, plans.AdaptivePool):
            pooled[step.output] = step.output_size[0] * step.output_size[1]
        elif isinstance(step, plans.Flatten):
            made = made * pooled[step.input] if made is not None and step.input in pooled else None
        channels[step.output] = made


def _channels(step: Step, shapes: list[tuple[int, ...]], read: list[int | None], flat: bool) -> int | None:
    """The channels of a step's result, None where nothing says how many; ValueError if its tensors do not fit."""
    made, inputs = read[0], read[0]
    fits = True
    if isinstance(step, plans.Convolution):
        fits = len(shapes[0]) == 4 and step.groups > 0 and shapes[0][0] % step.groups == 0
        made, inputs = shapes[0][0], shapes[0][1] * step.groups if fits else -1
    elif isinstance(step, plans.Linear):
        fits = len(shapes[0]) == 2
        made, inputs = shapes[0][0], shapes[0][-1]
        if not flat:  # nothing is known of the last axis
            read = [None]
    elif isinstance(step, plans.PadShortcut):
        made = step.channels
    elif isinstance(step, plans.Concatenate):
        known = [count for count in read if count is not None]
        made = sum(known) if len(known) == len(read) else None
    elif step.tensors:
        made = inputs = shapes[0][0]
    vectors = shapes if isinstance(step, plans.ScaleShiftAct) else shapes[1:]
    fits = fits and all(shape == (made,) for shape in vectors) and (read[0] is None or inputs == read[0])
    if not fits:
        raise ValueError(f"tensors of shapes {shapes} do not fit {step}, which reads {read[0]} channels")
    return None if isinstance(step, plans.Linear) and not flat else made
