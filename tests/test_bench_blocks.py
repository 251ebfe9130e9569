"""Blocks that are measured: found in the networks, checked before they are timed, described by their rows."""

import json

import pytest
import torch
from stand_in import Machine

from resfuse import backends, ops
from resfuse.bench import blocks, gate
from resfuse.bench.memory import peak_allocated_bytes, timeline_in

pytestmark = pytest.mark.usefixtures("one_thread")
needs_native = pytest.mark.skipif(
    backends.missing("bn_act", "native", "cpu", torch.float32) is not None, reason="the native library is missing"
)
PLAN = blocks.Plan("cifar_resnet20", 2, 16, dtypes=("float32",), rounds=6)


def test_the_blocks_of_a_network():
    found = blocks.distinct_blocks("resnet50", (2, 3, 64, 64))
    assert len(found) == 8 and {block.kind for block in found} == {"Bottleneck"}
    assert sum(len(block.names) for block in found) == 16
    assert found[0] == ("Bottleneck", ("layer1.0",), (2, 64, 16, 16))
    assert found[1] == ("Bottleneck", ("layer1.1", "layer1.2"), (2, 256, 16, 16))


def test_a_plan_without_rows_says_what_there_is():
    with pytest.raises(ValueError, match="vgg16_bn has no block that stands alone"):
        blocks.rows(blocks.Plan("vgg16_bn", 1, 32))
    with pytest.raises(ValueError, match="cifar_resnet20 has no block Bottleneck; it has: BasicBlock"):
        blocks.rows(blocks.Plan("cifar_resnet20", 1, 16, only=("Bottleneck",)))


@needs_native
def test_rows_of_every_mode(monkeypatch):
    monkeypatch.setattr(gate, "interleave", Machine({"fused": 5e-4}).interleave)
    plan = blocks.Plan("cifar_resnet20", 2, 8, dtypes=("float32", "bfloat16"), rounds=6)
    chosen = [row for row in blocks.rows(plan) if row[0].names[0] in ("layer1.0", "layer2.0")]
    assert len(chosen) == 2 * 4 * 2
    for block, mode, dtype in chosen:
        row = blocks.measure(plan, block, mode, dtype)
        assert json.loads(json.dumps(row, allow_nan=False)) == row
        assert row["ratios"]["fused/eager"]["high"] == pytest.approx(0.5)
        eager, fused = (row["variants"][name] for name in ("eager", "fused"))
        assert (eager["images_per_s"], fused["images_per_s"]) == (2000.0, 4000.0)
        assert eager["peak_bytes"] > 0 and fused["peak_bytes"] > 0
        assert ("saved_bytes" in fused) == (mode != "inference")
        assert "2.00x (2.00 to 2.00) eager" in blocks.lines(row)[2]


@needs_native
@pytest.mark.parametrize("mode", ["step", "inference"])
def test_a_wrong_kernel_is_refused(monkeypatch, mode):
    block = blocks.distinct_blocks("cifar_resnet20", (2, 3, 16, 16))[0]
    blocks.check(blocks.runners(PLAN, block, mode, "float32"), mode, "float32", gate.Gate("right"))
    for name in ("scale_shift_act", "conv_act", "conv_stats"):
        right = getattr(ops.of("native"), name)

        def wrong(*operands, right=right):
            found = right(*operands)
            return found * 1.0001 if isinstance(found, torch.Tensor) else (found[0] * 1.0001, *found[1:])

        monkeypatch.setattr(ops.of("native"), name, wrong)
    with pytest.raises(gate.RefusedError, match=rf"wrong result: BasicBlock layer1\.0 {mode} float32 fused"):
        blocks.measure(PLAN, block, mode, "float32")


@needs_native
def test_a_gradient_that_a_relu_decides_by_luck_is_asked_for_again(monkeypatch):
    """What is wrong is wrong on all operands; a running statistic is asked for once."""
    block = blocks.distinct_blocks("cifar_resnet20", (2, 3, 16, 16))[0]
    right, asked = blocks._Runner.results, []

    def spoiled(key, times):
        def results(runner, mode):
            found = right(runner, mode)
            if runner is asked[-1]["fused"] and len(asked) <= times:
                found[key] = found[key] * 1.01
            return found

        return results

    make = blocks.runners
    monkeypatch.setattr(blocks, "runners", lambda *given: asked.append(make(*given)) or asked[-1])
    for key, times, tried in (
        ("gradient of the input", 2, 3), ("gradient of the input", 9, None), ("bn1.running_mean", 1, None),
    ):  # fmt: skip
        asked.clear()
        monkeypatch.setattr(blocks._Runner, "results", spoiled(key, times))
        if tried is None:
            with pytest.raises(gate.RefusedError, match=key):
                blocks.checked_runners(PLAN, block, "step", "float32", "a block")
            assert len(asked) == (5 if key.startswith("gradient") else 1)
        else:
            _, passed, said = blocks.checked_runners(PLAN, block, "step", "float32", "a block")
            assert len(asked) == tried and passed.errors["fused"] < 1e-5
            assert said["note"].startswith(f"gradients were off on {times} of {tried} operands")


@needs_native
def test_a_lost_gradient_is_refused(monkeypatch):
    block = blocks.distinct_blocks("cifar_resnet20", (2, 3, 16, 16))[0]
    found = blocks.runners(PLAN, block, "step", "float32")
    found["fused"].module.conv1.weight.requires_grad_(False)
    with pytest.raises(gate.RefusedError, match="gradients are missing"):
        blocks.check(found, "step", "float32", gate.Gate("block"))


def test_peak_memory_is_what_a_call_holds_at_once():
    megabyte = 2**18
    held = torch.ones(megabyte)

    def call():
        first = torch.ones(4 * megabyte)
        del first
        return torch.ones(2 * megabyte) + torch.ones(2 * megabyte) + held.sum()

    assert peak_allocated_bytes(call) == pytest.approx(6 * 4 * megabyte, rel=0.01)


def test_the_memory_of_a_gpu_comes_first():
    def event(moment, change, kind):
        return {"name": "[memory]", "ts": moment, "args": {"Bytes": change, "Device Type": kind}}

    cpu = [event(5.0, 100, 0), event(7.0, -40, 0)]
    assert timeline_in([*cpu[::-1], {"name": "add"}]) == [(0.0, 100), (2.0, 60)]
    assert timeline_in([*cpu, event(9.0, 8, 1)]) == [(0.0, 8)]
    assert timeline_in([]) == []
