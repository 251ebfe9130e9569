"""Byte counts and predictions: that they are those of a real step's calls, and are shown as predictions."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cuda_dispatch import Calls
from test_report import load_script

import resfuse
from resfuse import choices, models, ops
from resfuse.bench import products
from resfuse.bench.records import read
from resfuse.bench.roofline import bytes_moved, predict

ROOT = Path(__file__).parents[1]
PREDICTED = {
    "predicted": True, "gpu": "Some GPU", "copy_gb_per_s": 1000.0, "model": "resnet50", "batch": 2,
    "dtype": "bfloat16", "shape": [2, 64, 8, 8], "bytes": 6 * 10**9, "microseconds": 6000.0,
}  # fmt: skip


def test_predictions_are_shown_as_such():
    rows = [{**PREDICTED, "unit": u, "form": f, "calls": n} for u, f, n in (("moments", "", 3), ("apply", "raw", 1))]
    text = load_script("report").render_predictions(rows)
    assert "| moments |  | 3 | 6.0 | 6.00 | 2x64x8x8 | 2000 |" in text
    assert "| all |  | 4 | 12.0 | 12.00 |  |  |" in text
    assert "Predicted, not measured: resnet50, one training step, batch 2, bfloat16, for Some GPU, whose" in text


def test_predictions_of_products_are_shown_as_such():
    row = {**PREDICTED, "unit": "conv_stats", "conv": [64, 256, 1, 1, 1, 1, 0, 0, 1, 1, 1], "size": [8, 8],
           "composed_bytes": 12 * 10**9, "operations": 10**12, "composed_microseconds": 12000.0,
           "peak_tflops": 500.0}  # fmt: skip
    text = load_script("report").render_products([row])
    assert "| 64 to 256, 8x8 | conv_stats | 6.00 | 6000 | 33% | 12.00 | 12000 | 0.50 |" in text
    assert "Predicted, not measured: one call in resnet50, batch 2, bfloat16, for Some GPU, whose" in text


def test_byte_counts():
    shape = (2, 64, 8, 8)
    values = 2 * 64 * 8 * 8
    assert bytes_moved("moments", "", shape, 2) == 2 * values
    assert bytes_moved("backward_apply", "raw", shape, 4) == 20 * values
    assert bytes_moved("scale_shift_relu_maxpool", "", shape, 2) == 2 * values + 3 * values // 4
    assert bytes_moved("scale_shift_relu_maxpool", "", (1, 1, 7, 7), 4) == 4 * 49 + 5 * 16


def operator(unit):
    """What a network calls for a unit: its backward writes over what the convolution left."""
    if " " in unit or unit.startswith("backward"):
        unit = ("" if " " in unit else "scale_shift_act_") + unit.replace(" ", "_")
    return f"{unit}_" if unit.endswith("apply") else unit


def test_predictions_count_the_units_that_a_step_calls(monkeypatch):
    """Over the meta device, which stands for one with the passes and no convolution kernels."""
    monkeypatch.setitem(ops.missing_native, "meta", None)
    with torch.device("meta"):
        model, x = resfuse.fuse(models.resnet50()), torch.empty(2, 3, 64, 64)
    with Calls() as calls:
        model(x).sum().backward()
    found = {}
    for p in predict(models.resnet50, (2, 3, 64, 64), 2, 1e9):
        found[p.unit] = found.get(p.unit, 0) + p.calls
        assert p.bytes == p.calls * bytes_moved(p.unit, p.form, p.shape, 2)
        assert p.microseconds == pytest.approx(p.bytes / 1e3, abs=0.01)
    of_step = {name: n for name, n in calls.ours().items() if not name.startswith("finalize")}
    assert {operator(unit): n for unit, n in found.items()} == of_step


def test_a_gpu_without_a_measured_copy_is_refused(tmp_path):
    output = tmp_path / "predicted.jsonl"
    command = [sys.executable, ROOT / "benchmarks" / "roofline.py", "--gpu", "Some GPU", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no copy has been measured on 'Some GPU'" in done.stderr and not output.exists()
    of_products = tmp_path / "predicted_products.jsonl"
    done = subprocess.run([*command, "--bandwidth", "1000"], capture_output=True, text=True)
    assert done.returncode == 0 and all(row["predicted"] and row["copy_gb_per_s"] == 1000.0 for row in read(output))
    assert not of_products.exists()  # nor is a peak known
    done = subprocess.run([*command, "--bandwidth", "1000", "--peak", "500"], capture_output=True, text=True)
    assert done.returncode == 0 and all(row["predicted"] and row["peak_tflops"] == 500.0 for row in read(of_products))


def test_predictions_of_products():
    """Folded forward: x twice, the shortcut and out; backward: grad_out, out, dz twice, x twice and grad_x."""
    found = products.predict(models.resnet50, (2, 3, 64, 64), torch.bfloat16, 1e9, 1e15)
    of = {(p.unit, tuple(p.conv[:2]), p.size): p for p in found}
    assert len(of) == len(found)
    assert {choices.rule(torch.bfloat16, choices.Conv.from_list(p.conv)) for p in found} == {"fused"}
    x, y = 2 * 64 * 16 * 16, 2 * 256 * 16 * 16
    folded, backward = (of[unit, (64, 256), (16, 16)] for unit in ("folded", "folded backward"))
    assert folded.bytes == 2 * (2 * x + 2 * y) and backward.bytes == 2 * (3 * x + 4 * y)
    assert folded.operations == 2 * 512 * (64 * 256 + 64 * 64)
    assert folded.microseconds == pytest.approx(folded.bytes / 1e3, abs=0.01)
    assert all(p.bytes < p.composed_bytes for p in found)
