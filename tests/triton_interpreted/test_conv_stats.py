"""conv_stats and its backward in Triton's interpreter, against reference.py: values, moments and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from numerics import CHAIN_MARGIN, assert_all_as_exact, assert_as_exact, image, laid_out, leaf
from test_tiles import CASES
from test_tiles import CONVS as TILE_CONVS
from test_tiles import operands as tile_operands
from torch.library import opcheck

from resfuse import ops, reference
from resfuse._triton import schedule
from resfuse._triton.candidates import CANDIDATES
from resfuse.parameters import Conv2dParameters

pytestmark = pytest.mark.usefixtures("poisoned")

triton = CANDIDATES["fused"]
LAST = torch.channels_last
# in, out, kernel, stride, padding, dilation, groups, height, width
CONVS = {
    "1x1": (20, 37, (1, 1), (1, 1), (0, 0), (1, 1), 1, 9, 8),
    "1x1-wide": (133, 70, (1, 1), (1, 1), (0, 0), (1, 1), 1, 5, 4),
    "1x1-strided": (7, 70, (1, 1), (2, 2), (0, 0), (1, 1), 1, 9, 9),
    "1x1-padded": (5, 6, (1, 1), (1, 1), (1, 1), (1, 1), 1, 5, 5),
    "3x3": (3, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1, 7, 9),
    "3x3-strided": (17, 9, (3, 3), (2, 2), (1, 1), (1, 1), 1, 9, 7),
    "3x3-dilated": (5, 6, (3, 3), (1, 1), (2, 2), (2, 2), 1, 8, 7),
    "3x3-strided-dilated": (4, 3, (3, 3), (2, 3), (2, 1), (3, 2), 1, 11, 10),
    "2x2-stride-3": (6, 5, (2, 2), (3, 3), (0, 0), (1, 1), 1, 8, 10),
    "3x1": (9, 8, (3, 1), (2, 1), (1, 0), (1, 1), 1, 7, 6),
    "one-pixel": (9, 17, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, 1),
    "grouped": (6, 8, (3, 3), (2, 2), (1, 1), (1, 1), 2, 7, 6),
    "depthwise": (2, 4, (3, 3), (1, 1), (1, 1), (1, 1), 2, 6, 5),
}
EVERY_CONV = pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
# bfloat16 is the GPU's: the interpreter leaves it out
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)


def operands(conv, dtype, weight_dtype=None):
    """x, affine, mean, weight and the geometry of a convolution."""
    channels, out, kernel, stride, padding, dilation, groups, height, width = conv
    x = image((2, channels, height, width), dtype, "channels_last")
    affine = torch.stack([torch.randn(channels) / 4, torch.randn(channels)])
    weight = torch.randn(out, channels // groups, *kernel) / (channels // groups * kernel[0] * kernel[1]) ** 0.5
    pairs = list(stride), list(padding), list(dilation), groups
    return x, affine, x.float().mean((0, 2, 3)), weight.to(weight_dtype or dtype), pairs


def gradients(x, affine, mean, weight, pairs, dtype, grad_y, moment_grads):
    """y and the gradients of (y, its moments) weighted, by the reference in `dtype`; masks are those of x as stored."""
    x, weight = leaf(x, dtype), leaf(weight, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    affine = leaf(affine, wide)
    a = reference.normalized(x, affine, mean.to(wide))
    y, *moments = reference.conv_stats(a, Conv2dParameters(weight, None, *pairs))
    outputs = (y, *moments)
    weights = [grad_y.to(dtype), *(g.to(wide) for g in moment_grads)]
    grads = torch.autograd.grad(outputs, (x, affine, weight), weights)
    return {"y": y.detach(), **dict(zip(("grad_x", "grad_affine", "grad_weight"), grads, strict=True))}


@EVERY_CONV
@DTYPES
def test_values_moments_and_gradients(dtype, conv):
    x, affine, mean, weight, pairs = operands(conv, dtype)
    y, y_mean, y_var = triton.conv_stats(x, affine, mean, weight, True, *pairs, True)
    assert y.is_contiguous(memory_format=LAST)
    wide = y.double()
    assert_as_exact(y_mean, wide.float().mean((0, 2, 3)), wide.mean((0, 2, 3)))
    if wide[:, 0].numel() > 1:
        assert_as_exact(y_var, wide.float().var((0, 2, 3), correction=0), wide.var((0, 2, 3), correction=0))
    grad_y = torch.randn(y.shape).to(dtype).contiguous(memory_format=LAST)
    moment_grads = torch.randn_like(y_mean), torch.randn_like(y_var)
    grad_x, grad_weight, sums = triton.conv_stats_backward(
        grad_y, y, None, y_mean, *moment_grads, False, x, affine, mean, weight, True, *pairs, None, True, True
    )
    assert grad_x.stride() == x.stride() and grad_weight.stride() == weight.stride()
    ours = {"y": y, "grad_x": grad_x, "grad_affine": sums, "grad_weight": grad_weight}
    stock = gradients(x, affine, mean, weight, pairs, dtype, grad_y, moment_grads)
    exact = gradients(x, affine, mean, weight, pairs, torch.float64, grad_y, moment_grads)
    assert_all_as_exact(ours, stock, exact, margin=CHAIN_MARGIN)


@pytest.mark.parametrize("conv", [CONVS[name] for name in ("1x1-strided", "3x3-dilated", "3x1", "grouped")])
def test_a_plain_convolution_whose_gradient_joins_another(conv):
    x, _, _, weight, pairs = operands(conv, torch.float16, torch.float32)
    weight = laid_out(weight, "channels_last")
    rounded = weight.half()
    y, *nothing = triton.conv_stats(x, None, None, weight, True, *pairs, False)
    assert [t.numel() for t in nothing] == [0, 0]
    assert_as_exact(y, F.conv2d(x, rounded, None, *pairs), F.conv2d(x.double(), rounded.double(), None, *pairs))
    grad_y, other = torch.randn_like(y), torch.randn_like(x)
    options = (None, None, None, None, None, False, x, None, None, weight, True, *pairs)
    grad_x, grad_weight, sums = triton.conv_stats_backward(grad_y, *options, other, True, True)
    assert sums.numel() == 0 and grad_weight.dtype == torch.float32 and grad_weight.stride() == weight.stride()

    def found(wide):
        leaves = leaf(x, wide), leaf(rounded, wide)
        grads = torch.autograd.grad(F.conv2d(*leaves, None, *pairs), leaves, grad_y.to(wide))
        return {"grad_x": grads[0] + other.to(wide), "grad_weight": grads[1]}

    ours = {"grad_x": grad_x, "grad_weight": grad_weight.half()}
    assert_all_as_exact(ours, found(torch.float16), found(torch.float64), margin=CHAIN_MARGIN)
    in_place = other.clone()
    again, _ = triton.conv_stats_backward_(grad_y, *options, in_place, True)
    assert torch.equal(in_place, grad_x) and torch.equal(again, grad_weight)
    alone = triton.conv_stats_backward(grad_y, *options, other, True, False)
    assert torch.equal(alone[0], grad_x) and alone[1].numel() == 0
    alone = triton.conv_stats_backward(grad_y, *options, None, False, True)
    assert torch.equal(alone[1], grad_weight) and alone[0].numel() == 0


@pytest.mark.parametrize(("moments", "y_relu"), [("both", True), ("both", False), ("mean", True), ("none", True)])
@DTYPES
def test_the_gradient_of_an_output_that_was_normalised_and_activated(dtype, y_relu, moments):
    """dY = dz*scale + grad_mean/M + 2*grad_var/M*(y - mean), dz by the mask of act((y - mean)*scale + bias)."""
    x, affine, mean, weight, pairs = operands(CONVS["2x2-stride-3"], dtype)
    y, y_mean, _ = triton.conv_stats(x, affine, mean, weight, True, *pairs, True)
    y_affine, grad = torch.randn(2, y.shape[1]), torch.randn_like(y)
    grad_mean = torch.randn_like(y_mean) if moments != "none" else None
    grad_var = torch.randn_like(y_mean) if moments == "both" else None
    grad_x, grad_weight, sums = triton.conv_stats_backward(
        grad, y, y_affine, y_mean, grad_mean, grad_var, y_relu, x, affine, mean, weight, True, *pairs, None, True, True
    )

    def found(wide):
        vectors = torch.float64 if wide == torch.float64 else torch.float32
        stored = leaf(y, wide)
        out = reference.normalized(stored, y_affine.to(vectors), y_mean.to(vectors), "relu" if y_relu else "identity")
        dy = torch.autograd.grad(out, stored, grad.to(wide))[0].to(vectors)
        count, nothing = y.numel() // y.shape[1], torch.zeros_like(y_mean)
        for vector, factor in ((grad_mean, 1), (grad_var, 2 * (stored.detach() - y_mean.to(vectors)[:, None, None]))):
            dy = dy + (nothing if vector is None else vector).to(vectors)[:, None, None] * factor / count
        leaves = leaf(x, wide), leaf(affine, vectors), leaf(weight, wide)
        a = reference.normalized(leaves[0], leaves[1], mean.to(vectors))
        grads = torch.autograd.grad(F.conv2d(a, leaves[2], None, *pairs), leaves, dy.to(wide))
        return dict(zip(("grad_x", "grad_affine", "grad_weight"), grads, strict=True))

    ours = {"grad_x": grad_x, "grad_affine": sums, "grad_weight": grad_weight}
    assert_all_as_exact(ours, found(dtype), found(torch.float64), margin=CHAIN_MARGIN)


@pytest.mark.parametrize("conv", [CONVS["1x1"], CONVS["grouped"]], ids=["1x1", "grouped"])
def test_programs_that_walk_many_tiles(conv, monkeypatch):
    """Long slabs, one of them short, give what one tile a program gives."""
    x, affine, mean, weight, pairs = operands((*conv[:7], 9, 8), torch.float32)

    def found():
        y, *moments = triton.conv_stats(x, affine, mean, weight, True, *pairs, True)
        grads = triton.conv_stats_backward(
            y, y, None, moments[0], moments[0], moments[1], False, x, affine, mean, weight, True, *pairs, x, True, True
        )
        return y, *moments, *grads

    short = found()
    monkeypatch.setattr(schedule, "_PROGRAMS", 2)
    for ours, exact in zip(found(), short, strict=True):
        assert_as_exact(ours, exact, exact.double())


@DTYPES
def test_masks_have_the_forward_pass_bits(dtype):
    """A 1x1 convolution with the identity shows the activated input, and the sum of dz counts where it is positive."""
    channels = 16
    x = image((2, channels, 9, 9), dtype, "channels_last")
    mean, affine = x.float().mean((0, 2, 3)), torch.randn(2, channels)
    affine[0] = (mean - x[0, :, 0, 0].float()) * affine[1]  # the first pixel is at the kink, but for rounding
    weight, pairs = torch.eye(channels, dtype=dtype)[:, :, None, None], ([1, 1], [0, 0], [1, 1], 1)
    a, *_ = triton.conv_stats(x, affine, mean, weight, True, *pairs, False)
    assert torch.equal(a, reference.scale_shift_act(x, affine[1], affine[0] - mean * affine[1]))
    ones = torch.ones_like(x)
    options = (None, None, None, None, None, False, x, affine, mean, weight, True, *pairs, None, True, False)
    grad_x, _, sums = triton.conv_stats_backward(ones, *options)
    exact = reference.scale_shift_act(x.double(), affine[1].double(), (affine[0] - mean * affine[1]).double()) > 0
    assert (exact != (a > 0)).sum() <= channels  # only the pixel at the kink may differ from float64
    assert torch.equal(sums[0], (grad_x != 0).sum((0, 2, 3)).float())
    if dtype == torch.float32:
        assert torch.equal(grad_x != 0, a > 0)


def test_variance_far_from_zero():
    """E[y^2] - E[y]^2 would keep no digit of it."""
    x = image((2, 8, 15, 17), layout="channels_last", mean=100, std=1)
    weight = torch.eye(8)[:, :, None, None]
    _, mean, var = triton.conv_stats(x, None, None, weight, False, [1, 1], [0, 0], [1, 1], 1, True)
    wide = x.double()
    assert torch.allclose(mean.double(), wide.mean((0, 2, 3)), rtol=1e-6)
    assert torch.allclose(var.double(), wide.var((0, 2, 3), correction=0), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of what is tested
def test_what_is_not_finite_is_passed_on():
    x, affine, mean, weight, pairs = operands(CONVS["3x3"], torch.float32)
    mean.zero_()
    affine.fill_(1)
    x[0, 0, 0, 0], x[1, 2, 6, 8] = float("nan"), float("inf")
    y, y_mean, _ = triton.conv_stats(x, affine, mean, weight, True, *pairs, True)
    stock = F.conv2d(F.relu(x + 1), weight, None, *pairs)
    assert torch.equal(y.isnan(), stock.isnan()) and torch.equal(y.isinf(), stock.isinf())
    assert y_mean.isnan().all()
    grad_x, *_ = triton.conv_stats_backward(
        torch.ones_like(y),
        None,
        None,
        None,
        None,
        None,
        False,
        x,
        affine,
        mean,
        weight,
        True,
        *pairs,
        None,
        True,
        False,
    )
    assert grad_x[0, 0, 0, 0] != 0 and grad_x.isfinite().all()  # as torch's, whose ReLU lets a NaN's gradient through


def test_bad_input_is_named_before_any_launch():
    x, affine, mean, weight, pairs = operands(CONVS["3x3"], torch.float32)
    rest = (True, *pairs, True)
    for arguments, error, message in (
        ((x.contiguous(), affine, mean, weight), ValueError, "x must be channels_last"),
        ((x.double(), affine, mean, weight), TypeError, "x must be float16, bfloat16 or float32"),
        ((x, affine, None, weight), ValueError, "affine needs a mean"),
        ((x, affine[:, :2], mean, weight), ValueError, "affine must be contiguous float32"),
        ((x, affine.to("meta"), mean, weight), ValueError, f"affine must be on {x.device}, got meta"),
        ((x, affine, mean.to("meta"), weight), ValueError, "the mean beside affine must be on"),
        ((x, affine, mean, weight.double()), TypeError, "weight must be float32"),
        ((x, affine, mean, weight[:, :2]), ValueError, "weight must be"),
    ):
        with pytest.raises(error, match=message):
            triton.conv_stats(*arguments, *rest)
    with pytest.raises(ValueError, match="fit its padded input"):
        triton.conv_stats(x[:, :, :1, :1].contiguous(memory_format=LAST), None, None, weight, True, [1, 1], [0, 0],
                          [1, 1], 1, False)  # fmt: skip
    y, *_ = triton.conv_stats(x, affine, mean, weight, *rest)
    options = (None, None, None, None, False, x, affine, mean, weight, True, *pairs, None, True, True)
    for arguments, message in (
        ((y[:1], None), "grad_y must have shape"),
        ((y, y), "y needs its mean"),
        ((y, y, None, torch.zeros(y.shape[1], device="meta")), "y_mean must be on"),
    ):
        with pytest.raises(ValueError, match=message):
            triton.conv_stats_backward(*arguments, *options[len(arguments) - 2 :])


@pytest.mark.parametrize("prologue", [True, False], ids=["prologue", "plain"])
@pytest.mark.parametrize("through", ["affine", "moments", "none"])
def test_the_composition_is_the_same_unit(through, prologue):
    """torch's convolution with passes around it, for every way that dY is formed."""
    x, affine, mean, weight, pairs = operands(CONVS["3x3-strided"], torch.float16, torch.float32)
    source = (x, affine, mean) if prologue else (x, None, None)
    composed = CANDIDATES["composed"]
    results = [kind.conv_stats(*source, weight, True, *pairs, True) for kind in (triton, composed)]
    y, y_mean, _ = results[0]
    grad, other = torch.randn_like(y), torch.randn_like(x)
    y_affine = torch.randn(2, y.shape[1]) if through == "affine" else None
    moments = (y_mean, torch.randn_like(y_mean), torch.randn_like(y_mean)) if through != "none" else (None,) * 3
    options = (grad, None if through == "none" else y, y_affine, *moments, True, *source, weight, True, *pairs, other)
    grads = [kind.conv_stats_backward(*options, True, True) for kind in (triton, composed)]
    for ours, theirs in [*zip(*results, strict=True), *zip(*grads, strict=True)]:
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        assert (ours.double() - theirs.double()).norm() <= 2e-3 * theirs.double().norm()
    in_place = other.clone()
    found = composed.conv_stats_backward_(*options[:-1], in_place, True)
    assert (in_place.double() - grads[1][0].double()).norm() <= 1e-3 * in_place.double().norm()
    assert all(torch.equal(a, b) for a, b in zip(found, grads[1][1:], strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("conv_stats")])
def test_opcheck(case):
    opcheck(getattr(ops.of("triton"), case.split()[0]), CASES[case](*tile_operands(TILE_CONVS["3x3"], torch.float32)))
