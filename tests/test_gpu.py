"""The CUDA kernels on a GPU, beyond what the CPU's tests ask again there (test_gpu_units, test_gpu_stem): operators one
by one, channel counts, tensors of more than 2^31 elements, unaligned memory, devices and streams."""

import pytest
import test_ops
import test_stem
import test_units
import torch
from numerics import DENSE, EVERY_DTYPE, RESIDUALS, assert_as_exact, image
from test_ops import CASES, is_written, outputs, overload

from resfuse import functional, ops, reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]
EVERY_RESIDUAL = pytest.mark.parametrize("residual", RESIDUALS)
CHANNELS = pytest.mark.parametrize("channels", [1, 3, 57, 65, 1000, 2048])


def moved(args, device, dtype=None):
    """The arguments of an operator on another device; activations and vectors in another dtype, if one is given."""
    return [
        a if not isinstance(a, torch.Tensor) else a.to(device, dtype if a.is_floating_point() else None, copy=True)
        for a in args
    ]


def results_of(case, args):
    """What a call returns and what it writes, on the CPU."""
    found = outputs(overload(case)(*args))
    written = [a for a, s in zip(args, overload(case)._schema.arguments, strict=True) if is_written(s)]
    return [t.cpu() for t in [*found, *written] if t is not None]


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 64, 9, 9), (3, 65, 4, 2)], ids=str)
@DENSE
@EVERY_DTYPE
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.form}")
def test_operators_are_as_exact_as_on_the_cpu(case, dtype, layout, shape, poisoned, monkeypatch):
    monkeypatch.setattr(test_ops, "SHAPE", shape)
    with torch.device("cpu"):
        args = case.build(dtype, layout)
    ours, theirs = results_of(case, moved(args, "cuda")), results_of(case, moved(args, "cpu"))
    exact = results_of(case, moved(args, "cpu", torch.float64))
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert mine.stride() == other.stride()
        if mine.is_floating_point():
            assert_as_exact(mine, other, truth)
        else:
            assert torch.equal(mine, other)


@EVERY_RESIDUAL
@DENSE
@EVERY_DTYPE
@CHANNELS
def test_bn_act_of_any_number_of_channels(channels, dtype, layout, residual):
    test_units.check_bn_act(*test_units.bn_act_inputs((5, channels, 14, 13), dtype, layout, residual))


@DENSE
@EVERY_DTYPE
@CHANNELS
def test_a_stem_of_any_number_of_channels(channels, dtype, layout):
    test_stem.check(*test_stem.inputs_of((3, channels, 18, 15), dtype, layout))


@DENSE
@EVERY_DTYPE
def test_bn_act_of_many_blocks(dtype, layout):
    test_units.check_bn_act(*test_units.bn_act_inputs((33, 129, 57, 57), dtype, layout, "raw"))


def unaligned(x, offset):
    """x's values behind `offset` elements, in its memory order."""
    room = torch.empty(x.numel() + offset, dtype=x.dtype)[offset:]
    return room.as_strided(x.shape, x.stride(), offset).copy_(x)


@EVERY_RESIDUAL
@DENSE
@EVERY_DTYPE
@pytest.mark.parametrize("offset", [(1, 0), (0, 1), (3, 3)], ids=["x", "residual", "both"])
def test_unaligned_memory_gives_the_values_of_aligned(offset, dtype, layout, residual):
    x, bn, other, other_bn = test_units.bn_act_inputs((4, 64, 14, 14), dtype, layout, residual)
    shifted = unaligned(x, offset[0]), None if other is None else unaligned(other, offset[1])
    args = shifted[0], bn, shifted[1], other_bn
    assert shifted[0].data_ptr() % 16 == offset[0] * x.element_size() % 16
    test_units.check_bn_act(*args)


BIG = (2**31 // (64 * 256 * 256) + 1, 64, 256, 256)


@pytest.fixture
def big():
    """An activation of more than 2^31 elements, all images of which are the same; two more of its size must fit."""
    size = 2 * torch.Size(BIG).numel()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 4 * size:
        pytest.skip(f"needs {4 * size / 1e9:.0f} GB of free GPU memory")
    x = torch.empty(BIG, dtype=torch.bfloat16, memory_format=torch.channels_last)
    return x.copy_(image((1, *BIG[1:]), torch.bfloat16))


def assert_all_images_are(out, expected):
    """Bit for bit, a few images at a time."""
    assert all(torch.equal(part, expected.expand_as(part)) for part in out.split(64))


def test_beyond_two_billion_elements(big):
    first = big[:1].clone(memory_format=torch.channels_last)
    assert big.numel() > 2**31
    mean, var = ops.moments(big)
    exact = reference.moments(first.double())
    torch.testing.assert_close((mean.double(), var.double()), exact, rtol=1e-5, atol=1e-5)
    scale, shift = torch.rand(2, BIG[1]) - 0.5
    assert_all_images_are(ops.add_relu(big, big), ops.add_relu(first, first))
    forward = (scale, shift, None, None, None, True)
    assert_all_images_are(ops.scale_shift_act(big, *forward), ops.scale_shift_act(first, *forward))
    backward = (scale, shift, mean)
    sums, _ = ops.scale_shift_act_backward_reduce(big, big, *backward, *[None] * 5, True)
    once, _ = ops.scale_shift_act_backward_reduce(first, first, *backward, *[None] * 5, True)
    torch.testing.assert_close(sums / BIG[0], once, rtol=1e-4, atol=1e-4 * once.abs().max().item())
    apply = (*backward, None, None, *[None] * 6, True)
    (expected, _), (ours, _) = (ops.scale_shift_act_backward_apply(t, t, *apply) for t in (first, big))
    assert_all_images_are(ours, expected)


def test_the_stem_beyond_two_billion_elements(big):
    first = big[:1].clone(memory_format=torch.channels_last)
    scale, shift = torch.rand(2, BIG[1]) - 0.5
    ours, expected = (ops.scale_shift_relu_maxpool(t, scale, shift, 3, 2, 1) for t in (big, first))
    for out, wanted in zip(ours, expected, strict=True):
        assert_all_images_are(out, wanted)
    grads = [
        ops.scale_shift_relu_maxpool_backward_apply(out, indices, t, scale, shift, shift, None, None, 3, 2, 1)
        for (out, indices), t in ((ours, big), (expected, first))
    ]
    assert_all_images_are(*grads)


@EVERY_DTYPE
def test_large_reductions_have_one_order(dtype):
    x = image((64, 96, 56, 56), dtype, "channels_last")
    found = [functional.moments(x, backend="native") for _ in range(3)]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_the_current_stream_is_used():
    x, stream = torch.zeros(1 << 24), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.fill_(1)
        out = ops.add_relu(x, x)
        mean, _ = ops.moments(x.view(1, 1, 1 << 12, 1 << 12))
    stream.synchronize()
    assert out.eq(2).all() and mean.eq(1).all()


def test_a_tensor_on_another_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    x = torch.ones(2, 8, 4, 4, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert ops.add_relu(x, x).eq(2).all() and ops.moments(x)[0].eq(1).all()
    assert torch.cuda.current_device() == 0


def test_mixed_devices_and_layouts_are_refused():
    x, v = torch.randn(2, 3, 4, 4), torch.rand(3)
    with pytest.raises(RuntimeError, match="dtype and device"):
        ops.add_relu(x, x.cpu())
    with pytest.raises(RuntimeError, match="shape and strides"):
        ops.add_relu(x, x.contiguous(memory_format=torch.channels_last))
    with pytest.raises(RuntimeError, match="device"):
        ops.scale_shift_act(x, v.cpu(), v, None, None, None, True)
    with pytest.raises(RuntimeError, match="dense, contiguous or channels_last"):
        ops.moments(x[..., ::2])
    with pytest.raises(ValueError, match="must be on x's device cuda:0, got cpu"):
        functional.add_relu(x, x.cpu())
