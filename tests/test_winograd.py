"""3x3 convolutions by Winograd's method: what is special about them beside test_tiles.py, whose cases they share."""

import pytest
import torch
import torch.nn.functional as F
from numerics import image, leaf
from test_tiles import operands

from resfuse import ops

pytestmark = pytest.mark.skipif(
    torch.float32 not in ops.tile_dtypes, reason="this processor has no tile kernels (AVX-512 or AVX2)"
)
LAST = torch.channels_last


def conv(channels, out, height, width, padding=1):
    return channels, out, (3, 3), (1, 1), (padding, padding), (1, 1), 1, height, width


def plain(x, weight, grad, pairs):
    """y, grad_x and grad_weight of a convolution without a prologue."""
    y, *_ = ops.conv_stats(x, None, None, weight, False, *pairs, False)
    options = (None, None, None, None, None, False, x, None, None, weight, False, *pairs, None, True, True)
    grad_x, grad_weight, _ = ops.conv_stats_backward(grad, *options)
    return {"y": y, "grad_x": grad_x, "grad_weight": grad_weight}


def torch_plain(x, weight, grad, pairs, dtype=None):
    """The same by torch, which multiplies in the activation's dtype unless another is given."""
    dtype = dtype or x.dtype
    leaves = leaf(x, dtype), leaf(weight, dtype)
    y = F.conv2d(*leaves, None, *pairs)
    grad_x, grad_weight = torch.autograd.grad(y, leaves, grad.to(dtype))
    return {"y": y.detach(), "grad_x": grad_x, "grad_weight": grad_weight}


def inputs(shape, images, dtype=torch.float32):
    """The weight stays float32, as under autocast."""
    x, _, _, weight, pairs = operands(shape, torch.float32, images=images)
    out = F.conv2d(x, weight, None, *pairs).shape
    return x.to(dtype), weight, torch.randn(out).to(dtype).contiguous(memory_format=LAST), pairs


NO_BFLOAT16 = pytest.mark.skipif(
    torch.bfloat16 not in ops.tile_dtypes, reason="this processor has no bfloat16 tile kernels"
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=NO_BFLOAT16)], ids=str)


@DTYPES
@pytest.mark.parametrize(("shape", "images"), [
    (conv(64, 64, 28, 28), 2), (conv(32, 48, 5, 5), 23), (conv(40, 33, 7, 3), 9), (conv(256, 128, 14, 14), 4),
], ids=str)  # fmt: skip
def test_no_floor_is_needed(shape, images, dtype):
    """Errors are within twice those of stock alone. Small maps: tiles of several images are multiplied together, and
    blocks of bfloat16 are paired across rows and images, whose number is odd."""
    x, weight, grad, pairs = inputs(shape, images, dtype)
    exact = torch_plain(x, weight, grad, pairs, torch.float64)
    ours, stock = plain(x, weight, grad, pairs), torch_plain(x, weight, grad, pairs)
    for name, value in exact.items():
        error, bound = (((found[name].double() - value).norm() / value.norm()).item() for found in (ours, stock))
        assert 0 < error <= 2 * bound, name


@DTYPES
@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (3, 3), (6, 5), (12, 8)], ids=str)
def test_an_infinity_spreads_as_far_as_torchs(place, value, dtype):
    """It may become NaN, in the outputs that read it and in no other."""
    x, weight, grad, pairs = inputs(conv(64, 64, 13, 9), 2, dtype)
    x[(1, 5, *place)] = value
    ours, stock = plain(x, weight, grad, pairs)["y"], torch_plain(x, weight, grad, pairs)["y"]
    assert torch.equal(ours.isfinite(), stock.isfinite()) and not ours.isfinite().all()


@DTYPES
@pytest.mark.parametrize(("shape", "images"), [(conv(64, 64, 13, 9), 3), (conv(32, 160, 7, 7), 17)], ids=str)
def test_bits_do_not_depend_on_threads(shape, images, dtype, threads):
    """A weight's gradient is shared out by their number."""
    operands_ = inputs(shape, images, dtype)
    found = []
    for count in (1, 2, 3, 8):
        threads(count)
        found.append(plain(*operands_))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@pytest.mark.parametrize("place", [(4, 7), (5, 6), (0, 0), (11, 10)], ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_reaches_whom_it_reaches_in_stock(value, place):
    """An infinity may become NaN: blocks add and subtract it."""
    x, weight, _, pairs = inputs(conv(32, 32, 12, 12), 2)
    x[1, 5, place[0], place[1]] = value
    found, *_ = ops.conv_stats(x, None, None, weight, False, *pairs, False)
    stock = F.conv2d(x, weight, None, *pairs)
    assert not stock.isfinite().all() and torch.equal(found.isfinite(), stock.isfinite())


@DTYPES
def test_a_mean_of_a_hundred_deviations_cancels_nothing(dtype):
    """B^T d B subtracts neighbours: what is large and common to them costs no more than it costs stock."""
    _, weight, grad, pairs = inputs(conv(64, 64, 14, 14), 2)
    x, grad = image((2, 64, 14, 14), dtype, "channels_last", mean=100.0), grad.to(dtype)
    exact = torch_plain(x, weight, grad, pairs, torch.float64)["y"]
    ours, stock = plain(x, weight, grad, pairs)["y"], torch_plain(x, weight, grad, pairs)["y"]
    assert (ours - exact).norm() <= 2 * (stock - exact).norm()


@NO_BFLOAT16
def test_a_weight_in_bfloat16_is_not_rounded_twice():
    """A direct convolution multiplies it as it is: what is off is the result's rounding, as in stock."""
    x, weight, grad, pairs = inputs(conv(64, 64, 14, 14), 2, torch.bfloat16)
    weight = weight.bfloat16()
    exact = torch_plain(x, weight, grad, pairs, torch.float64)["y"]
    ours, stock = plain(x, weight, grad, pairs)["y"], torch_plain(x, weight, grad, pairs)["y"]
    assert (ours - exact).norm() <= 1.05 * (stock - exact).norm()
