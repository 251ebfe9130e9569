"""The stems of fused networks: maxpool(relu(bn1(conv1(x)))) in one call, and the pools that are called instead."""

import copy

import pytest
import torch
from numerics import DENSE, TRAIN_EVAL, assert_all_as_exact, assert_as_exact, image
from torch import nn

import resfuse
from resfuse import models, ops
from resfuse.bench.peers import import_torchvision

try:
    resnet = import_torchvision().models.resnet
except ImportError:
    resnet = None

pytestmark = pytest.mark.skipif(ops.missing_native["cpu"] is not None, reason=str(ops.missing_native["cpu"]))

# around torch's convolution, and with ours
NODES = ("BNReLUMaxPoolFunctionBackward", "ConvBNReLUMaxPoolFunctionBackward")


def network(build=models.resnet18):
    model = build(num_classes=10)
    with torch.no_grad():
        model.bn1.weight.uniform_(0.5, 1.5).mul_(torch.where(torch.rand(64) < 0.3, -1, 1))
        model.bn1.bias.uniform_(-0.5, 0.5)
    return model


LIBRARIES = pytest.mark.parametrize(
    "build",
    [
        models.resnet18,
        pytest.param(
            lambda **o: resnet.resnet18(**o),
            marks=pytest.mark.skipif(resnet is None, reason="torchvision is not installed"),
        ),
    ],
    ids=["resfuse", "torchvision"],
)


class ReachedError(Exception):
    """Ends a network's forward with the input of its first stage."""


def stem(model, x):
    """What the first stage of a network is given."""

    def stop(_, inputs):
        raise ReachedError(inputs[0])

    handle = model.layer1.register_forward_pre_hook(stop)
    try:
        model(x)
    except ReachedError as reached:
        return reached.args[0]
    finally:
        handle.remove()


def stem_step(model, x):
    """The stem's output, gradients and statistics, by name."""
    out = stem(model, x)
    parameters = {"grad_conv": model.conv1.weight, "grad_weight": model.bn1.weight, "grad_bias": model.bn1.bias}
    grads = torch.autograd.grad(out.square().sum(), list(parameters.values()))
    return {"out": out.detach(), **dict(zip(parameters, grads, strict=True)), **dict(model.bn1.named_buffers())}


@LIBRARIES
@DENSE
@TRAIN_EVAL
def test_a_fused_stem_equals_stock(build, layout, training):
    stock = network(build).train(training)
    fused, exact = resfuse.fuse(copy.deepcopy(stock), strict=True), copy.deepcopy(stock).double()
    x = image((2, 3, 33, 32), torch.float32, layout, mean=0)
    assert stem(fused, x).grad_fn.name() == NODES[bool(ops.tile_dtypes) and layout == "channels_last"]
    fused.bn1.load_state_dict(stock.bn1.state_dict())
    results = [stem_step(model, x.to(model.fc.weight.dtype)) for model in (fused, stock, exact)]
    assert_all_as_exact(*results, margin=10)
    with torch.no_grad():
        assert_as_exact(fused.eval()(x), stock.eval()(x), exact.eval()(x.double()))


class Pool(nn.MaxPool2d):
    """A user's subclass."""


UNFUSED = {
    "dilated": nn.MaxPool2d(3, 2, 1, dilation=2),
    "ceil": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "subclass": Pool(3, 2, 1),
    "average": nn.AvgPool2d(3, 2, 1),
    "identity": nn.Identity(),
    "large": nn.MaxPool2d(17, 2, 8),
}


@LIBRARIES
@pytest.mark.parametrize("pool", UNFUSED.values(), ids=UNFUSED)
def test_any_other_pool_is_called(build, pool):
    stock, x = network(build).eval(), torch.randn(2, 3, 33, 32)
    stock.maxpool = pool
    fused = resfuse.fuse(copy.deepcopy(stock), strict=True)
    out = stem(fused, x)
    assert out.grad_fn.name() not in NODES
    torch.testing.assert_close(out, stem(stock, x))


@LIBRARIES
def test_a_hooked_pool_is_called(build):
    fused, calls = resfuse.fuse(network(build)), []
    handle = fused.maxpool.register_forward_hook(lambda *_: calls.append(1))
    assert stem(fused, torch.randn(2, 3, 32, 32)).grad_fn.name() not in NODES and calls == [1]
    assert resfuse.explain(fused).blocks[0].fused
    handle.remove()
    assert stem(fused, torch.randn(2, 3, 32, 32)).grad_fn.name() in NODES and calls == [1]


def test_a_stem_under_autocast_follows_the_convolution():
    fused, x = resfuse.fuse(network()), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = stem(fused, x)
    assert out.dtype == torch.bfloat16 and out.grad_fn.name() in NODES
