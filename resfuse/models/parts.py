"""What networks of several families are made of: convolutions, shortcuts, initialisation, and the checks of options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]
"""Makes a normalisation layer for a number of channels, such as ``nn.BatchNorm2d``."""

SHORTCUTS = ("A", "B", "C")
"""Where a block changes the shape: A pads with zeros, B projects; C projects in every block."""


def conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(inplanes, planes, 3, stride=stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False)


class ZeroPadShortcut(nn.Module):
    """Shortcut option A: take every ``stride``-th pixel and append channels of zeros; no parameters.

    ``out[n, c, h, w] = x[n, c, stride * h, stride * w]`` for ``c < in_channels``, else 0.

    Args:
        in_channels (int): channels of the input.
        out_channels (int): channels of the output, at least ``in_channels``.
        stride (int): distance of the pixels kept, in both directions.

    Shape:
        (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)), any dtype and strides.

    Raises:
        TypeError: an argument that is not an int.
        ValueError: an argument below 1, ``out_channels < in_channels``, or an input of other channels.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, section 3.3.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        check_positive_int("in_channels", in_channels)
        check_positive_int("out_channels", out_channels)
        check_positive_int("stride", stride)
        if out_channels < in_channels:
            raise ValueError(f"out_channels must be at least in_channels {in_channels}, got {out_channels}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must have shape (N, {self.in_channels}, H, W), got {tuple(x.shape)}")
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, 0, self.out_channels - self.in_channels))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


def make_shortcut(
    option: str | None, inplanes: int, outplanes: int, stride: int, norm: NormLayer | None
) -> nn.Module | None:
    """The module on a block's shortcut.

    Args:
        option (str | None): one of ``SHORTCUTS``; None for a plain network.
        inplanes (int), outplanes (int), stride (int): the block's change of shape.
        norm (NormLayer | None): normalises a projection; None leaves it raw.

    Returns:
        nn.Module | None: a ZeroPadShortcut, a projection (its convolution, or a Sequential of convolution and norm), or
        None for the identity and for a plain network.
    """
    changes = stride != 1 or inplanes != outplanes
    if option == "C" or (option == "B" and changes):
        projection = conv1x1(inplanes, outplanes, stride)
        return projection if norm is None else nn.Sequential(projection, norm(outplanes))
    return ZeroPadShortcut(inplanes, outplanes, stride) if option == "A" and changes else None


def initialise(
    model: nn.Module, zero_init_residual: bool = False, mode: Literal["fan_in", "fan_out"] = "fan_out"
) -> None:
    """Draw He-normal weights for every convolution, in order of registration; biases and norms stay.

    Args:
        model (nn.Module): a network; residual blocks have a method ``zero_residual``.
        zero_init_residual (bool): also start every block as its shortcut.
        mode (str): "fan_out" or "fan_in".

    Raises:
        ValueError: ``zero_init_residual`` where a block cannot start like this.

    Source: He et al., Delving Deep into Rectifiers, 2015; Goyal et al., Accurate, Large Minibatch SGD, 2017.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
    blocks: list[Any] = [module for module in model.modules() if hasattr(module, "zero_residual")]
    for block in blocks if zero_init_residual else ():
        block.zero_residual()


def zero_weight(module: nn.Module) -> None:
    """Set the weight that closes a residual path to zero, so that nothing is added to the shortcut.

    Raises:
        ValueError: the module has no weight.
    """
    weight = getattr(module, "weight", None)
    if weight is None:
        raise ValueError(f"zero_init_residual must be False where norm_layer has no weight, got {module}")
    nn.init.zeros_(weight)


def check_positive_int(argument: str, value: object) -> None:
    """Raise TypeError unless ``value`` is an int, ValueError unless it is at least 1.

    Args:
        argument (str): the name that the error gives.
        value (object): what the caller passed; bool does not count as int.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{argument} must be at least 1, got {value}")


def check_probability(argument: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError unless it is in [0, 1]."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{argument} must be a number in [0, 1], got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{argument} must be in [0, 1], got {value}")


def check_length(argument: str, value: Sequence[object], length: int) -> None:
    """Raise TypeError unless ``value`` is a sequence, ValueError unless it has ``length`` elements."""
    if not isinstance(value, Sequence):
        raise TypeError(f"{argument} must be a sequence of {length} elements, got {value!r}")
    if len(value) != length:
        raise ValueError(f"{argument} must have {length} elements, got {value!r}")


def check_choice(argument: str, value: object, choices: Iterable[str | None]) -> None:
    """Raise ValueError, naming the choices, unless ``value`` is one of them."""
    names = list(choices)
    if value not in names:
        raise ValueError(f"{argument} must be one of {', '.join(str(name) for name in names)}, got {value!r}")
