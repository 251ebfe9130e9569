"""What surrounds fused blocks: default dtypes, autocast beside wider tensors, overrides, wrappers, tracers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import torchvision_models
from torch import nn

import resfuse
from resfuse import models
from resfuse.models.units import ORDERS, ResidualUnit

LAST = torch.channels_last


def network(name):
    """A small network of each composition."""
    if name == "densenet":
        return models.DenseNet(8, (2, 1, 1, 1), 16, num_classes=3)
    if name == "bottleneck":
        narrow = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32))
        return nn.Sequential(models.Bottleneck(16, 8, 1, narrow), models.Bottleneck(32, 8))
    return nn.Sequential(*(ResidualUnit(16, 16 // 4, order=ORDERS[name], bottleneck=True) for _ in range(2)))


def image_for(name, dtype=torch.float32):
    return torch.randn(2, 3 if name == "densenet" else 16, 32, 32).to(dtype, memory_format=LAST).requires_grad_()


def step(model, x):
    out = model(x)
    out.float().square().mean().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bottleneck", "densenet", *ORDERS])
def test_the_default_dtype_changes_nothing(name, dtype, default_dtype):
    model, x = resfuse.fuse(network(name), folding=True), image_for(name)
    other, same = copy.deepcopy(model), x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    expected = step(model, x)
    default_dtype(dtype)
    found = step(other, same)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_a_unit_that_comes_activated_need_not_be_the_first():
    entered = ResidualUnit(16, 16, order=ORDERS["full_preact"], entered=True)
    stock = nn.Sequential(
        ResidualUnit(16, 16, order=ORDERS["full_preact"]), entered, ResidualUnit(16, 16, order=ORDERS["full_preact"])
    )
    fused, x = resfuse.fuse(copy.deepcopy(stock)), image_for("unit")
    other = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    for mine, theirs in zip(step(fused, x), step(stock, other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_under_autocast_a_wider_shortcut_stays_wide(order):
    stock = ResidualUnit(16, 16, order=ORDERS[order]).eval()
    fused, x = resfuse.fuse(copy.deepcopy(stock)), image_for("unit")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert fused(x).dtype == stock(x).dtype == torch.float32
        narrow = x.bfloat16()
        assert fused(narrow).dtype == stock(narrow).dtype == torch.bfloat16


def test_under_autocast_a_hook_does_not_change_the_dtype():
    block, x = resfuse.nn.ConvBNAct2d(16, 16).eval(), image_for("unit")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        fused = block(x, x)
        block.conv.register_forward_hook(lambda *_: None)
        assert block(x, x).dtype == fused.dtype == torch.bfloat16


def first_report(model):
    return resfuse.explain(model).blocks[0]


def test_a_forward_of_its_own_is_explained():
    block = resfuse.fuse(models.BasicBlock(16, 16))
    assert first_report(block).fused
    block.forward = lambda x: x
    report = first_report(block)
    assert not report.fused and report.reason == "it has its own forward"
    with pytest.raises(ValueError, match="it has its own forward"):
        resfuse.fuse(block, strict=True)


def test_a_shortcut_that_is_called_as_it_is_is_listed():
    shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
    block, listed = resfuse.explain(resfuse.fuse(nn.Sequential(models.BasicBlock(16, 16, 2, shortcut)))).blocks
    assert block.fused and (listed.name, listed.fused) == ("0.downsample", False)


class Doubled(torch.Tensor):
    """A weight that computes a convolution of its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return out * 2 if function is F.conv2d else out


@pytest.mark.parametrize("how", ["circular padding", "weight"])
def test_a_convolution_of_its_own_runs(how):
    stock = models.BasicBlock(16, 16).eval()
    fused, x = resfuse.fuse(copy.deepcopy(stock)), image_for("unit")
    for block in (fused, stock):
        if how == "weight":
            block.conv1.weight = nn.Parameter(block.conv1.weight.detach().as_subclass(Doubled))
        else:
            block.conv1._conv_forward = lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w, b)
    torch.testing.assert_close(fused(x), stock(x))
    reason = "conv1's weight is a Doubled" if how == "weight" else "conv1 has its own _conv_forward"
    assert first_report(fused).reason == reason


def test_unfuse_leaves_what_others_made_of_a_fused_class():
    block = resfuse.fuse(models.BasicBlock(16, 16))
    model = nn.Sequential(resfuse.fuse(models.BasicBlock(16, 16)), block)
    made = type("Wrapped", (type(block),), {})
    block.__class__ = made
    with pytest.raises(TypeError, match="1 is a Wrapped, which fuse did not make"):
        resfuse.unfuse(model)
    assert type(block) is made and isinstance(model[0], resfuse.nn.FusedBlock)


MODULES = {
    "AddReLU": lambda: resfuse.nn.AddReLU(),
    "BNAct2d": lambda: resfuse.nn.BNAct2d(16),
    "ConvBNAct2d": lambda: resfuse.nn.ConvBNAct2d(16, 16),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_are_traced_and_exported_as_stock(name, training):
    module, x, residual = MODULES[name]().train(training), *torch.randn(2, 2, 16, 8, 8)
    expected = copy.deepcopy(module)(x, residual)
    traced = torch.fx.symbolic_trace(copy.deepcopy(module))
    torch.testing.assert_close(traced(x, residual), expected)
    jitted = torch.jit.trace(copy.deepcopy(module), (x, residual), check_trace=False)
    torch.testing.assert_close(jitted(x, residual), expected)
    exported = torch.export.export(copy.deepcopy(module), (x, residual))
    assert not any("resfuse" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x, residual), expected)


def test_dense_layers_take_what_torchvisions_take():
    densenet = torchvision_models().densenet
    layer, block = densenet._DenseLayer(8, 4, 2, 0.0), densenet._DenseBlock(1, 8, 2, 4, 0.0)
    transition = densenet._Transition(8, 4)
    x = torch.randn(2, 8, 6, 6)
    for stock in (layer, block, transition):
        stock.eval()
    expected = layer(input=x), layer(x), layer([x]), block(init_features=x), transition(input=x)
    for module in (layer, block, transition):
        resfuse.fuse(module)
        assert isinstance(module, resfuse.nn.FusedBlock)
    found = layer(input=x), layer(x), layer([x]), block(init_features=x), transition(input=x)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
