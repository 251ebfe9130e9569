"""How Triton's kernels are started: what spills is compiled again. No GPU is needed."""

from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="needs Triton")

from resfuse._triton.kernel import Kernel, remedies


class Jit:
    """Stands in for a kernel of triton.jit: forms spill as the test says."""

    def __init__(self, spills):
        self.spills, self.launched = spills, []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launched.append((grid, args, options))
            return SimpleNamespace(n_spills=self.spills(options))

        return launch


def given(jit, *names):
    return [tuple(options.get(name) for name in names) for _, _, options in jit.launched]


def test_a_form_that_spills_is_compiled_again_and_no_other():
    jit = Jit(lambda options: 8 * (options["BLOCK"] == 64 and "maxnreg" not in options))
    kernel = Kernel(jit)
    for block in (64, 64, 32, 64, 32):
        kernel[2, 3]("x", "y", BLOCK=block, num_warps=4)
    assert given(jit, "BLOCK", "maxnreg") == [(64, None), (64, 255), (32, None), (64, 255), (32, None)]
    assert all((grid, args) == ((2, 3), ("x", "y")) for grid, args, _ in jit.launched)
    assert all(options["num_warps"] == 4 for *_, options in jit.launched)


def test_remedies_are_tried_in_turn_and_the_last_one_stays():
    jit = Jit(lambda options: 8 * (options["num_stages"] == 3))
    kernel = Kernel(jit)
    for _ in range(4):
        kernel[(1,)](num_stages=3)
    assert given(jit, "maxnreg", "num_stages") == [(None, 3), (255, 3), (None, 2), (None, 2)]
    jit = Jit(lambda options: 8)
    kernel = Kernel(jit)
    for _ in range(5):
        kernel[(1,)](num_stages=2)
    assert given(jit, "maxnreg", "num_stages") == [(None, 2), (255, 2), (None, 1), (None, 1), (None, 1)]


def test_the_interpreter_compiles_nothing():
    calls = []
    kernel = Kernel({(1,): lambda *args, **options: calls.append(options)})
    kernel[(1,)]("x", BLOCK=64)
    kernel[(1,)]("x", BLOCK=64)
    assert calls == [{"BLOCK": 64}] * 2


def test_rocm_has_no_limit_of_registers(monkeypatch):
    assert remedies({"num_stages": 3}) == [{}, {"maxnreg": 255}, {"num_stages": 2}]
    assert remedies({"num_stages": 1}) == remedies({}) == [{}, {"maxnreg": 255}]
    monkeypatch.setattr("torch.version.hip", "7.0")
    assert remedies({"num_stages": 3}) == [{}, {"num_stages": 2}] and remedies({}) == [{}]
