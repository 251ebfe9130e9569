"""Tile kernels: convolutions with prologue and epilogue, second moments, and what the operators refuse."""

import pytest
import torch
import torch.nn.functional as F
from numerics import CHAIN_MARGIN, GRADIENT_MARGIN, assert_all_as_exact, assert_as_exact, image, leaf
from test_ops import TILE_OPS
from torch import nn
from torch.library import opcheck

from resfuse import autograd_conv, ops, raw, reference
from resfuse.nn import batch_norm_parameters, conv_parameters
from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters

pytestmark = pytest.mark.skipif(not ops.tile_dtypes, reason="this processor has no tile kernels (AVX-512 or AVX2)")

DTYPES = pytest.mark.parametrize("dtype", sorted(ops.tile_dtypes, key=str), ids=str)
LAST = torch.channels_last
# in, out, kernel, stride, padding, dilation, groups, height, width
CONVS = {
    "1x1": (64, 64, (1, 1), (1, 1), (0, 0), (1, 1), 1, 8, 8),
    "1x1-wide": (130, 257, (1, 1), (1, 1), (0, 0), (1, 1), 1, 14, 14),
    "1x1-strided": (7, 70, (1, 1), (2, 2), (0, 0), (1, 1), 1, 9, 9),
    "1x1-padded": (5, 6, (1, 1), (1, 1), (1, 1), (1, 1), 1, 5, 5),
    "3x3": (3, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1, 7, 9),
    "3x3-tall": (33, 40, (3, 3), (1, 1), (1, 1), (1, 1), 1, 57, 31),
    "3x3-blocks": (64, 96, (3, 3), (1, 1), (1, 1), (1, 1), 1, 28, 30),
    "3x3-small": (160, 70, (3, 3), (1, 1), (1, 1), (1, 1), 1, 7, 7),
    "3x3-unpadded": (48, 33, (3, 3), (1, 1), (0, 0), (1, 1), 1, 9, 12),
    "3x3-padded": (32, 64, (3, 3), (1, 1), (2, 1), (1, 1), 1, 6, 11),
    "3x3-one-pixel": (40, 40, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, 1),
    "3x3-strided": (65, 33, (3, 3), (2, 2), (1, 1), (1, 1), 1, 15, 13),
    "3x3-dilated": (32, 48, (3, 3), (1, 1), (2, 2), (2, 2), 1, 14, 14),
    "5x5-stride-3": (16, 16, (5, 5), (3, 3), (2, 2), (1, 1), 1, 17, 19),
    "7x7-strided": (3, 64, (7, 7), (2, 2), (3, 3), (1, 1), 1, 32, 32),
    "3x1": (40, 24, (3, 1), (2, 1), (1, 0), (1, 1), 1, 11, 11),
    "1x5": (9, 8, (1, 5), (1, 2), (0, 2), (1, 1), 1, 6, 12),
    "one-channel": (1, 1, (3, 3), (1, 1), (1, 1), (1, 1), 1, 4, 4),
    "one-pixel": (31, 17, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, 1),
    "grouped": (128, 128, (3, 3), (1, 1), (1, 1), (1, 1), 32, 14, 9),
    "grouped-strided": (96, 64, (3, 3), (2, 2), (1, 1), (1, 1), 4, 15, 13),
    "grouped-dilated": (36, 60, (3, 3), (1, 1), (2, 2), (2, 2), 3, 9, 11),
    "grouped-1x1": (84, 160, (1, 1), (1, 1), (0, 0), (1, 1), 2, 7, 7),
    "grouped-1x1-strided": (66, 22, (1, 1), (2, 2), (0, 0), (1, 1), 11, 9, 9),
    "odd-groups": (35, 55, (3, 3), (1, 1), (1, 1), (1, 1), 5, 7, 9),
    "wide-groups": (201, 75, (1, 3), (1, 1), (0, 1), (1, 1), 3, 8, 7),
    "depthwise": (70, 70, (3, 3), (1, 1), (1, 1), (1, 1), 70, 9, 8),
    "depthwise-expanding": (33, 99, (5, 5), (2, 2), (2, 2), (1, 1), 33, 9, 9),
    "depthwise-reducing": (99, 33, (3, 3), (1, 1), (1, 1), (1, 1), 33, 7, 7),
}
EVERY_CONV = pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)


def operands(conv, dtype, weight_dtype=None, images=3):
    """x, affine, mean, weight and the geometry of a convolution."""
    channels, out, kernel, stride, padding, dilation, groups, height, width = conv
    x = image((images, channels, height, width), dtype, "channels_last")
    affine = torch.stack([torch.randn(channels) / 4, torch.randn(channels)])
    weight = torch.randn(out, channels // groups, *kernel) / (channels // groups * kernel[0] * kernel[1]) ** 0.5
    mean = x.float().mean((0, 2, 3))
    return x, affine, mean, weight.to(weight_dtype or dtype), (list(stride), list(padding), list(dilation), groups)


def torch_path(x, affine, mean, weight, pairs, dtype, grad_y, other=None):
    """What torch computes in `dtype` with every step stored: y, its moments and the gradients of a weighted sum."""
    x, affine, weight = (leaf(t, dtype) for t in (x, affine, weight))
    z = (x - mean.to(dtype)[:, None, None]) * affine[1][:, None, None] + affine[0][:, None, None]
    y = F.conv2d(F.relu(z), weight, None, *pairs)
    wide = y.double()
    moments = wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)
    loss = (y * grad_y.to(dtype)).sum() + sum((m * (i + 1)).sum() for i, m in enumerate(moments)).to(dtype)
    grad_x, grad_affine, grad_weight = torch.autograd.grad(loss, (x, affine, weight))
    if other is not None:
        grad_x = grad_x + other.to(dtype)
    return {"y": y.detach(), "grad_x": grad_x, "grad_affine": grad_affine.float(), "grad_weight": grad_weight}


@EVERY_CONV
@DTYPES
def test_conv_stats_and_its_backward(dtype, conv):
    """Values, moments and gradients against float64. The mask is away from the kink: random biases seldom hit it."""
    x, affine, mean, weight, pairs = operands(conv, dtype)
    y, y_mean, y_var = ops.conv_stats(x, affine, mean, weight, True, *pairs, True)
    assert y.is_contiguous(memory_format=LAST)
    grad_y = torch.randn(y.shape).to(dtype).contiguous(memory_format=LAST)
    moment_grads = torch.ones_like(y_mean), torch.full_like(y_var, 2.0)
    grad_x, grad_weight, sums = ops.conv_stats_backward(
        grad_y, y, None, y_mean, *moment_grads, False, x, affine, mean, weight, True, *pairs, None, True, True
    )
    wide = y.double()
    assert_as_exact(y_mean, wide.float().mean((0, 2, 3)), wide.mean((0, 2, 3)))
    if wide[:, 0].numel() > 1:
        assert_as_exact(y_var, wide.float().var((0, 2, 3), correction=0), wide.var((0, 2, 3), correction=0))
    ours = {"y": y, "grad_x": grad_x, "grad_affine": sums, "grad_weight": grad_weight}
    # the gradient is linear in grad_y; a bfloat16 path of stock's rounds the mean to bfloat16 too
    stock = torch_path(x, affine, mean, weight, pairs, dtype, grad_y)
    exact = torch_path(x, affine, mean, weight, pairs, torch.float64, grad_y)
    exact = {name: t.double() for name, t in exact.items()}
    assert_all_as_exact(ours, stock, exact, margin=GRADIENT_MARGIN if dtype == torch.float32 else 2)


@EVERY_CONV
@DTYPES
def test_without_prologue_and_with_another_gradient(dtype, conv):
    x, _, _, weight, pairs = operands(conv, dtype, torch.float32)
    y, *_ = ops.conv_stats(x, None, None, weight, True, *pairs, False)
    rounded = weight.to(dtype)
    assert_as_exact(y, F.conv2d(x, rounded, None, *pairs), F.conv2d(x.double(), rounded.double(), None, *pairs))
    grad_y = torch.randn_like(y)
    other = torch.randn_like(x)
    options = (None, None, None, None, None, False, x, None, None, weight, True, *pairs)
    grad_x, grad_weight, sums = ops.conv_stats_backward(grad_y, *options, other, True, True)
    assert sums.numel() == 0 and grad_weight.dtype == torch.float32

    def gradients(wide):
        leaves = leaf(x, wide), leaf(rounded, wide)
        found = torch.autograd.grad(F.conv2d(*leaves, None, *pairs), leaves, grad_y.to(wide))
        return {"grad_x": found[0] + other.to(wide), "grad_weight": found[1]}

    stock, exact = gradients(dtype), gradients(torch.float64)
    assert_all_as_exact({"grad_x": grad_x, "grad_weight": grad_weight.to(dtype)}, stock, exact, margin=CHAIN_MARGIN)

    in_place = other.clone()
    weight_again, _ = ops.conv_stats_backward_(grad_y, *options, in_place, True)
    assert torch.equal(in_place, grad_x) and torch.equal(weight_again, grad_weight)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 2), (2, 2), (1, 3), (3, 3)], ids=str)
@DTYPES
def test_one_row_of_windows_that_do_not_meet(dtype, kernel, stride):
    """Backward a long row of base pixels stands for several rows of input, and is not cut."""
    conv = (9, 40, (kernel, kernel), (stride, stride), (0, 0), (1, 1), 1, stride, 128)
    x, _, _, weight, pairs = operands(conv, dtype, images=1)
    grad = torch.randn(1, 40, 1, (128 - kernel) // stride + 1).to(dtype).to(memory_format=LAST)
    options = (None, None, None, None, None, False, x, None, None, weight, False, *pairs)
    grad_x, *_ = ops.conv_stats_backward(grad, *options, None, True, False)
    stock, exact = (
        torch.nn.grad.conv2d_input(x.shape, weight.to(wide), grad.to(wide), *pairs) for wide in (dtype, torch.float64)
    )
    assert_as_exact(grad_x, stock, exact, "grad_x", margin=CHAIN_MARGIN)


@pytest.mark.parametrize("kind", ["none", "identity", "raw"])
@EVERY_CONV
@DTYPES
def test_conv_act(dtype, conv, kind):
    x, affine, mean, weight, pairs = operands(conv, dtype, torch.float32)
    out_channels = weight.shape[0]
    scale, shift = torch.rand(out_channels) + 0.5, torch.randn(out_channels)
    a = reference.normalized(x.double(), affine.double(), mean.double()).to(dtype).double()
    z = F.conv2d(a, (weight * scale[:, None, None, None]).to(dtype).double(), None, *pairs) + shift[:, None, None]
    residual = image(z.shape, dtype, "channels_last") if kind != "none" else None
    r_affine = torch.randn(2, out_channels) if kind == "raw" else None
    r_mean = torch.randn(out_channels) if kind == "raw" else None
    if residual is not None:
        wide = [None if t is None else t.double() for t in (residual, r_affine, r_mean)]
        z = z + reference.normalized(*wide, "identity")
    options = (residual, r_affine, r_mean, None, None, [1, 1], True, *pairs)
    out, *nothing = ops.conv_act(x, affine, mean, True, weight, scale, shift, *options, False)
    assert_as_exact(out, F.relu(z).to(dtype), F.relu(z))
    assert [t.numel() for t in nothing] == [0, 0]
    again, out_mean, out_var = ops.conv_act(x, affine, mean, True, weight, scale, shift, *options, True)
    assert torch.equal(out, again)
    stored = out.double()
    assert torch.allclose(out_mean.double(), stored.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(out_var.double(), stored.var((0, 2, 3), unbiased=False), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("stride", [[1, 1], [2, 2], [1, 3]], ids=str)
@pytest.mark.parametrize("channels", [(64, 64, 256), (7, 21, 33), (1, 2, 3)], ids=str)
@DTYPES
def test_conv_act_with_a_branch(dtype, channels, stride):
    """Two 1x1 convolutions of different inputs, one strided, are one product."""
    first, second, out_channels = channels
    height, width = 7, 9
    x = image((3, first, height, width), dtype, "channels_last")
    size = [(n - 1) * s + 1 + (s - 1) // 2 for n, s in zip((height, width), stride, strict=True)]
    branch = image((3, second, *size), dtype, "channels_last")
    weight, other = torch.randn(out_channels, first, 1, 1).to(dtype), torch.randn(out_channels, second, 1, 1).to(dtype)
    shift = torch.randn(out_channels)
    z = F.conv2d(x.double(), weight.double()) + F.conv2d(branch.double(), other.double(), None, stride)
    z = z + shift[:, None, None]
    out, out_mean, _ = ops.conv_act(
        x, None, None, False, weight, None, shift, None, None, None, branch, other, stride, True, [1, 1], [0, 0],
        [1, 1], 1, True,
    )  # fmt: skip
    assert_as_exact(out, F.relu(z).to(dtype), F.relu(z))
    assert torch.allclose(out_mean.double(), out.double().mean((0, 2, 3)), atol=1e-5)


def test_a_branch_must_add_up():
    x, branch = (image((2, 4, size, 6), layout="channels_last") for size in (6, 7))
    weight, shift = torch.randn(5, 4, 1, 1), torch.zeros(5)
    with pytest.raises(RuntimeError, match="dense"):
        ops.conv_act(
            x, None, None, False, torch.randn(8, 1, 1, 1), None, torch.zeros(8), None,
            None, None, x, torch.randn(8, 4, 1, 1), [1, 1], True, [1, 1], [0, 0], [1, 1], 4, False,
        )  # fmt: skip
    for bad, stride in ((branch, [1, 1]), (x, [2, 2]), (x.double(), [1, 1]), (x[:1], [1, 1])):
        with pytest.raises(RuntimeError, match="branch"):
            ops.conv_act(
                x, None, None, False, weight, None, shift, None, None, None, bad, weight, stride, True, [1, 1], [0, 0],
                [1, 1], 1, False,
            )  # fmt: skip


@pytest.mark.parametrize("ratio", [0, 1, 10, 100])
@DTYPES
def test_second_moments_do_not_cancel(dtype, ratio):
    """With mean/std up to 100 the covariance keeps its digits, as a sum of shifted products must."""
    x = (torch.randn(4, 33, 13, 11) + ratio).to(dtype).contiguous(memory_format=LAST)
    mean, covariance = ops.second_moments(x, None, None, False, [1, 1])
    pixels = x.double().permute(0, 2, 3, 1).flatten(0, 2)
    exact = torch.cov(pixels.T, correction=0)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3  # shifted values are rounded to bfloat16 again
    assert (covariance - exact).norm() / exact.norm() < tolerance
    assert ((covariance.diagonal() - exact.diagonal()) / exact.diagonal()).abs().max() < tolerance
    assert (mean - pixels.mean(0)).abs().max() < tolerance
    assert torch.equal(covariance, covariance.T)


@pytest.mark.parametrize("ratio", [0, 0.3, 1])
def test_deviations_in_bfloat16_are_not_all_rounded_one_way(ratio):
    """The mean of many is off by less than any of them: values of few bits less a pivot of more all round alike."""
    if torch.bfloat16 not in ops.tile_dtypes:
        pytest.skip("this processor has no bfloat16 tile kernels")
    x = (torch.randn(4, 33, 39, 33) + ratio).bfloat16().contiguous(memory_format=LAST)
    mean, covariance = ops.second_moments(x, None, None, False, [1, 1])
    pixels = x.double().permute(0, 2, 3, 1).flatten(0, 2)
    exact = torch.cov(pixels.T, correction=0)
    assert (mean - pixels.mean(0)).abs().max() < 2e-4
    assert ((covariance.diagonal() - exact.diagonal()) / exact.diagonal()).abs().max() < 5e-4


@pytest.mark.parametrize("stride", [[1, 1], [2, 2], [3, 1]], ids=str)
def test_second_moments_behind_a_prologue(stride):
    x, affine, mean, _, _ = operands(CONVS["3x3-tall"], torch.float32)
    found_mean, covariance = ops.second_moments(x, affine, mean, True, stride)
    a = reference.normalized(x.double(), affine.double(), mean.double())[:, :, :: stride[0], :: stride[1]]
    pixels = a.permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.allclose(found_mean.double(), pixels.mean(0), atol=1e-6)
    assert torch.allclose(covariance.double(), torch.cov(pixels.T, correction=0), atol=1e-6)


CASES = {
    "conv_stats": lambda x, a, m, w, p: (x, a, m, w, True, *p, True),
    "conv_stats plain": lambda x, a, m, w, p: (x, None, None, w, False, *p, False),
    "conv_stats_backward": lambda x, a, m, w, p: (
        torch.randn(3, 5, 7, 9).to(memory_format=LAST), None, None, None, None, None, False, x, a, m, w, True, *p,
        None, True, True,
    ),
    "conv_stats_backward_": lambda x, a, m, w, p: (
        torch.randn(3, 5, 7, 9).to(memory_format=LAST), None, None, None, None, None, False, x, None, None, w, True,
        *p, torch.randn_like(x), True,
    ),
    "conv_act": lambda x, a, m, w, p: (
        x, a, m, True, w, None, torch.randn(5), *[None] * 5, [1, 1], True, *p, False,
    ),
    "conv_act with a branch": lambda x, a, m, w, p: (
        x, a, m, True, w[:, :, :1, :1].contiguous(), None, torch.randn(5), *[None] * 3,
        torch.randn(3, 6, 13, 17).to(memory_format=LAST), torch.randn(5, 6, 1, 1), [2, 2], True, [1, 1], [0, 0], [1, 1],
        1, True,
    ),
    "second_moments": lambda x, a, m, w, p: (x, a, m, True, [2, 1]),
    "expand_bn_act_backward_weight": lambda x, a, m, w, p: (
        torch.randn(3, 5, 7, 9).to(memory_format=LAST), torch.randn(3, 5, 7, 9).to(memory_format=LAST), x, a, m, True,
    ),
    "expand_bn_act_backward_weight_": lambda x, a, m, w, p: (
        torch.randn(3, 5, 7, 9).to(memory_format=LAST), torch.randn(3, 5, 7, 9).to(memory_format=LAST), x, a, m, True,
    ),
    "expand_bn_act_backward_input": lambda x, a, m, w, p: (
        torch.randn(3, 5, 7, 9).to(memory_format=LAST), x, a, m, True, torch.randn(5, 3), torch.randn(3, 3),
        torch.randn(3), [1, 1],
    ),
    "folded_moments": lambda x, a, m, w, p: (torch.randn(5, 3), torch.randn(3), torch.rand(3, 3)),
    "folded_weight": lambda x, a, m, w, p: (torch.randn(5, 3), torch.rand(5), torch.randn(5), torch.randn(3), x),
    "folded_weight_backward": lambda x, a, m, w, p: (
        torch.randn(5, 3), torch.randn(5), torch.randn(5, 3), torch.randn(3), torch.rand(3, 3), torch.rand(5),
        torch.rand(5), 77, 1e-5, x, True, True,
    ),
}  # fmt: skip


def test_every_tile_operator_has_a_case():
    assert {case.split()[0] for case in CASES} == TILE_OPS - {"tile_kernels", "pack_weight", "run_plan"}


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case, poisoned):
    x, affine, mean, weight, pairs = operands(CONVS["3x3"], torch.float32)
    opcheck(getattr(ops, case.split()[0]), CASES[case](x, affine, mean, weight, pairs))


def test_kernels_refuse_what_they_cannot_read():
    x, affine, mean, weight, pairs = operands(CONVS["3x3"], torch.float32)
    arguments = (affine, mean, weight, True, *pairs, True)
    for bad in (x.contiguous(), x.double(), x[:, :2]):
        with pytest.raises(RuntimeError, match="resfuse"):
            ops.conv_stats(bad, *arguments)
    with pytest.raises(RuntimeError, match="weight"):
        ops.conv_stats(x, affine, mean, weight.double(), True, *pairs, True)
    with pytest.raises(RuntimeError, match="kernel"):
        ops.conv_stats(
            x[:, :, :1, :1].contiguous(memory_format=LAST), affine, mean, weight, True, [1, 1], [0, 0], [1, 1], 1, True
        )


@pytest.mark.parametrize("frozen", [False, True])
def test_conv_norm_through_its_reference(frozen):
    """y, its affine, and every gradient, with the shortcut's gradient joined where grad_x is written."""
    x, affine, mean, weight, _ = operands(CONVS["3x3"], torch.float32)
    bn = BatchNorm2dParameters(torch.rand(5), torch.rand(5) + 0.5, torch.rand(5), torch.rand(5), not frozen)
    grads, values = [], []
    weights = torch.randn(3, 5, 7, 9), torch.randn(2, 5), torch.randn(3, 3, 7, 9)
    for path in ("ours", "reference"):
        wide = torch.float32 if path == "ours" else torch.float64
        leaves = [leaf(t, wide) for t in (x, affine, weight, bn.weight, bn.bias)]
        own = bn._replace(
            weight=leaves[3], bias=leaves[4], running_mean=bn.running_mean.to(wide, copy=True),
            running_var=bn.running_var.to(wide, copy=True),
        )  # fmt: skip
        conv = Conv2dParameters(leaves[2], None, 1, 1)
        if path == "ours":
            found, through = autograd_conv.conv_norm(
                raw.Raw(leaves[0], leaves[1], mean), conv, own, True, "native", through=True
            )
            y, y_affine = found.x, found.affine
        else:
            y, y_affine, _ = reference.conv_norm(leaves[0], leaves[1], mean.double(), conv, own)
            through = leaves[0]
        loss = sum((t * w.to(wide)).sum() for t, w in zip((y, y_affine, through), weights, strict=True))
        grads.append(torch.autograd.grad(loss, leaves))
        values.append((y.detach(), y_affine.detach()))
    for ours, exact in zip(grads[0] + values[0], grads[1] + values[1], strict=True):
        assert exact.norm() > 0
        assert (ours - exact).norm() / exact.norm() < 1e-5


def test_parameters_follow_the_module():
    """stride, padding, dilation and groups in every spelling that torch.nn.Conv2d has."""
    strided, grouped = {"padding": (1, 0), "stride": (2, 1)}, {"groups": 2}
    for options in ({"padding": "same"}, {"padding": "valid"}, strided, {"dilation": 2}, grouped):
        conv = nn.Conv2d(6, 4, 3, bias=False, **options)
        x = image((2, 6, 9, 8), layout="channels_last")
        pairs = raw.geometry(conv_parameters(conv))
        y, *_ = ops.conv_stats(x, None, None, conv.weight.detach(), True, *pairs, False)
        assert torch.allclose(y, conv(x).detach(), atol=1e-5)
    assert batch_norm_parameters(nn.BatchNorm2d(3)).training
