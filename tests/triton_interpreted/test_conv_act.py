"""conv_act in Triton's interpreter: prologue, folded scale and shift, residual or branch, activation and moments."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_exact, image
from test_tiles import operands

from resfuse import choices, ops, reference
from resfuse._triton.candidates import CANDIDATES

LAST = torch.channels_last
# bfloat16 on a GPU alone: see conftest.py
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
UNIT = ([1, 1], [0, 0], [1, 1], 1)
# in, out, kernel, stride, padding, dilation, groups, height, width: what differs in the addresses of a tile
CONVS = {
    "1x1-one-step": (60, 130, (1, 1), (1, 1), (0, 0), (1, 1), 1, 5, 9),
    "1x1-steps": (150, 20, (1, 1), (1, 1), (0, 0), (1, 1), 1, 9, 8),
    "1x1-strided": (7, 70, (1, 1), (2, 2), (0, 0), (1, 1), 1, 9, 9),
    "1x1-padded": (5, 6, (1, 1), (1, 1), (1, 1), (1, 1), 1, 5, 5),
    "3x3": (70, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1, 6, 5),
    "3x3-strided": (65, 33, (3, 3), (2, 2), (1, 1), (1, 1), 1, 11, 9),
    "3x3-dilated": (32, 20, (3, 3), (1, 1), (2, 2), (2, 2), 1, 8, 8),
    "5x5-stride-3": (16, 16, (5, 5), (3, 3), (2, 2), (1, 1), 1, 11, 13),
    "3x1": (40, 24, (3, 1), (2, 1), (1, 0), (1, 1), 1, 11, 5),
    "1x5": (9, 8, (1, 5), (1, 2), (0, 2), (1, 1), 1, 6, 12),
    "one-channel": (1, 1, (3, 3), (1, 1), (1, 1), (1, 1), 1, 4, 4),
    "one-pixel": (31, 17, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, 1),
    "grouped-1x1": (84, 160, (1, 1), (1, 1), (0, 0), (1, 1), 2, 7, 5),
    "odd-groups": (21, 33, (3, 3), (1, 2), (1, 1), (1, 1), 3, 7, 9),
}
conv_act = CANDIDATES["fused"].conv_act


def moments_hold(out, out_mean, out_var):
    """The moments are those of what was stored."""
    wide = out.double()
    assert_as_exact(out_mean, wide.mean((0, 2, 3)).float(), wide.mean((0, 2, 3)))
    assert torch.allclose(out_var.double(), wide.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", CONVS)
@DTYPES
def test_every_geometry(dtype, name):
    """Each with another kind of residual, so that all meet several; the weight is float32, as a parameter's."""
    kind = ("none", "identity", "raw")[list(CONVS).index(name) % 3]
    x, affine, mean, weight, pairs = operands(CONVS[name], dtype, torch.float32, images=2)
    out_channels = weight.shape[0]
    scale, shift = torch.rand(out_channels) + 0.5, torch.randn(out_channels)

    def path(kind_of_number):
        cast = [t.to(kind_of_number) for t in (x, affine, mean, weight, scale, shift)]
        z = F.conv2d(reference.normalized(*cast[:3]), cast[3] * cast[4][:, None, None, None], cast[5], *pairs)
        if residual is None:
            return F.relu(z)
        given = [None if t is None else t.to(kind_of_number) for t in (residual, *raw)]
        return F.relu(z + reference.normalized(*given, "identity"))

    residual, raw = None, (None, None)
    shape = path(torch.float64).shape
    if kind != "none":
        residual = image(shape, dtype, "channels_last")
    if kind == "raw":
        raw = torch.randn(2, out_channels), torch.randn(out_channels)
    options = (residual, *raw, None, None, [1, 1], True, *pairs)
    out, *moments = conv_act(x, affine, mean, True, weight, scale, shift, *options, True)
    assert out.is_contiguous(memory_format=LAST)
    assert_as_exact(out, path(dtype), path(torch.float64))
    moments_hold(out, *moments)


def test_nothing_but_a_bias():
    """No prologue, no scale, no residual, no activation: a convolution with a bias; negative values stay."""
    x, _, _, weight, pairs = operands(CONVS["3x3-strided"], torch.float32)
    shift = torch.randn(weight.shape[0])
    out, *nothing = conv_act(x, None, None, True, weight, None, shift, *[None] * 5, [1, 1], False, *pairs, False)
    assert [t.numel() for t in nothing] == [0, 0]
    exact = F.conv2d(x.double(), weight.double(), shift.double(), *pairs)
    assert_as_exact(out, F.conv2d(x, weight, shift, *pairs), exact)
    assert (out < 0).any()


def test_nan_passes_the_activation():
    x = image((1, 4, 3, 3), layout="channels_last")
    x[0, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    weight = torch.zeros(2, 4, 1, 1)
    weight[:, 0] = 1
    out, *_ = conv_act(x, None, None, False, weight, None, torch.zeros(2), *[None] * 5, [1, 1], True, *UNIT, False)
    assert torch.equal(out[0, :, 0].nan_to_num(nan=-1), torch.tensor([[-1.0, torch.finfo().max, 0.0]] * 2))


def test_moments_of_a_large_mean_do_not_cancel():
    """mean/std of 100 in float32: the variance to 1e-5, over several tiles and slabs."""
    x = image((5, 6, 17, 19), layout="channels_last", mean=0.0)
    weight, shift = torch.randn(7, 6, 1, 1), torch.full((7,), 300.0)
    out, *moments = conv_act(x, None, None, False, weight, None, shift, *[None] * 5, [1, 1], True, *UNIT, True)
    assert (out.double().mean((0, 2, 3)) / out.double().std((0, 2, 3))).max() > 50
    moments_hold(out, *moments)


@pytest.mark.parametrize("stride", [[1, 1], [2, 2], [1, 3]], ids=str)
@pytest.mark.parametrize("channels", [(64, 64, 130), (7, 90, 33), (150, 2, 3)], ids=str)
@DTYPES
def test_a_branch(dtype, channels, stride):
    """Two 1x1 convolutions of different inputs, one strided, are one product; the first's scale is its own."""
    first, second, out_channels = channels
    height, width = 5, 7
    x = image((3, first, height, width), dtype, "channels_last")
    size = [(n - 1) * s + 1 + (s - 1) // 2 for n, s in zip((height, width), stride, strict=True)]
    branch = image((3, second, *size), dtype, "channels_last")
    affine, mean = torch.randn(2, first), torch.randn(first)
    weights = torch.randn(out_channels, first, 1, 1).to(dtype), torch.randn(out_channels, second, 1, 1).to(dtype)
    scale, shift = torch.rand(out_channels) + 0.5, torch.randn(out_channels)

    def path(kind):
        cast = [t.to(kind) for t in (x, affine, mean, branch, *weights, scale, shift)]
        z = F.conv2d(reference.normalized(*cast[:3]), cast[4] * cast[6][:, None, None, None], cast[7])
        return F.relu(z + F.conv2d(cast[3], cast[5], None, stride))

    options = (None, None, None, branch, weights[1], stride, True, *UNIT)
    out, *moments = conv_act(x, affine, mean, True, weights[0], scale, shift, *options, True)
    assert_as_exact(out, path(dtype), path(torch.float64))
    moments_hold(out, *moments)


def test_conv_act_names_bad_input():
    x, taller = (image((2, 4, size, 6), layout="channels_last") for size in (6, 7))
    weight, shift = torch.randn(5, 4, 1, 1), torch.zeros(5)
    residual = image((2, 5, 6, 6), layout="channels_last")
    nothing = (None, None, None)
    for given, error, message in (
        ((weight[:, :3], shift, *nothing, None, None, [1, 1]), ValueError, "weight must be"),
        ((weight, shift[:4], *nothing, None, None, [1, 1]), ValueError, r"shift must be contiguous float32 \(5,\)"),
        ((weight, shift.to("meta"), *nothing, None, None, [1, 1]), ValueError, "shift must be on .*, got meta"),
        ((weight, shift, x, None, None, None, None, [1, 1]), ValueError, "residual must have shape"),
        ((weight, shift, residual, torch.zeros(2, 5), None, None, None, [1, 1]), ValueError, "residual_affine needs"),
        ((weight, shift, *nothing, taller, weight, [1, 1]), ValueError, "a branch must be"),
        ((weight, shift, *nothing, x, weight, [2, 2]), ValueError, "a branch must be"),
        ((weight, shift, *nothing, x[:1], weight, [1, 1]), ValueError, "a branch must be"),
        ((weight, shift, *nothing, x, None, [1, 1]), ValueError, "branch_weight must be"),
        ((weight, shift, *nothing, x.half(), weight, [1, 1]), TypeError, r"branch must be torch\.float32"),
    ):
        own_weight, own_shift, *options = given
        with pytest.raises(error, match=message):
            conv_act(x, None, None, False, own_weight, None, own_shift, *options, True, *UNIT, False)


@pytest.mark.parametrize("moments", [False, True], ids=["plain", "moments"])
@pytest.mark.parametrize("kind", ["none", "identity", "raw"])
def test_the_composition_is_the_same_unit(kind, moments):
    """torch's convolution with passes around it: with every residual, with and without a scale."""
    x, affine, mean, weight, pairs = operands(CONVS["3x3-strided"], torch.float16, torch.float32)
    channels = weight.shape[0]
    scale, shift = (None if kind == "identity" else torch.rand(channels) + 0.5), torch.randn(channels)
    raw = (torch.randn(2, channels), torch.randn(channels)) if kind == "raw" else (None, None)
    shape = F.conv2d(x.float(), weight, None, *pairs).shape
    residual = None if kind == "none" else image(shape, torch.float16, "channels_last")
    options = (scale, shift, residual, *raw, None, None, [1, 1], True, *pairs, moments)
    source = (x, affine, mean, True, weight)
    kept = x.clone()
    fused, composed = (CANDIDATES[name].conv_act(*source, *options) for name in ("fused", "composed"))
    for ours, theirs in zip(fused, composed, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        assert (ours.double() - theirs.double()).norm() <= 2e-3 * theirs.double().norm()
    assert torch.equal(x, kept)


def test_the_candidate_of_conv_stats_convolves_unless_there_is_a_branch(monkeypatch):
    asked = []

    def choose(unit, *rest):
        asked.append(unit)
        return "composed"

    def refuse(*arguments):
        raise RuntimeError("the composition was taken")

    monkeypatch.setattr(choices, "choose", choose)
    monkeypatch.setitem(CANDIDATES, "composed", CANDIDATES["composed"]._replace(conv_act=refuse))
    x, weight = image((1, 4, 3, 3), layout="channels_last"), torch.randn(2, 4, 1, 1)
    plain = (x, None, None, False, weight, None, torch.zeros(2), None, None, None)
    with pytest.raises(RuntimeError, match="the composition was taken"):
        ops.of("triton").conv_act(*plain, None, None, [1, 1], True, *UNIT, False)
    assert asked == ["conv_stats"]
    out, *_ = ops.of("triton").conv_act(*plain, x, weight, [1, 1], True, *UNIT, False)
    torch.testing.assert_close(out, F.relu(2 * F.conv2d(x, weight)))
