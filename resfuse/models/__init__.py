"""The networks of the ResNet papers: what a user builds, by name or by builder; nothing is defined here."""

from resfuse.models.builder import Builder
from resfuse.models.checkpointing import CheckpointedSequential
from resfuse.models.cifar import BNReLU, CifarResNet
from resfuse.models.densenet import DenseNet
from resfuse.models.highway import HighwayBlock
from resfuse.models.parts import ZeroPadShortcut
from resfuse.models.registry import BUILDERS, get_model, list_models
from resfuse.models.resnet import BasicBlock, Bottleneck, PlainBlock, ResNet
from resfuse.models.units import ResidualUnit
from resfuse.models.vgg import VGG

__all__ = [
    "VGG",
    "BNReLU",
    "BasicBlock",
    "Bottleneck",
    "CheckpointedSequential",
    "CifarResNet",
    "DenseNet",
    "HighwayBlock",
    "PlainBlock",
    "ResNet",
    "ResidualUnit",
    "ZeroPadShortcut",
    "get_model",
    "list_models",
]


def __getattr__(name: str) -> Builder:
    """A network's builder by its name: ``models.resnet50(num_classes=10)`` is ``get_model("resnet50", ...)``."""
    if name in BUILDERS:
        return BUILDERS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; list_models() lists the networks")


def __dir__() -> list[str]:
    return sorted({*globals(), *BUILDERS})
