"""The algebra of train-time folding: the native operators on K-by-C matrices, against float64."""

import pytest
import torch

from resfuse import ops

pytestmark = pytest.mark.skipif(not ops.tile_dtypes, reason="this processor has no tile kernels (AVX-512 or AVX2)")

DTYPES = pytest.mark.parametrize("dtype", sorted(ops.tile_dtypes, key=str), ids=str)
SIZES = pytest.mark.parametrize("size", [(256, 64), (70, 33), (5, 3), (1, 1), (40, 200), (513, 129)], ids=str)
PIXELS, EPS = 77, 1e-5


def covariance_of(channels):
    deviations = torch.randn(2 * channels + 1, channels)
    return deviations.T @ deviations / len(deviations)


def exact_backward(gram, grad_bias, weight, a_mean, covariance, var, scale, dtype):
    """grad_weight_bn, grad_weight, W', correction, row in float64; W' and correction rounded as they are multiplied."""
    wide = [t.double() for t in (gram, grad_bias, weight, a_mean, covariance, var, scale)]
    gram, grad_bias, weight, a_mean, covariance, var, scale = wide
    invstd = (var + EPS).rsqrt()
    centered = gram - torch.outer(grad_bias, a_mean)
    grad_weight_bn = invstd * (centered * weight).sum(1)
    slope = scale * invstd * grad_weight_bn
    grad_weight = centered * scale[:, None] - (weight @ covariance) * slope[:, None]
    folded = (weight * scale[:, None]).to(dtype).double()
    correction = -((weight * (slope / PIXELS)[:, None]).T @ weight).to(dtype).double()
    row = -(folded * (grad_bias / PIXELS)[:, None]).sum(0) - (correction * a_mean[:, None]).sum(0)
    return grad_weight_bn, grad_weight, folded, correction, row


@SIZES
@DTYPES
def test_the_folded_weight_and_its_statistics(size, dtype):
    rows, channels = size
    weight, a_mean, covariance = torch.randn(size), torch.randn(channels) * 10, covariance_of(channels)
    mean, var = ops.folded_moments(weight, a_mean, covariance)
    wide, length = weight.double(), weight.norm(dim=1).double()
    assert ((mean - wide @ a_mean.double()).abs() <= 1e-6 * length * a_mean.norm()).all()
    torch.testing.assert_close(var.double(), ((wide @ covariance.double()) * wide).sum(1), rtol=2e-6, atol=0)
    scale, bias, like = torch.randn(rows), torch.randn(rows), torch.empty(0, dtype=dtype)
    for given in (bias, None):
        folded, shift = ops.folded_weight(weight, scale, given, a_mean, like)
        assert torch.equal(folded, (weight * scale[:, None]).to(dtype))
        exact = (0 if given is None else bias.double()) - folded.double() @ a_mean.double()
        assert ((shift - exact).abs() <= 2e-6 * (folded.double().norm(dim=1) * a_mean.norm() + 1)).all()


def test_a_variance_is_never_less_than_nothing():
    weight = torch.tensor([[1.0, -1.0], [0.0, 1.0], [torch.nan, 0.0]])
    _, var = ops.folded_moments(weight, torch.zeros(2), torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-6]]))
    assert var[0] == 0 and var[1] > 0 and var[2].isnan()


@SIZES
@DTYPES
def test_the_backward(size, dtype):
    rows, channels = size
    weight, a_mean, gram = torch.randn(size), torch.randn(channels), torch.randn(size)
    arguments = (gram, torch.randn(rows), weight, a_mean, covariance_of(channels), torch.rand(rows) + 0.1)
    arguments = (*arguments, torch.randn(rows))
    like = torch.empty(0, dtype=dtype)
    found = ops.folded_weight_backward(*arguments, PIXELS, EPS, like, True, True)
    exact = exact_backward(*arguments, dtype)
    names = ("grad_weight_bn", "grad_weight", "folded", "correction", "row")
    for name, ours, wanted in zip(names, found, exact, strict=True):
        if name == "correction":
            assert torch.equal(ours, ours.T) and torch.equal(ours, ours.to(dtype).float())
        # a correction on the boundary of two roundings may take the other one, which row then cancels
        rounded = dtype == torch.bfloat16 and name in ("correction", "row")
        assert (ours.double() - wanted).norm() <= (1e-3 if rounded else 2e-6) * wanted.norm(), name
    terms = found[2].double() * (arguments[1].double() / PIXELS)[:, None], found[3].double() * a_mean.double()[:, None]
    size = sum(term.abs().sum(0) for term in terms)
    assert ((found[4].double() + sum(term.sum(0) for term in terms)).abs() <= 1e-6 * size).all(), "of its own operands"
    for need_x, need_weight in ((True, False), (False, True), (False, False)):
        some = ops.folded_weight_backward(*arguments, PIXELS, EPS, like, need_x, need_weight)
        kept = [True, need_weight, need_x, need_x, need_x]
        for part, whole, wanted in zip(some, found, kept, strict=True):
            assert torch.equal(part, whole) if wanted else part.numel() == 0


def test_what_they_cannot_read_is_refused():
    weight, mean, covariance = torch.randn(5, 3), torch.randn(3), torch.rand(3, 3)
    for bad in ((weight.double(), mean, covariance), (weight, mean[:2], covariance), (weight, mean, covariance[:2])):
        with pytest.raises(RuntimeError, match="resfuse"):
            ops.folded_moments(*bad)
    with pytest.raises(RuntimeError, match="this machine has no tile kernels"):
        ops.folded_weight(weight, torch.rand(5), None, mean, torch.empty(0, dtype=torch.float64))
