"""The gate of a measuring run: only what has just been checked against a more exact result may be timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from resfuse.bench.timing import Samples, interleave

# Whoever we are compared with rounds as he likes, but must compute the same function. In bfloat16 gradients over a few
# pixels, where a ReLU near zero decides, are off by a tenth; another function's results are off by all of themselves.
PEER_BOUND = 0.3


class RefusedError(SystemExit):
    """Something wrong, or something that nobody has checked, was about to be timed; ends a run, saying what."""


class Refusals:
    """Rows that a run leaves out because a result was wrong: the run goes on, and its end says so."""

    def __init__(self) -> None:
        self.said: dict[str, None] = {}

    @contextlib.contextmanager
    def skip(self) -> Iterator[None]:
        """Within: a row, which is left out where it is refused."""
        try:
            yield
        except RefusedError as error:
            self.said[str(error)] = None

    def end(self) -> None:
        """Raise RefusedError with every reason, each once, if there was any."""
        if self.said:
            raise RefusedError("\n".join(self.said))


class Gate:
    """What one run has checked, and so may time.

    A benchmark opens a gate, lets every result pass it, and times through it: a callable whose name has not passed is
    refused, so that no later change can time what nothing checks.
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.errors: dict[str, float] = {}

    def check(self, name: str, error: float, bound: float, detail: str = "") -> None:
        """Let `name` pass if its error, relative to a more exact result, is within the bound.

        Raises:
            RefusedError: it is not, or it is NaN.
        """
        if not error <= bound:
            self.errors.pop(name, None)
            what = " ".join(part for part in (self.subject, name, detail) if part)
            raise RefusedError(f"refusing to time a wrong result: {what} is off by {error:.2e}, allowed {bound:.2e}")
        self.errors[name] = max(error, self.errors.get(name, 0.0))

    def exempt(self, name: str) -> None:
        """Let a yardstick pass: what is timed beside the results and has none of its own, as an optimizer's step."""
        self.errors[name] = 0.0

    def interleave(self, functions: Mapping[str, Callable[[], object]], **options: Any) -> Samples:
        """:func:`resfuse.bench.timing.interleave`, for callables that have passed.

        Raises:
            RefusedError: one of them has not.
        """
        untested = [name for name in functions if name not in self.errors]
        if untested:
            raise RefusedError(f"refusing to time an untested result: {self.subject} {', '.join(untested)}")
        return interleave(functions, **options)
