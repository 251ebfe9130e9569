"""The units that are measured: each is what it claims to be, a wrong one is refused, and rows say what they must."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from stand_in import Machine

from resfuse import backends, ops
from resfuse.bench import gate, unit_peers, units
from resfuse.bench.conv_cases import EXPANDING, ConvInputs, conv_cases, form_of, units_of
from resfuse.bench.roofline import OPERATIONS, PASSES, POOL_PASSES, bytes_moved, operations
from resfuse.bench.unit_cases import Case, Inputs, cases

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        backends.missing("bn_act", "native", "cpu", torch.float32) is not None, reason="the native library is missing"
    ),
]
SMALL = (2, 5, 4, 4)


def case_of(unit, form, i):
    return next(case for case in cases(i) if (case.unit, case.form) == (unit, form))


def test_a_wrong_kernel_is_refused():
    i = Inputs(SMALL, torch.float32)
    case = case_of("scale_shift_act", "raw", i)
    assert units.measure(case, i, 1)["unit"] == "scale_shift_act"
    (out,) = case.ours()
    wrongs = out * 1.0001, torch.zeros_like(out), F.pad(out, (0, 1)), torch.full_like(out, math.nan)
    for wrong in wrongs:
        broken = Case(**{**vars(case), "ours": lambda wrong=wrong: (wrong,)})
        with pytest.raises(gate.RefusedError, match=r"refusing to time a wrong result: scale_shift_act raw.*resfuse"):
            units.measure(broken, i, 1)


def test_a_wrong_peer_is_refused():
    i = Inputs(SMALL, torch.float32)
    case = case_of("scale_shift_act", "none", i)
    broken = Case(**{**vars(case), "stock": lambda: (case.stock()[0] * 1.5,)})
    with pytest.raises(gate.RefusedError, match=r"wrong result: scale_shift_act none.*stock"):
        units.measure(broken, i, 1)


def test_rows_of_a_kernel_that_goes_wrong_are_left_out_and_the_others_stand(monkeypatch):
    right = ops.scale_shift_act
    monkeypatch.setattr(ops, "scale_shift_act", lambda *operands: right(*operands) * 1.001)
    rows = []
    with pytest.raises(SystemExit, match="refusing to time a wrong result: scale_shift_act none"):
        for row in units.run(units.Plan.chosen(quick=True, shape=SMALL, dtypes=("float32",), rounds=1), {}):
            rows.append(row)
    kept = {row["unit"] for row in rows}
    assert {"moments", "finalize", "add_relu", "backward_reduce"} <= kept and "scale_shift_act" not in kept


def test_what_nobody_has_checked_is_not_timed():
    checks = gate.Gate("some unit")
    checks.check("ours", 1e-7, 1e-6)
    assert checks.interleave({"ours": int}, rounds=2).keys() == {"ours"}
    with pytest.raises(gate.RefusedError, match="untested result: some unit theirs"):
        checks.interleave({"ours": int, "theirs": int}, rounds=1)
    for wrong in (2e-6, math.nan, math.inf):
        with pytest.raises(gate.RefusedError, match=r"some unit ours output 1 is off by .*allowed 1\.00e-06"):
            checks.check("ours", wrong, 1e-6, "output 1")
        with pytest.raises(gate.RefusedError, match="untested"):  # what failed has lost its pass
            checks.interleave({"ours": int}, rounds=1)
        checks.check("ours", 0.0, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 64, 9, 9), (2, 65, 3, 3)], ids=str)
def test_every_unit_passes_its_own_check(shape, dtype):
    i = Inputs(shape, dtype)
    names = []
    for case in cases(i):
        checks = gate.Gate(case.unit)
        units.check(case, i, checks)
        assert checks.errors.keys() == ({"resfuse", "stock"} if case.stock else {"resfuse"})
        if case.unit == "finalize":  # of vectors
            assert (case.bytes, case.flops) == (6 * 4 * shape[1], 7 * shape[1])
        else:
            assert case.bytes == bytes_moved(case.unit, case.form, shape, dtype.itemsize)
            assert case.flops == operations(case.unit, case.form, shape) > 0
        names.append((case.unit, case.form))
    expected = {*PASSES, ("finalize", ""), *(POOL_PASSES if shape[1] == 64 else ())}
    assert set(names) == expected and len(names) == len(expected)


def convolutions():
    plan = units.Plan.chosen(quick=True, batch=2, size=32)
    return [conv for conv in units.convolution_shapes(plan) if conv.input[1] <= 256]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_convolution_passes_its_own_check(dtype):
    if dtype not in ops.tile_dtypes:
        pytest.skip(f"this processor has no convolution kernels for {dtype}")
    forms = set()
    for conv in convolutions():
        i = ConvInputs(conv, dtype)
        for case in conv_cases(i, conv):
            units.check(case, i, gate.Gate(case.unit))
            forms.add((case.unit, case.form))
            product, square = 2 * math.prod(conv.output) * math.prod(conv.weight[1:]), 2 * math.prod(conv.input)
            square *= conv.input[1] if case.unit in EXPANDING else 0
            times = 0 if case.unit == "second_moments" else 2 if case.unit.endswith("backward") else 1
            assert case.flops == times * product + square
            assert case.bytes >= i.x.numel() * i.x.element_size() and case.more["weight"] == list(conv.weight)
    assert {form for _, form in forms} == {"1x1", "3x3", "1x1 stride 2", "3x3 stride 2"} and len(forms) == 4 * 3 + 3
    assert {unit for unit, form in forms if form == "1x1"} == set(units.CONVOLUTIONS)


def test_a_wrong_folded_kernel_is_refused(monkeypatch):
    if torch.float32 not in ops.tile_dtypes:
        pytest.skip("this processor has no convolution kernels")
    right = ops.of("native").second_moments
    wrong = lambda *operands: (right(*operands)[0], 1.01 * right(*operands)[1])  # noqa: E731
    monkeypatch.setattr(ops.of("native"), "second_moments", wrong)
    conv = next(conv for conv in convolutions() if EXPANDING[0] in units_of(conv))
    i = ConvInputs(conv, torch.float32)
    (case,) = (case for case in conv_cases(i, conv) if case.unit == "expand_bn_act forward")
    with pytest.raises(gate.RefusedError, match="expand_bn_act forward resfuse output 0 is off by"):
        units.check(case, i, gate.Gate(case.unit))


def test_the_widest_convolution_of_each_map_and_form_is_taken():
    chosen = units.convolution_shapes(units.Plan())
    everything = units.convolution_shapes(units.Plan(everything=True))
    assert set(chosen) < set(everything) and len({conv[1:] for conv in everything}) == len(everything)
    keys = [(form_of(conv), units_of(conv), conv.output[2]) for conv in chosen]
    assert len(set(keys)) == len(keys) and set(keys) == {(form_of(c), units_of(c), c.output[2]) for c in everything}
    assert [conv.input[1] for conv in chosen if EXPANDING[0] in units_of(conv)] == [64, 128, 256, 512]
    assert all(conv.input[1] > 3 for conv in everything)


def test_operations_are_stated_for_every_unit():
    stated = {unit for unit, _ in OPERATIONS} | {"bn_act forward", "bn_act backward"}
    assert stated == {unit for unit, _ in (*PASSES, *POOL_PASSES)}
    assert operations("bn_act forward", "raw", (1, 2, 3, 4)) == (4 + 6) * 24


def test_a_row_says_what_readers_need(monkeypatch):
    monkeypatch.setattr(gate, "interleave", Machine().interleave)
    i = Inputs(SMALL, torch.float32)
    row = units.measure(case_of("add_relu", "", i), i, 6)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["times"]["resfuse"]["values_ms"] == [1.0] * 6
    assert row["bytes"] == 3 * 4 * math.prod(SMALL) and row["gb_per_s"] == round(row["bytes"] / 1e6, 2)
    assert row["share_of_copy"] == 1.5  # three activations in the time of two
    assert row["over_stock"] == row["ratios"]["resfuse/stock"]
    assert row["over_stock"] == pytest.approx({"of_medians": 1, "paired": 1, "low": 1, "high": 1})
    head, text = units.HEAD, units.line({**row, "dtype": "float32", "shape": list(SMALL)})
    assert text.index("2x5x4x4") > head.index("dtype") and text.endswith("1.00x (1.00 to 1.00)")


def test_compiled_stock_is_a_peer_and_the_others_say_why_not():
    i = Inputs(SMALL, torch.float32)
    assert unit_peers.unit_peer("compile", case_of("bn_act backward", "none", i), i) is None
    assert unit_peers.why_missing("compile", "cpu") is None
    for name in ("apex", "inplace-abn", "cudnn-frontend"):
        assert unit_peers.why_missing(name, "cpu") is not None
    with pytest.raises(ValueError, match="peer must be one of compile, apex"):
        unit_peers.why_missing("magic", "cpu")
    rival = unit_peers.unit_peer("compile", case_of("add_relu", "", i), i)
    assert torch.equal(rival()[0], torch.relu(i.x + i.residual))


def test_a_plan_takes_what_is_given_and_the_rest_from_its_kind():
    plan = units.Plan.chosen(quick=True, batch=None, size=96, rounds=None)
    assert (plan.batch, plan.size, plan.rounds, plan.quick) == (2, 96, 7, True)
    assert units.Plan.chosen() == units.Plan()
