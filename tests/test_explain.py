"""Which blocks are fused, and why the others are not: explain, strict, filter_fn and register_block."""

import json
from functools import partial

import pytest
import torch
from test_fusion import nodes
from torch import nn

import resfuse
from resfuse import backends, fusion, models, ops
from resfuse.models.vgg import VGGFeatures
from resfuse.nn import ConvBNAct2d, FusedBasicBlock


def types(model):
    return [type(module) for module in model.modules()]


def test_explain_as_text_and_json():
    model = models.CifarResNet(8)
    model.layer2[0].bn1.register_forward_hook(lambda *_: None)
    before = resfuse.explain(model)
    assert [block.name for block in before.blocks] == ["", "layer1.0", "layer2.0", "layer3.0"]
    assert not any(block.fused for block in before.blocks)
    assert str(before).startswith("0 of 4 blocks fused")
    assert "fuse() has not been applied" in str(before)
    after = resfuse.explain(resfuse.fuse(model))
    assert str(after).startswith("3 of 4 blocks fused")
    assert "bn1 has a hook" in str(after) and "(model)" in str(after)
    rows = json.loads(after.to_json())
    assert [fusion.BlockReport(**row) for row in rows] == list(after.blocks)
    fields = ("name", "type", "fused", "reason", "convolutions")
    assert rows[2] == dict(zip(fields, ("layer2.0", "BasicBlock", False, "bn1 has a hook", ""), strict=True))


def test_a_block_answers_for_its_projection_and_for_nothing_else():
    projection = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
    model = models.CifarResNet(8)
    model.layer1 = nn.Sequential(nn.Conv2d(16, 4, 3), nn.BatchNorm2d(4))  # a child of a block that resfuse knows
    model.layer2 = nn.Sequential(OwnBlock(4, 8, downsample=nn.Sequential(*projection)))
    model.layer3 = nn.Sequential(OwnBlock(4, 8, 2, nn.Sequential(nn.AvgPool2d(2), nn.Sequential(*projection))))
    assert {block.name: block.reason for block in resfuse.explain(resfuse.fuse(model)).blocks} == {
        "": "",
        "layer1": "resfuse has no fused Sequential",
        "layer2.0": "resfuse has no fused OwnBlock",
        "layer3.0": "resfuse has no fused OwnBlock",
    }


def test_filter_fn_is_given_blocks_and_qualified_names():
    model, asked = models.CifarResNet(8), []

    def choose(module, name):
        asked.append((name, type(module)))
        return name.startswith("layer2")

    resfuse.fuse(model, filter_fn=choose, strict=True)
    assert asked[0] == ("", models.CifarResNet)
    assert [name for name, _ in asked] == ["", "layer1.0", "layer2.0", "layer3.0"]
    assert [block.name for block in resfuse.explain(model).blocks if block.fused] == ["layer2.0"]


def test_strict_lists_blocks_and_changes_nothing():
    model = models.ResNet(models.BasicBlock, [1, 1, 1, 1], norm_layer=partial(nn.GroupNorm, 4))
    model.layer1 = models.resnet18().layer1
    before = types(model)
    with pytest.raises(
        ValueError, match=r"4 blocks would stay stock: .*layer2\.0: bn1 is a GroupNorm.*layer4\.0"
    ) as error:
        resfuse.fuse(model, strict=True)
    assert "layer1" not in str(error.value)
    assert types(model) == before
    assert all(b.fused for b in resfuse.explain(resfuse.fuse(models.resnet18(), strict=True)).blocks)


def test_strict_counts_nothing_that_filter_fn_excludes():
    model = nn.Sequential(OwnBlock(4, 4), models.BasicBlock(4, 4), models.BasicBlock(4, 4), ConvBNAct2d(4, 4))
    model[1].bn1.register_forward_hook(lambda *_: None)
    model[3].conv.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"2 blocks would stay stock: 1: bn1 has a hook; 3: conv has a hook$"):
        resfuse.fuse(model, filter_fn=lambda _, name: name in "13", strict=True)
    resfuse.fuse(model, filter_fn=lambda _, name: name == "2", strict=True)
    assert [block.name for block in resfuse.explain(model).blocks if block.fused] == ["2"]
    resfuse.fuse(model, filter_fn=lambda *_: False, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=["device", "dtype"])
def test_strict_names_why_no_backend_serves(dtype, monkeypatch):
    if dtype == torch.float32:
        monkeypatch.setitem(ops.missing_native, "cpu", "test")
    model = nn.Sequential(models.BasicBlock(4, 4), ConvBNAct2d(4, 4)).to(dtype)
    before, reason = types(model), f"no backend serves {dtype} on cpu: "
    with pytest.raises(ValueError, match=f"2 blocks would stay stock: 0: {reason}.+; 1: {reason}"):
        resfuse.fuse(model, strict=True)
    assert types(model) == before
    assert not any(block.fused for block in resfuse.explain(resfuse.fuse(model)).blocks)
    resfuse.fuse(model[:1], backend="reference", strict=True)
    resfuse.fuse(model.to("meta"), strict=True)  # a device that says nothing about where the model will run


def test_strict_under_a_global_hook():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="0: a global module hook is registered"):
            resfuse.fuse(nn.Sequential(models.BasicBlock(4, 4)), strict=True)
    finally:
        handle.remove()


class OwnBlock(models.BasicBlock):
    """A user's subclass, with a forward that fuse must not replace."""

    def forward(self, x):
        return super().forward(x) + 1


class FusedOwnBlock(FusedBasicBlock, OwnBlock):
    """What the user registers for it."""


def test_a_subclass_of_a_known_block_stays_stock():
    model = nn.Sequential(OwnBlock(4, 4), models.BasicBlock(4, 4))
    resfuse.fuse(model)
    assert type(model[0]) is OwnBlock
    first, second = resfuse.explain(model).blocks
    assert (first.fused, first.reason) == (False, "resfuse has no fused OwnBlock") and second.fused
    with pytest.raises(ValueError, match="0: resfuse has no fused OwnBlock"):
        resfuse.fuse(model, strict=True)


def test_register_block_fuses_a_users_block(monkeypatch):
    monkeypatch.setattr(fusion, "_registered", {})
    resfuse.register_block(OwnBlock, FusedOwnBlock)
    model, x = nn.Sequential(OwnBlock(4, 4)), torch.randn(2, 4, 5, 5)
    resfuse.fuse(model, strict=True)
    (block,) = resfuse.explain(model).blocks
    assert (block.name, block.type, block.fused, block.reason) == ("0", "OwnBlock", True, "")
    assert model(x).grad_fn.name() == "BNActFunctionBackward"
    assert type(resfuse.unfuse(model)[0]) is OwnBlock
    with pytest.raises(TypeError, match="must be a subclass of a resfuse"):
        resfuse.register_block(OwnBlock, models.BasicBlock)


@pytest.mark.skipif(torch.float32 not in ops.tile_dtypes, reason="this processor has no tile kernels (AVX-512 or AVX2)")
def test_explain_says_who_convolves_and_fuse_takes_folding():
    model, x = nn.Sequential(models.Bottleneck(16, 4)), torch.randn(2, 16, 9, 9).to(memory_format=torch.channels_last)
    for folding, how in (
        (None, "tiles, folding conv3 (4 -> 16) from 16 pixels on"),
        (True, "tiles, folding conv3 (4 -> 16)"),
        (False, "tiles"),
    ):
        resfuse.fuse(model, folding=folding)
        assert resfuse.explain(model).blocks[0].convolutions == how
        assert f"fused, convolutions by {how}" in str(resfuse.explain(model))
        assert model(x).grad_fn.name().startswith("Expand" if folding is not False else "Conv")
    model.append(models.Bottleneck(16, 4, groups=2))
    assert resfuse.explain(resfuse.fuse(model)).blocks[1].convolutions.startswith("tiles")
    model.double()
    assert "float64" in resfuse.explain(model).blocks[0].convolutions
    resfuse.unfuse(model)
    assert not [name for name in model[0].__dict__ if "resfuse" in name]


@pytest.mark.skipif(torch.float32 not in ops.tile_dtypes, reason="this processor has no tile kernels (AVX-512 or AVX2)")
def test_explain_says_which_convolutions_fold_and_from_how_many_pixels_on():
    network = resfuse.fuse(models.resnet50())
    by_name = {block.name: block.convolutions for block in resfuse.explain(network).blocks}
    conv3 = "conv3 (64 -> 256) from 256 pixels on"
    assert by_name["layer1.0"] == f"tiles, folding {conv3} and downsample.0 (64 -> 256) from 256 pixels on"
    assert by_name["layer1.1"] == f"tiles, folding {conv3}" and conv3 in resfuse.explain(network).to_json()
    assert by_name["layer4.2"] == "tiles"
    assert {block.convolutions for block in resfuse.explain(network.eval()).blocks if block.name} == {"tiles"}
    for pixels, folds in ((256, True), (255, False)):  # what is said is what is done
        x = torch.randn(1, 256, pixels, 1).to(memory_format=torch.channels_last)
        assert network.train().layer1[1](x).grad_fn.name().startswith("Expand") == folds


@pytest.mark.skipif(torch.float32 not in ops.tile_dtypes, reason="this processor has no tile kernels (AVX-512 or AVX2)")
@pytest.mark.parametrize("unit", ["relu_only_preact", "relu_before_add", "full_preact"])
def test_explain_says_what_of_a_unit_folds(unit):
    order = models.units.ORDERS[unit]
    projection = nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16))
    shape = (16, 4) if unit == "full_preact" else (8, 4, 2, projection)
    model = nn.Sequential(models.units.ResidualUnit(*shape, order=order, bottleneck=True))
    (block,) = resfuse.explain(resfuse.fuse(model, folding=True)).blocks
    assert (
        block.convolutions
        == {
            "relu_only_preact": "tiles, folding conv3 (4 -> 16) and downsample.0 (8 -> 16)",
            "relu_before_add": "tiles, folding conv3 (4 -> 16)",
            "full_preact": "tiles",
        }[unit]
    )


@pytest.mark.skipif(torch.float32 not in ops.tile_dtypes, reason="this processor has no tile kernels (AVX-512 or AVX2)")
def test_explain_counts_the_stretches_of_a_long_block(monkeypatch):
    monkeypatch.setattr(backends, "_TILE_CHANNELS", dict.fromkeys(ops.tile_dtypes, 64))
    model = resfuse.fuse(VGGFeatures((2, 2, 1, 1, 1), (48, 64, 64, 64, 64)))
    for training in (True, False):  # what ends in a pool is a stretch of its own
        (block,) = resfuse.explain(model.train(training)).blocks
        assert block.convolutions.startswith("tiles; torch in 3 of 7 stretches: ")
        assert "below 64" in block.convolutions
    (block,) = resfuse.explain(resfuse.fuse(VGGFeatures((2, 2, 1, 1, 1)))).blocks
    assert block.convolutions == "tiles"  # the first convolution reads the taps of a row as one pixel
    (block,) = resfuse.explain(resfuse.fuse(VGGFeatures((2, 2, 1, 1, 1), (8, 8, 8, 8, 8)))).blocks
    assert block.convolutions.startswith("torch: ")
    narrow = "torch: torch is faster below 64 channels"
    for model, name, expected in (
        (models.CifarResNet(8), "", narrow),
        (models.resnet18(), "", "tiles"),
        (models.DenseNet(8, (1, 1, 1, 1), 64), "features", "tiles"),
        (models.DenseNet(8, (1, 1, 1, 1), 48), "features", narrow),
    ):
        stem = next(block for block in resfuse.explain(resfuse.fuse(model)).blocks if block.name == name)
        assert stem.convolutions.startswith(expected)


@pytest.mark.skipif(torch.float32 not in ops.tile_dtypes, reason="this processor has no tile kernels (AVX-512 or AVX2)")
def test_explain_says_why_a_grouped_convolution_stays_torchs(monkeypatch):
    monkeypatch.setattr(backends, "_TILE_GROUP_CHANNELS", {torch.float32: 3})
    model = nn.Sequential(*(models.Bottleneck(16, 4, groups=g, base_width=64 * 3 // g) for g in (4, 6)))
    first, second = resfuse.explain(resfuse.fuse(model)).blocks
    assert model[1].conv2.weight.shape[1] == 2
    assert first.convolutions.startswith("tiles, folding conv3")
    assert second.convolutions == "torch: torch is faster below 3 channels per group in torch.float32, here 2"


@pytest.mark.skipif(torch.float32 not in ops.tile_dtypes, reason="this processor has no tile kernels (AVX-512 or AVX2)")
def test_explain_under_autocast_speaks_of_its_dtype(monkeypatch):
    monkeypatch.setattr(backends, "_TILE_CHANNELS", {torch.float32: 8, torch.bfloat16: 32})
    model = resfuse.fuse(nn.Sequential(models.Bottleneck(64, 16)))
    assert resfuse.explain(model).blocks[0].convolutions.startswith("tiles")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert str(dtype) in resfuse.explain(model).blocks[0].convolutions
            x = torch.randn(2, 64, 5, 5).to(memory_format=torch.channels_last)
            assert model(x).grad_fn.name().startswith("BNAct"), "torch convolves"
    assert resfuse.explain(model.double()).blocks[0].convolutions.startswith("torch: ")


def test_a_highways_gate_is_called_and_the_rest_is_fused():
    block, calls = resfuse.fuse(models.HighwayBlock(8, 8)), []
    block.gate.register_forward_hook(lambda *_: calls.append("gate"))
    (report,) = resfuse.explain(block).blocks
    assert report.fused and report.type == "HighwayBlock"
    names = nodes(block(torch.randn(2, 8, 6, 6)))
    assert calls == ["gate"] and "SigmoidBackward0" in names
    assert not [name for name in names if "NativeBatchNorm" in name]
    block.conv2.register_forward_hook(lambda *_: calls.append("conv2"))
    assert resfuse.explain(block).blocks[0].reason == "conv2 has a hook"
    block(torch.randn(2, 8, 6, 6))
    assert calls == ["gate", "gate", "conv2"]
