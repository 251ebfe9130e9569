"""The tolerance itself: it passes correct results, and fails zero, missing, slightly wrong and NaN ones."""

import pytest
import torch
from numerics import DTYPES, assert_as_exact


@pytest.fixture
def gradient():
    """(stock, exact): a gradient as rounded to float32, and in float64."""
    exact = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    return exact.float(), exact


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rounding_passes(dtype):
    exact = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    assert_as_exact(exact.to(dtype), exact.to(dtype), exact, "grad_x")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros_like, "off by"),
        (lambda g: g * 1.01, "off by 1.00e-02"),
        (lambda g: g.where(g != g.max(), 1.01 * g), "off by"),
        (lambda g: g.where(g != g.max(), torch.nan), "1 values that are not finite"),
        (lambda g: g.double(), "float64, stock torch.float32"),
        (lambda g: g[:2], "has shape"),
        (lambda g: None, "missing"),
    ],
    ids=["zero", "one-percent", "one-value", "nan", "dtype", "shape", "missing"],
)
def test_wrong_gradients_fail(gradient, wrong, message):
    stock, exact = gradient
    assert_as_exact(stock.clone(), stock, exact, "grad_x")
    with pytest.raises(AssertionError, match=message):
        assert_as_exact(wrong(stock), stock, exact, "grad_x")


def test_gradients_that_prove_nothing_fail(gradient):
    stock, exact = gradient
    with pytest.raises(AssertionError, match="proves nothing"):
        assert_as_exact(torch.zeros_like(stock), torch.zeros_like(stock), torch.zeros_like(exact), "grad_x")
    with pytest.raises(AssertionError, match="proves nothing"):
        assert_as_exact(stock, stock * 1.1, exact, "grad_x")


def test_at_most_twice_stocks_error(gradient):
    _, exact = gradient
    noise = torch.randn_like(exact) * 1e-4
    stock = (exact + noise).float()
    assert_as_exact((exact - 1.9 * noise).float(), stock, exact)
    with pytest.raises(AssertionError, match="off by"):
        assert_as_exact((exact - 2.1 * noise).float(), stock, exact)


def test_scale_replaces_a_vanishing_norm():
    exact = torch.full((8,), 1e-9, dtype=torch.float64)
    ours, stock = torch.zeros(8), exact.float()
    with pytest.raises(AssertionError, match="off by"):
        assert_as_exact(ours, stock, exact, "running_mean")
    assert_as_exact(ours, stock, exact, "running_mean", scale=8**0.5)


def test_an_oracle_that_is_not_finite_is_refused(gradient):
    stock, exact = gradient
    with pytest.raises(AssertionError, match="oracle"):
        assert_as_exact(stock, stock, exact * torch.inf)


def test_poisoned_memory_is_nan(poisoned):
    assert torch.empty(64).isnan().all()
