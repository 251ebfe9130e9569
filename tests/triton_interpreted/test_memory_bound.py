"""The memory-bound units in Triton's interpreter: outputs, statistics and every gradient against the reference."""

import copy
from functools import partial

import pytest
import test_stem
import test_units
import torch
from numerics import DENSE, RESIDUALS, TRAIN_EVAL, assert_as_exact, gradient_for, image
from test_stem import (
    STEM,
    WINDOWS,
    test_values_are_compared_after_rounding,  # noqa: F401  the test itself
)
from test_units import (  # noqa: F401  the tests themselves
    SMALL,
    bn_act_inputs,
    check_bn_act,
    test_empty_activations_as_stock,
    test_finalize,
    test_momentum_and_tracking,
    test_relu_of_special_values,
    test_special_values_propagate_as_stock,
    test_strided_vectors,
    test_zero_and_negative_gamma_and_tiny_variance,
)

import resfuse
from resfuse import functional, models, nn, ops
from resfuse._triton import walk

pytestmark = pytest.mark.usefixtures("native_is_triton")

LAYOUTS = pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "contiguous"), (torch.float16, "channels_last")],
    ids=["float32-contiguous", "float16-channels_last"],
)


@pytest.fixture
def long_slabs(monkeypatch):
    """Few programs, each of several tiles."""
    monkeypatch.setattr(walk, "_PROGRAMS", 3)


@TRAIN_EVAL
@LAYOUTS
@pytest.mark.parametrize("residual", RESIDUALS)
def test_bn_act(dtype, layout, residual, training):
    check_bn_act(*bn_act_inputs(SMALL, dtype, layout, residual, training=training))


@DENSE
@pytest.mark.parametrize("shape", [(6, 1, 1, 1), (2, 3, 7, 7), (3, 17, 1, 9), (40, 5, 1, 1)], ids=str)
def test_shapes(shape, layout):
    check_bn_act(*bn_act_inputs(shape, torch.float32, layout, "raw"))


@LAYOUTS
@pytest.mark.parametrize("residual", RESIDUALS)
def test_slabs_of_several_tiles(residual, dtype, layout, long_slabs):
    check_bn_act(*bn_act_inputs((3, 5, 31, 33), dtype, layout, residual))


@DENSE
@pytest.mark.parametrize("mean", [100.0, -1000.0])
def test_mean_much_larger_than_std(layout, mean, long_slabs):
    x = image((4, 5, 23, 23), torch.float32, layout, mean=mean)
    ours, stock = functional.moments(x), torch.var_mean(x, (0, 2, 3), correction=0)[::-1]
    exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)[::-1]
    assert ((ours.var - exact[1]) / exact[1]).abs().max() < 1e-6
    assert_as_exact(ours.mean, stock[0], exact[0], "mean", scale=exact[1].sqrt().norm())


def test_blocks_of_channels():
    check_bn_act(*bn_act_inputs((2, 257, 3, 2), torch.float32, "channels_last", "raw"))


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_windows_of_a_stem(window):
    test_stem.check(*test_stem.inputs_of(test_stem.SMALL, torch.float32, "channels_last"), window)


@TRAIN_EVAL
@pytest.mark.parametrize("window", ["stem", "uneven"])
def test_a_stem_in_contiguous_memory(window, training):
    test_stem.check(*test_stem.inputs_of((2, 3, 9, 8), torch.float16, training=training), WINDOWS[window])


@TRAIN_EVAL
def test_special_values_of_the_stem(training):
    test_stem.test_special_values_propagate_as_stock("channels_last", torch.float32, training)


def test_a_stem_of_several_tiles(long_slabs):
    test_stem.check(*test_stem.inputs_of((2, 20, 31, 33), torch.float16, "channels_last"), STEM)


def step(module, x, call=None):
    out = (module if call is None else call)(x)
    out.sum().backward()
    return [out.detach(), *(p.grad for p in module.parameters()), *module.buffers()]


def test_a_network_by_name(monkeypatch):
    """fuse(backend="triton"): nothing of the C++ kernels is called."""
    monkeypatch.setitem(ops._overloads, "native", None)
    stock = models.CifarResNet(8).to(memory_format=torch.channels_last)
    ours = resfuse.fuse(copy.deepcopy(stock), backend="triton", strict=True)
    x = image((2, 3, 8, 8), layout="channels_last")
    for mine, theirs in zip(step(ours, x), step(stock, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_torch_compile_traces_it_whole(monkeypatch):
    monkeypatch.setitem(ops._overloads, "native", None)
    module = nn.BNAct2d(5, backend="triton")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = image((2, 5, 4, 4), layout="channels_last")
    again = copy.deepcopy(module)
    for mine, theirs in zip(step(module, x, compiled), step(again, x), strict=True):
        assert torch.equal(mine, theirs)


def test_derivatives_of_second_order():
    x, r = torch.randn(2, 1, 2, 2, 2, dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradgradcheck(partial(functional.add_relu, residual=r, backend="triton"), x)


def test_bits_are_the_same_from_run_to_run(long_slabs):
    x, bn, r, other = bn_act_inputs((2, 9, 17, 19), torch.float16, "channels_last", "raw")
    grad = gradient_for(torch.randn(x.shape), torch.float16)
    first, second = (test_units.run_bn_act(test_units.native_bn_act, x, bn, r, other, grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strides_that_address_nothing_may_differ():
    """1x1 maps are dense in both layouts, and torch describes them in either way."""
    values, residual = torch.randn(2, 3, 8, 1, 1)
    x = torch.empty_like(values, memory_format=torch.channels_last).copy_(values)
    assert x.stride() != residual.stride()
    scale, shift = torch.randn(2, 8)
    out = ops.of("triton").scale_shift_act(x, scale, shift, residual, None, None, True)
    expected = torch.relu(values * scale[:, None, None] + shift[:, None, None] + residual)
    torch.testing.assert_close(out, expected)
