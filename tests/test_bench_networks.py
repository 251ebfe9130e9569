"""Networks that are measured: variants are the same network, wrong ones are refused, rows say what they must."""

import sys

import pytest
import torch
from stand_in import Machine
from test_report import WHERE, load_script

from resfuse import backends, fuse, ops
from resfuse.bench import gate, networks, parity, peers, scaling, worker, workload
from resfuse.bench.networks import Cell
from resfuse.bench.workload import Task, batch_of, build

pytestmark = pytest.mark.usefixtures("one_thread")
needs_native = pytest.mark.skipif(
    backends.missing("bn_act", "native", "cpu", torch.float32) is not None, reason="the native library is missing"
)
SMALL = Cell("cifar_resnet20", "training", 4, 16)


class Inside:
    """A Worker in this process: fast, and open to what a test replaces."""

    def __init__(self, task):
        self.task, self.load = task, workload.workload(task)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __call__(self):
        self.load.run()

    def prepare(self):
        if self.load.prepare is not None:
            self.load.prepare()

    def outputs(self):
        return self.load.outputs()[: worker.SHOWN].double()

    def memory(self):
        return worker._memory(self.task, self.load, 1)


@pytest.fixture
def inside(monkeypatch):
    monkeypatch.setattr(networks, "Worker", Inside)
    monkeypatch.setattr(gate, "interleave", Machine({"fused": 5e-4}).interleave)


@needs_native
def test_the_fused_network_passes_the_gate_before_it_is_timed():
    networks.check("resnet18", "float32")


@needs_native
@pytest.mark.parametrize("mode", ["forward", "backward", "training", "inference"])
def test_every_mode_is_measured(inside, mode):
    row = networks.measure(SMALL._replace(mode=mode), "float32", ("eager", "eager-contiguous", "fused"), 6)
    eager, fused = (row["variants"][name] for name in ("eager", "fused"))
    assert (eager["images_per_s"], fused["images_per_s"]) == (4000.0, 8000.0)
    assert row["ratios"].keys() == {"fused/eager", "fused/eager-contiguous"} and row["missing"] == {}
    assert row["ratios"]["fused/eager"]["of_medians"] == pytest.approx(0.5)
    assert 0 <= eager["error"] < 1e-5 > fused["error"] >= 0
    if mode == "inference":
        assert "saved_bytes" not in fused
    else:
        assert 0 < fused["saved_bytes"] < eager["saved_bytes"]


@needs_native
def test_a_wrong_variant_is_refused(inside, monkeypatch):
    def wrong(name, model):
        if name == "eager-contiguous":
            torch.nn.init.normal_(model.fc.weight)
        return model

    monkeypatch.setattr(peers, "as_module", wrong)
    with pytest.raises(gate.RefusedError, match="cifar_resnet20 training float32 eager-contiguous outputs is off by"):
        networks.measure(SMALL, "float32", ("eager", "eager-contiguous"), 1)


@needs_native
def test_a_wrong_kernel_is_refused_before_any_row(monkeypatch):
    right = ops.of("native").finalize_backward
    lost = lambda *given: (*(found := right(*given))[:2], torch.zeros_like(found[2]))  # noqa: E731
    monkeypatch.setattr(ops.of("native"), "finalize_backward", lost)
    plan = networks.Plan([SMALL], ("float32",), ("eager", "fused"), 1)
    with pytest.raises(SystemExit, match="refusing to time a wrong result: cifar_resnet20 float32 gradients"):
        next(networks.run(plan, WHERE))


@needs_native
def test_where_the_whole_network_proves_nothing_its_blocks_are_judged(monkeypatch):
    note = networks.check("cifar_plain20", "bfloat16")
    assert note.startswith("gradients of the whole network prove nothing in bfloat16, stock's are off by 0.")
    assert note.endswith("its 5 distinct blocks were judged one by one")
    right = ops.of("native").finalize_backward
    wrong = lambda *given: (*(found := right(*given))[:2], 1.2 * found[2])  # noqa: E731
    monkeypatch.setattr(ops.of("native"), "finalize_backward", wrong)
    with pytest.raises(gate.RefusedError, match=r"cifar_plain20 PlainBlock layer1\.0 bfloat16 fused gradient of"):
        networks.check("cifar_plain20", "bfloat16")


def test_batches_tell_wrong_gradients_from_luck():
    """One unlucky batch is forgiven, what is wrong on most is not; outputs must hold on every batch."""

    def batch(ours, stock=1e-3, outputs=1e-6):
        bound = lambda error: parity.FACTOR * error + parity.FLOOR[torch.float32]  # noqa: E731
        gradients = parity.Verdict("gradients", ours, stock, bound(stock))
        return [gradients, parity.Verdict("outputs", outputs, 1e-6, bound(1e-6))]

    def holds(*batches):
        return [verdict.holds for verdict in parity.over_batches(batches, torch.float32)]

    assert holds(batch(9e-4, 1e-6), batch(5e-4), batch(8e-4)) == [True, True]
    assert holds(batch(9e-3), batch(8e-3), batch(5e-4)) == [False, True]
    assert holds(batch(1e-4), batch(1e-4, outputs=1e-5), batch(1e-4)) == [True, False]
    assert holds(batch(1e-4), batch(float("nan")), batch(float("nan"))) == [False, True]


def verdicts(ours, stock):
    bound = parity.FACTOR * stock + parity.FLOOR[torch.float32]
    return [parity.Verdict("gradients", ours, stock, bound), parity.Verdict("outputs", 1e-6, 1e-6, 2.5e-6)]


@pytest.mark.parametrize(
    ("ours", "stock", "judged"),
    [
        ((1e-3, 3e-6, 2e-3, 1e-3, 4e-6), (1e-4, 3e-3, 4e-6, 1e-3, 1e-4), "best of five"),  # ReLUs near zero in most
        ((1e-3, 1e-5, 2e-3, 1e-3, 1e-5), (1e-4, 3e-3, 4e-6, 1e-3, 1e-4), None),  # wrong by a little in all
        ((1e-3, 3e-6, 4e-6, 2e-6, 4e-6), (1e-4, 3e-3, 4e-6, 1e-3, 1e-4), "medians"),
    ],
)
def test_where_medians_are_luck_the_best_batches_and_the_blocks_decide(ours, stock, judged, monkeypatch):
    batches = iter(zip(ours, stock, strict=True))
    asked = []
    monkeypatch.setattr(parity, "judge_fused", lambda *_: verdicts(*next(batches)))
    monkeypatch.setattr(networks.blocks, "check_all", lambda *given: asked.append(given) or 3)
    if judged is None:
        with pytest.raises(gate.RefusedError, match=r"gradients is off by 1\.00e-05, allowed 8\.50e-06"):
            networks.check("cifar_resnet20", "float32")
        return
    note = networks.check("cifar_resnet20", "float32")
    if judged == "medians":
        assert note is None and not asked
    else:
        assert judged in note and "its 3 distinct blocks were judged one by one" in note and len(asked) == 1


def test_a_refused_row_is_left_out_and_the_run_goes_on(inside, monkeypatch):
    def check(network, dtype, device):
        checked.append(network)
        if network == "cifar_resnet20":
            raise gate.RefusedError("refusing to time a wrong result: cifar_resnet20")
        return "gradients prove nothing"

    checked = []
    monkeypatch.setattr(networks, "check", check)
    monkeypatch.setattr(networks, "measure", lambda cell, *_, **__: cell._asdict())
    cells = [SMALL, SMALL._replace(mode="forward"), SMALL._replace(model="cifar_plain20")]
    rows = networks.run(networks.Plan(cells, ("float32",)), WHERE)
    row = next(rows)
    assert (row["model"], row["note"]) == ("cifar_plain20", "gradients prove nothing")
    with pytest.raises(gate.RefusedError) as told:
        next(rows)
    assert str(told.value) == "refusing to time a wrong result: cifar_resnet20"
    assert checked == ["cifar_resnet20", "cifar_plain20"]


def test_what_is_compared_drops_nothing():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5))
    with workload.nothing_dropped(model):
        assert torch.equal(model(torch.ones(100)), torch.ones(100))
    assert model[0].p == 0.5
    with pytest.raises(ValueError, match="networks run in float32, bfloat16, float16, got 'float64'"):
        workload.lower_precision("cpu", "float64")


def test_what_cannot_be_measured_says_why():
    row = networks.measure(SMALL, "float32", ("onnxruntime", "torch-tensorrt"), 1)
    assert row["missing"].keys() == {"onnxruntime", "torch-tensorrt"} and row["variants"] == {}
    assert peers.why_missing("onnxruntime", "inference", "cpu", "bfloat16") is not None
    assert peers.why_missing("freeze", "training", "cpu", "float32") == "it does not train"
    with pytest.raises(ValueError, match=r"peer must be one of eager, .*, got 'magic'"):
        peers.why_missing("magic", "inference", "cpu", "float32")
    assert any("not measured: it does not train" in text for text in networks.lines(
        {**row, "missing": {"freeze": "it does not train"}}
    ))  # fmt: skip


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_engines_compute_the_same_network(name):
    pytest.importorskip(peers.PEERS[name].package)
    task = Task("cifar_resnet20", name, "inference", "float32", 3, 16)
    exact = networks.exact_outputs(task)
    assert (workload.workload(task).outputs().double() - exact).norm() < 1e-5 * exact.norm()


@needs_native
def test_a_small_network_is_measured_in_processes_of_their_own():
    record = networks.measure(SMALL, "float32", ("eager", "fused"), 1, parts=True)
    assert record["variants"].keys() == record["outside_ms"].keys() == {"eager", "fused"}
    assert record["parts"].keys() == {"eager convolutions", "fused convolutions", "optimizer"}
    eager, fused = (record["variants"][name] for name in ("eager", "fused"))
    assert 0 < fused["saved_bytes"] < eager["saved_bytes"] < eager["peak_rss_bytes"]
    assert "| cifar_resnet20 | training | float32 | 4 |" in load_script("report").render(
        [{"quick": False, "environment": WHERE, **record}], []
    )
    text = networks.lines(record)
    assert len(text) == 3 and "images/s" in text[2] and text[2].endswith("eager")


def test_a_worker_that_ends_says_so():
    with worker.Worker(Task("no_such_network", "eager", "inference", "float32", 1, 8)) as one:
        one.process.wait(60)
        with pytest.raises(RuntimeError, match=r"no_such_network eager inference.*ended with 1"):
            one()


def test_the_optimizer_alone_moves_parameters_by_the_gradients_that_are_there():
    task = Task("cifar_resnet20", "eager", "optimizer", "float32", 2, 32)
    images, labels = batch_of(2, 32)
    model = build("cifar_resnet20", "eager")
    step = workload._training(model, task, images, labels).run
    before, statistics = model.fc.weight.detach().clone(), model.bn1.running_mean.clone()
    step()
    assert not torch.equal(model.fc.weight, before) and torch.equal(model.bn1.running_mean, statistics)


def test_backward_is_timed_without_its_forward():
    task = Task("cifar_resnet20", "eager", "backward", "float32", 2, 16)
    load = workload.workload(task)
    calls = []
    load.model.register_forward_hook(lambda *_: calls.append("forward"))
    for _ in range(2):
        load.prepare()
        assert load.model.fc.weight.grad is None and calls.pop() == "forward"
        load.run()
        assert load.model.fc.weight.grad is not None and not calls


def test_outside_is_what_is_left_of_a_step():
    samples = {
        "eager": [1.0, 2.0, 9.0], "fused": [0.5, 0.5, 0.5], "compile": [1.0, 1.0, 1.0], "optimizer": [0.1, 0.1, 0.1],
        "eager convolutions": [0.6, 1.0, 1.0], "fused convolutions": [0.3, 0.5, 0.2],
    }  # fmt: skip
    assert networks.outside(samples) == {"eager": 900.0, "fused": 100.0}
    assert networks.outside({"eager": [1.0]}) == {}


def test_the_same_weights_for_all_variants():
    stock, fused = build("cifar_resnet20", "eager"), build("cifar_resnet20", "fused")
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), fused.parameters(), strict=True))
    assert type(fuse(stock).layer1[0]) is type(fused.layer1[0])
    with pytest.raises(ValueError, match=r"got 'resnet51'; nearest: resnet"):
        workload.stock("resnet51")


def test_the_command_line_chooses_rows(monkeypatch):
    bench = load_script("bench_models")

    def rows(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench_models.py", *arguments])
        return bench.chosen(bench.parse())

    assert rows() == list(bench.TABLE)
    assert {cell.model for cell in rows("--only", "resnet18", "resnext50_32x4d")} == {"resnet18", "resnext50_32x4d"}
    assert [cell.batch for cell in rows("--modes", "memory")] == [32]
    monkeypatch.setattr(sys, "argv", ["bench_models.py", "--variants", "all"])
    assert bench.parse().variants == [*peers.PEERS, *peers.OURS]
    monkeypatch.setattr(sys, "argv", ["bench_models.py", "--variants", "all", "--no-compile"])
    assert bench.parse().variants == ["eager", "eager-contiguous", "onnxruntime", "openvino", "torch-tensorrt", "fused"]
    assert rows("--quick", "--modes", "inference") == [Cell("resnet18", "inference", 4, 64)]
    with pytest.raises(SystemExit):
        rows("--only", "resnet51")


def test_the_points_of_each_axis():
    found = {axis: [p.value for p in scaling.points([axis])] for axis in scaling.AXES}
    assert (found["batch"][0], found["batch"][-1]) == (1, 64) and (found["size"][0], found["size"][-1]) == (64, 512)
    assert found["depth"] == [18, 34, 50, 101, 152] and found["threads"] == [torch.get_num_threads()] == [1]
    assert scaling.points(["depth"])[0].cell.model == "resnet18"
    assert [p.value for p in scaling.points(["batch"], quick=True)] == [1, 8]
    one, two = (scaling.work(Cell("resnet18", "training", batch, 64)) for batch in (1, 2))
    assert two == 2 * one > 0


def point(axis, value, ms, work, threads=1):
    return {"suite": "scaling", "axis": axis, "value": value, "mode": "training", "dtype": "float32", "work": work,
            "threads": threads, "variants": {"fused": {"median_ms": ms}}}  # fmt: skip


def test_findings_say_where_growth_is_not_linear():
    rows = [point("batch", 1, 2.0, 1), point("batch", 2, 2.0, 2), point("batch", 4, 4.4, 4), point("batch", 8, 16.0, 8)]
    (text,) = scaling.findings(rows)
    assert "fused training float32 along batch 1 to 8: linear but for batch 1 (2.00x), 8 (2.00x)" in text
    threads = [point("threads", 1, 8.0, 1, 1), point("threads", 2, 4.2, 1, 2)]
    assert scaling.curves(threads) == {("threads", "training", "float32", "fused"): [(1, 1.0), (2, 1.05)]}
    (text,) = scaling.findings(threads)
    assert "along threads 1 to 2: linear; time times threads" in text
    assert scaling.findings([]) == scaling.findings(threads[:1]) == []


@needs_native
def test_a_curve_is_measured(inside, monkeypatch):
    monkeypatch.setattr(networks, "check", lambda *_: None)
    chosen = [scaling.Point("batch", n, Cell("cifar_resnet20", "inference", n, 16)) for n in (1, 2)]
    rows = list(scaling.run(chosen, ("float32",), WHERE, rounds=6))
    assert [(row["axis"], row["value"], row["threads"]) for row in rows] == [("batch", 1, 1), ("batch", 2, 1)]
    assert rows[1]["work"] == 2 * rows[0]["work"] and rows[0]["ratios"]["fused/eager"]["high"] < 1
