"""Convolutions that torch computes in float32 because it would emulate bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_exact, image, leaf

import resfuse.functional as RF
from resfuse import _calls, backends, ops
from resfuse.autograd_wide import convolve
from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters

BFLOAT16 = torch.bfloat16
CONVS = {
    "3x3": (3, 5, 3, ([1, 1], [1, 1], [1, 1], 1)),
    "strided": (4, 6, 3, ([2, 1], [1, 0], [1, 2], 1)),
    "grouped": (6, 4, 1, ([1, 1], [0, 0], [1, 1], 2)),
}


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_as_exact_as_torch(conv, with_bias):
    channels, out, kernel, geometry = conv
    x = image((2, channels, 9, 8), BFLOAT16, "channels_last")
    weight = torch.randn(out, channels // geometry[3], kernel, kernel)
    bias = torch.randn(out) if with_bias else None
    found, grad_y = [], None
    for dtype, conv2d in ((torch.float64, F.conv2d), (BFLOAT16, F.conv2d), (BFLOAT16, None)):
        own = [leaf(t, t.dtype if conv2d is None and t is not x else dtype) for t in (x, weight, bias) if t is not None]
        arguments = (*own, None)[:3]
        y = convolve(*arguments, geometry) if conv2d is None else conv2d(*arguments, *geometry)
        grad_y = torch.randn_like(y) if grad_y is None else grad_y
        found.append([y, *torch.autograd.grad(y, own, grad_y.to(y.dtype))])
        if conv2d is None:
            assert y.dtype == BFLOAT16 and [t.grad_fn is None for t in own] == [True] * len(own)
            assert [g.dtype for g in found[-1][1:]] == [t.dtype for t in own]
    for exact, stock, ours in zip(*found, strict=True):
        assert exact.norm() > 0
        assert_as_exact(ours.to(BFLOAT16), stock, exact)


def test_gradients_that_nobody_wants_and_derivatives_twice():
    x, weight = image((2, 3, 5, 5), BFLOAT16), torch.randn(4, 3, 3, 3)
    geometry = CONVS["3x3"][3]
    own = leaf(weight, weight.dtype)
    (grad,) = torch.autograd.grad(convolve(x, own, None, geometry).float().square().sum(), own, create_graph=True)
    (twice,) = torch.autograd.grad(grad.square().sum(), own)
    exact = leaf(weight, torch.float64)
    (grad,) = torch.autograd.grad(F.conv2d(x.double(), exact, None, 1, 1).square().sum(), exact, create_graph=True)
    (expected,) = torch.autograd.grad(grad.square().sum(), exact)
    assert (twice - expected).norm() < 0.02 * expected.norm()
    assert not convolve(x, weight, None, geometry).requires_grad


def test_only_what_came_is_kept(monkeypatch):
    monkeypatch.setattr(ops, "tile_operands", {BFLOAT16: torch.float32})
    monkeypatch.setattr(backends, "_TILE_CHANNELS", {BFLOAT16: 10**6})
    x, weight = leaf(image((2, 8, 6, 6), BFLOAT16, "channels_last"), BFLOAT16), leaf(torch.randn(8, 8, 3, 3), BFLOAT16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = _calls.convolve(x, Conv2dParameters(weight, None, 1, 1))
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()} and y.dtype == BFLOAT16


@pytest.mark.parametrize("padding", [1, "same"])
def test_a_composition_under_autocast(monkeypatch, padding):
    """Where torch would emulate, y is the float32 convolution rounded once; a padding's name changes nothing else."""
    monkeypatch.setattr(ops, "tile_operands", {BFLOAT16: torch.float32})
    monkeypatch.setattr(backends, "_TILE_CHANNELS", {BFLOAT16: 10**6})
    x, weight = image((2, 8, 6, 6), torch.float32, "channels_last"), torch.randn(8, 8, 3, 3)
    bn = BatchNorm2dParameters(torch.zeros(8), torch.ones(8))
    with torch.autocast("cpu", BFLOAT16):
        y = RF.conv_bn_act(x, Conv2dParameters(weight, None, 1, padding), bn)
        stock = F.relu(F.batch_norm(F.conv2d(x, weight, None, 1, padding), bn.running_mean, bn.running_var))
    exact = F.relu(F.batch_norm(F.conv2d(x.double(), weight.double(), None, 1, 1), *(t.double() for t in bn[:2])))
    assert y.dtype == BFLOAT16
    assert_as_exact(y, stock, exact)
