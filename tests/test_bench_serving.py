"""The serving benchmark: every engine computes the same network from its files, and a wrong one is not timed."""

import sys

import pytest
import torch
from test_report import load_script, needs_native

from resfuse.bench import serving
from resfuse.bench.parity import relative_l2
from resfuse.bench.records import read

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small network in every engine's file."""
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("serving")
    torch.manual_seed(1)
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    serving.write("cifar_resnet20", images, ("float32", "bfloat16"), path, onnx=True)
    return path


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("variant", ["eager", "onnxruntime", "openvino", "folded", "fold"])
def test_every_engine_serves_the_network_of_its_file(folder, variant, dtype, bound):
    if (variant, dtype) == ("onnxruntime", "bfloat16"):
        assert serving.why_missing(variant, dtype) == "ONNX Runtime has no bfloat16 convolutions on CPUs"
        return
    pytest.importorskip(variant if variant in ("onnxruntime", "openvino") else "torch")
    images = torch.load(folder / "images.pt", weights_only=True)
    with torch.inference_mode():
        out = serving.load(variant, "cifar_resnet20", folder, dtype)(images.contiguous())
    exact = torch.load(folder / "exact.pt", weights_only=True)
    assert exact.std() > 0.1 and relative_l2(out, exact) < bound


def test_a_wrong_result_is_not_timed():
    bench = load_script("bench_serving")
    cell = bench.Cell("resnet18", 1, 64)
    found = {"eager": {"error": 1e-6}, "folded": {"error": 2e-6}}
    bench.refuse_a_wrong_result(found, cell, "float32")
    for error in (1e-5, float("nan")):
        found["folded"]["error"] = error
        with pytest.raises(SystemExit, match="refusing to time a wrong result: resnet18 float32 folded is off by"):
            bench.refuse_a_wrong_result(found, cell, "float32")
    found = {"eager": {"error": 1e-6}, "openvino": {"error": 0.9}}
    with pytest.raises(SystemExit, match="refusing to time a wrong result: resnet18 float32 openvino is off by"):
        bench.refuse_a_wrong_result(found, cell, "float32")


@needs_native
def test_a_quick_run_records_every_variant(tmp_path, monkeypatch, capsys):
    bench = load_script("bench_serving")
    path = tmp_path / "serving.jsonl"
    arguments = ["--quick", "--batches", "2", "--dtypes", "float32", "--variants", "folded", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_serving.py", *arguments, "--output", str(path)])
    monkeypatch.setattr(bench, "SECONDS_PER_SAMPLE", 0.01)
    bench.main()
    (record,) = read(path)
    assert record["suite"] == "serving" and record["quick"] and record["threads"] == 1
    for row in record["variants"].values():
        assert 0 < row["p50_ms"] <= row["p99_ms"] and row["images_per_s"] > 0 and row["first_call_s"] > 0
        assert len(row["values_ms"]) == 2 and 0 < row["imported_rss_bytes"] < row["peak_rss_bytes"]
    assert record["variants"]["folded"]["fold_first_s"] > 0
    assert record["ratios"]["folded/eager"]["of_medians"] > 0
    assert "folded is" in capsys.readouterr().out
