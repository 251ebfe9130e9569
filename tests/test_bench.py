"""The measuring library and the report: their arithmetic on known values, never a time."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resfuse import backends, models, ops
from resfuse.bench import parity
from resfuse.bench.environment import describe, environment, native_environment
from resfuse.bench.memory import model_tensors, peak_resident_bytes, saved_memory
from resfuse.bench.records import append, read
from resfuse.bench.shapes import batch_norm_shapes
from resfuse.bench.timing import calls_for, compare, interleave, milliseconds, quantile, summarise

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
needs_native = pytest.mark.skipif(
    backends.missing("bn_act", "native", "cpu", torch.float32) is not None, reason="the native library is missing"
)


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Clock:
    """Seconds that pass only when something says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds, log=None, name=None):
        def run():
            self.now += seconds
            if log is not None:
                log.append(name)

        return run


@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_quantile_is_torchs(q, count):
    samples = torch.rand(count, dtype=torch.float64)
    assert quantile(samples.tolist(), q) == pytest.approx(torch.quantile(samples, q).item())


@pytest.mark.parametrize(("samples", "q"), [([], 0.5), ([1.0], -0.1), ([1.0], 1.1)])
def test_quantile_refuses(samples, q):
    with pytest.raises(ValueError, match=r"samples|q must be"):
        quantile(samples, q)


def test_summary_and_milliseconds():
    assert summarise([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
    assert milliseconds([0.002]) == {"p20_ms": 2.0, "median_ms": 2.0, "p80_ms": 2.0, "samples": 1}


def test_compare_keeps_pairs():
    # the machine slows down threefold in the last round: only the pairs still say 1/2
    ratio = compare({"ours": [1.0, 1.0, 3.0, 3.0], "stock": [2.0, 2.0, 6.0, 6.0]}, "ours", "stock")
    assert ratio == (0.5, 0.5)
    assert compare({"a": [1.0, 4.0, 1.0], "b": [2.0, 1.0, 2.0]}, "a", "b") == (0.5, 0.5)
    assert compare({"a": [1.0, 2.0, 9.0], "b": [1.0, 4.0, 3.0]}, "a", "b") == pytest.approx((2 / 3, 1.0))


def test_interleave_takes_turns():
    clock, log, ticks = Clock(), [], []
    functions = {name: clock.work(seconds, log, name) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    samples = interleave(functions, rounds=4, warmup=1, tick=lambda: ticks.append(1), clock=clock)
    assert "".join(log) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert samples == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [4.0] * 4}
    assert len(ticks) == 3 * (4 + 1)


def test_interleave_repeats_short_calls():
    clock = Clock()
    assert calls_for(clock.work(0.25), 2.0, clock) == 8
    assert calls_for(clock.work(5.0), 2.0, clock) == 1
    start = clock.now
    assert interleave({"a": clock.work(0.25)}, rounds=2, warmup=0, seconds_per_sample=1.0, clock=clock) == {
        "a": [0.25] * 2
    }
    assert clock.now - start == 0.25 * (2 + 2 * 4)


@pytest.mark.parametrize(("functions", "rounds"), [({}, 1), ({"a": int}, 0)])
def test_interleave_refuses(functions, rounds):
    with pytest.raises(ValueError, match="functions and rounds"):
        interleave(functions, rounds=rounds)


def test_saved_bytes_of_a_known_graph():
    x, w = torch.randn(10, 20, requires_grad=True), torch.randn(20, 30, requires_grad=True)
    assert saved_memory(lambda: x @ w) == (4 * (10 * 20 + 20 * 30), 2)
    assert saved_memory(lambda: x @ w, [w]) == (4 * 10 * 20, 1)
    # x*x saves x twice and exp its result: storages count once
    assert saved_memory(lambda: (x * x).exp()) == (4 * 10 * 20 * 2, 2)
    # a view keeps its whole storage
    assert saved_memory(lambda: x[:1].sin()) == (4 * 10 * 20, 1)
    with torch.no_grad():
        assert saved_memory(lambda: x @ w) == (0, 0)


def test_saved_bytes_leave_out_the_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 8, 8)
    input_bytes, conv_out = 4 * x.numel(), 4 * 2 * 4 * 8 * 8
    assert saved_memory(lambda: model(x), model_tensors(model)).bytes == input_bytes + conv_out + 2 * 4 * 4


def test_peak_memory_is_the_processs_own():
    held = torch.ones(64 * 2**20 // 4)
    ours = peak_resident_bytes()
    assert ours > held.numel() * 4
    code = "from resfuse.bench.memory import peak_resident_bytes as p; a = p(); import torch; b = torch.ones(2**25); "
    code += "print(p() - a)"
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout)
    assert 2**27 <= grown <= 2**28


def test_shapes_of_a_network():
    found = batch_norm_shapes(models.resnet50, (16, 3, 224, 224))
    assert len(found) == 12 and sum(len(s.names) for s in found) == 53
    assert found[0] == ((16, 64, 112, 112), ("bn1",))
    assert ((16, 2048, 7, 7), ("layer4.0.bn3", "layer4.0.downsample.1", "layer4.1.bn3", "layer4.2.bn3")) in found
    assert found[0].numel == 16 * 64 * 112 * 112


def test_environment_record():
    record = environment()
    assert json.loads(json.dumps(record)) == record
    assert {"date", "commit", "dirty", "device", "device_name", "driver", "threads", "torch", "triton"} <= record.keys()
    assert record["torch"] in describe(record)
    assert "no checkout" in describe({**record, "commit": None, "dirty": None})


def test_native_kernels_are_measured_only_where_they_are(capsys, monkeypatch):
    monkeypatch.setitem(ops.missing_native, "cpu", None)
    record = native_environment(["float32", "bfloat16"])
    assert capsys.readouterr().out == describe(record) + "\n"
    with pytest.raises(SystemExit, match=r"no native kernels for int8: it has no kernel for torch\.int8"):
        native_environment(["float32", "int8"])
    monkeypatch.setitem(ops.missing_native, "cpu", "it was not built")
    with pytest.raises(SystemExit, match="no native kernels for float32: it was not built"):
        native_environment(["float32"])


def test_records_are_appended(tmp_path):
    path = tmp_path / "new" / "some.jsonl"
    assert read(path) == []
    append(path, {"a": 1})
    append(path, {"b": [2]})
    assert read(path) == [{"a": 1}, {"b": [2]}]


@pytest.fixture
def small_steps():
    """The same step in float64 and float32, of a network small enough to be well conditioned."""
    model = parity.condition(models.get_model("cifar_resnet20")).train()
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    exact = parity.training_step(models_copy(model).double(), images.double(), labels)
    return exact, parity.training_step(models_copy(model), images, labels)


def models_copy(model):
    other = models.get_model("cifar_resnet20")
    other.load_state_dict(model.state_dict())
    return other


def broken(verdicts):
    return {v.quantity for v in verdicts if not v.holds}


def test_parity_holds_for_stock_itself(small_steps):
    exact, step = small_steps
    errors = parity.step_errors(step, exact)
    assert 0 < errors["gradients"].together < 1e-3
    verdicts = parity.judge(errors, [errors], torch.float32)
    assert broken(verdicts) == set() and len(verdicts) == 9


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("stock_error", [None, 0.9], ids=["exact-stock", "useless-stock"])
def test_parity_catches_gradients_that_are_zero_or_not_finite(small_steps, value, stock_error):
    exact, step = small_steps
    stock = parity.step_errors(step, exact)
    if stock_error is not None:  # twice 0.9 would let zeros pass
        stock["gradients"] = parity.Errors(stock_error, stock_error, stock_error, "any")
    wrong = {**step, "gradients": {n: torch.full_like(g, value) for n, g in step["gradients"].items()}}
    verdicts = parity.judge(parity.step_errors(wrong, exact), [stock], torch.float32)
    assert broken(verdicts) == {"gradients", "gradients, median", "gradients, worst"}


def test_parity_catches_one_zero_gradient_and_names_it(small_steps):
    exact, step = small_steps
    name = "layer2.1.bn2.bias"
    wrong = {**step, "gradients": {**step["gradients"], name: torch.zeros_like(step["gradients"][name])}}
    errors = parity.step_errors(wrong, exact)
    assert errors["gradients"].worst == 1 and errors["gradients"].worst_name == name
    assert "gradients, worst" in broken(parity.judge(errors, [parity.step_errors(step, exact)], torch.float32))


def test_parity_takes_the_most_exact_layout_but_for_gradients(small_steps):
    exact, step = small_steps
    good = parity.step_errors(step, exact)
    poor = {q: parity.Errors(10 * e.together, 10 * e.median, 10 * e.worst, e.worst_name) for q, e in good.items()}
    found = {v.quantity: v for v in parity.judge(good, [poor, good], torch.float32)}
    assert found["outputs"].stock == good["outputs"].together
    assert found["outputs"].bound == 2 * good["outputs"].together + parity.FLOOR[torch.float32]
    assert found["running_var, worst"].stock == good["running_var"].worst
    assert found["gradients"].stock == poor["gradients"].together  # luck decides there


def test_parity_refuses_other_tensors(small_steps):
    exact, step = small_steps
    with pytest.raises(ValueError, match=r"same tensors.*fc\.bias"):
        parity.step_errors({**step, "gradients": {k: g for k, g in step["gradients"].items() if k != "fc.bias"}}, exact)


def test_a_missing_gradient_counts_as_zero():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    step = parity.training_step(Half(), torch.randn(3, 4), torch.arange(3))
    assert not step["gradients"]["unused.weight"].any() and step["gradients"]["used.weight"].any()


@pytest.mark.parametrize(
    ("value", "exact", "error"),
    [([3.0, 4.0], [3.0, 4.0], 0.0), ([0.0, 0.0], [3.0, 4.0], 1.0), ([0.0], [0.0], 0.0), ([1.0], [0.0], math.inf)],
    ids=["equal", "zeros", "both-zero", "exact-zero"],
)
def test_relative_l2(value, exact, error):
    assert parity.relative_l2(torch.tensor(value), torch.tensor(exact)) == error


def test_floors_are_those_of_the_tests():
    numerics = pytest.importorskip("numerics")
    assert numerics.FLOOR == parity.FLOOR


WHERE = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "dirty": False, "device_name": "Some CPU",
    "capability": "AVX512", "threads": 2, "torch": "2.13.0",
}  # fmt: skip


def model_record(fused_ms=50.0, quick=False, **changes):
    times = {"eager": 100.0, "compile": 80.0, "fused": fused_ms}
    variants = {
        name: {"median_ms": ms, "images_per_s": round(16e3 / ms, 2), "saved_bytes": 10**8, "peak_rss_bytes": 10**9}
        for name, ms in times.items()
    }
    ratios = {f"fused/{b}": {"of_medians": fused_ms / times[b], "paired": 0.5} for b in ("eager", "compile")}
    cell = {"model": "resnet50", "mode": "training", "dtype": "float32", "batch": 16, "size": 224}
    return {"quick": quick, "environment": WHERE, **cell, "variants": variants, "ratios": ratios, **changes}


def unit_record(shape, over_stock, **changes):
    return {
        "quick": False, "environment": WHERE, "unit": "moments", "form": "", "dtype": "float32", "shape": shape,
        "gb_per_s": 20.0, "share_of_copy": 0.8, "over_stock": over_stock, **changes,
    }  # fmt: skip


def test_report_renders_the_newest_records():
    report = load_script("report")
    old, new, quick = model_record(200.0), model_record(50.0), model_record(1.0, quick=True)
    units = [
        unit_record([1, 2, 3, 3], {"of_medians": 0.5, "paired": 0.5}),
        unit_record([1, 2, 5, 5], {"of_medians": 2.0, "paired": 2.0}),
    ]
    text = report.render([old, new, quick], units)
    assert "| resnet50 | training | float32 | 16 | 160.0 | 200.0 | 320.0 | 2.00x | 1.60x | 1.00 | 1000 | 1000 |" in text
    assert "| moments |  | float32 | 20 | 80% (80% to 80%) | 1.00x (0.50 to 2.00) |" in text
    assert "Some CPU" in text and "commit 012345678" in text and "1x2x3x3, 1x2x5x5" in text
    assert report.render([], []) == "" and report.render([quick], []) == ""


def test_report_shows_what_was_not_measured_as_empty():
    record = model_record()
    del record["variants"]["compile"], record["ratios"]["fused/compile"]
    for row in record["variants"].values():
        del row["saved_bytes"], row["peak_rss_bytes"]
    assert "| 16 | 160.0 |  | 320.0 | 2.00x |  |  |  |  |" in load_script("report").render([record], [])


def test_report_check_says_whether_the_tables_are_stale(tmp_path, capsys):
    report = load_script("report")
    readme, results = tmp_path / "README.md", tmp_path / "results"
    arguments = ["--readme", str(readme), "--results", str(results)]
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    append(results / "models.jsonl", model_record())
    assert report.main([*arguments, "--check"]) == 1 and "stale" not in readme.read_text()
    assert "run python benchmarks/report.py" in capsys.readouterr().out
    assert "old" in readme.read_text()
    assert report.main(arguments) == 0
    written = readme.read_text()
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "old" not in written
    assert report.main([*arguments, "--check"]) == 0
    append(results / "models.jsonl", model_record(40.0))
    assert report.main([*arguments, "--check"]) == 1


@pytest.mark.parametrize("text", ["", "{0}", "{1}{0}", "{0}{1}{0}"], ids=["none", "one", "swapped", "twice"])
def test_report_refuses_a_text_without_its_markers(text):
    report = load_script("report")
    with pytest.raises(ValueError, match="once each"):
        report.replace_block(text.format(report.START, report.END), "new")


@needs_native
def test_units_refuse_a_wrong_result():
    units = load_script("bench_units")
    inputs = units.Inputs((2, 5, 4, 4), torch.float32)
    case = next(c for c in units.cases(inputs) if (c.unit, c.form) == ("scale_shift_act", "raw"))
    units.check(case, inputs)
    (out,) = case.ours()
    for wrong in (out * 1.0001, torch.zeros_like(out), F.pad(out, (0, 1)), torch.full_like(out, math.nan)):
        with pytest.raises((SystemExit, RuntimeError), match=r"wrong result|size"):
            units.check(units.Case(**{**vars(case), "ours": lambda wrong=wrong: (wrong,)}), inputs)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 8, 9, 9), (2, 65, 3, 3)], ids=str)
def test_every_unit_passes_its_own_check(shape, dtype):
    units = load_script("bench_units")
    inputs = units.Inputs(shape, dtype)
    names = []
    for case in units.cases(inputs):
        units.check(case, inputs)
        names.append((case.unit, case.form))
    assert len(set(names)) == len(names) == 17


@needs_native
def test_the_fused_network_passes_the_gate_before_it_is_timed():
    load_script("bench_models").check("resnet18", "float32")
