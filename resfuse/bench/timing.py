"""Timing: interleaved samples of several callables, their quantiles, and the ratios between them with intervals.

Nothing here knows what is timed. All callables are sampled in turn, in one process, and the first of a round moves on
by one each round, so that a change of clock speed or a busy neighbour meets all of them alike.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tick = Callable[[float], object]
"""Told the share of the work done since it was called last."""

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
        low, high: where of_medians lies with 95 % confidence, see :func:`interval`; None where rounds are too few.
    """

    of_medians: float
    paired: float
    low: float | None
    high: float | None

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 1: only then is one of the two faster."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high


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
    bounds = interval(lambda medians: medians[0] / medians[1], [(ours, theirs)])
    return Ratio(statistics.median(ours) / statistics.median(theirs), statistics.median(paired), *bounds)


_RESAMPLES, _CONFIDENCE = 2000, 0.95
# with fewer, all rounds may fall on one side of the truth by luck alone more often than 95 % allows: 2 * 0.5**5 > 0.05
FEWEST_ROUNDS = 6


def interval(
    statistic: Callable[[list[Tensor]], Tensor], groups: Sequence[tuple[Sequence[float], ...]], seed: int = 0
) -> tuple[float, float] | tuple[None, None]:
    """The 95 % percentile-bootstrap interval of a statistic of medians.

    Rounds are drawn with replacement, the same ones for all columns of a group, so that what slows down a whole round
    stays with it; groups, which are different runs, are drawn independently.

    Args:
        statistic (Callable[[list[Tensor]], Tensor]): of the medians of all columns, in order; each holds one value for
            each resample.
        groups (Sequence[tuple[Sequence[float], ...]]): samples by run and column; the columns of a run are as long.
        seed (int): of the draws: the same samples give the same interval.

    Returns:
        tuple[float, float]: low and high; None and None below FEWEST_ROUNDS rounds, which bear no such interval.
    """
    if any(len(column) < FEWEST_ROUNDS for group in groups for column in group):
        return None, None
    medians = []
    for i, group in enumerate(groups):
        rows = _draws(len(group[0]), seed + i)
        for column in group:
            medians.append(torch.tensor(column, dtype=torch.float64)[rows].quantile(0.5, dim=1))
    found = statistic(medians)
    tail = (1 - _CONFIDENCE) / 2
    low, high = found.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


# the 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom; the last stands for all that follow
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def interval_of_runs(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the ratio after / before, of one value for each of several runs of both.

    Student's, of the logarithms, whose spread from run to run is taken to be the same before and after. That spread
    holds all that differs between runs, also what no sample of one run can show.

    Args:
        before, after (Sequence[float]): positive; three or more of them together.
    """
    logs = [[math.log(value) for value in values] for values in (before, after)]
    means = [statistics.mean(values) for values in logs]
    squares = sum((value - mean) ** 2 for values, mean in zip(logs, means, strict=True) for value in values)
    freedom = len(before) + len(after) - 2
    error = math.sqrt(squares / freedom * (1 / len(before) + 1 / len(after)))
    reach = _STUDENT[min(freedom, len(_STUDENT)) - 1] * error
    return math.exp(means[1] - means[0] - reach), math.exp(means[1] - means[0] + reach)


@functools.lru_cache(maxsize=16)
def _draws(rounds: int, seed: int) -> Tensor:
    """Indices of the rounds of every resample."""
    generator = torch.Generator().manual_seed(seed + 1009 * rounds)
    return torch.randint(rounds, (_RESAMPLES, rounds), generator=generator)


def wait() -> None:
    """Wait for everything queued on an accelerator; a no-op where only the CPU is used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def time_calls(
    function: Callable[[], object],
    calls: int,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], object] | None = None,
) -> float:
    """Seconds per call over `calls` calls in a row; with `before`, an untimed call of it ahead of each."""
    if before is not None:
        return sum(_time_after(function, before, clock) for _ in range(calls)) / calls
    wait()
    start = clock()
    for _ in range(calls):
        function()
    wait()
    return (clock() - start) / calls


def _time_after(function: Callable[[], object], before: Callable[[], object], clock: Callable[[], float]) -> float:
    before()
    wait()
    start = clock()
    function()
    wait()
    return clock() - start


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
    before: Mapping[str, Callable[[], object]] | None = None,
) -> Samples:
    """Sample every callable once per round, after a warm-up.

    Args:
        functions (Mapping[str, Callable[[], object]]): what to time, by name.
        rounds (int): samples of each, at least 1.
        warmup (int): untimed calls of each beforehand.
        seconds_per_sample (float): repeat short calls within a sample to about this length; 0 is one call a sample.
        tick (Callable[[], object]): called after every sample and every warm-up call, for a progress bar.
        clock (Callable[[], float]): seconds, monotonic.
        before (Mapping[str, Callable[[], object]] | None): what a callable needs ahead of each call and is not part of
            its time, as a forward pass is not of backward's; such a callable is called once a sample.

    Returns:
        Samples: `rounds` values of seconds per call for each name.

    Raises:
        ValueError: there is nothing to time or rounds is below 1.
    """
    if not functions or rounds < 1:
        raise ValueError(f"interleave needs functions and rounds >= 1, got {len(functions)} and {rounds}")
    before = before or {}
    for name, function in functions.items():
        for _ in range(warmup):
            before.get(name, _nothing)()
            function()
            tick()
    names = list(functions)
    repeated = set() if seconds_per_sample <= 0 else functions.keys() - before.keys()
    calls = {n: calls_for(functions[n], seconds_per_sample, clock) if n in repeated else 1 for n in names}
    samples: Samples = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(time_calls(functions[name], calls[name], clock, before.get(name)))
            tick()
    return samples


def _nothing() -> None:
    """What most callables need ahead of a call."""


def milliseconds(samples: Sequence[float]) -> dict[str, Any]:
    """Quantiles, number and values of samples in milliseconds, as records keep them."""
    p20, median, p80 = (round(1e3 * value, 6) for value in summarise(samples))
    values = [float(f"{1e3 * value:.6g}") for value in samples]
    return {"p20_ms": p20, "median_ms": median, "p80_ms": p80, "samples": len(samples), "values_ms": values}
