"""A small network of every family that resfuse fuses, in every order of units, for the tests of them all."""

from functools import partial

import torch
from networks import torchvision_models
from torch import nn

from resfuse import models
from resfuse.models import CifarResNet
from resfuse.models.units import ORDERS, ORIGINAL
from resfuse.models.vgg import VGGFeatures


def cifar(unit, shortcut, bottleneck):
    widths = (4, 4, 6) if bottleneck else (16, 16, 20)
    return CifarResNet(11 if bottleneck else 8, unit=unit, shortcut=shortcut, bottleneck=bottleneck, widths=widths)


def torchvision_vgg():
    """Narrow: all but its classifier, whose size is fixed."""
    vgg = torchvision_models().vgg
    with torch.device("meta"):
        model = vgg.VGG(vgg.make_layers([4, "M", 6, 6, "M", 8, 8, 8, "M", 8, "M", 8, "M"], batch_norm=True))
    model.classifier = nn.Flatten()
    model.features.to_empty(device="cpu").apply(lambda m: getattr(m, "reset_parameters", lambda: None)())
    return model


def torchvision_densenet(**options):
    return torchvision_models().DenseNet(4, (2, 2, 1, 2), 8, 2, num_classes=10, **options)


NETWORKS = {
    **{
        f"{unit}-{shortcut}-{'bottleneck' if bottleneck else 'basic'}": partial(cifar, unit, shortcut, bottleneck)
        for unit in (ORIGINAL, *ORDERS)
        for shortcut, bottleneck in (("A", False), ("B", True), ("C", False))
    },
    "plain": partial(CifarResNet, 8, shortcut=None),
    "highway-A": partial(CifarResNet, 8, unit="highway", widths=(16, 16, 20)),
    "highway-C": partial(CifarResNet, 8, unit="highway", shortcut="C", widths=(16, 16, 20)),
    "vgg": lambda: nn.Sequential(VGGFeatures((1, 2, 3, 1, 1), (4, 6, 8, 8, 8)), nn.Flatten()),
    "densenet": partial(models.DenseNet, 4, (2, 2, 1, 2), 8, 2, num_classes=10),
    "torchvision-vgg": torchvision_vgg,
    "torchvision-densenet": torchvision_densenet,
}
# sides of images where the last maps have more pixels than one; 16 for the others
SIZES = {"vgg": 32, "densenet": 64, "torchvision-vgg": 32, "torchvision-densenet": 64}


@torch.no_grad()
def stock(build, training=True, layout=torch.channels_last):
    """A network whose norms are not at their initial values, with running statistics that fit."""
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5).mul_(torch.where(torch.rand(module.num_features) < 0.3, -1, 1))
            module.bias.uniform_(-0.5, 0.5)
            module.momentum = 0.9
    model(torch.randn(4, 3, 64, 64))
    return model.train(training).to(memory_format=layout)
