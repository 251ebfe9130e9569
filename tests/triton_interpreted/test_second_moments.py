"""second_moments in Triton's interpreter: mean and covariance against float64."""

import pytest
import torch
from numerics import assert_as_exact, image

from resfuse import ops, reference
from resfuse._triton import LAUNCHERS

LAST = torch.channels_last
# bfloat16 on a GPU alone: see conftest.py
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
second_moments = ops.of("triton").second_moments


def moments_of(a):
    """Mean and biased covariance of an activation's channels, in its own dtype, or in float32 beside a narrower one."""
    pixels = a.permute(0, 2, 3, 1).flatten(0, 2)
    pixels = pixels if a.dtype in (torch.float32, torch.float64) else pixels.float()
    centered = pixels - pixels.mean(0)
    return pixels.mean(0), centered.T @ centered / pixels.shape[0]


@pytest.mark.parametrize("ratio", [0, 1, 10, 100])
@DTYPES
def test_they_do_not_cancel(dtype, ratio):
    """With mean/std up to 100 the covariance keeps its digits, as a sum of shifted products must."""
    x = (torch.randn(4, 33, 13, 11) + ratio).to(dtype).contiguous(memory_format=LAST)
    mean, covariance = second_moments(x, None, None, False, [1, 1])
    exact_mean, exact = moments_of(x.double())
    # shifted values are rounded to 16 bits again
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    assert (covariance - exact).norm() / exact.norm() < tolerance
    assert ((covariance.diagonal() - exact.diagonal()) / exact.diagonal()).abs().max() < tolerance
    assert (mean - exact_mean).abs().max() < tolerance
    assert torch.equal(covariance, covariance.T)


@pytest.mark.parametrize("ratio", [0, 0.3, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2.5e-5), (torch.bfloat16, 2e-4)], ids=str)
def test_deviations_are_not_all_rounded_one_way(dtype, tolerance, ratio):
    """The mean of many is off by less than any of them: values of few bits less a pivot of more all round alike."""
    x = (torch.randn(4, 33, 39, 33) + ratio).to(dtype).contiguous(memory_format=LAST)
    mean, _ = second_moments(x, None, None, False, [1, 1])
    assert (mean - moments_of(x.double())[0]).abs().max() < tolerance


@pytest.mark.parametrize("stride", [[1, 1], [2, 2], [3, 1]], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 1, 7), (3, 65, 9, 5), (2, 150, 6, 5)], ids=str)
@DTYPES
def test_behind_a_prologue(dtype, shape, stride):
    """Channels that fill no block, one block, and several; pixels that a strided convolution reads."""
    x = image(shape, dtype, "channels_last")
    affine = torch.stack([torch.rand(shape[1]), torch.randn(shape[1])])
    mean = x.float().mean((0, 2, 3))
    ours = second_moments(x, affine, mean, True, stride)

    def path(kind):
        a = reference.normalized(x.to(kind), affine.to(kind), mean.to(kind))
        return moments_of(a[:, :, :: stride[0], :: stride[1]])

    for found, stock, exact in zip(ours, path(dtype), path(torch.float64), strict=True):
        assert_as_exact(found, stock.float(), exact)


def test_the_identity_as_activation_and_one_pixel():
    x = image((1, 5, 1, 1), layout="channels_last", mean=-1)
    affine, mean = torch.stack([-torch.ones(5), torch.ones(5)]), torch.zeros(5)
    found, covariance = second_moments(x, affine, mean, False, [2, 2])
    assert torch.equal(found, x.flatten() - 1) and not covariance.any()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_channel_that_is_not_finite_spoils_no_other(value):
    x = image((2, 6, 5, 5), layout="channels_last")
    x[0, 2, 0, 0] = value
    mean, covariance = second_moments(x, None, None, False, [1, 1])
    others = [0, 1, 3, 4, 5]
    exact_mean, exact = moments_of(x.double()[:, others])
    assert torch.allclose(mean[others].double(), exact_mean, atol=1e-6)
    assert torch.allclose(covariance[others][:, others].double(), exact, atol=1e-6)
    assert mean[2].isnan() if value != value else mean[2] == value
    assert covariance[2, 2].isnan()


def test_second_moments_name_bad_input():
    x = image((2, 4, 3, 3), layout="channels_last")
    affine, mean = torch.zeros(2, 4), torch.zeros(4)
    for arguments, error, message in (
        ((x.double(), None, None), TypeError, r"x must be float16, bfloat16 or float32 .* got torch\.float64"),
        ((x.contiguous(), None, None), ValueError, r"x must be channels_last"),
        ((x, affine[:, :3], mean), ValueError, r"affine must be contiguous float32 \(2, 4\)"),
        ((x, affine.to("meta"), mean), ValueError, r"affine must be on .*, got meta"),
        ((x, affine, None), ValueError, r"affine needs a mean"),
        ((x, affine, mean[:3]), ValueError, r"the mean beside affine must be contiguous float32 \(4,\)"),
    ):
        with pytest.raises(error, match=message):
            LAUNCHERS["second_moments"](*arguments, True, [1, 1])
