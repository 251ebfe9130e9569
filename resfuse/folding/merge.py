"""Merging the steps of a walk: normalisations into weights, additions and activations into the step before them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import dropwhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resfuse.folding.plan import Convolution, Linear, Plan, ScaleShiftAct, Step, Stock
from resfuse.ops import accumulate_dtype


class Folding(NamedTuple):
    """A plan and its tensors, by name."""

    plan: Plan
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _Normalised(Convolution):
    """A convolution whose weight takes the scale and shift of a normalisation."""

    norm: str = ""
    scale: str = ""
    shift: str = ""


def merge(plan: Plan, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Folding:
    """What a walk wrote, in as few steps as possible.

    Args:
        plan (Plan): steps of which each stands for one module or addition.
        tensors (Mapping[str, Tensor]): what they read, in the dtype of folding.
        dtype (torch.dtype): of activations and weights; vectors get its accumulation dtype.

    Returns:
        Folding: the steps in an order in which they can run, and copies of the tensors that they read.

    Raises:
        ValueError: a convolution is shared by two normalisations, or a folded tensor is not finite.
    """
    readers = plan.readers()
    found: dict[int, Step] = {}  # in the order of execution, by the value that a step writes
    for step in plan.steps:
        merged = _absorbed(step, found, readers)
        if merged is None:
            found[step.output] = step
        else:
            producer, whole = merged
            del found[producer.output]
            found[whole.output] = whole  # here all that it reads has been written
    _check_shared(found.values())
    kept: dict[str, Tensor] = {}
    steps = tuple(_finished(step, tensors, dtype, kept) for step in found.values())
    return Folding(Plan(steps, plan.output), kept)


def _absorbed(step: Step, found: Mapping[int, Step], readers: Mapping[int, int]) -> tuple[Step, Step] | None:
    """The step before this one, of which this one is the only reader, and the two as one."""
    if not isinstance(step, ScaleShiftAct):
        return None
    orders = [step]
    if step.scale is None and step.residual is not None:  # addition commutes
        orders.append(replace(step, input=step.residual, residual=step.input))
    for order in orders:
        producer = found.get(order.input)
        if producer is not None and readers[producer.output] == 1 and not _meets_stock(producer, found):
            whole = _whole(producer, order)
            if whole is not None:
                return producer, whole
    return None


def _meets_stock(producer: Step, found: Mapping[int, Step]) -> bool:
    """Whether a stock step after this one reads what it reads, and may write it: then this one must stay before it."""
    later = dropwhile(lambda step: step is not producer, found.values())
    return any(isinstance(step, Stock) and step.input in producer.reads for step in later)


def _whole(producer: Step, step: ScaleShiftAct) -> Step | None:
    """act((producer) * scale + shift + residual) as one step, if there is one."""
    if getattr(producer, "activation", None) != "identity":
        return None
    names = producer.names + step.names
    ending: dict[str, Any] = {
        "output": step.output,
        "names": names,
        "activation": step.activation,
        "scalars": step.scalars,
    }
    if isinstance(producer, Linear):
        return replace(producer, **ending) if step.scale is None and step.residual is None else None
    if not isinstance(producer, Convolution | ScaleShiftAct):
        return None
    if producer.residual is not None and (step.residual is not None or step.scale is not None):
        return None
    ending["residual"] = producer.residual if step.residual is None else step.residual
    if step.scale is None or step.shift is None:
        return replace(producer, **ending)
    if not isinstance(producer, Convolution) or isinstance(producer, _Normalised):
        return None
    fields = {name: getattr(producer, name) for name in Convolution.__dataclass_fields__}
    norm = {"norm": step.names[0], "scale": step.scale, "shift": step.shift}
    return _Normalised(**(fields | ending | norm))


def _check_shared(steps: Iterable[Step]) -> None:
    """Raise ValueError if a weight would be folded in two ways."""
    norms: dict[str, str | None] = {}
    for step in steps:
        if isinstance(step, Convolution):
            norm = step.norm if isinstance(step, _Normalised) else None
            other = norms.setdefault(step.weight, norm)
            if other != norm:
                both = " and ".join("no normalisation" if name is None else name for name in (other, norm))
                raise ValueError(f"{step.names[0]} is called twice, followed by {both}: its weight folds with one only")


def _finished(step: Step, tensors: Mapping[str, Tensor], dtype: torch.dtype, kept: dict[str, Tensor]) -> Step:
    """The step as engines see it; its tensors are kept, rounded to what they are computed in."""
    if isinstance(step, _Normalised):
        scale = tensors[step.scale]
        weight, bias = tensors[step.weight] * scale[:, None, None, None], tensors[step.shift]
        bias = bias if step.bias is None else tensors[step.bias] * scale + bias
        shared = {name: getattr(step, name) for name in Convolution.__dataclass_fields__}
        step = Convolution(**(shared | {"bias": step.weight.removesuffix("weight") + "bias"}))
        made = {step.weight: weight, step.bias: bias}
    else:
        made = {name: tensors[name] for name in step.tensors}
    for name, tensor in made.items():
        if name is not None and name not in kept:
            kept[name] = _rounded(tensor, dtype)
            _check_finite(kept[name], name, step)
    return step


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in `dtype`, the input channels of a convolution's innermost; a vector in its accumulation dtype."""
    if tensor.dim() == 1:
        return tensor.to(accumulate_dtype(dtype))
    layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return tensor.to(dtype).contiguous(memory_format=layout)


def _check_finite(tensor: Tensor, name: str, step: Step) -> None:
    wrong = 0 if tensor.is_meta else int((~tensor.isfinite()).sum())
    if wrong:
        behind = f" with {', '.join(step.names[1:])}" if len(step.names) > 1 else ""
        raise ValueError(
            f"{step.names[0] or 'the model'} folds{behind} to a {name.rpartition('.')[2]} of which {wrong} values are "
            f"NaN or infinite in {tensor.dtype}"
        )
