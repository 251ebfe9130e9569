"""When a block runs its stock forward: the reasons that its children, the call, the device or the dtype give.

Each function says why not, in words for :func:`resfuse.explain`, or None.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from resfuse import backends
from resfuse._calls import convolved_dtype
from resfuse._checks import check_window


class Parts(NamedTuple):
    """The names of a block's children that its fused call replaces, each kind in the order of the forward pass."""

    convs: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()


def why_not_child(child: nn.Module | None, name: str, wanted: type[nn.Module]) -> str | None:
    """Why a child cannot be replaced by a fused call: its type is not exactly `wanted`, or its call would be missed."""
    if type(child) is not wanted:
        return f"{name} is a {type(child).__name__}, not a {wanted.__name__}"
    if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
        return f"{name} has a hook"
    if "forward" in child.__dict__:
        return f"{name} has its own forward"
    if child._compiled_call_impl is not None:
        return f"{name} is compiled by itself"
    return None


def why_not_conv(conv: nn.Module | None, name: str) -> str | None:
    reason = why_not_child(conv, name, nn.Conv2d)
    if reason is not None:
        return reason
    assert isinstance(conv, nn.Conv2d)
    if conv.padding_mode != "zeros":
        return f"{name} pads with {conv.padding_mode!r}, not zeros"
    if "_conv_forward" in conv.__dict__:
        return f"{name} has its own _conv_forward"
    weight = conv._parameters.get("weight", conv.__dict__.get("weight"))  # not by its name: torch.fx would record it
    if _computes_itself(weight):
        return f"{name}'s weight is a {type(weight).__name__}"
    return None


def _computes_itself(weight: Any) -> bool:
    """Whether a weight has a __torch_function__ of its own, in which it may convolve as it likes."""
    own = getattr(getattr(type(weight), "__torch_function__", None), "__func__", None)
    return own not in (None, Tensor.__torch_function__.__func__)  # type: ignore[attr-defined]


def why_not_norm(bn: nn.Module | None, name: str) -> str | None:
    reason = why_not_child(bn, name, nn.BatchNorm2d)
    if reason is not None:
        return reason
    assert isinstance(bn, nn.BatchNorm2d)
    if not bn.eps > 0 or not (bn.momentum is None or 0 <= bn.momentum <= 1):
        return f"{name} has eps {bn.eps} and momentum {bn.momentum}"  # stock computes with any number
    return None


def why_stock_children(block: nn.Module, parts: Parts) -> str | None:
    """Why a block's children keep it from being fused."""
    children = block._modules
    for name in parts.convs:
        if (reason := why_not_conv(children.get(name), name)) is not None:
            return reason
    for name in parts.norms:
        if (reason := why_not_norm(children.get(name), name)) is not None:
            return reason
    for name in parts.activations:
        if (reason := why_not_child(children.get(name), name, nn.ReLU)) is not None:
            return reason
    return why_not_projection(children.get("downsample"))


def is_projection(downsample: nn.Module | None) -> bool:
    """Whether the shortcut is a Sequential of a convolution and a batch normalisation."""
    return (
        type(downsample) is nn.Sequential
        and len(downsample) == 2
        and type(downsample[0]) is nn.Conv2d
        and type(downsample[1]) is nn.BatchNorm2d
    )


def why_not_projection(downsample: nn.Module | None) -> str | None:
    if downsample is None or not is_projection(downsample):
        return None  # a shortcut of any other kind is called as it is
    conv, bn = downsample._modules["0"], downsample._modules["1"]
    return (
        why_not_child(downsample, "downsample", nn.Sequential)
        or why_not_conv(conv, "downsample.0")
        or why_not_norm(bn, "downsample.1")
    )


def why_not_pool(pool: nn.Module, x: Tensor, backend: str | None) -> str | None:
    """Why a max-pool is called as it is, after the fused layer before it."""
    reason = why_not_child(pool, "maxpool", nn.MaxPool2d)
    if reason is not None:
        return reason
    assert isinstance(pool, nn.MaxPool2d)
    if pool.dilation not in (1, (1, 1)) or pool.ceil_mode or pool.return_indices:
        return "maxpool dilates, rounds up or returns indices"
    try:
        check_window(pool.kernel_size, pool.stride, pool.padding)
    except (TypeError, ValueError) as error:
        return f"maxpool: {error}"
    if backend is None:
        return backends.why_none("bn_relu_maxpool", x.device.type, x.dtype)
    return backends.missing("bn_relu_maxpool", backend, x.device.type, x.dtype)


def why_stock_anywhere() -> str | None:
    """Why every block runs stock at present."""
    return "a global module hook is registered" if _torch_module._has_any_global_hook() else None


def why_stock_input(device: str, dtype: torch.dtype, backend: str | None) -> str | None:
    """Why no backend serves activations on this device in this dtype; a requested backend is left to raise."""
    dtype = convolved_dtype(device, dtype)
    if backend is None and (reason := backends.why_none("bn_act", device, dtype)) is not None:
        return f"no backend serves {dtype} on {device}: {reason}"
    return None


def why_stock_call(x: Tensor) -> str | None:
    """Why every block runs stock in this call: something looks at the modules that it would go through."""
    if isinstance(x, torch.fx.Proxy):
        return "the model is being traced by torch.fx"
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "the model is being exported"
    return why_stock_anywhere()


def why_stock(x: Tensor, block: str | None, backend: str | None) -> str | None:
    """Why a call with x runs a block's stock forward; `block` is the reason that the block itself gives."""
    return why_stock_call(x) or block or why_stock_input(x.device.type, x.dtype, backend)
