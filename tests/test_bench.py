"""The measuring library: its arithmetic on known values, never a time."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stand_in import Clock
from torch import nn

from resfuse import fuse, models, ops
from resfuse.bench import convolutions, parity
from resfuse.bench.environment import cpu_name, describe, environment, native_environment
from resfuse.bench.memory import keep_freed_memory, model_tensors, peak_resident_bytes, saved_memory
from resfuse.bench.records import append, cell, parse, read, timings
from resfuse.bench.shapes import batch_norm_shapes, conv_shapes
from resfuse.bench.timing import calls_for, compare, interleave, interval, milliseconds, quantile, summarise

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]


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
    assert milliseconds([0.002]) == {"p20_ms": 2.0, "median_ms": 2.0, "p80_ms": 2.0, "samples": 1, "values_ms": [2.0]}


def test_compare_keeps_pairs():
    # the machine slows down threefold in the last round: only the pairs still say 1/2
    ratio = compare({"ours": [1.0, 1.0, 3.0, 3.0], "stock": [2.0, 2.0, 6.0, 6.0]}, "ours", "stock")
    assert ratio[:2] == (0.5, 0.5)
    assert compare({"a": [1.0, 4.0, 1.0], "b": [2.0, 1.0, 2.0]}, "a", "b")[:2] == (0.5, 0.5)
    assert compare({"a": [1.0, 2.0, 9.0], "b": [1.0, 4.0, 3.0]}, "a", "b")[:2] == pytest.approx((2 / 3, 1.0))


def noisy(seconds, rounds, seed, drift=0.3, noise=0.03):
    """Samples of callables that take these seconds, on a machine whose speed drifts, with noise of their own."""
    generator = random.Random(seed)
    speeds = [math.exp(generator.gauss(0, drift)) for _ in range(rounds)]
    return {n: [s * v * math.exp(generator.gauss(0, noise)) for v in speeds] for n, s in seconds.items()}


def test_the_interval_of_a_thing_with_itself_contains_1():
    ratios = [compare(noisy({"a": 1.0, "b": 1.0}, 9, seed), "a", "b") for seed in range(100)]
    assert sum(ratio.decided for ratio in ratios) <= 5
    assert max(ratio.high - ratio.low for ratio in ratios) < 0.5  # and says something, for all the drift


def test_the_interval_of_a_difference_contains_it_and_not_1():
    ratios = [compare(noisy({"a": 1.2, "b": 1.0}, 15, seed), "a", "b") for seed in range(100)]
    assert sum(ratio.low <= 1.2 <= ratio.high for ratio in ratios) >= 95
    assert sum(ratio.decided for ratio in ratios) >= 90


def test_few_rounds_decide_nothing():
    few = compare({"a": [1.0] * 5, "b": [9.0] * 5}, "a", "b")
    assert (few.low, few.high, few.decided) == (None, None, False)
    enough = compare({"a": [1.0] * 6, "b": [9.0] * 6}, "a", "b")
    assert enough.decided and enough.low == enough.high == pytest.approx(1 / 9)


def test_runs_are_drawn_independently_and_columns_of_a_run_together():
    drifting = tuple(noisy({"a": 1.0, "b": 1.0}, 20, 0, noise=0.0).values())
    together = interval(lambda medians: medians[0] / medians[1], [drifting])
    apart = interval(lambda medians: medians[0] / medians[1], [drifting[:1], drifting[1:]])
    assert together == (1.0, 1.0) and apart[0] < 0.95 and apart[1] > 1.05
    assert apart == interval(lambda medians: medians[0] / medians[1], [drifting[:1], drifting[1:]])


def test_interleave_takes_turns():
    clock, log, ticks = Clock(), [], []
    functions = {name: clock.work(seconds, log, name) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    samples = interleave(functions, rounds=4, warmup=1, tick=lambda: ticks.append(1), clock=clock)
    assert "".join(log) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert samples == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [4.0] * 4}
    assert len(ticks) == 3 * (4 + 1)


def test_what_a_call_needs_ahead_is_not_timed():
    clock, log = Clock(), []
    before = {"backward": clock.work(4.0, log, "f")}
    functions = {"backward": clock.work(1.0, log, "b"), "step": clock.work(2.0, log, "s")}
    samples = interleave(functions, rounds=2, warmup=1, seconds_per_sample=4.0, clock=clock, before=before)
    assert samples == {"backward": [1.0, 1.0], "step": [2.0, 2.0]}
    assert "".join(log) == "fb" + "s" + "ss" + "fbss" + "ssfb"


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


def page_faults_of_fresh_tensors(keep):
    """Whether memory is kept, and the page faults of a large tensor after a few others like it."""
    code = "import resource, torch; from resfuse.bench.memory import keep_freed_memory as k; "
    code += "n = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
    code += f"kept = {keep} and k()\nfor _ in range(5): a = n(); torch.ones(2**24)\nprint(kept, n() - a)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    kept, faults = run.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults as Linux does")
def test_kept_memory_has_no_page_faults():
    kept, faults = page_faults_of_fresh_tensors(True)
    if not kept:
        assert keep_freed_memory() is False
        return
    assert faults < 100 < page_faults_of_fresh_tensors(False)[1]


def test_shapes_of_a_network():
    found = batch_norm_shapes(models.resnet50, (16, 3, 224, 224))
    assert len(found) == 12 and sum(len(s.names) for s in found) == 53
    assert found[0] == ((16, 64, 112, 112), ("bn1",))
    assert ((16, 2048, 7, 7), ("layer4.0.bn3", "layer4.0.downsample.1", "layer4.1.bn3", "layer4.2.bn3")) in found
    assert found[0].numel == 16 * 64 * 112 * 112


def test_convolutions_of_a_network():
    found = conv_shapes(models.resnet50, (2, 3, 64, 64))
    assert len(found) == 53 and found[0][:4] == ("conv1", (2, 3, 64, 64), (2, 64, 32, 32), (64, 3, 7, 7))
    strided = next(conv for conv in found if conv.name == "layer2.0.conv2")
    assert strided[4:] == ((2, 2), (1, 1), (1, 1), 1) and strided.output == (2, 128, 8, 8)
    # the 4.09 GFLOP of the paper's table, as multiply-adds at 224x224, less the linear layer
    whole = conv_shapes(models.resnet50, (1, 3, 224, 224))
    work = sum(math.prod(conv.output) * math.prod(conv.weight[1:]) for conv in whole)
    assert work == pytest.approx(4.09e9, rel=0.01)
    with pytest.raises(NotImplementedError, match="padding 'same'"):
        conv_shapes(lambda: nn.Conv2d(3, 3, 3, padding="same"), (1, 3, 5, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bare_convolutions_are_convolutions(dtype):
    shapes = conv_shapes(lambda: models.get_model("cifar_resnet20"), (2, 3, 8, 8))
    fused = fuse(models.get_model("cifar_resnet20").to(memory_format=torch.channels_last))
    tiled = convolutions.served_by_tiles(fused, dtype)
    assert tiled == (tuple(shape.name for shape in shapes) if dtype in ops.tile_dtypes else ())
    assert convolutions.served_by_tiles(models.get_model("cifar_resnet20"), dtype) == ()
    ours, torchs = (convolutions.bare_convolutions(shapes, names, dtype) for names in (tiled, ()))
    for shape, a, b in zip(shapes, ours, torchs, strict=True):
        (grad_x, grad_weight), (torch_x, torch_weight) = a.backward(), b.backward()
        assert (grad_x is None) == (torch_x is None) == (shape.name == "conv1")
        pairs = [(a.forward(), b.forward()), (grad_weight, torch_weight), (grad_x, torch_x)]
        for mine, other in pairs[: 2 if grad_x is None else 3]:
            assert mine.shape == other.shape
            assert parity.relative_l2(mine, other.double()) < 8 * parity.FLOOR[dtype]


def test_bare_convolutions_run_forward_then_backward():
    log = []
    convs = [
        convolutions.BareConv(lambda i=i: log.append(("forward", i)), lambda i=i: log.append(("backward", i)))
        for i in range(2)
    ]
    convolutions.run(convs)
    assert log == [("forward", 0), ("forward", 1), ("backward", 1), ("backward", 0)]


def test_environment_record():
    record = environment()
    assert json.loads(json.dumps(record)) == record
    assert {"date", "commit", "dirty", "device", "device_name", "driver", "threads", "torch", "triton"} <= record.keys()
    assert record["torch"] in describe(record)
    assert "no checkout" in describe({**record, "commit": None, "dirty": None})


def test_processors_of_one_name_are_told_apart(monkeypatch):
    """Two generations may share a name and a set of vector instructions."""
    info = "processor : 0\ncpu family : 25\nmodel : 17\nmodel name : AMD EPYC\n"
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: info)
    assert cpu_name() == "AMD EPYC, family 25 model 17"
    monkeypatch.setattr(Path, "read_text", lambda self: "model name : Some CPU\n")
    assert cpu_name() == "Some CPU"


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
    with pytest.raises(ValueError, match="JSON"):  # infinity and NaN are not JSON
        append(path, {"c": math.inf})


def test_records_are_read_from_lines_and_lists():
    assert parse('{"a": 1}\n\n{"b": 2}\n') == parse('[{"a": 1}, {"b": 2}]') == [{"a": 1}, {"b": 2}]
    for text in ("[1]", "3", "nonsense"):
        with pytest.raises(ValueError):
            parse(text)


def test_a_cell_is_what_is_measured_not_when():
    row = {"suite": "units", "unit": "moments", "form": "", "shape": [1, 2], "dtype": "float32"}
    assert (
        cell(row) == cell({**row, "quick": True, "weight": None}) == ("units", "moments", "", "1x2", "", "", "float32")
    )
    assert cell(row) != cell({**row, "weight": [1, 1]})
    with pytest.raises(
        ValueError, match="suite must be one of units, blocks, models, scaling, serving, gpu-models, got None"
    ):
        cell({})
    assert timings({"variants": {"a": {"median_ms": 1}, "b": {"saved_bytes": 1}}}) == {"a": {"median_ms": 1}}


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


def test_a_gradient_that_cancels_is_judged_beside_its_layers():
    exact = {"conv.weight": torch.full((9,), 2.0), "conv.bias": torch.tensor([1e-17]), "fc.bias": torch.tensor([1e-17])}
    near = {**exact, "conv.bias": torch.tensor([6e-6])}
    errors = parity.step_errors({"gradients": near}, {"gradients": exact})["gradients"]
    assert errors.worst == pytest.approx(1e-6) and errors.worst_name == "conv.bias"
    lost = {**exact, "fc.bias": torch.zeros(1)}  # alone in its layer, it is judged by its own size
    assert parity.step_errors({"gradients": lost}, {"gradients": exact})["gradients"].worst == 1


def test_a_bound_that_zeros_would_meet_proves_nothing():
    sharp, vague, over = (
        parity.Verdict("gradients", ours, 0.9, bound) for ours, bound in ((0.4, 0.8), (1.0, 1.8), (2.0, 1.8))
    )
    assert [v.proves_nothing for v in (sharp, vague, over)] == [False, True, False]
    assert [v.holds for v in (sharp, vague, over)] == [True, False, False]
    assert not parity.Verdict("gradients", math.nan, 0.9, 1.8).proves_nothing
    assert vague.failed == "is off by 1.00e+00, no nearer to the exact result than zeros are"
    assert over.failed == "is off by 2.00e+00, allowed 1.80e+00"


def test_a_conditioned_network_drops_nothing():
    model = parity.condition(nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5)))
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model.train()(x), x)


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
