"""A prepared plan as a list of calls: what engines that work step by step share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from resfuse.folding.plan import INPUT, Plan, Step

Prepared = tuple[Callable[[Tensor], Tensor], Tensor]
"""What runs a plan, and the result of the run that prepared it: a step that writes its input has then done so once."""

Run = Callable[..., Tensor]
"""Computes one step from the values that it reads, in their order."""


class Call(NamedTuple):
    """A step, ready to run: what computes it, what it reads and writes, and what nobody reads afterwards."""

    run: Run
    reads: tuple[int, ...]
    output: int
    dying: tuple[int, ...]


Make = Callable[[Step, list[Tensor], tuple[int, ...]], Run]
"""Given a step, the tensors that it reads and the values that die with it, makes what computes it."""


def prepare(plan: Plan, x: Tensor, make: Make) -> Prepared:
    """Run the plan once, making each step's run from what it reads then.

    Args:
        plan (Plan): what to compute.
        x (Tensor): the network's input.
        make (Make): called once for each step, in order.

    Returns:
        Prepared: any number of threads may run it at once if they may call the steps' runs.
    """
    values = {INPUT: x}
    calls = []
    for step, dying in zip(plan.steps, plan.dying(), strict=True):
        inputs = [values[value] for value in step.reads]
        call = Call(make(step, inputs, dying), step.reads, step.output, dying)
        values[step.output] = call.run(*inputs)
        for value in dying:
            del values[value]
        calls.append(call)
    return partial(_run, tuple(calls), plan.output), values[plan.output]


def _run(calls: tuple[Call, ...], output: int, x: Tensor) -> Tensor:
    values = {INPUT: x}
    for run, reads, written, dying in calls:
        values[written] = run(*[values[value] for value in reads])
        for value in dying:
            del values[value]
    return values[output]
