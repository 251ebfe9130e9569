"""Fused residual kernels for PyTorch: train and serve ResNet-like networks in fewer passes over memory."""

from resfuse import backends, functional, models, nn
from resfuse.folding import Folded, fold
from resfuse.fusion import Explanation, explain, fuse, register_block, unfuse
from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters, Moments

__version__ = "0.1.0"
__all__ = [
    "BatchNorm2dParameters",
    "Conv2dParameters",
    "Explanation",
    "Folded",
    "Moments",
    "backends",
    "explain",
    "fold",
    "functional",
    "fuse",
    "models",
    "nn",
    "register_block",
    "unfuse",
]
