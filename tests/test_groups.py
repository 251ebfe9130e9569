"""Grouped convolutions on tile kernels, beside test_tiles: blocks, threads, and what is refused or left to torch."""

import pytest
import torch
from numerics import image, leaf
from test_folded_blocks import Bottleneck, check_folding, native
from test_tiles import CONVS, DTYPES, LAST, operands
from torch import nn
from torch.library import opcheck

from resfuse import backends, ops
from resfuse.nn import ConvBNAct2d

pytestmark = pytest.mark.skipif(not ops.tile_dtypes, reason="this processor has no tile kernels (AVX-512 or AVX2)")
MEASURED = backends._TILE_GROUP_CHANNELS


@pytest.mark.parametrize("folding", [True, False])
@pytest.mark.parametrize(("channels", "width", "groups"), [(28, 12, 4), (66, 33, 33), (30, 70, 10)])
def test_grouped_bottlenecks(channels, width, groups, folding):
    """The last convolution, which is dense, folds or not; those before it are grouped, one of them depthwise."""
    unit = Bottleneck(3, channels, width, "projection", groups=groups)
    check_folding(unit, image((4, channels, 7, 5), layout="channels_last"), folding=folding)


@pytest.mark.parametrize("name", ["grouped", "grouped-1x1", "odd-groups", "depthwise-expanding"])
@DTYPES
def test_bits_of_grouped_convolutions_do_not_depend_on_threads(dtype, name, threads):
    x, affine, mean, weight, pairs = operands(CONVS[name], dtype, images=9)
    found = []
    for count in (1, 2, 3):
        threads(count)
        y, *moments = ops.conv_stats(x, affine, mean, weight, True, *pairs, True)
        grads = ops.conv_stats_backward(
            y, y, None, *moments, moments[1], False, x, affine, mean, weight, True, *pairs, None, True, True
        )
        found.append((y, *moments, *grads))
    assert y.numel() * 16 > 2 * 32768, "too small for a second thread"
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_opcheck(poisoned):
    """Every element of every output is written, of the weight's gradient too."""
    x, affine, mean, weight, pairs = operands(CONVS["odd-groups"], torch.float32)
    opcheck(ops.conv_stats, (x, affine, mean, weight, True, *pairs, True))
    y, *_ = ops.conv_stats(x, affine, mean, weight, True, *pairs, False)
    rest = (None,) * 5
    arguments = (y, *rest, False, x, affine, mean, weight, True, *pairs, None, True, True)
    opcheck(ops.conv_stats_backward, arguments)
    assert all(t.isfinite().all() for t in ops.conv_stats_backward(*arguments))
    shift = torch.randn(weight.shape[0])
    opcheck(ops.conv_act, (x, affine, mean, True, weight, None, shift, *[None] * 5, [1, 1], True, *pairs, False))


@pytest.mark.parametrize(
    ("channels", "groups", "why"), [(4, 3, "C / groups"), (4, 0, "C / groups"), (6, 3, "C / groups"), (3, 3, "K")]
)
def test_kernels_refuse_groups_that_do_not_fit(channels, groups, why):
    """A weight of 5 output channels, each of which reads one."""
    x, weight = image((2, channels, 7, 9), layout="channels_last"), torch.randn(5, 1, 3, 3)
    pairs = ([1, 1], [1, 1], [1, 1], groups)
    shift = torch.zeros(5)
    calls = {
        ops.conv_stats: (x, None, None, weight, True, *pairs, True),
        ops.conv_act: (x, None, None, True, weight, None, shift, *[None] * 5, [1, 1], True, *pairs, False),
    }
    for op, arguments in calls.items():
        with pytest.raises(RuntimeError, match=f"resfuse: .*{why}"):
            op(*arguments)


@pytest.mark.parametrize(("in_channels", "out_channels"), [(128, 128), (64, 128), (128, 64)])
def test_depthwise_convolutions_stay_torchs(in_channels, out_channels, monkeypatch):
    """One channel into or out of a group is too few, however many there are on the other side."""
    layer = ConvBNAct2d(in_channels, out_channels, groups=64).to(memory_format=LAST)
    x = image((2, in_channels, 6, 6), layout="channels_last").requires_grad_()
    assert layer(x).grad_fn.name() == "ConvNormActFunctionBackward"
    for dtype in MEASURED:
        assert MEASURED[dtype] == 2, "the sizes above are on either side of the rule"
    monkeypatch.setattr(backends, "_TILE_GROUP_CHANNELS", MEASURED)
    wide = min(in_channels, out_channels) // 64 > 1
    assert layer(x).grad_fn.name() == ("ConvNormActFunctionBackward" if wide else "BNActFunctionBackward")
    assert "below 2 channels per group" in backends.why_not_raw("cpu", torch.float32, 64, 1)
    assert backends.why_not_raw("cpu", torch.float32, 64, 2) is None


def test_a_grouped_last_convolution_does_not_fold():
    """Its output's variance is no quadratic form in the covariance of all channels with one matrix."""
    unit, x = Bottleneck(3, 64, 16, "identity"), leaf(image((2, 64, 6, 6), layout="channels_last"))
    assert native(unit, x, folding=True).grad_fn.name() == "ExpandNormActFunctionBackward"
    unit.convs[2] = nn.Conv2d(16, 64, 1, groups=2, bias=False)
    out = native(unit, x, folding=True)
    assert out.grad_fn.name() == "ConvNormActFunctionBackward"
