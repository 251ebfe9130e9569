"""How Triton's kernels are started: what would spill is compiled again before it runs. No GPU is needed."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from triton.runtime.jit import JITFunction

from resfuse._triton.kernel import Kernel, remedies

X = torch.zeros(1)


class Jit(JITFunction):
    """Stands in for a kernel of triton.jit: forms spill as the test says; what is compiled and launched is kept."""

    def __init__(self, spills):
        self.spills, self.compiled, self.launched = spills, [], []

    def __hash__(self):
        return id(self)

    def run(self, *args, grid, warmup, **options):
        (self.compiled if warmup else self.launched).append((grid, args, options))
        return SimpleNamespace(run=None, n_spills=self.spills(args, options))


def given(calls, *names):
    return [tuple(options.get(name) for name in names) for _, _, options in calls]


def test_a_form_that_spills_is_compiled_again_before_it_runs_and_no_other():
    jit = Jit(lambda _, options: 8 * (options["BLOCK"] == 64 and "maxnreg" not in options))
    kernel = Kernel(jit)
    for block in (64, 64, 32, 64, 32):
        kernel[2, 3](X, "y", BLOCK=block, num_warps=4)
    assert given(jit.compiled, "BLOCK", "maxnreg") == [(64, None), (64, 255), (32, None)]
    assert given(jit.launched, "BLOCK", "maxnreg") == [(64, 255), (64, 255), (32, None), (64, 255), (32, None)]
    assert all((grid, args) == ((2, 3), (X, "y")) for grid, args, _ in jit.launched)
    assert all(options["num_warps"] == 4 for *_, options in jit.launched)


def test_forms_differ_by_dtype_and_by_absent_operands():
    jit = Jit(lambda args, _: 8 * (args[0].dtype == torch.float64 or args[1] is None))
    kernel = Kernel(jit)
    for args in ((X, 1), (X.double(), 1), (X, None), (X, 2), (X.double(), 3)):
        kernel[(1,)](*args)
    assert given(jit.launched, "maxnreg") == [(None,), (255,), (255,), (None,), (255,)]
    assert len(jit.compiled) == 1 + 2 + 2


def test_remedies_are_tried_in_turn_and_the_last_one_stays():
    jit = Jit(lambda _, options: 8 * (options["num_stages"] == 3))
    kernel = Kernel(jit)
    kernel[(1,)](X, num_stages=3)
    assert given(jit.compiled, "maxnreg", "num_stages") == [(None, 3), (255, 3), (None, 2)]
    assert given(jit.launched, "maxnreg", "num_stages") == [(None, 2)]
    jit = Jit(lambda *_: 8)
    kernel = Kernel(jit)
    for _ in range(2):
        kernel[(1,)](X, num_stages=2)
    assert given(jit.launched, "maxnreg", "num_stages") == [(None, 1), (None, 1)] and len(jit.compiled) == 3


def test_the_interpreter_compiles_nothing():
    calls = []
    kernel = Kernel({(1,): lambda *args, **options: calls.append(options)})
    kernel[(1,)](X, BLOCK=64)
    kernel[(1,)](X, BLOCK=64)
    assert calls == [{"BLOCK": 64}] * 2


def test_rocm_has_no_limit_of_registers(monkeypatch):
    assert remedies({"num_stages": 3}) == [{}, {"maxnreg": 255}, {"num_stages": 2}]
    assert remedies({"num_stages": 1}) == remedies({}) == [{}, {"maxnreg": 255}]
    monkeypatch.setattr("torch.version.hip", "7.0")
    assert remedies({"num_stages": 3}) == [{}, {"num_stages": 2}] and remedies({}) == [{}]
