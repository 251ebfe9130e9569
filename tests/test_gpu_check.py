"""`make gpu-check` without a GPU: stages, limits, records and the table, over processes that play a part."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_ops import NAMES
from test_report import load_script

from resfuse.bench import tune, units
from resfuse.nn import FusedBlock

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu_check():
    return load_script("gpu_check")


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def python(code):
    return [sys.executable, "-c", code]


def test_a_machine_without_a_gpu_gets_one_line(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path)}
    command = [sys.executable, "benchmarks/gpu_check.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("gpu-check: torch ") and done.stderr.endswith(" finds no NVIDIA GPU\n")
    assert done.stderr.count("\n") == 1


def test_an_interpreter_without_torch_gets_one_line(gpu_check, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(SystemExit, match=r"^gpu-check: ModuleNotFoundError: No module named 'torch'$"):
        gpu_check.probe(str(broken))


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A CUDA toolkit, as far as the plan looks."""
    path = tmp_path / "toolkit" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    return path


def planned(gpu_check, folder):
    return {stage.name: stage for stage in gpu_check.plan("9.0", folder / "gpu.jsonl", folder)}


def test_the_limits_leave_ten_minutes_enough(gpu_check, tmp_path, nvcc):
    stages = planned(gpu_check, tmp_path)
    assert sum(stage.limit for stage in stages.values()) <= gpu_check.SECONDS < 10 * 60
    assert list(stages)[:2] == ["build", "tests"]
    build = stages.pop("build")
    wanted = {"RESFUSE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "CUDA_HOME": str(nvcc.parents[1])}
    assert wanted.items() <= build.environment.items()
    assert all(stage.needs == "build" for stage in stages.values())
    for stage in stages.values():  # every script that is named is there
        for name in (part for part in stage.command if part.endswith(".py")):
            assert (ROOT / name).is_file(), name


def test_without_nvcc_triton_is_built_tested_and_measured(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(gpu_check, "has", lambda module: True)
    stages = planned(gpu_check, tmp_path)
    assert stages["build"].environment["RESFUSE_CUDA"] == "0" and stages["build"].missing is None
    native = {"tests", "memcheck", "racecheck", "units"}
    assert {name for name, stage in stages.items() if stage.missing == "nvcc is not found"} == native
    assert stages["triton"].missing is stages["convolutions"].missing is stages["tune"].missing is None
    for name in ("batch 256", "batch 16"):
        variants = {part.partition("-")[0] for part in stages[name].command[-6:]}
        assert stages[name].missing is None and "triton" in variants and "fused" not in variants


def test_without_triton_the_native_kernels_are_tested_and_measured(gpu_check, tmp_path, monkeypatch, nvcc):
    monkeypatch.setattr(gpu_check, "has", lambda module: module != "triton")
    stages = planned(gpu_check, tmp_path)
    triton = {"triton", "triton memcheck", "triton racecheck", "triton units", "convolutions", "tune"}
    assert {name for name, stage in stages.items() if stage.missing == "Triton is not installed"} == triton
    assert stages["batch 256"].missing is None and "triton" not in stages["batch 256"].command


def test_the_names_of_units_and_variants_are_those_of_the_scripts(gpu_check):
    assert (*gpu_check.PASSES, *gpu_check.CONVOLUTIONS) == units.UNITS
    bench = load_script("bench_gpu")
    assert set(gpu_check.VARIANTS) < set(bench.VARIANTS)
    assert all(bench.backend_of(v) == gpu_check.KERNELS.get(v.partition("-")[0]) for v in gpu_check.VARIANTS)


def test_the_tests_of_triton_that_run_are_few_and_of_every_kind(gpu_check):
    """Each test that has a form in bfloat16 is among them, and what only a GPU has."""
    pytest.importorskip("triton", reason="needs Triton")
    files = sorted(str(file) for file in (ROOT / "tests").glob("test_gpu_triton*.py"))

    def collected(expression):
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--collect-only", "-p", "no:cacheprovider"]
        done = subprocess.run([*command, "-k", expression, *files], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        return {line for line in done.stdout.splitlines() if "::" in line}

    def functions(found):
        return {name.partition("[")[0] for name in found}

    chosen = collected(gpu_check.TRITON_TESTS)
    alone = collected(gpu_check.TRITON_ALONE)
    assert functions(collected("bfloat16 or graph or compiled or billion or autocast")) == functions(chosen)
    assert alone < chosen and len(alone) < 20 and len(chosen) < 180


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
@pytest.mark.parametrize("name", ["units", "convolutions", "batch 256"])
def test_a_script_takes_the_arguments_of_its_stage(gpu_check, tmp_path, monkeypatch, nvcc, name):
    """It looks for a GPU when it has read them."""
    monkeypatch.setattr(gpu_check, "has", lambda module: True)
    done = subprocess.run(planned(gpu_check, tmp_path)[name].command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "nothing to measure: torch finds no NVIDIA GPU\n" and done.returncode == 1


def test_the_table_of_choices_is_kept_with_the_results_and_the_networks_choose_by_it(
    gpu_check, tmp_path, nvcc, monkeypatch, capsys
):
    stages = planned(gpu_check, tmp_path)
    chooses = {name for name, stage in stages.items() if stage.environment.get("XDG_CACHE_HOME") == str(tmp_path)}
    assert chooses == {"tune", "batch 256", "batch 16"}
    assert list(stages).index("tune") < list(stages).index("batch 256")
    rows, asked, path = [{"fused_ms": 1.0, "composed_ms": ms} for ms in (2.0, 0.5, 3.0)], [], tmp_path / "some-gpu.json"
    path.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(tune, "tune", lambda **options: asked.append(options) or path)
    exec(gpu_check.TUNE, {})
    assert asked == [{"dtypes": (torch.bfloat16,), "batch": 256}]
    assert capsys.readouterr().out == "the fused kernel is the faster in 2 of 3 rows of some-gpu.json\n"


def test_a_dry_run_runs_nothing(gpu_check, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.main(["--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 13 and "bench_gpu.py" in said
    assert not list(tmp_path.iterdir())


def test_a_failure_hides_no_other_stage(gpu_check, log, capsys):
    stage = gpu_check.Stage
    stages = [
        stage("first", python("print('made'); print('=== 3 passed ===')"), 20),
        stage("broken", python("import sys; print('what went wrong'); sys.exit(9)"), 20),
        stage("missing", python("raise AssertionError"), 20, "no tool"),
        stage("needy", python("raise AssertionError"), 20, None, "broken"),
        stage("nowhere", ["/no/such/program"], 20),
        stage("last", python("import os; print(os.environ['INK'], os.getcwd())"), 20, None, "first", {"INK": "red"}),
    ]
    recorded = []
    results = gpu_check.check(stages, log, 60, recorded.append)
    assert recorded == results
    assert [(r.state, r.note) for r in results] == [
        ("passed", "3 passed"),
        ("failed", "what went wrong"),
        ("skipped", "no tool"),
        ("skipped", "broken has not passed"),
        ("failed", "[Errno 2] No such file or directory: '/no/such/program'"),
        ("passed", f"red {ROOT}"),
    ]
    said = capsys.readouterr().out
    assert "what went wrong" in said and "gpu-check: missing skipped: no tool" in said and "made" not in said
    assert "made" in log.read_text()


def test_a_stage_that_runs_too_long_ends_with_its_children(gpu_check, log, tmp_path):
    """The child ignores the first signal; its file shows whether it lives on."""
    alive = tmp_path / "alive"
    child = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"while True: open({str(alive)!r}, 'a').write('.'); time.sleep(0.05)"
    )
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    results = gpu_check.check(
        [gpu_check.Stage("slow", python(parent), 1), gpu_check.Stage("next", python("pass"), 20)], log, 21
    )
    assert [r.state for r in results] == ["out of time", "passed"] and results[0].note == "begun"
    assert time.monotonic() - start < 20
    size = alive.stat().st_size
    time.sleep(0.3)
    assert alive.stat().st_size == size > 0


def test_no_stage_outlasts_the_whole(gpu_check, log):
    stages = [gpu_check.Stage(name, python("import time; time.sleep(60)"), 50) for name in ("one", "two")]
    one, two = gpu_check.check(stages, log, 1.5)
    assert one.state == "out of time" and one.seconds < 10
    assert (two.state, two.note) == ("skipped", "no time is left")


def test_a_stage_gets_the_time_that_earlier_ones_left(gpu_check, log):
    """Not that of the stages after it, unless they are skipped."""
    slow = python("import time; time.sleep(3)")
    stages = [
        gpu_check.Stage("short", python("pass"), 20),
        gpu_check.Stage("long", slow, 1),
        gpu_check.Stage("skipped", slow, 10, "no tool"),
        gpu_check.Stage("last", python("pass"), 5),
    ]
    assert [r.state for r in gpu_check.check(stages, log, 26)] == ["passed", "passed", "skipped", "passed"]
    assert gpu_check.check(stages[1:], log, 6)[0].state == "out of time"


MOMENTS = {"suite": "units", "backend": "native", "unit": "moments", "form": ""}
ROWS = [
    {**MOMENTS, "share_of_copy": 0.95, "gb_per_s": 4000.0},
    {**MOMENTS, "share_of_copy": 0.85, "gb_per_s": 3600.0},
    {**MOMENTS, "backend": "triton", "share_of_copy": 0.5, "gb_per_s": 2000.0},
    {
        "suite": "units",
        "backend": "triton",
        "unit": "conv_stats",
        "form": "1x1",
        "shape": [256, 64, 56, 56],
        "weight": [256, 64, 1, 1],
        "share_of_copy": 0.9,
        "gb_per_s": 3000.0,
        "share_of_roofline": 0.75,
        "times": {name: {"median_ms": ms} for name, ms in (("resfuse", 0.4), ("copy", 0.2), ("composed", 0.9))},
        "missing": {"max-autotune": "30 s of the run had passed"},
    },
    {"suite": "gpu-models", "variant": "eager", "batch": 256, "images_per_s": 2000.0},
    {"suite": "gpu-models", "variant": "fused", "batch": 256, "images_per_s": 3000.0},
    {"suite": "gpu-models", "variant": "fused", "batch": 16, "images_per_s": 900.0},
]


def test_rows_are_appended_and_the_table_comes_last(gpu_check, monkeypatch, capsys, tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    writer = f"open({str(tmp_path / 'gpu.jsonl')!r}, 'a').write({lines!r})"
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu_check, "probe", lambda: {"gpu": "Some GPU", "architecture": "9.0", "torch": "2.11"})
    stages = [gpu_check.Stage("build", python(writer), 20), gpu_check.Stage("tests", python("raise SystemExit(1)"), 20)]
    monkeypatch.setattr(gpu_check, "plan", lambda architecture, results, kept: stages)
    (tmp_path / "gpu.jsonl").write_text(json.dumps({"suite": "gpu-models", "variant": "older"}) + "\n")
    assert gpu_check.main([]) == 1
    said = capsys.readouterr().out
    assert said.startswith("gpu-check: Some GPU, sm_90, torch 2.11\n")
    table = said.split("\n\n")[-1]
    assert "build            passed" in table and "tests            failed" in table and "older" not in table
    assert "3800 GB/s   90% of a copy, at least  85%" in table and "2000 GB/s   50% of a copy" in table
    convolution = next(line for line in table.splitlines() if line.startswith("conv_stats "))
    assert "64 to 256 at 56 " in convolution and " 0.400 ms,  75% of the roofline; composed 0.900, " in convolution
    assert convolution.endswith("max-autotune not measured: 30 s of the run had passed")
    assert "batch 256 fused                   3000.0 images/s  1.50x eager" in table
    assert "batch  16 fused                    900.0 images/s \n" in table
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [r["state"] for r in rows if r["suite"] == "gpu-check"] == ["passed", "failed"]
    assert all(r["gpu"] == "Some GPU" for r in rows if r["suite"] == "gpu-check")
    assert gpu_check.main(["--stages", "build"]) == 0


def test_what_the_sanitizer_runs_calls_every_operator_of_cuda():
    done = subprocess.run(
        [sys.executable, "tests/gpu_small_shapes.py", "cpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 18 * len(NAMES)


def test_what_the_sanitizer_runs_calls_every_operator_of_triton():
    pytest.importorskip("triton", reason="needs Triton")
    done = subprocess.run(
        [sys.executable, "tests/gpu_small_shapes.py", "cpu", "triton"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > len(NAMES)


@pytest.mark.parametrize("variant", ["eager", "fused"])
def test_the_step_that_is_timed_trains(variant):
    bench = load_script("bench_gpu")
    model = bench.build("resnet18", variant, "cpu")
    before = model.conv1.weight.detach().clone()
    assert isinstance(model, FusedBlock) == (variant == "fused")
    bench.training_step(model, *bench.batch_of(2, 32, "cpu"), torch.bfloat16)()
    assert model.conv1.weight.isfinite().all() and not torch.equal(model.conv1.weight, before)


def test_a_variant_is_fused_and_checked_on_its_own_kernels(monkeypatch):
    """Where they are missing the run ends before it times anything."""
    bench = load_script("bench_gpu")
    backends = {variant: bench.backend_of(variant) for variant in bench.VARIANTS}
    assert {v for v, b in backends.items() if b == "triton"} == {"triton", "triton-graph"}
    assert {v for v, b in backends.items() if b is None} == {"eager", "eager-graph", "compile", "compile-graph"}
    with pytest.raises(RuntimeError, match="backend='triton' does not serve"):
        bench.build("resnet18", "triton-graph", "cpu")
    with pytest.raises(RuntimeError, match="backend='triton' does not serve"):
        bench.check("resnet18", "float32", "triton", 2, "cpu", 32)
    monkeypatch.setattr(bench.parity, "FLOOR", dict.fromkeys(bench.parity.FLOOR, -1e9))
    with pytest.raises(SystemExit, match="refusing to time a wrong result: resnet18 float32 native"):
        bench.check("resnet18", "float32", "native", 2, "cpu", 32)


def test_the_makefile_has_the_command():
    assert "\ngpu-check:\n\t$(PYTHON) benchmarks/gpu_check.py\n" in (ROOT / "Makefile").read_text()
