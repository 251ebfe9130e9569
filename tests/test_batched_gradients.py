"""Batches of gradients through every node, torch.autograd.grad(..., is_grads_batched=True): vectorised Jacobians."""

import pytest
import torch
from torch import nn

import resfuse
from resfuse import BatchNorm2dParameters, Conv2dParameters, functional, reference

CHANNELS = 16


def norm(channels=CHANNELS, training=True):
    weight, bias = torch.rand(channels).add(0.5).requires_grad_(), torch.randn(channels).requires_grad_()
    return BatchNorm2dParameters(torch.zeros(channels), torch.ones(channels), weight, bias, training)


def conv(outputs, inputs, kernel=1):
    weight = torch.randn(outputs, inputs, kernel, kernel).mul((inputs * kernel * kernel) ** -0.5).requires_grad_()
    return Conv2dParameters(weight, None, 1, kernel // 2)


def stem(x):
    return functional.conv_bn_relu_maxpool(x[:, :3], conv(64, 3, 3), norm(64))


def frozen(x):
    return functional.conv_bn_act(x, conv(CHANNELS, CHANNELS, 3), norm(training=False))


def basic(x):
    layers = conv(CHANNELS, CHANNELS, 3), norm(), conv(CHANNELS, CHANNELS, 3), norm()
    return functional.basic_block(x, *layers)


def bottleneck(x, folding, shortcut=None):
    narrow = conv(8, CHANNELS), norm(8), conv(8, 8, 3), norm(8)
    return functional.bottleneck(x, *narrow, conv(CHANNELS, 8), norm(), shortcut, folding=folding)


def preact(x):
    layers = [(norm(), conv(CHANNELS, CHANNELS, 3)), (norm(), conv(CHANNELS, CHANNELS, 3))]
    out, moments = functional.preact_block(x, layers, x)
    return out * moments.var[:, None, None]


CASES = {
    "add_relu": lambda x: functional.add_relu(x, x.flip(0)),
    "bn_act": lambda x: functional.bn_act(x, norm(), x.flip(0)),
    "bn_relu_maxpool": lambda x: functional.bn_relu_maxpool(x, norm()),
    "stem": stem,
    "frozen": frozen,
    "basic": basic,
    "bottleneck": lambda x: bottleneck(x, False),
    "folded": lambda x: bottleneck(x, True),
    "folded-projection": lambda x: bottleneck(x, True, (conv(CHANNELS, CHANNELS), norm())),
    "preact": preact,
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_gradients_is_the_gradients_one_by_one(name, layout):
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(2, CHANNELS, 4, 4).to(memory_format=memory_format).requires_grad_()
    out = CASES[name](x)
    given = torch.randn(3, *out.shape)
    before = given.clone()
    (found,) = torch.autograd.grad(out, x, given, retain_graph=True, is_grads_batched=True)
    one_by_one = torch.stack([torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in given])
    assert torch.equal(given, before)
    torch.testing.assert_close(found, one_by_one, rtol=1e-4, atol=1e-4)


def test_a_vectorised_jacobian_of_a_fused_network():
    model = resfuse.fuse(resfuse.models.get_model("cifar_resnet20", num_classes=3)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    x = torch.randn(2, 3, 8, 8)
    fast, slow = (torch.autograd.functional.jacobian(model, x, vectorize=vectorize) for vectorize in (True, False))
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-4)


def test_moments_and_their_gradients_in_batches():
    x = torch.randn(2, 5, 3, 3, requires_grad=True)
    mean, var = functional.moments(x)
    given = torch.randn(4, 5), torch.randn(4, 5)
    (found,) = torch.autograd.grad((mean, var), x, given, is_grads_batched=True)
    expected = [torch.autograd.grad(reference.moments(x), x, pair)[0] for pair in zip(*given, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))
