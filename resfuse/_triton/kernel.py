"""How kernels are started: one that was made to spill is compiled again, with more registers or fewer steps in flight.

To run one more block on a multiprocessor, the assembler puts a few values of some kernels into local memory. Which
forms of a kernel that befalls depends on the GPU and on Triton's version, so no rule for tiles can avoid it: it is
read from what was compiled. A form that spills runs so once; the next launch tries the next remedy. Bits are the same.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

_STEPS = "num_stages"


def remedies(options: dict[str, Any]) -> list[dict[str, Any]]:
    """What a form is compiled with, one after the other while it spills: options beside its own, at first none."""
    # ROCm's compiler has no such option
    found: list[dict[str, Any]] = [{}] if torch.version.hip else [{}, {"maxnreg": 255}]
    return [*found, {_STEPS: options[_STEPS] - 1}] if options.get(_STEPS, 1) > 1 else found


class Kernel:
    """A kernel of `triton.jit` that is launched as one: kernel[grid](*args, **options)."""

    def __init__(self, jit: Any) -> None:
        self.jit = jit
        self._spilled: dict[frozenset[tuple[str, Any]], int] = {}  # how many remedies a form has tried in vain

    def __getitem__(self, grid: Any) -> Any:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: Any, *args: Any, **options: Any) -> None:
        form = frozenset(options.items())
        tried = self._spilled.get(form, 0)
        if tried == 0:
            compiled = self.jit[grid](*args, **options)
        else:
            compiled = self.jit[grid](*args, **{**options, **remedies(options)[tried]})
        # nothing was compiled where kernels are interpreted
        if compiled is not None and compiled.n_spills and tried + 1 < len(remedies(options)):
            self._spilled[form] = tried + 1
