"""What Triton's products load and store, counted in the interpreter, against the counts of bench/products.py.

Values of each activation, once each as the mathematics must move them, and by instruction: once for each block of
channels and tap. How many blocks there are is the schedule's.
"""

import math

import pytest
import torch
from accesses import Accesses
from numerics import image

from resfuse._triton import schedule
from resfuse._triton.candidates import CANDIDATES
from resfuse._triton.expand_bn_act_backward import expand_bn_act_backward_input, expand_bn_act_backward_weight
from resfuse._triton.gemm import product_of
from resfuse._triton.second_moments import second_moments
from resfuse.bench import products
from resfuse.choices import Conv

fused = CANDIDATES["fused"]
HALF = torch.float16
IMAGES = 2
# more channels than a block has on either side; several taps, a stride that skips pixels, phases, groups
LAYERS = {
    "1x1": ((70, 133), (1, 1), 1, (0, 0), (9, 8)),
    "1x1-strided": ((70, 133), (1, 1), 2, (0, 0), (9, 8)),
    "3x3": ((70, 133), (3, 3), 1, (1, 1), (5, 4)),
    "3x3-strided": ((70, 72), (3, 3), 2, (1, 1), (7, 6)),
    "grouped": ((140, 160), (3, 3), 1, (1, 1), (4, 5)),
}
EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)


def layer_of(name):
    (channels, out), kernel, stride, padding, size = LAYERS[name]
    groups = 2 if name == "grouped" else 1
    conv = Conv(channels, out, kernel, (stride, stride), padding, (1, 1), groups)
    return products.Layer(conv, IMAGES, *size)


class Operands:
    """Tensors of one layer's operators."""

    def __init__(self, layer):
        conv = layer.conv
        self.x = image((IMAGES, conv.channels, layer.height, layer.width), HALF, "channels_last")
        self.weight = torch.randn(conv.out_channels, conv.channels // conv.groups, *conv.kernel).to(HALF)
        self.geometry = list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups
        self.product = product_of(self.x, self.weight, *self.geometry)
        size = self.product.height.rows, self.product.width.rows
        self.y, self.grad, self.residual = (
            image((IMAGES, conv.out_channels, *size), HALF, "channels_last") for _ in range(3)
        )
        self.affine, self.mean = torch.rand(2, conv.channels), torch.rand(conv.channels)
        self.vectors = [torch.rand(conv.out_channels) for _ in range(3)]


def assert_counts(accesses, predicted, **tensors):
    """Each predicted activation has this traffic, and there is no other one."""
    assert {name: accesses.of(tensor) for name, tensor in tensors.items()} == predicted


@EVERY_LAYER
@pytest.mark.parametrize("moments", [True, False])
def test_conv_stats(name, moments, monkeypatch):
    layer = layer_of(name)
    o = Operands(layer)
    accesses = Accesses(monkeypatch)
    y, *_ = fused.conv_stats(o.x, o.affine, o.mean, o.weight, True, *o.geometry, moments)
    blocks = schedule.forward_schedule(o.product, HALF).blocks
    assert blocks > 1
    assert_counts(accesses, products.conv_stats(layer, blocks), x=o.x, y=y)


@EVERY_LAYER
def test_conv_act(name, monkeypatch):
    layer = layer_of(name)
    o = Operands(layer)
    accesses = Accesses(monkeypatch)
    shift, none = o.vectors[0], [None] * 4
    arguments = (None, None, False, o.weight, None, shift, o.residual, *none, [1, 1], True, *o.geometry, False)
    out, *_ = fused.conv_act(o.x, *arguments)
    blocks = schedule.act_schedule(o.product, HALF, plain=True, crowded=False).blocks
    assert_counts(accesses, products.conv_act(layer, blocks, residual=True), x=o.x, out=out, residual=o.residual)


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_act_with_a_branch(stride, monkeypatch):
    layer = layer_of("1x1")
    o, beside = Operands(layer), (layer.height * stride, layer.width * stride)
    branch = products.Layer(layer.conv._replace(channels=100, stride=(stride, stride)), IMAGES, *beside)
    shortcut = image((IMAGES, 100, *beside), HALF, "channels_last")
    weight = torch.randn(layer.conv.out_channels, 100, 1, 1).to(HALF)
    accesses = Accesses(monkeypatch)
    arguments = (o.affine, o.mean, True, o.weight, None, o.vectors[0], None, None, None, shortcut, weight)
    out, *_ = fused.conv_act(o.x, *arguments, [stride, stride], True, *o.geometry, False)
    blocks = schedule.act_schedule(o.product, HALF, plain=False, crowded=False).blocks
    assert_counts(accesses, products.conv_act(layer, blocks, branch=branch), x=o.x, out=out, branch=shortcut)


@EVERY_LAYER
@pytest.mark.parametrize("formed", [True, False], ids=["formed", "given"])
def test_input_gradient(name, formed, monkeypatch):
    layer = layer_of(name)
    o = Operands(layer)
    other = image(o.x.shape, HALF, "channels_last")
    accesses = Accesses(monkeypatch)
    gradient = (o.grad, o.y, None, *o.vectors) if formed else (o.grad, *[None] * 5)
    arguments = (False, o.x, o.affine, o.mean, o.weight, True, *o.geometry, other, True, False)
    grad_x, *_ = fused.conv_stats_backward(*gradient, *arguments)
    blocks = schedule.input_schedule(o.product, HALF, formed, False).blocks
    predicted = products.input_gradient(layer, blocks, formed=formed, prologue=True, other=True)
    formed_of = {"y": o.y} if formed else {}
    assert_counts(accesses, predicted, grad_y=o.grad, grad_x=grad_x, x=o.x, other=other, **formed_of)


@EVERY_LAYER
@pytest.mark.parametrize("formed", [True, False], ids=["formed", "given"])
def test_weight_gradient(name, formed, monkeypatch):
    layer = layer_of(name)
    o = Operands(layer)
    accesses = Accesses(monkeypatch)
    gradient = (o.grad, o.y, None, *o.vectors) if formed else (o.grad, *[None] * 5)
    arguments = (False, o.x, o.affine, o.mean, o.weight, True, *o.geometry, None, False, True)
    fused.conv_stats_backward(*gradient, *arguments)
    config = schedule.weight_schedule(o.product, HALF).config
    out_blocks, in_blocks = blocks_of(o.product, config.block_m, config.block_n)
    predicted = products.weight_gradient(layer, out_blocks, in_blocks, formed=formed)
    assert_counts(accesses, predicted, grad_y=o.grad, x=o.x, **({"y": o.y} if formed else {}))


def blocks_of(product, block_out, block_in):
    return math.ceil(product.out_channels / block_out), math.ceil(product.channels / block_in)


@pytest.mark.parametrize(("channels", "stride"), [(40, 1), (150, 1), (300, 2)])
def test_second_moments(channels, stride, monkeypatch):
    conv = Conv(channels, channels, (1, 1), (stride, stride), (0, 0), (1, 1), 1)
    layer = products.Layer(conv, IMAGES, 7, 6)
    o = Operands(layer)
    accesses = Accesses(monkeypatch)
    second_moments(o.x, o.affine, o.mean, True, [stride, stride])
    blocks = schedule.second_moments_schedule(layer.pixels, channels, HALF).blocks
    assert blocks == math.ceil(channels / 128)
    assert_counts(accesses, products.second_moments(layer, blocks), x=o.x)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("channels", "out_channels"), [(40, 100), (150, 300)])
def test_expand_weight(channels, out_channels, masked, monkeypatch):
    conv = Conv(channels, out_channels, (1, 1), (1, 1), (0, 0), (1, 1), 1)
    layer = products.Layer(conv, IMAGES, 7, 6)
    o = Operands(layer)
    accesses = Accesses(monkeypatch)
    dz, *_ = expand_bn_act_backward_weight(o.grad, o.y if masked else None, o.x, o.affine, o.mean, True)
    config = schedule.expand_weight_schedule(layer.pixels, channels, out_channels, HALF).config
    out_blocks, in_blocks = blocks_of(o.product, config.block_m, config.block_n)
    predicted = products.expand_weight(layer, out_blocks, in_blocks, masked=masked)
    assert_counts(accesses, predicted, grad_out=o.grad, x=o.x, dz=dz, **({"out": o.y} if masked else {}))


@pytest.mark.parametrize(("prologue", "stride"), [(True, 1), (False, 2)])
def test_expand_input(prologue, stride, monkeypatch):
    conv = Conv(150, 300, (1, 1), (stride, stride), (0, 0), (1, 1), 1)
    layer = products.Layer(conv, IMAGES, 7, 6)
    o = Operands(layer)
    before = (o.affine, o.mean, True) if prologue else (None, None, False)
    algebra = (o.weight, torch.randn(150, 150), torch.randn(150), [stride, stride])
    accesses = Accesses(monkeypatch)
    grad_x, _ = expand_bn_act_backward_input(o.grad, o.x, *before, *algebra)
    blocks = schedule.expand_input_schedule(layer.pixels, 150, HALF).blocks
    assert_counts(accesses, products.expand_input(layer, blocks, prologue=prologue), dz=o.grad, x=o.x, grad_x=grad_x)
