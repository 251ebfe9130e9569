"""The units that a GPU measures, on Triton's kernels: each passes its own check, and a run has the rows it should."""

import pytest
import torch
from stand_in import Machine

from resfuse.bench import gate, units
from resfuse.bench.conv_cases import ConvInputs, conv_cases
from resfuse.bench.roofline import PASSES, POOL_PASSES
from resfuse.bench.shapes import ConvShape
from resfuse.bench.unit_cases import Inputs, cases

pytestmark = pytest.mark.usefixtures("one_thread")
CONV = ConvShape("layer1.1.conv3", (2, 24, 5, 5), (2, 40, 5, 5), (40, 24, 1, 1), (1, 1), (0, 0), (1, 1), 1)


def test_every_unit_passes_its_own_check(monkeypatch):
    def refuse(*arguments):
        pytest.fail("a native kernel was called")

    for name in ("moments", "add_relu", "scale_shift_act", "scale_shift_relu_maxpool", "finalize"):
        monkeypatch.setattr(units.ops, name, refuse)
    i = Inputs((1, 64, 3, 2), torch.float32, backend="triton")
    names = set()
    for case in cases(i):
        units.check(case, i, gate.Gate(case.unit))
        names.add((case.unit, case.form))
    assert names == {*PASSES, *POOL_PASSES, ("finalize", "")}


def test_a_stage_gives_its_most_frequent_pointwise_convolutions():
    shapes = units.convolution_shapes(units.Plan(backend="triton", device="cuda", batch=256))
    assert [(conv.input[2], conv.input[1], conv.output[1]) for conv in shapes] == [
        (56, 256, 64), (56, 64, 256), (28, 128, 512), (28, 512, 128),
        (14, 256, 1024), (14, 1024, 256), (7, 512, 2048), (7, 2048, 512),
    ]  # fmt: skip
    assert all(conv.input[0] == 256 and conv.weight[2:] == (1, 1) for conv in shapes)


def test_a_convolution_is_the_fused_kernel_beside_the_composition():
    i, names = ConvInputs(CONV, torch.float32, backend="triton"), {}
    for case in conv_cases(i, CONV):
        checks = gate.Gate(case.unit)
        units.check(case, i, checks)
        assert checks.errors.keys() == {"resfuse", *case.others} | (set() if case.stock is None else {"stock"})
        names[case.unit] = [*case.others]
        if not case.others:
            continue
        broken = [case.others["composed"]()[0] * 1.5, *case.others["composed"]()[1:]]
        case.others["composed"] = lambda broken=broken: broken
        with pytest.raises(gate.RefusedError, match=f"wrong result: {case.unit} 1x1.*composed"):
            units.check(case, i, gate.Gate(f"{case.unit} {case.form}"))
    composed = {"conv_stats", "conv_stats backward", "conv_act"}
    assert names == {unit: ["composed"] if unit in composed else [] for unit in units.CONVOLUTIONS}


def test_a_run_has_a_row_of_each_direction_and_says_where_a_peer_is_missing(monkeypatch):
    """A peer that is made ready too late is missing, and rows say so; the others are under a stated roof."""
    asked = []
    machine = Machine({"resfuse": 2e-3, "composed": 3e-3, "stock": 4e-3, "copy": 1e-3})
    monkeypatch.setattr(gate, "interleave", machine.interleave)
    monkeypatch.setattr(units, "matmul_rate", lambda dtype, device: 1e-3)
    monkeypatch.setattr(units, "convolution_shapes", lambda plan: [CONV])
    monkeypatch.setattr(units, "unit_peer", lambda name, case, i: asked.append(name) or case.stock)
    for seconds, missing in ((1e9, False), (0.0, True)):
        plan = units.Plan(
            backend="triton", dtypes=("float32",), units=units.CONVOLUTIONS, peers=("max-autotune",),
            peer_seconds=seconds, rounds=1,
        )  # fmt: skip
        rows = list(units.run(plan, {}))
        assert [row["unit"] for row in rows] == list(units.CONVOLUTIONS)
        assert [row.get("missing", {}).keys() == {"max-autotune"} for row in rows] == [
            missing and unit != "conv_stats backward" for unit in units.CONVOLUTIONS
        ]
        for row in rows:
            assert row["backend"] == "triton"
            assert row["roofline_ms"] == pytest.approx(row["flops"] / 1e3)  # 1e-3 GFLOP/s, and bytes cost less
            assert row["share_of_roofline"] == pytest.approx(row["roofline_ms"] / 2, rel=1e-4)
            if "resfuse/composed" in row["ratios"]:
                assert row["ratios"]["resfuse/composed"]["of_medians"] == pytest.approx(2 / 3)
                assert "composed 3.000 ms" in units.line(row)
        assert sum("resfuse/composed" in row["ratios"] for row in rows) == 3
    assert asked == ["max-autotune"] * len(units.CONVOLUTIONS)
