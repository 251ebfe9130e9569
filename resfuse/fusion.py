"""fuse, unfuse and explain: swapping the classes of blocks that resfuse knows for fused subclasses, and back.

Fusing a model changes the class of its blocks and nothing else: modules, parameters, buffers, hooks and their names
stay the same objects, so optimizers, state_dicts and wrappers keep working.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resfuse._calls import convolved_dtype
from resfuse.backends import BACKENDS, missing
from resfuse.guards import is_projection, why_stock_anywhere, why_stock_children, why_stock_input
from resfuse.nn import ConvBNAct2d, FusedBlock, conv_parameters
from resfuse.raw_chain import folds_from, why_not_convs

M = TypeVar("M", bound=nn.Module)

# Where the fused subclasses of a library's blocks are, by the module that defines the blocks.
_INTEGRATIONS = {
    "torchvision.models.resnet": "resfuse.integrations.torchvision",
    "torchvision.models.vgg": "resfuse.integrations.torchvision",
    "torchvision.models.densenet": "resfuse.integrations.torchvision",
    "resfuse.models.resnet": "resfuse.integrations.models",
    "resfuse.models.cifar": "resfuse.integrations.models",
    "resfuse.models.highway": "resfuse.integrations.models",
    "resfuse.models.units": "resfuse.integrations.units",
    "resfuse.models.vgg": "resfuse.integrations.vgg",
    "resfuse.models.densenet": "resfuse.integrations.densenet",
}
_registered: dict[type[nn.Module], type[FusedBlock]] = {}


def register_block(stock: type[nn.Module], fused: type[nn.Module]) -> None:
    """Let `fuse` swap `stock` for `fused`.

    Args:
        stock (type): a block's class; subclasses of it are not affected.
        fused (type): a subclass of one of :mod:`resfuse.nn`'s mixins and of `stock`, in this order, at the top level of
            a module, so that fused models can be pickled. It must add no state.

    Raises:
        TypeError: `fused` is not a subclass of both.
    """
    if not (issubclass(fused, FusedBlock) and issubclass(fused, stock)):
        raise TypeError(f"fused must be a subclass of a resfuse.nn mixin and of {stock.__name__}, got {fused!r}")
    _registered[stock] = fused


def _fused_class(stock: type[nn.Module]) -> type[FusedBlock] | None:
    """The fused subclass of exactly this class, importing the integration it belongs to."""
    if stock not in _registered and stock.__module__ in _INTEGRATIONS:
        integration = importlib.import_module(_INTEGRATIONS[stock.__module__])
        return integration.FUSED.get(stock)
    return _registered.get(stock)


def _stock_class(fused: type) -> type[nn.Module]:
    """The class that a fused class was made for: the first of its bases that is no fused one."""
    return next(base for base in fused.__mro__ if issubclass(base, nn.Module) and not issubclass(base, FusedBlock))


@dataclass(frozen=True)
class BlockReport:
    """How one block runs: its qualified name ("" is the model itself), its stock class, and why it is not fused.

    convolutions says who computes those of a fused block: "tiles" (activations travel raw between them, if they are
    channels_last), or "torch" and why, or how many stretches of a long block are torch's; and which 1x1
    convolutions fold in training, from how many pixels of the batch on: :func:`resfuse.backends.folds_from`.
    """

    name: str
    type: str
    fused: bool
    reason: str
    convolutions: str = ""


@dataclass(frozen=True)
class Explanation:
    """Every block of a model that holds batch normalisation, fused or not, and why not."""

    blocks: tuple[BlockReport, ...]

    def __str__(self) -> str:
        fused = sum(block.fused for block in self.blocks)
        lines = [f"{fused} of {len(self.blocks)} blocks fused"]
        width = max((len(block.name or "(model)") for block in self.blocks), default=0)
        for block in self.blocks:
            how = f", convolutions by {block.convolutions}" if block.convolutions else ""
            state = f"fused{how}" if block.fused else f"stock: {block.reason}"
            lines.append(f"  {block.name or '(model)':{width}}  {block.type:12}  {state}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The blocks as a JSON list of objects with name, type, fused, reason and convolutions."""
        return json.dumps([asdict(block) for block in self.blocks], indent=1)


def known_class(module: nn.Module) -> type[FusedBlock] | None:
    """The fused class that a block has or would get; None where resfuse has none for it."""
    return type(module) if isinstance(module, FusedBlock) else _fused_class(type(module))


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What :func:`explain` lists, by qualified name."""
    found = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        fused = known_class(module)
        known = fused is not None or type(module) is ConvBNAct2d
        holds = any(isinstance(child, _BatchNorm) for child in module.children())
        if not known and (not holds or id(module) in inside):
            continue
        found.append((name, module))
        for child in (fused or FusedBlock).answers_for:
            part = module._modules.get(child)
            if fused is not None and child == "downsample" and not is_projection(part):
                continue  # a fused block calls it as it is
            inside.update(id(each) for each in (part.modules() if part is not None else ()))
    return found


def _why_stock(module: nn.Module, backend: str | None) -> str | None:
    """Why a block, fused with this backend, would run stock if called now in its parameters' device and dtype."""
    known = known_class(module)
    if known is not None:
        reason = known.why_stock_children(module) or known.why_stock_mode(module)
    elif type(module) is ConvBNAct2d:  # fused by itself
        reason, backend = why_stock_children(module, module.fused_parts), module.backend
    else:
        return f"resfuse has no fused {type(module).__name__}"
    own = next((name for name in ("forward", "_forward_impl") if name in module.__dict__), None)
    reason = why_stock_anywhere() or reason or (None if own is None else f"it has its own {own}")
    parameter = next(module.parameters(), None)
    if reason is not None or parameter is None or parameter.device.type == "meta":
        return reason
    return why_stock_input(parameter.device.type, parameter.dtype, backend)


def explain(model: nn.Module) -> Explanation:
    """How each block of a model runs now: in its present mode, in its parameters' dtype or, under autocast, in that's.

    Args:
        model (nn.Module): any model, fused or not, or a folded one. Nothing is changed.

    Returns:
        Explanation: one entry for each block that resfuse knows and for each other module that directly holds batch
        normalisation, a block's projection (`downsample`) excepted; of a folded model, one for each layer that is
        folded and each module that is not; as text through str(), as JSON through .to_json().
    """
    own: Any = getattr(model, "_resfuse_explanation", None)
    if own is not None:  # a folded model explains itself
        return own()
    reports = []
    for name, module in _blocks(model):
        fused = isinstance(module, FusedBlock)
        kind = _stock_class(type(module)) if fused else type(module)
        reason = _why_stock(module, getattr(module, "_resfuse_backend", None))
        if reason is None and not fused and kind is not ConvBNAct2d:
            reason = "fuse() has not been applied to it"
        how = _convolutions(module) if reason is None else ""
        reports.append(BlockReport(name, kind.__name__, reason is None, reason or "", how))
    return Explanation(tuple(reports))


def stretches(module: Any) -> list[tuple[list[nn.Conv2d], str | None]]:
    """The convolutions of a fused block, in lists of those that only serve together, and why they are left to torch;
    None where tile kernels compute them, for activations in the block's parameters' device and dtype."""
    backend, found = getattr(module, "_resfuse_backend", None), []
    for convs in module.stretches_of(module) if isinstance(module, FusedBlock) else [[module.conv]]:
        if not convs:
            continue
        reason: str | None = "the reference was asked for"
        if backend != "reference":
            device, dtype = convs[0].weight.device.type, convs[0].weight.dtype
            parameters = [conv_parameters(conv) for conv in convs]
            reason = why_not_convs(parameters, device, convolved_dtype(device, dtype), backend)
        found.append((convs, reason))
    return found


def _convolutions(module: Any) -> str:
    """Who computes the convolutions of a fused block."""
    reasons = [reason for _, reason in stretches(module)]
    left = [reason for reason in reasons if reason is not None]
    if len(left) == len(reasons):
        return f"torch: {left[0]}" if left else ""
    how = f"tiles{_folding(module)}"
    return f"{how}; torch in {len(left)} of {len(reasons)} stretches: {left[0]}" if left else how


def _folding(module: Any) -> str:
    """Which convolutions of a fused block fold in training, and from how many pixels on."""
    found: list[str] = []
    closing = module.closing_layers() if isinstance(module, FusedBlock) else {}
    for i, (name, layer) in enumerate(closing.items()):
        least = folds_from(layer, module._resfuse_folding, projection=i > 0)
        if least is None:  # without the last layer a projection does not fold either
            break
        out, channels = layer[0].weight.shape[:2]
        found.append(f"{name} ({channels} -> {out})" + (f" from {least} pixels on" if least else ""))
    return f", folding {' and '.join(found)}" if found else ""


def fuse(
    model: M,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    backend: str | None = None,
    folding: bool | None = None,
    strict: bool = False,
) -> M:
    """Fuse the blocks of a model in place; parameters, buffers and hooks stay the same objects.

    Known blocks: those of torchvision's ResNets, VGGs and DenseNets; all blocks of :mod:`resfuse.models`, the highway's
    but for its gate; and those given to :func:`register_block`. A block whose children it cannot replace (another
    normalisation, a hook, a parametrization) stays stock, and so does, call by call, a block on a device or in a dtype
    that no backend serves; :func:`explain` says why. Call it after loading weights and before torch.compile, DDP or
    FSDP. torch.jit.script refuses a fused block: script the model unfused, or trace or export it.

    Args:
        model (nn.Module): changed in place.
        filter_fn (Callable[[nn.Module, str], bool] | None): given a block that :func:`explain` lists and its qualified
            name, whether to fuse it.
        backend (str | None): "native", "triton" or "reference" for every fused block; None chooses at each call.
        folding (bool | None): fold the last batch normalisation of bottlenecks into its 1x1 convolution during training
            always (True), never (False), or by the measured rule :func:`resfuse.backends.folds_from` (None).
        strict (bool): raise if a block that filter_fn lets through would stay stock, now and with activations in its
            parameters' device and dtype.

    Returns:
        nn.Module: the same object.

    Raises:
        TypeError: `model` is no nn.Module. ValueError: `backend` is no backend's name, or `strict` and a block would
        stay stock; RuntimeError: the backend is missing on the model's device. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    _check_backend(model, backend)
    chosen = [(name, module) for name, module in _blocks(model) if filter_fn is None or filter_fn(module, name)]
    if strict:
        _raise_if_stock(chosen, backend)
    for _, module in chosen:
        known = known_class(module)
        if known is not None and known.why_stock_children(module) is None:
            module.__class__ = known  # type: ignore[assignment]
            module._resfuse_backend = backend  # type: ignore[assignment]
            module._resfuse_folding = folding  # type: ignore[assignment]
    return model


def _check_backend(model: nn.Module, backend: str | None) -> None:
    if backend is None:
        return
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    for parameter in model.parameters():
        reason = missing("bn_act", backend, parameter.device.type, parameter.dtype)
        if reason is not None:
            raise RuntimeError(f"backend={backend!r} does not serve this model on {parameter.device.type}: {reason}")


def _raise_if_stock(chosen: list[tuple[str, nn.Module]], backend: str | None) -> None:
    left = [(name or "(model)", reason) for name, module in chosen if (reason := _why_stock(module, backend))]
    if left:
        lines = "; ".join(f"{name}: {reason}" for name, reason in left)
        raise ValueError(f"strict=True, but {len(left)} blocks would stay stock: {lines}")


def unfuse(model: M) -> M:
    """Undo :func:`fuse` in place: every fused block gets its stock class back.

    Args:
        model (nn.Module): changed in place; parameters and buffers stay the same objects.

    Returns:
        nn.Module: the same object.

    Raises:
        TypeError: `model` is no nn.Module, or a block's class was made of a fused one by something else, as FSDP does,
            which has to be undone first. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, FusedBlock) and _fused_class(_stock_class(type(module))) is not type(module):
            raise TypeError(f"model's {name or 'root'} is a {type(module).__name__}, which fuse did not make")
    for module in model.modules():
        if isinstance(module, FusedBlock):
            for name in ("_resfuse_backend", "_resfuse_folding"):
                module.__dict__.pop(name, None)
            module.__class__ = _stock_class(type(module))  # type: ignore[assignment]
    return model
