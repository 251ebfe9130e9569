"""Inf and NaN in an activation: the moments of tiles merge to what stock's sums give."""

import pytest
import torch
from numerics import DENSE, EVERY_DTYPE, laid_out
from torch import nn

from resfuse import backends, functional, ops
from resfuse.nn import batch_norm_parameters

pytestmark = pytest.mark.skipif(
    backends.missing("bn_act", "native", "cpu", torch.float32) is not None, reason="the native library is missing"
)
INF, NAN = torch.inf, torch.nan
VALUES = {"inf": (INF,), "-inf": (-INF,), "twice": (INF, INF), "both": (INF, -INF), "nan": (NAN,), "mixed": (INF, NAN)}
# the first image and the first tile, the last ones, and one value in each: what is merged and what it is merged into
PLACES = {"first": ((0, 0), (0, 1)), "last": ((-1, -1), (-1, -2)), "apart": ((0, 0), (-1, -1))}
SHAPES = [(4, 5, 9, 9), (6, 24, 40, 40)]  # one tile an image; many tiles, and slabs of them


def spoiled(shape, dtype, values, places):
    """A random activation whose channel 1 holds these values at these (image, pixel)."""
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    for value, (image, pixel) in zip(values, places, strict=False):
        x[image, 1].view(-1)[pixel] = value
    return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@DENSE
@EVERY_DTYPE
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("values", VALUES)
def test_running_statistics_are_stocks(values, place, dtype, layout, shape):
    x = laid_out(spoiled(shape, dtype, VALUES[values], PLACES[place]), layout)
    stock, ours = (nn.BatchNorm2d(shape[1], dtype=ops.accumulate_dtype(dtype)) for _ in range(2))
    stock(x)
    functional.bn_act(x, batch_norm_parameters(ours), backend="native")
    assert not stock.running_mean[1].isfinite() and stock.running_var[1].isnan()
    rtol = 1e-4 if dtype.itemsize == 2 else 1e-5
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(stock, name), equal_nan=True, rtol=rtol, atol=rtol)
