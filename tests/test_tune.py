"""Which candidate computes a convolution on a GPU: the rule, tables, and how `tune` makes one; no GPU is needed."""

import json
from types import SimpleNamespace

import pytest
import torch

from resfuse import choices, ops, raw_chain
from resfuse.bench import tune
from resfuse.parameters import Conv2dParameters

BF16 = torch.bfloat16
POINTWISE = choices.Conv.of((64, 256, 1, 1), (1, 1), (0, 0), (1, 1), 1)


def row(fused, composed, pixels=1000, unit="conv_stats", conv=POINTWISE):
    return {"unit": unit, "dtype": "bfloat16", "conv": conv.as_list(), "pixels": pixels, "fused_ms": fused,
            "composed_ms": composed}  # fmt: skip


@pytest.mark.parametrize(
    ("weight", "stride", "padding", "groups", "dtype", "expected"),
    [
        ((64, 256, 1, 1), 1, 0, 1, BF16, "fused"),
        ((128, 512, 1, 1), 1, 0, 1, torch.float16, "fused"),
        ((512, 256, 1, 1), 2, 0, 1, BF16, "composed"),  # bound by the product
        ((64, 256, 1, 1), 1, 0, 1, torch.float32, "composed"),
        ((64, 64, 3, 3), 1, 1, 1, BF16, "composed"),
        ((64, 64, 1, 1), 1, 1, 1, BF16, "composed"),
        ((128, 4, 1, 1), 1, 0, 32, BF16, "composed"),
    ],
)
def test_the_rule_without_a_measurement(weight, stride, padding, groups, dtype, expected):
    conv = choices.Conv.of(weight, (stride,) * 2, (padding,) * 2, (1, 1), groups)
    assert choices.rule(dtype, conv) == expected


def test_a_convolution_survives_its_list():
    conv = choices.Conv(6, 4, (3, 5), (2, 1), (1, 2), (1, 3), 2)
    assert choices.Conv.from_list(conv.as_list()) == conv and len(conv.as_list()) == 11


def test_a_table_answers_for_shapes_near_those_measured():
    table = choices.read([row(2.0, 1.0, 1000), row(1.0, 2.0, 4000)])
    answers = {499: None, 600: "composed", 1000: "composed", 1900: "composed", 2500: "fused", 7900: "fused", 8100: None}
    for pixels, expected in answers.items():
        assert choices.lookup(table, "conv_stats", BF16, POINTWISE, pixels) == expected
    assert choices.lookup(table, "conv_stats", BF16, POINTWISE, None) == "fused"
    assert choices.lookup(table, "conv_stats", torch.float16, POINTWISE, 1000) is None
    assert choices.lookup(table, "conv_stats_backward", BF16, POINTWISE, 1000) is None
    assert choices.lookup(table, "conv_stats", BF16, POINTWISE._replace(stride=(2, 2)), 1000) is None


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "has_room", lambda index: True)
    choices.table_of.cache_clear()
    yield tmp_path
    choices.table_of.cache_clear()


def test_the_table_of_a_device_decides_before_the_rule(cache, monkeypatch):
    monkeypatch.setattr(choices, "_device_name", lambda index: "NVIDIA H200 (a stand-in)")
    gpu = torch.device("cuda", 0)
    assert choices.choose("conv_stats", gpu, BF16, POINTWISE, 1000) == "fused"
    path = tune.write("NVIDIA H200 (a stand-in)", [row(2.0, 1.0)], {"torch": "2"}, choices.user_directory())
    assert path == cache / "resfuse" / "choices" / "nvidia-h200-a-stand-in.json"
    assert choices.choose("conv_stats", gpu, BF16, POINTWISE, 1000) == "composed"
    assert choices.choose("conv_stats", gpu, BF16, POINTWISE, 100000) == "fused"
    assert choices.choose("conv_stats_backward", gpu, BF16, POINTWISE, 1000) == "fused"
    assert choices.choose("conv_stats", torch.device("cpu"), BF16, POINTWISE, 1000) == "fused"
    kept = json.loads(path.read_text())
    assert kept["device"] == "NVIDIA H200 (a stand-in)" and kept["rows"] == [row(2.0, 1.0)]


def test_a_second_run_of_tune_keeps_what_it_does_not_measure(cache):
    """Another dtype, another network: rows are told apart by unit, dtype, convolution and pixels."""
    wider = POINTWISE._replace(out_channels=128)
    first = [row(2.0, 1.0), row(3.0, 1.0, unit="conv_stats_backward"), row(4.0, 1.0, pixels=9)]
    second = [row(5.0, 6.0), row(1.0, 2.0) | {"dtype": "float16"}, row(1.0, 3.0, conv=wider)]
    for rows in (first, second):
        path = tune.write("a GPU", rows, {}, choices.user_directory())
    assert json.loads(path.read_text())["rows"] == [second[0], *first[1:], *second[1:]]
    table = choices.table_of("a GPU")
    assert choices.lookup(table, "conv_stats", BF16, POINTWISE, 1000) == "fused"
    assert choices.lookup(table, "conv_stats_backward", BF16, POINTWISE, 1000) == "composed"


def test_a_run_that_is_interrupted_keeps_what_it_measured(cache, monkeypatch):
    pytest.importorskip("triton", reason="tune imports Triton's candidates")
    shapes = [tune.Case(POINTWISE, (images, 256, 3, 3), (images, 64, 3, 3), False) for images in (1, 2)]

    def measure(case, dtype, device, both):
        if case == shapes[1]:
            raise RuntimeError("candidates disagree")
        return [row(1.0, 2.0, case.pixels)]

    for name, stand_in in (("is_available", lambda: True), ("current_device", lambda: 0),
                           ("get_device_name", lambda device: "a GPU")):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name, stand_in in (("environment", lambda device: {}), ("cases", lambda *asked: shapes), ("measure", measure)):
        monkeypatch.setattr(tune, name, stand_in)
    monkeypatch.setitem(ops.missing_triton, "cuda", None)
    with pytest.raises(RuntimeError, match="candidates disagree"):
        tune.tune("cuda", ["resnet50"], [BF16])
    kept = json.loads((choices.user_directory() / "a-gpu.json").read_text())
    assert kept["rows"] == [row(1.0, 2.0, 9)]


def test_a_gpu_without_room_for_the_fused_kernels_composes(monkeypatch):
    """Compute capability 8.6 and 8.9 have 99 KiB of shared memory for a block, 8.0 has 163."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(choices, "_device_name", lambda index: "a GPU that was not measured")
    monkeypatch.setattr(choices, "has_room", choices.has_room.__wrapped__)  # what it says is kept for a process
    for kibibytes, expected in ((99, "composed"), (163, "fused"), (227, "fused")):
        properties = SimpleNamespace(shared_memory_per_block_optin=kibibytes * 1024)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, found=properties: found)
        assert choices.choose("conv_stats", gpu, BF16, POINTWISE, 1000) == expected


@pytest.mark.parametrize(("widths", "raw"), [((64, 256), True), ((512, 2048), False)], ids=["stage 1", "stage 4"])
def test_activations_travel_raw_where_any_convolution_is_fused(cache, monkeypatch, widths, raw):
    monkeypatch.setattr(choices, "_device_name", lambda index: "a GPU that was not measured")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setitem(ops.missing_triton, "cuda", None)
    inner, outer = widths
    weights = [torch.empty(inner, outer, 1, 1), torch.empty(inner, inner, 3, 3), torch.empty(outer, inner, 1, 1)]
    convs = [Conv2dParameters(torch.nn.Parameter(w), None, padding=w.shape[2] // 2) for w in weights]
    reason = raw_chain.why_not_convs(convs, "cuda", BF16)
    assert (reason is None) == raw and (raw or "taken to be faster" in reason)
    assert raw_chain.why_not_convs(convs, "cuda", BF16, "triton") is None
    assert "float64" in raw_chain.why_not_convs(convs, "cuda", torch.float64, "triton")

    def compiled(x):
        return x + (raw_chain.why_not_convs(convs, "cuda", BF16) is None)

    out = torch.compile(compiled, fullgraph=True, backend="eager")(torch.zeros(1))
    assert out.item() == raw


def test_the_cases_of_a_network_are_its_distinct_convolutions():
    found = tune.cases(["resnet50", "resnet18"], 2, 64)
    assert len(found) == len(set(found)) and sum(case.reads_image for case in found) == 1
    assert found[0].conv == choices.Conv(3, 64, (7, 7), (2, 2), (3, 3), (1, 1), 1)
    assert found[0].pixels == 2 * 32 * 32
    kernels = {case.conv.kernel for case in found}
    assert kernels == {(7, 7), (1, 1), (3, 3)}
    with pytest.raises(ValueError, match="resnet51"):
        tune.cases(["resnet51"], 2, 64)


def candidates(error=0.0):
    """Two stand-ins that agree but for a relative error, and record what they were given."""
    given = []

    def candidate(factor):
        def call(*arguments):
            given.append(arguments)
            return tuple(factor * torch.ones(3, dtype=BF16) for _ in range(3))

        return SimpleNamespace(conv_stats=call, conv_stats_backward=call)

    return {"fused": candidate(1.0), "composed": candidate(1.0 + error)}, given


def test_rows_come_from_the_timer_after_results_were_compared():
    case = tune.Case(POINTWISE, (1, 256, 3, 3), (1, 64, 3, 3), False)
    seconds = {"fused": [3e-3, 1e-3, 2e-3], "composed": [5e-3, 4e-3, 6e-3]}
    both, given = candidates()
    rows = tune.measure(case, BF16, "cpu", both, timer=lambda functions: {name: seconds[name] for name in functions})
    assert rows == [row(2.0, 5.0, 9), row(2.0, 5.0, 9, "conv_stats_backward")]
    assert [len(arguments) for arguments in given] == [10, 10, 19, 19]
    wrong, _ = candidates(error=0.5)
    with pytest.raises(RuntimeError, match="nothing is timed"):
        tune.measure(case, BF16, "cpu", wrong, timer=lambda functions: pytest.fail("timed a wrong result"))


def test_tune_refuses_without_a_gpu(cache):
    with pytest.raises(RuntimeError, match="tune measures kernels on a GPU, and there is none as 'cpu'"):
        tune.tune("cpu", ["resnet18"])
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="nothing was measured"):
            tune.tune("cuda", ["resnet18"])
    assert not (cache / "resfuse").exists()
