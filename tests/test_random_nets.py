"""Whole residual networks drawn at random: one training step, fused, is as exact as stock's."""

import copy
import random

import pytest
import torch
from numerics import CHAIN_MARGIN, assert_all_as_exact, image, judged, step
from torch import nn

import resfuse
from resfuse import ops
from resfuse.models import BasicBlock, Bottleneck

LAST = torch.channels_last


def random_net(blocks, rng):
    """Blocks of odd widths, both kinds, strides, all shortcuts; gammas of both signs, one in eight of them zero."""
    channels = rng.choice([3, 5, 8, 17, 33])
    first, modules = channels, []
    for i in range(blocks):
        stride = rng.choice([1, 1, 2]) if i < 3 else 1
        bottleneck = rng.random() < 0.6
        planes = rng.choice([3, 7, 8, 13, 16, 19])
        out = 4 * planes if bottleneck else planes
        if rng.random() < 0.3 and stride == 1:  # identity
            out = channels
            planes = channels // 4 if bottleneck else channels
            bottleneck = bottleneck and channels % 4 == 0
            planes = planes if bottleneck else channels
        downsample = None
        if stride != 1 or out != channels:
            downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        modules.append((Bottleneck if bottleneck else BasicBlock)(channels, planes, stride, downsample))
        channels = out
    net = nn.Sequential(*modules)
    with torch.no_grad():
        for bn in net.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.weight.copy_((torch.rand_like(bn.weight) + 0.5) * torch.randn_like(bn.weight).sign())
                bn.weight[torch.rand_like(bn.weight) < 0.125] = 0
                bn.bias.normal_(0, 0.3)
    return net.to(memory_format=LAST), first


def joined(found, exact):
    """The output, and as one vector each, every tensor of length 1: all gradients, all running means, all variances.

    A few channels make an error haphazard. What a later normalisation cancels, or a zero gamma cuts off, has no exact
    value to be near.
    """
    found = {name: t for name, t in found.items() if exact[name].double().norm() > 1e-9}
    vectors = judged(found, {name: exact[name] for name in found})
    for kind in ("running_mean", "running_var"):
        names = [name for name in vectors if name.endswith(kind)]
        vectors[kind] = torch.cat([vectors.pop(n) / exact[n].norm().to(found[n].dtype) for n in names])
    return vectors


@pytest.mark.parametrize("folding", [None, True, False], ids=["rule", "folded", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", range(1, 9))
def test_a_step_is_as_exact_as_stocks(blocks, dtype, folding):
    if dtype == torch.bfloat16 and dtype not in ops.tile_dtypes and folding is not None:
        pytest.skip("this processor has no bfloat16 tile kernels: nothing folds")
    rng = random.Random(blocks)
    net, channels = random_net(blocks, rng)
    mean, size = rng.choice([0.0, 1.0, 30.0]), (rng.choice([13, 16, 23]), rng.choice([11, 15, 16]))
    x = image((4, channels, *size), layout="channels_last", mean=mean)
    autocast = dtype == torch.bfloat16
    fused = resfuse.fuse(copy.deepcopy(net), folding=folding)
    exact = step(copy.deepcopy(net).double(), x.double())
    stock, ours = step(copy.deepcopy(net), x, autocast=autocast), step(fused, x, autocast=autocast)
    margin = 0 if autocast else CHAIN_MARGIN  # behind so many 16-bit convolutions stock's own error nears a tenth
    assert_all_as_exact(joined(ours, exact), joined(stock, exact), joined(exact, exact), margin=margin)
