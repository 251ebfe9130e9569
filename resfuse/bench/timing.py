"""Timing: interleaved samples of several callables, their quantiles, and the ratios between them.

Nothing here knows what is timed. All callables are sampled in turn, in one process, and the first of a round moves on
by one each round, so that a change of clock speed or a busy neighbour meets all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

Samples = dict[str, list[float]]
"""Seconds per call, by the callable's name; the i-th entries of all names were taken in the same round."""


class Quantiles(NamedTuple):
    """The middle of a sample and its spread, in the sample's unit."""

    p20: float
    median: float
    p80: float


class Ratio(NamedTuple):
    """How one callable's time compares with another's; below 1 the first is faster.

    Attributes:
        of_medians: ratio of the two medians.
        paired: median of the ratios within each round, which a drift of the machine between rounds leaves alone.
    """

    of_medians: float
    paired: float


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile with linear interpolation between neighbours, as torch.quantile; q in [0, 1]."""
    if not samples:
        raise ValueError("samples must hold at least one value, got none")
    if not 0 <= q <= 1:
        raise ValueError(f"q must be in [0, 1], got {q}")
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def summarise(samples: Sequence[float]) -> Quantiles:
    """The 20 %, 50 % and 80 % quantiles of a sample."""
    return Quantiles(quantile(samples, 0.2), quantile(samples, 0.5), quantile(samples, 0.8))


def compare(samples: Mapping[str, Sequence[float]], name: str, baseline: str) -> Ratio:
    """Time of `name` over time of `baseline`, from samples that :func:`interleave` took.

    Args:
        samples (Mapping[str, Sequence[float]]): as returned by :func:`interleave`.
        name (str), baseline (str): two of its keys.

    Returns:
        Ratio: below 1 where `name` is faster.
    """
    ours, theirs = samples[name], samples[baseline]
    paired = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(statistics.median(ours) / statistics.median(theirs), statistics.median(paired))


def wait() -> None:
    """Wait for everything queued on an accelerator; a no-op where only the CPU is used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def time_calls(function: Callable[[], object], calls: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds per call over `calls` calls in a row."""
    wait()
    start = clock()
    for _ in range(calls):
        function()
    wait()
    return (clock() - start) / calls


def calls_for(function: Callable[[], object], seconds: float, clock: Callable[[], float] = time.perf_counter) -> int:
    """How many calls in a row fill about `seconds`, so that one sample is long beside the clock's resolution."""
    once = min(time_calls(function, 1, clock) for _ in range(2))
    return max(1, min(10_000, round(seconds / max(once, 1e-9))))


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    seconds_per_sample: float = 0.0,
    tick: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Sample every callable once per round, after a warm-up.

    Args:
        functions (Mapping[str, Callable[[], object]]): what to time, by name.
        rounds (int): samples of each, at least 1.
        warmup (int): untimed calls of each beforehand.
        seconds_per_sample (float): repeat short calls within a sample to about this length; 0 is one call a sample.
        tick (Callable[[], object]): called after every sample and every warm-up call, for a progress bar.
        clock (Callable[[], float]): seconds, monotonic.

    Returns:
        Samples: `rounds` values of seconds per call for each name.

    Raises:
        ValueError: there is nothing to time or rounds is below 1.
    """
    if not functions or rounds < 1:
        raise ValueError(f"interleave needs functions and rounds >= 1, got {len(functions)} and {rounds}")
    for function in functions.values():
        for _ in range(warmup):
            function()
            tick()
    names = list(functions)
    calls = {n: calls_for(functions[n], seconds_per_sample, clock) if seconds_per_sample > 0 else 1 for n in names}
    samples: Samples = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(time_calls(functions[name], calls[name], clock))
            tick()
    return samples


def milliseconds(samples: Sequence[float]) -> dict[str, float | int]:
    """Quantiles in milliseconds and the number of samples, as records keep them."""
    p20, median, p80 = (round(1e3 * value, 6) for value in summarise(samples))
    return {"p20_ms": p20, "median_ms": median, "p80_ms": p80, "samples": len(samples)}
