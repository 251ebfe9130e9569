"""Fused networks of every family and order of units against float64, and the moments that are handed on in them."""

import copy
from functools import partial

import pytest
import torch
from numerics import assert_all_as_exact, judged, step
from test_fusion import identities, nodes, types, without_ties
from torch import nn

import resfuse
from resfuse import models, ops
from resfuse.models import CifarResNet
from resfuse.models.units import ORDERS, ORIGINAL, Order, ResidualUnit

pytestmark = [
    pytest.mark.skipif(ops.missing_native["cpu"] is not None, reason=str(ops.missing_native["cpu"])),
    pytest.mark.usefixtures("one_thread"),
]
LAST = torch.channels_last
TRAIN_EVAL = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
LAYOUTS = pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=["channels_last", "contiguous"])
MOMENTS = "MomentsFunctionBackward"  # a pass that takes moments and does nothing else


def cifar(unit, shortcut, bottleneck):
    widths = (4, 4, 6) if bottleneck else (16, 16, 20)
    return CifarResNet(11 if bottleneck else 8, unit=unit, shortcut=shortcut, bottleneck=bottleneck, widths=widths)


NETWORKS = {
    **{
        f"{unit}-{shortcut}-{'bottleneck' if bottleneck else 'basic'}": partial(cifar, unit, shortcut, bottleneck)
        for unit in (ORIGINAL, *ORDERS)
        for shortcut, bottleneck in (("A", False), ("B", True), ("C", False))
    },
}
PREACT = partial(CifarResNet, 14, unit="full_preact", shortcut="B", widths=(16, 16, 20))


@torch.no_grad()
def stock(build, training=True, layout=LAST):
    """A network whose norms are not at their initial values, with running statistics that fit."""
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5).mul_(torch.where(torch.rand(module.num_features) < 0.3, -1, 1))
            module.bias.uniform_(-0.5, 0.5)
            module.momentum = 0.9
    model(torch.randn(4, 3, 32, 32))
    return model.train(training).to(memory_format=layout)


def fused(build, **options):
    return resfuse.fuse(stock(build), **options)


def images(layout=LAST):
    return torch.randn(4, 3, 16, 16).to(memory_format=layout)


@TRAIN_EVAL
@LAYOUTS
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_is_as_exact_as_stock(name, layout, training):
    model = stock(NETWORKS[name], training, layout)
    ours, exact = resfuse.fuse(copy.deepcopy(model), strict=True), copy.deepcopy(model).double()
    x = without_ties(exact, (4, 3, 16, 16)).to(memory_format=layout)
    exact.load_state_dict(model.state_dict())  # the search for x moved its running statistics
    results = [step(m, x.to(next(m.parameters()).dtype), target=torch.arange(4)) for m in (ours, model, exact)]
    assert not [node for node in nodes(ours(x)) if "NativeBatchNorm" in node]
    for cancelled in [key for key, t in results[2].items() if key.startswith("grad") and t.norm() < 1e-12]:
        for result in results:  # a bias that only batch statistics read: its gradient is noise around zero
            del result[cancelled]
    assert_all_as_exact(*(judged(result, results[2]) for result in results))


@pytest.mark.parametrize("name", NETWORKS)
def test_fuse_and_unfuse_leave_every_object_alone(name):
    model = NETWORKS[name]()
    before, stock_types = identities(model), types(model)
    attributes = [set(module.__dict__) for module in model.modules()]
    resfuse.fuse(model, strict=True)
    assert identities(model) == before and types(model) != stock_types
    assert [set(module.__dict__) for module in resfuse.unfuse(model).modules()] == attributes
    assert identities(model) == before and types(model) == stock_types


FUSED = [name for name in models.list_models() if not name.startswith(("vgg", "densenet"))]


@pytest.mark.parametrize("name", FUSED)
def test_explain_finds_nothing_stock_but_the_highway_gate(name, monkeypatch):
    monkeypatch.setattr(nn.init, "kaiming_normal_", lambda tensor, **_: tensor)
    with torch.device("meta"):
        model = models.get_model(name)
    left = {block.type for block in resfuse.explain(resfuse.fuse(model)).blocks if not block.fused}
    assert left == ({"HighwayBlock"} if "highway" in name else set())


@LAYOUTS
def test_moments_are_handed_on_through_the_whole_network(layout):
    """The first unit's input comes activated; every later normalisation is given what the unit before it handed on."""
    model = fused(PREACT).to(memory_format=layout)
    assert MOMENTS not in nodes(model(images(layout)))
    resfuse.unfuse(model)
    resfuse.fuse(model, filter_fn=lambda _, name: name != "")  # who calls the units knows nothing of moments
    taken = nodes(model(images(layout))).count(MOMENTS)
    assert taken == (5 if layout == LAST else 0)  # between torch's convolutions a pass normalises and takes them


@TRAIN_EVAL
def test_a_unit_that_something_watches_is_called(training):
    x, calls = images(), []
    expected = fused(PREACT).train(training)(x)

    def watch(model):
        model.layer2[0].register_forward_hook(lambda *_: calls.append("unit"))
        model.layer3.register_forward_hook(lambda *_: calls.append("stage"))
        model.tail.register_forward_pre_hook(lambda *_: calls.append("tail"))

    model = fused(PREACT).train(training)
    watch(model)
    out = model(x)
    assert calls == ["unit", "stage", "tail"]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert (MOMENTS in nodes(out)) == training


def test_a_unit_with_a_forward_of_its_own_or_compiled_by_itself_is_called():
    model, x = fused(PREACT), images()
    expected, calls = copy.deepcopy(model)(x), []
    unit, other = model.layer1[1], model.layer2[1]
    own, unit.forward = unit.forward, lambda x: calls.append("own") or own(x)
    other._compiled_call_impl = lambda x: calls.append("compiled") or other._call_impl(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert calls == ["own", "compiled"]


def test_a_stock_unit_among_fused_ones():
    model, x = stock(PREACT), images()
    expected = copy.deepcopy(model)(x)
    resfuse.fuse(model, filter_fn=lambda _, name: name != "layer2.0")
    model.layer3[0].bn2.register_forward_hook(lambda *_: None)
    out = model(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert nodes(out).count("NativeBatchNormBackward0") == 4
    assert [block.name for block in resfuse.explain(model).blocks if not block.fused] == ["layer2.0", "layer3.0"]


def test_frozen_norms_need_no_moments():
    model = fused(PREACT).eval()
    found = nodes(model(images()))
    assert MOMENTS not in found and "AddMomentsFunctionBackward" not in found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda unit: setattr(unit, "downsample", nn.Sequential(unit.downsample)), "downsample is a Sequential, and"),
        (lambda unit: unit.downsample.register_forward_hook(lambda *_: None), "downsample has a hook"),
        (lambda unit: setattr(unit, "bn1", nn.GroupNorm(4, 16)), "bn1 is a GroupNorm, not a BatchNorm2d"),
        (lambda unit: setattr(unit, "order", Order(before="bn")), "resfuse composes no unit of Order"),
        (lambda unit: setattr(unit, "relu", nn.SiLU()), "relu is a SiLU, not a ReLU"),
    ],
    ids=["downsample", "hook", "norm", "order", "activation"],
)
def test_a_unit_that_cannot_be_fused_says_why(change, reason):
    unit = ResidualUnit(16, 20, 2, nn.Conv2d(16, 20, 1, 2), order=ORDERS["full_preact"])
    x = torch.randn(4, 16, 8, 8)
    for before in (True, False):
        own = copy.deepcopy(unit)
        for action in (change, resfuse.fuse) if before else (resfuse.fuse, change):
            action(own)
        (block,) = (block for block in resfuse.explain(own).blocks if block.name == "")
        assert not block.fused and reason in block.reason
        own_stock = resfuse.unfuse(copy.deepcopy(own))
        assert torch.equal(own(x), own_stock(x))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("inputs", [16, 20], ids=["clean", "projected"])
def test_a_shortcut_of_any_other_kind_is_called(order, inputs):
    """Where what it reads exists: a module that fuse knows nothing of."""
    shortcut = nn.Sequential(nn.Conv2d(inputs, 20, 1), nn.Identity())
    unit = ResidualUnit(inputs, 20, 1, shortcut, order=ORDERS[order], entered=order == "full_preact")
    expected, x = copy.deepcopy(unit), torch.randn(4, inputs, 8, 8)
    resfuse.fuse(unit, strict=True)
    torch.testing.assert_close(unit(x), expected(x), rtol=1e-4, atol=1e-4)
