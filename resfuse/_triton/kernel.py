"""How kernels are started: one that would spill is compiled again before it runs, with a remedy.

To run one more block on a multiprocessor, the assembler puts a few values of some kernels into local memory. Which
forms of a kernel that befalls depends on the GPU and on Triton's version, so no rule for tiles can avoid it: it is
read from what was compiled. All is settled at a form's first launch, so that a step may be captured in a CUDA graph
after one that was not. Bits are the same.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

_STEPS = "num_stages"

Form = tuple[Any, ...]
"""What tells one form of a kernel from another: options, the dtype of its first operand, which operands are absent."""


def remedies(options: dict[str, Any]) -> list[dict[str, Any]]:
    """What a form is compiled with, one after the other while it spills: options beside its own, at first none."""
    # ROCm's compiler has no such option
    found: list[dict[str, Any]] = [{}] if torch.version.hip else [{}, {"maxnreg": 255}]
    return [*found, {_STEPS: options[_STEPS] - 1}] if options.get(_STEPS, 1) > 1 else found


class Kernel:
    """A kernel of `triton.jit` that is launched as one: kernel[grid](*args, **options)."""

    def __init__(self, jit: Any) -> None:
        self.jit = jit
        self._settled: dict[Form, dict[str, Any]] = {}  # options beside a form's own

    def __getitem__(self, grid: Any) -> Any:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: Any, first: Tensor, *args: Any, **options: Any) -> None:
        if isinstance(self.jit, JITFunction):  # nothing is compiled where kernels are interpreted
            form = (frozenset(options.items()), first.dtype, *(arg is None for arg in args))
            if form not in self._settled:
                self._settled[form] = self._remedy(grid, (first, *args), options)
            options |= self._settled[form]
        self.jit[grid](first, *args, **options)

    def _remedy(self, grid: Any, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        """The first of the remedies with which nothing spills, else the last."""
        more: dict[str, Any] = {}
        for more in remedies(options):
            compiled = self.jit.warmup(*args, grid=grid, **{**options, **more})
            compiled.run  # noqa: B018  loads the code: a driver, not Triton, says what it takes
            if not compiled.n_spills:
                break
        return more
