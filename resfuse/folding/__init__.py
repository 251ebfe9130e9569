"""fold: an eval-only copy of a network, batch normalisation folded into its weights, run by an engine."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resfuse.backends import DTYPES
from resfuse.folding import families  # noqa: F401  registers the rules of blocks and networks
from resfuse.folding.engines import choose
from resfuse.folding.merge import merge
from resfuse.folding.module import Folded
from resfuse.folding.plan import INPUT, Plan
from resfuse.folding.walk import Walk

__all__ = ["Folded", "fold"]


def fold(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    example_input: Tensor | None = None,
    backend: str | None = None,
) -> Folded:
    """A copy of a network for inference: batch normalisation in the weights, one pass for each convolution.

    For conv, BN, residual and activation in a row, w' = w * s and b' = b * s + (bias - mean * s), with
    s = weight / sqrt(var + eps), and out = act(conv(x, w') + b' + residual) is one step. Folded are the networks and
    blocks that :func:`resfuse.fuse` knows, fused or not, torchvision's VGG and DenseNet, blocks given to
    :func:`resfuse.register_block` that are residual ones, and every Sequential of convolutions, normalisations,
    activations, pools and linear layers. What is unknown is copied and called as it is, the known parts inside it
    folded; :func:`resfuse.explain` of the result says which. The model is left as it is, and later changes of it are
    not seen: fold again after training.

    Args:
        model (nn.Module): in eval, every module of it.
        dtype (torch.dtype | None): of weights and activations, such as torch.bfloat16; None is the dtype of the model's
            first parameter. Normalisations are folded in float32 before rounding, in float64 for a float64 model.
        memory_format (torch.memory_format | None): of activations and of the result: torch.channels_last, which None
            is, or torch.contiguous_format. The tile engine computes in a layout of its own whichever it is.
        example_input (Tensor | None): as the network will get it: shape and device. The engine is prepared with it now;
            without it at the first call. Other shapes are served as well.
        backend (str | None): an engine: "tiles", "onednn", "cuda" or "reference" (plain torch operators); None takes
            the first that serves.

    Returns:
        Folded: takes (N, C, H, W) of any floating dtype and strides, and returns what the model returns in eval, in
        `dtype`. It has save and load, a state_dict of its own, and can be copied, pickled, compiled and exported.

    Raises:
        TypeError: `model` is no nn.Module, or its forward cannot be called with one tensor; or `dtype` is not float16,
            bfloat16, float32 or float64; or another argument is of the wrong type.
        ValueError: a module is in training mode, has no running statistics, or has a hook, a parametrization or a
            forward of its own that folding would drop; a convolution is shared by two normalisations; or a folded
            weight is NaN or infinite. The message names the module.
            Or the backend has no known name, or the memory format is neither of the two.
        RuntimeError: the backend is missing.

    Numerics: bias, residual and activation are added to the float32 sums of a convolution before they are rounded,
        where the engine has such an epilogue; the error against float64 is at most twice that of the model in eval.
    """
    _check_model(model)
    layout = _checked_layout(memory_format)
    first = next((tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()), None)
    own = torch.get_default_dtype() if first is None else first.dtype
    dtype = own if dtype is None else dtype
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
    if not isinstance(example_input, Tensor | None):
        raise TypeError(f"example_input must be a tensor or None, got {type(example_input).__name__}")
    if not isinstance(backend, str | None):
        raise TypeError(f"backend must be a string or None, got {backend!r}")
    options = _Options(dtype, layout, backend, torch.float64 if own == torch.float64 else torch.float32)
    folded = _folded(*_walk(model, "", options), options)
    device = torch.device("cpu") if first is None else first.device
    choose(folded.plan, device, dtype, backend)  # a missing backend raises now
    if example_input is not None:
        folded(example_input.clone())  # a stock part may write its input
    return folded


def _checked_layout(memory_format: torch.memory_format | None) -> torch.memory_format:
    layout = torch.channels_last if memory_format is None else memory_format
    if not isinstance(layout, torch.memory_format):
        raise TypeError(f"memory_format must be a torch.memory_format, got {layout!r}")
    if layout not in (torch.channels_last, torch.contiguous_format):
        raise ValueError(f"memory_format must be torch.channels_last or torch.contiguous_format, got {layout}")
    return layout


def _check_model(model: nn.Module) -> None:
    """Raise an error unless this is a network in eval whose forward takes one tensor, as a folded one does."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"{name or 'the model'} is in training mode: call model.eval() before fold")
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # it says nothing of its arguments
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise TypeError(
            f"{type(model).__name__}.forward{signature} cannot be called with one tensor ({error}), as a folded "
            "network is: fold its parts instead"
        ) from error


class _Options(NamedTuple):
    """Checked arguments of fold; `precision` is the dtype in which it folds."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    backend: str | None
    precision: torch.dtype


def _walk(model: nn.Module, name: str, options: _Options) -> tuple[Walk, Plan]:
    """The steps of a model, or of a part of one."""
    walk = Walk(options.precision, lambda part, path: _fold_part(part, path, options))
    with torch.no_grad():
        return walk, walk.plan(walk.call(model, name, INPUT))


def _fold_part(part: nn.Module, path: str, options: _Options) -> Folded | None:
    """The folded part of an unknown module, which would see it if the part wrote its input: then it stays as it is."""
    walk, plan = _walk(part, path, options)
    return None if walk.writes_input else _folded(walk, plan, options)


def _folded(walk: Walk, plan: Plan, options: _Options) -> Folded:
    dtype = options.dtype
    with torch.inference_mode(False), torch.no_grad():  # its tensors may be called for a gradient later
        folding = merge(plan, walk.tensors, dtype)
    modules = {path: module.to(dtype).requires_grad_(False) for path, module in walk.modules.items()}
    return Folded(folding, modules, walk.reasons, dtype, options.memory_format, options.backend)
