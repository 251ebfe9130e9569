"""The table of networks by name, and nothing about any one of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from resfuse.models import cifar, resnet
from resfuse.models.weights import WeightsSource

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder
    for builder in (
        resnet.resnet18,
        resnet.resnet34,
        resnet.resnet50,
        resnet.resnet101,
        resnet.resnet152,
        cifar.cifar_resnet20,
        cifar.cifar_resnet32,
        cifar.cifar_resnet44,
        cifar.cifar_resnet56,
        cifar.cifar_resnet110,
    )
}


def list_models() -> list[str]:
    """Return the names that ``get_model`` knows, sorted."""
    return sorted(_BUILDERS)


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
        **kwargs: the other options of the network, as :class:`ResNet` and :class:`CifarResNet` list them.

    Returns:
        nn.Module: the network in training mode, float32 unless torch's default dtype says otherwise.

    Raises:
        TypeError: an option that the network does not have, or an argument of the wrong type.
        ValueError: an unknown name, an option out of range, or weights that cannot be read or do not fit.
        FileNotFoundError: ``weights`` names a file that does not exist.
    """
    builder = _BUILDERS.get(name) if isinstance(name, str) else None
    if builder is None:
        raise ValueError(_unknown_name(name))
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    return builder(weights=weights, **kwargs)


def _unknown_name(name: object) -> str:
    nearest = difflib.get_close_matches(str(name), list_models(), n=3, cutoff=0.4)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    return f"name must be the name of a network, got {name!r}{hint}; list_models() lists them all"
