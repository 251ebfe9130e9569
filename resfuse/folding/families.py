"""The rules of blocks and networks: what the forward of each class does with its children, in the same order."""

from __future__ import annotations

from typing import Any

from torch import nn

from resfuse.folding import plan as plans
from resfuse.folding.walk import Walk, batch_norm, check_plain, joined, rule, rule_of


@rule("torchvision.models.resnet.BasicBlock", "resfuse.models.resnet.BasicBlock", "resfuse.nn.FusedBasicBlock")
def basic_block(walk: Walk, block: nn.Module, name: str, x: int) -> int:
    return _residual(walk, block, name, x, 2)


@rule("torchvision.models.resnet.Bottleneck", "resfuse.models.resnet.Bottleneck", "resfuse.nn.FusedBottleneck")
def bottleneck(walk: Walk, block: nn.Module, name: str, x: int) -> int:
    return _residual(walk, block, name, x, 3)


@rule("resfuse.models.resnet.PlainBlock")
def plain_block(walk: Walk, block: nn.Module, name: str, x: int) -> int:
    return walk.child(block, name, "relu", _chain(walk, block, name, x, 2))


def _residual(walk: Walk, block: nn.Module, name: str, x: int, layers: int) -> int:
    """relu(bn(conv(... relu(bn1(conv1(x))))) + downsample(x)), whatever these children are."""
    out = _chain(walk, block, name, x, layers)
    shortcut = x if getattr(block, "downsample", None) is None else walk.child(block, name, "downsample", x)
    return walk.child(block, name, "relu", walk.add(out, shortcut))


def _chain(walk: Walk, block: nn.Module, name: str, x: int, layers: int) -> int:
    """conv1, bn1, relu, conv2, bn2 ...: without an activation behind the last."""
    for i in range(1, layers + 1):
        x = walk.child(block, name, f"bn{i}", walk.child(block, name, f"conv{i}", x))
        x = walk.child(block, name, "relu", x) if i < layers else x
    return x


@rule("resfuse.models.units.ResidualUnit")
def residual_unit(walk: Walk, unit: Any, name: str, x: int) -> int:
    def run(names: tuple[str, ...], x: int) -> int:
        for child in names:
            x = walk.child(unit, name, child, x)
        return x

    entered = run(unit.entry, x)
    out = run(unit.path, entered)
    return run(unit.exit, walk.add(out, walk.child(unit, name, "downsample", x if unit.clean else entered)))


@rule("resfuse.models.cifar.BNReLU")
def bn_relu(walk: Walk, block: nn.Module, name: str, x: int) -> int:
    return walk.children(block, name, x)


@rule("resfuse.models.parts.ZeroPadShortcut")
def zero_pad(walk: Walk, shortcut: Any, name: str, x: int) -> int:
    return walk.write(plans.PadShortcut, x, name, stride=shortcut.stride, channels=shortcut.out_channels)


@rule("resfuse.nn.BNAct2d", takes_more=True)
def bn_act(walk: Walk, module: Any, name: str, x: int) -> int:
    return _ended(walk, batch_norm(walk, module, name, x), module)


@rule("resfuse.nn.ConvBNAct2d", takes_more=True)
def conv_bn_act(walk: Walk, module: Any, name: str, x: int) -> int:
    return _ended(walk, walk.children(module, name, x), module)


def _ended(walk: Walk, x: int, module: Any) -> int:
    """A layer's own activation; one that is no activation is left out."""
    return x if module.activation == "identity" else walk.activation(x, module.activation)


@rule("torchvision.models.densenet._DenseBlock", "resfuse.models.densenet.DenseBlock")
def dense_block(walk: Walk, block: Any, name: str, x: int) -> int:
    layers = {joined(name, child): layer for child, layer in block.items()}
    if not all(rule_of(layer) is dense_layer for layer in layers.values()):
        return walk.stock(block, name, x, "it holds other modules than dense layers")
    features = [x]
    for path, layer in layers.items():
        check_plain(layer, path)
        features.append(dense_layer(walk, layer, path, _concatenated(walk, features)))
    return _concatenated(walk, features)


@rule("torchvision.models.densenet._DenseLayer", "resfuse.models.densenet.DenseLayer", takes_more=True)
def dense_layer(walk: Walk, layer: nn.Module, name: str, x: int) -> int:
    return _run(walk, layer, name, x, "norm1", "relu1", "conv1", "norm2", "relu2", "conv2")


def _concatenated(walk: Walk, features: list[int]) -> int:
    return features[0] if len(features) == 1 else walk.write(plans.Concatenate, features[0], others=tuple(features[1:]))


@rule("torchvision.models.resnet.ResNet", "resfuse.models.resnet.ResNet")
def resnet(walk: Walk, model: nn.Module, name: str, x: int) -> int:
    x = _run(walk, model, name, x, "conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")
    return walk.child(model, name, "fc", walk.write(plans.Flatten, x))


@rule("resfuse.models.cifar.CifarResNet")
def cifar_resnet(walk: Walk, model: nn.Module, name: str, x: int) -> int:
    x = _run(walk, model, name, x, "conv1", "bn1", "relu", "layer1", "layer2", "layer3", "tail", "avgpool")
    return walk.child(model, name, "fc", walk.write(plans.Flatten, x))


@rule("torchvision.models.vgg.VGG", "resfuse.models.vgg.VGG")
def vgg(walk: Walk, model: nn.Module, name: str, x: int) -> int:
    x = _run(walk, model, name, x, "features", "avgpool")
    return walk.child(model, name, "classifier", walk.write(plans.Flatten, x))


@rule("torchvision.models.densenet.DenseNet", "resfuse.models.densenet.DenseNet")
def densenet(walk: Walk, model: nn.Module, name: str, x: int) -> int:
    x = walk.activation(walk.child(model, name, "features", x), "relu")
    x = walk.write(plans.AdaptivePool, x)
    return walk.child(model, name, "classifier", walk.write(plans.Flatten, x))


def _run(walk: Walk, module: nn.Module, name: str, x: int, *children: str) -> int:
    for child in children:
        x = walk.child(module, name, child, x)
    return x
