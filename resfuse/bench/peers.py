"""Access to the libraries that resfuse is compared with."""

from __future__ import annotations

import importlib
import types

import torch

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_kept: list[torch.library.Library] = []  # a library's definitions live as long as the object


def import_torchvision() -> types.ModuleType:
    """Import torchvision, also where its compiled operators do not load.

    A CUDA build of torchvision beside a CPU-only torch fails at import, because the operators whose fakes it registers
    were never defined. Declaring their schemas first is enough: no network of ``torchvision.models`` calls them.

    Returns:
        types.ModuleType: the torchvision package.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    _declare_missing_operators()
    return importlib.import_module("torchvision")


def _declare_missing_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _OPERATORS:
        library.define(schema)
    _kept.append(library)
