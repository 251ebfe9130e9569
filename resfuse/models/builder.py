"""What a network's name stands for: its class and the arguments that the name fixes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from resfuse.models.weights import WeightsSource, load_weights


@dataclass(frozen=True)
class Builder:
    """Builds a network; each family has a table of them by name.

    Attributes:
        network: the network's class, whose documentation lists the options.
        structure: the arguments that belong to the name, such as block and depth; a caller cannot give them.
        defaults: values of other arguments, where they differ from the class's.
    """

    network: Callable[..., nn.Module]
    structure: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, *, weights: WeightsSource | None = None, progress: bool = True, **options: Any) -> nn.Module:
        """Construct the network and load its weights.

        Args:
            weights (str | os.PathLike | Mapping[str, Tensor] | None): see :func:`load_weights`; None loads nothing.
            progress (bool): accepted, as torchvision's builders do; nothing is downloaded, so there is none to show.
            **options: the class's other arguments.

        Returns:
            nn.Module: the network in training mode.

        Raises:
            TypeError: an option that the network does not have, or that its name fixes.
        """
        accepted = [name for name in inspect.signature(self.network).parameters if name not in self.structure]
        unexpected = [option for option in options if option not in accepted]
        if unexpected:
            raise TypeError(
                f"unexpected keyword arguments: {', '.join(unexpected)}; "
                f"accepted are: {', '.join(['weights', *accepted])}"
            )
        model = self.network(**self.structure, **{**self.defaults, **options})
        if weights is not None:
            load_weights(model, weights)
        return model
