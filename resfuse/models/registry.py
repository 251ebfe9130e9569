"""The table of networks by name, and nothing about any one of them."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from resfuse.models import cifar, densenet, resnet, vgg
from resfuse.models.builder import Builder
from resfuse.models.weights import WeightsSource

BUILDERS: dict[str, Builder] = {
    name: builder for family in (resnet, cifar, vgg, densenet) for name, builder in family.BUILDERS.items()
}


def list_models() -> list[str]:
    """Return the names that ``get_model`` knows, sorted."""
    return sorted(BUILDERS)


def get_model(
    name: str, *, weights: WeightsSource | None = None, num_classes: int | None = None, **kwargs: Any
) -> nn.Module:
    """Build the network called ``name``.

    Args:
        name (str): one of ``list_models()``.
        weights (str | os.PathLike | Mapping[str, Tensor] | None): a ``.pth``, ``.pt`` or ``.safetensors`` file that
            holds a plain state_dict, or the state_dict itself; None leaves the random initialisation. Nothing is ever
            downloaded.
        num_classes (int | None): outputs of the last linear layer; None means the builder's own default, the number of
            classes the network was published with (1000 for the ImageNet networks, 10 for the CIFAR ones).
        **kwargs: the other options of the network, as its class lists them: :class:`ResNet`, :class:`CifarResNet`,
            :class:`VGG` or :class:`DenseNet`.

    Returns:
        nn.Module: the network in training mode, float32 unless torch's default dtype says otherwise.

    Raises:
        TypeError: an option that the network does not have, or an argument of the wrong type.
        ValueError: an unknown name, an option out of range, or weights that cannot be read or do not fit.
        FileNotFoundError: ``weights`` names a file that does not exist.
    """
    builder = BUILDERS.get(name) if isinstance(name, str) else None
    if builder is None:
        raise ValueError(_unknown_name(name))
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    return builder(weights=weights, **kwargs)


def _unknown_name(name: object) -> str:
    nearest = difflib.get_close_matches(str(name), list_models(), n=3, cutoff=0.4)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    choices = ", ".join(list_models())
    return f"name must be the name of a network, got {name!r}{hint}; list_models() lists them all: {choices}"
