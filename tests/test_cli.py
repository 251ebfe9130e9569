"""The command line: what each command says and keeps, how it fails, and what it does not need."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from stand_in import Machine
from typer.testing import CliRunner

import resfuse
from resfuse import Folded, backends, cli, models, ops
from resfuse.bench import gate, networks, profiling, scaling, units
from resfuse.bench.records import read

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
needs_native = pytest.mark.skipif(
    backends.missing("bn_act", "native", "cpu", torch.float32) is not None, reason="the native library is missing"
)


def invoke(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "160"})


def refused(*arguments):
    """What a command says that cannot run as it is given: one line, and no traceback."""
    told = invoke(*arguments)
    assert told.exit_code == 2, told.output
    assert told.stderr.startswith("resfuse: ") and told.stderr.count("\n") == 1
    return told.stderr


@pytest.fixture
def quick(monkeypatch):
    """Nothing is timed: callables run, and a stand-in clock moves."""
    monkeypatch.setattr(gate, "interleave", Machine({"resfuse": 5e-4, "fused": 5e-4}).interleave)
    monkeypatch.setattr(units, "matmul_rate", lambda *_: 1.0)


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra_one_line_says_what_to_install(package):
    code = f"import sys; sys.modules[{package!r}] = None; import resfuse; import resfuse.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and 'pip install "resfuse[cli]"' in done.stderr and package in done.stderr


def test_the_core_and_the_measuring_library_need_no_extra():
    modules = ["resfuse", "resfuse.bench.units", "resfuse.bench.blocks", "resfuse.bench.scaling",
               "resfuse.bench.comparison", "resfuse.bench.diagnosis", "resfuse.bench.profiling"]  # fmt: skip
    code = "import sys; sys.modules.update(dict.fromkeys(('typer', 'rich', 'onnxruntime', 'openvino', 'plotly')));"
    done = subprocess.run([sys.executable, "-c", f"{code} import {', '.join(modules)}"], capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "resfuse", "--help"], capture_output=True, text=True, cwd=ROOT)
    commands = "doctor", "bench", "compare", "explain", "profile", "tune", "demo", "list"
    assert done.returncode == 0 and all(name in done.stdout for name in commands)


def test_doctor_lists_the_backends_and_tests_them():
    told = invoke("doctor")
    assert told.exit_code == 0, told.output
    assert all(status.backend in told.output for status in backends.available())
    assert "FAILED" not in told.output and "passed" in told.output
    found = json.loads(invoke("doctor", "--json").output)
    assert found["healthy"] and found["packages"]["torch"] == torch.__version__
    assert found.keys() >= {"environment", "backends", "cpu", "gpu", "caches", "self_test"}
    assert [b["backend"] for b in found["backends"]] == [status.backend for status in backends.available()]
    assert any(test["name"] == "reference cpu" for test in found["self_test"])
    if not torch.cuda.is_available():
        assert not found["gpu"]["available"] and found["gpu"]["reason"]


@needs_native
def test_doctor_finds_a_kernel_that_computes_wrong(monkeypatch):
    right = ops.add_relu
    monkeypatch.setattr(ops, "add_relu", lambda *operands: right(*operands) * 1.01)
    told = invoke("doctor")
    assert told.exit_code == 1 and "FAILED a wrong result: add_relu" in told.output


@needs_native
def test_doctor_finds_a_folded_network_that_computes_wrong(monkeypatch):
    right = Folded.forward
    monkeypatch.setattr(Folded, "forward", lambda self, x: right(self, x) * 1.05)
    told = invoke("doctor")
    assert told.exit_code == 1 and "folded output" in told.output


def test_doctor_fails_without_native_kernels_only_where_it_is_asked_to(monkeypatch):
    monkeypatch.setitem(ops.missing_native, "cpu", "it was not built")
    assert invoke("doctor").exit_code == 0 and "it was not built" in invoke("doctor").output
    assert invoke("doctor", "--strict").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "model", "resnet51"], "'resnet51'; nearest: resnet"),
        (["explain", "resnet51"], "'resnet51'; nearest: resnet"),
        (["profile", "resnet18", "--mode", "trainig"], "'trainig'; nearest: training"),
        (["bench", "unit", "momets"], "'momets'; nearest: moments"),
        (["bench", "unit", "--dtype", "float31"], "'float31'; nearest: float32"),
        (["bench", "unit", "--shape", "16x64x56"], "four positive numbers NxCxHxW, as 16x64x56x56, got '16x64x56'"),
        (["bench", "unit", "--batch", "1", "--size", "32"], "more than 1 value per channel"),
        (["bench", "unit", "--peer", "apx"], "'apx'; nearest: apex"),
        (["bench", "model", "resnet18", "--peer", "openvin"], "'openvin'; nearest: openvino"),
        (["bench", "model", "resnet18", "--batch", "0"], "batch must be at least 1, got 0"),
        (["bench", "model", "resnet18", "--scale", "with"], "scale must be one of batch, size, depth, threads"),
        (["bench", "model", "resnet18", "resnet34", "--scale", "size"], "in one mode, got resnet18, resnet34"),
        (["bench", "model", "resnet18", "--scale", "size", "--batch", "4"], "leave out --batch"),
        (["bench", "block", "vgg16_bn"], "vgg16_bn has no block that stands alone"),
        (["bench", "unit", "conv_stats", "--shape", "1x4x3x3"], "nothing to measure: convolutions take their shapes"),
        (["bench", "unit", "conv_stats", "--dtype", "float64"], "nothing to measure: convolutions have tile kernels"),
        (["bench", "model", "resnet18", "--dtype", "float64"], "dtype must be one of float32, bfloat16, float16, got"),
        (["bench", "block", "resnet18", "--dtype", "float64"], "dtype must be one of float32, bfloat16, float16, got"),
        (["profile", "resnet18", "--dtype", "float64"], "dtype must be one of float32, bfloat16, float16, got"),
        (["profile", "resnet18", "--size", "8", "--batch", "1"], "batch 1 of 8: Expected more than 1 value per"),
        (["bench", "block", "resnet18", "--output", "/dev/null/rows.jsonl"], "cannot write /dev/null/rows.jsonl: "),
        (["bench", "block", "resnet18", "--html", "/dev/null/page.html"], "cannot write /dev/null/page.html: "),
        (["explain", "resnet18", "--backend", "nativ"], "'nativ'; nearest: native"),
        (["explain", "resnet18", "--device", "tpu"], "device must be one of cpu, cuda, got 'tpu'"),
        (["list", "modles"], "'modles'; nearest: models"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_unknown_names_are_refused_with_the_nearest(arguments, said):
    if "bench" in arguments and backends.missing("bn_act", "native", "cpu", torch.float32) is not None:
        pytest.skip("the native library is missing")
    assert said in refused(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_missing_is_refused():
    for arguments in (["bench", "unit"], ["bench", "model", "resnet18"], ["explain", "resnet18"]):
        assert "torch finds no NVIDIA GPU" in refused(*arguments, "--device", "cuda")


@needs_native
def test_units_are_measured_shown_and_kept(quick, tmp_path):
    file = tmp_path / "new" / "units.jsonl"
    arguments = ["bench", "unit", "add_relu", "moments", "--shape", "1x4x3x3", "--dtype", "float32,bfloat16"]
    told = invoke(*arguments, "--rounds", 6, "--output", file)
    assert told.exit_code == 0, told.output
    rows = read(file)
    assert [(row["unit"], row["dtype"]) for row in rows] == [
        (unit, dtype) for dtype in ("float32", "bfloat16") for unit in ("moments", "add_relu")
    ]
    assert told.output.count("2.00x (2.00 to 2.00)") == 4 and told.output.count("speed-up") == 1
    assert f"4 of 4 rows are in {file}" in told.output.replace("\n", " ")
    assert invoke(*arguments, "--rounds", 1, "--output", file).exit_code == 0 and len(read(file)) == 8


@needs_native
@pytest.mark.parametrize("shape", [None, (1, 64, 3, 3)], ids=["of-a-network", "given"])
def test_as_many_rows_as_announced(quick, shape):
    plan = units.Plan.chosen(quick=True, shape=shape, model="resnet18", size=64, batch=1, rounds=1)
    assert sum(1 for _ in units.run(plan, {})) == units.count(plan)


@needs_native
def test_ctrl_c_keeps_what_is_measured(quick, tmp_path, monkeypatch):
    file, measure, calls = tmp_path / "units.jsonl", units.measure, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(units, "measure", interrupted)
    page = types.SimpleNamespace(write_html=lambda rows, path: path.write_text(f"{len(rows)} rows"))
    monkeypatch.setitem(sys.modules, "resfuse.bench.html", page)
    html = tmp_path / "page.html"
    told = invoke("bench", "unit", "--shape", "1x4x3x3", "--rounds", 1, "--output", file, "--html", html)
    assert told.exit_code == 130 and "resfuse: interrupted" in told.stderr
    assert len(read(file)) == 2 and html.read_text() == "2 rows"
    calls.clear()
    told = invoke("bench", "unit", "--shape", "1x4x3x3", "--rounds", 1, "--output", file, "--html", tmp_path)
    assert told.exit_code == 2 and f"cannot write {tmp_path}: Is a directory" in told.stderr.replace("\n", " ")
    assert not calls and len(read(file)) == 2  # said before anything is measured


@needs_native
def test_a_wrong_kernels_row_is_left_out(quick, tmp_path, monkeypatch):
    right = ops.add_relu
    monkeypatch.setattr(ops, "add_relu", lambda *operands: right(*operands) * 1.01)
    told = invoke("bench", "unit", "--shape", "1x4x3x3", "--rounds", 1, "--output", tmp_path / "units.jsonl")
    assert told.exit_code == 1 and "refusing to time a wrong result: add_relu" in told.stderr
    kept = {row["unit"] for row in read(tmp_path / "units.jsonl")}
    assert kept >= {"moments", "scale_shift_act"} and "add_relu" not in kept


@needs_native
def test_a_network_that_does_not_take_its_images_ends_in_one_line(quick, tmp_path, monkeypatch):
    from test_bench_networks import Inside

    monkeypatch.setattr(networks, "Worker", Inside)
    monkeypatch.setattr(networks, "check", lambda *_: None)
    cell = "--size", 8, "--batch", 1, "--dtype", "float32", "--output", tmp_path / "models.jsonl"
    told = invoke("bench", "model", "resnet18", *cell)
    assert told.exit_code == 2 and "resfuse: Expected more than 1 value per channel" in told.stderr
    assert not (tmp_path / "models.jsonl").exists()


@needs_native
def test_blocks_are_measured(quick, tmp_path):
    file = tmp_path / "blocks.jsonl"
    told = invoke("bench", "block", "cifar_resnet20", "--mode", "inference", "--dtype", "float32", "--batch", 1,
                  "--size", 8, "--rounds", 6, "--output", file)  # fmt: skip
    assert told.exit_code == 0, told.output
    assert len(read(file)) == 5 and "BasicBlock layer1.0 and 2 alike inference float32, 1x16x8x8" in told.output


@needs_native
def test_networks_are_measured(quick, tmp_path, monkeypatch):
    from test_bench_networks import Inside

    monkeypatch.setattr(networks, "Worker", Inside)
    file = tmp_path / "models.jsonl"
    small = "--dtype", "float32", "--rounds", 6, "--output", file
    cell = "--mode", "inference", "--batch", 2, "--size", 16
    told = invoke("bench", "model", "cifar_resnet20", "--peer", "torch-tensorrt", *cell, *small)
    assert told.exit_code == 0, told.output
    (row,) = read(file)
    assert row["variants"].keys() == {"eager", "fused"} and "torch-tensorrt" in row["missing"]
    assert "torch-tensorrt       not measured: " in told.output and "2.00x (2.00 to 2.00) eager" in told.output
    points = [scaling.Point("batch", n, networks.Cell("cifar_resnet20", "inference", n, 16)) for n in (1, 2)]
    monkeypatch.setattr(scaling, "points", lambda *_: points)
    told = invoke("bench", "model", "cifar_resnet20", "--scale", "all", *small)
    assert told.exit_code == 0, told.output
    assert [row["suite"] for row in read(file)] == ["models", "scaling", "scaling"]
    assert "along batch 1 to 2: linear but for batch 1 (2.00x)" in told.output.replace("\n", " ")


def test_explain_says_how_blocks_run():
    told = invoke("explain", "cifar_resnet20", "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.output)
    network = resfuse.fuse(models.get_model("cifar_resnet20"))
    assert found == json.loads(resfuse.explain(network).to_json())
    assert "10 of 10 blocks fused" in invoke("explain", "cifar_resnet20", "--backend", "reference").output


@needs_native
def test_profile_times_units_and_draws_memory(tmp_path):
    told = invoke("profile", "cifar_resnet20", "--quick", "--output", tmp_path / "new")
    assert told.exit_code == 0, told.output
    found = json.loads((tmp_path / "new" / "profile.json").read_text())
    stock, fused = found["stock"], found["fused"]
    assert "fused convolution" in fused["units"] and "fused convolution" not in stock["units"]
    assert stock["peak_bytes"] == max(held for _, held in stock["memory"]) > fused["peak_bytes"] > 0
    for name, part in (("stock", stock), ("fused", fused)):
        assert sum(part["units"].values()) == pytest.approx(sum(row["ms"] for row in part["operators"]))
        assert json.loads((tmp_path / "new" / f"{name}.trace.json").read_text())["traceEvents"]
        assert f"memory of a step, {name}" in told.output
    assert all(unit in told.output for unit in fused["units"])


@pytest.mark.parametrize(
    ("operator", "unit"),
    [
        ("resfuse::conv_stats_backward_", "fused convolution"), ("resfuse::moments", "fused normalisation"),
        ("resfuse::scale_shift_relu_maxpool", "fused pool"), ("aten::mkldnn_convolution", "convolution"),
        ("aten::native_batch_norm", "normalisation"), ("aten::threshold_backward", "ReLU"),
        ("aten::max_pool2d_with_indices", "pool"), ("aten::addmm", "linear and loss"),
        ("Optimizer.step#SGD.step", "optimizer"), ("ConvNormFunctionBackward", "autograd's nodes"),
        ("aten::detach", "other"),
    ],
)  # fmt: skip
def test_an_operator_counts_for_its_unit(operator, unit):
    assert profiling.unit_of(operator) == unit


def test_a_sparkline_shows_the_most_of_each_slice():
    line = profiling.sparkline([(0.0, 8), (1.0, 0), (9.0, 4), (10.0, 0)], 8, width=10)
    assert len(line) == 10 and line[0] == "█" and line[9] == "▄" and set(line[2:9]) == {" "}
    assert profiling.sparkline([], 8) == profiling.sparkline([(0.0, 0)], 0) == ""


def test_tune_hands_on_what_it_is_given_and_says_why_not(monkeypatch):
    calls = []

    def tune(device, names, dtypes):
        calls.append((device, names, dtypes))
        if len(calls) > 1:
            raise RuntimeError("candidates disagree")
        return Path("table.json")

    monkeypatch.setitem(sys.modules, "resfuse.bench.tune", types.SimpleNamespace(tune=tune))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = invoke("tune", "resnet18", "--dtype", "float16")
    assert told.exit_code == 0 and "Written: table.json" in told.output
    assert calls == [("cuda", ["resnet18"], [torch.float16])]
    told = invoke("tune")
    assert told.exit_code == 1 and told.stderr == "resfuse: candidates disagree\n"
    assert calls[1] == ("cuda", ["resnet50"], [torch.bfloat16])
    assert "device must not be cpu" in refused("tune", "--device", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no NVIDIA GPU" in refused("tune")
    monkeypatch.setitem(sys.modules, "resfuse.bench.tune", None)
    assert "kernels to tune" in refused("tune")


def test_list_names_everything():
    found = json.loads(invoke("list", "--json").output)
    assert found["models"] == models.list_models() and found["units"] == list(units.UNITS)
    assert invoke("list", "backends").output.split() == list(backends.BACKENDS)
    told = invoke("list").output
    assert all(name in told for name in (*found["peers"], *found["unit-peers"], *found["dtypes"]))
