"""Folded: the module that fold returns. It holds a plan and its tensors, and runs them by an engine."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from resfuse._calls import autocasts, transformed
from resfuse.folding import engines, files
from resfuse.folding.engines import reference
from resfuse.folding.merge import Folding
from resfuse.folding.pages import OneAtATime
from resfuse.folding.plan import (
    INPUT,
    AdaptivePool,
    AveragePool,
    Convolution,
    MaxPool,
    ScaleShiftAct,
    Stock,
    plan_from_data,
)
from resfuse.fusion import BlockReport, Explanation
from resfuse.ops import accumulate_dtype

FORMAT = "resfuse.folded"
VERSION = 1
"""Of what `save` writes and of the state_dict."""


class Folded(nn.Module):
    """A network for inference only: what :func:`resfuse.fold` returns.

    Its tensors are buffers named as the modules that they come from, under ``folded``; modules that are not folded are
    under ``stock``. Called with a tensor that requires a gradient, under torch.compile, and while it is exported or
    traced, it computes in plain torch operators. Calls from several threads at once are safe; moving it, loading a
    state_dict and calls at the same time are not.

    Attributes:
        plan (Plan): its steps.
        backend (str | None): the engine that was asked for.
    """

    _version = VERSION
    _run: Callable[[Tensor], Tensor] | None
    _device: torch.device | None
    _lock: threading.Lock

    def __init__(
        self,
        folding: Folding,
        modules: Mapping[str, nn.Module],
        reasons: Mapping[str, str],
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.plan, self.backend = folding.plan, backend
        self.folded, self.stock = nn.Module(), nn.Module()
        self._dtype, self._layout = dtype, str(memory_format).removeprefix("torch.")  # torch.save pickles no layout
        self._reasons = dict(reasons)
        self._channels = _input_channels(folding)
        for name, tensor in folding.tensors.items():
            parent, _, leaf = name.rpartition(".")
            _holder(self.folded, parent).register_buffer(leaf, tensor)
        for name, module in modules.items():
            parent, _, leaf = name.rpartition(".")
            _holder(self.stock, parent).add_module(leaf or _ROOT, module)
        self._mapped = False  # whether the tensors are in a file that load has mapped
        super().train(False)
        self._forget()
        self.register_load_state_dict_post_hook(Folded._loaded)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations and weights."""
        return self._dtype

    def train(self, mode: bool = True) -> Folded:
        """A folded network cannot be trained: RuntimeError unless `mode` is False."""
        if mode:
            raise RuntimeError("a folded network is for inference only: train the network that it was folded from")
        return super().train(False)

    def extra_repr(self) -> str:
        return f"{len(self.plan.steps)} steps, dtype={self._dtype}, backend={self.backend!r}"

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):
            return reference.run(self.plan, *self._parts(), x.to(self._dtype))
        self._check(x)
        with torch.autocast(x.device.type, enabled=False) if autocasts(x.device.type) else nullcontext():
            if torch.compiler.is_compiling() or _is_watched(x) or x.numel() == 0:
                return self._laid_out(reference.run(self.plan, *self._parts(), x.to(self._dtype)))
            with torch.no_grad():
                x = self._laid_out(x.to(self._dtype))
                run = self._run
                return self._laid_out(self._first(x) if run is None else run(x))

    def _check(self, x: Tensor) -> None:
        """Raise an error that says what x must be: of any shape where no convolution or normalisation reads it."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating point tensor, got {x.dtype}")
        if self._device is not None and x.device != self._device:
            raise RuntimeError(f"x must be on {self._device}, where the network is, got {x.device}")
        if self._channels is not None and (x.dim() != 4 or x.shape[1] != self._channels):
            raise ValueError(f"x must have shape (N, {self._channels}, H, W), got {tuple(x.shape)}")

    def _laid_out(self, x: Tensor) -> Tensor:
        """An activation in the layout that was asked for; a stock part may return anything, which is left as it is."""
        if isinstance(x, Tensor) and x.dim() == 4 and not transformed():
            return x.contiguous(memory_format=getattr(torch, self._layout))
        return x

    def _first(self, x: Tensor) -> Tensor:
        """The first call prepares what runs the plan; other threads that come meanwhile wait."""
        with self._lock:
            run = self._run
            if run is None:
                engine = engines.ENGINES[engines.choose(self.plan, x.device, self._dtype, self.backend)]
                tensors, modules = self._parts()
                tensors = OneAtATime(tensors) if self._mapped else tensors
                self._run, out = engine.prepare(self.plan, tensors, modules, x)
                return out
        return run(x)

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, nn.Module]]:
        """What the plan's names stand for."""
        tensors = {name: self.folded.get_buffer(name) for step in self.plan.steps for name in step.tensors}
        stock = [step.module for step in self.plan.steps if isinstance(step, Stock)]
        return tensors, {name: self.stock.get_submodule(name or _ROOT) for name in stock}

    def _forget(self) -> None:
        """Whatever was prepared no longer holds."""
        self._run = None
        self._device = next((buffer.device for buffer in self.folded.buffers()), None)
        self._lock = threading.Lock()

    def _apply(self, fn: Any, recurse: bool = True) -> Folded:
        super()._apply(fn, recurse)
        self._settle()
        return self

    def _settle(self) -> None:
        """The dtype is that of the weights, which may be new ones; vectors keep its accumulation dtype."""
        tensors = (*self.folded.buffers(), *self.stock.parameters(), *self.stock.buffers())
        weights = (tensor for tensor in tensors if tensor.dim() > 1 and tensor.is_floating_point())
        self._dtype = next((weight.dtype for weight in weights), self._dtype)
        for module in self.folded.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.dim() == 1:
                    module._buffers[name] = buffer.to(accumulate_dtype(self._dtype))
        self._forget()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        version = local_metadata.get("version", VERSION)
        if version != VERSION:
            raise ValueError(f"this resfuse reads version {VERSION} of a folded network's state_dict, got {version}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    @staticmethod
    def _loaded(module: Folded, incompatible_keys: Any) -> None:
        module._settle()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_run", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mapped = False
        self._forget()

    def _resfuse_explanation(self) -> FoldedExplanation:
        """What :func:`resfuse.explain` says of this network."""
        reports = []
        device = next((buffer.device for buffer in self.folded.buffers()), torch.device("cpu"))
        engine = engines.choose(self.plan, device, self._dtype, self.backend)
        computed_by = engines.computed_by(engine, self.plan, self._dtype)
        for step in self.plan.steps:
            if isinstance(step, Stock):
                module = self.stock.get_submodule(step.module or _ROOT)
                reports.append(BlockReport(step.module, type(module).__name__, False, self._reasons[step.module]))
                inner = [part for part in module.modules() if isinstance(part, Folded)]
                reports += [report for part in inner for report in part._resfuse_explanation().blocks]
            elif step.tensors:
                how = f"{computed_by[step.output]}{_absorbed(step)}"
                reports.append(BlockReport(step.names[0], type(step).__name__, True, "", how))
        return FoldedExplanation(tuple(reports))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the network to a file of plain data, without code; :meth:`load` reads it.

        Args:
            path (str | os.PathLike): the file; it is replaced only when everything is written.

        Raises:
            ValueError: a part is not folded, which is code: pickle the network, or save its state_dict, instead.
        """
        if self._reasons:
            names = ", ".join(name or "the model" for name in self._reasons)
            raise ValueError(f"save writes no code, but these parts are not folded: {names}")
        data = {
            "format": FORMAT,
            "version": VERSION,
            "plan": self.plan.to_data(),
            "tensors": self._parts()[0],
            "dtype": str(self._dtype).removeprefix("torch."),
            "memory_format": self._layout,
            "backend": self.backend,
        }
        files.write(path, data)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Folded:
        """Read a network that :meth:`save` wrote; its tensors stay in the file, which may be replaced but not changed.

        Args:
            path (str | os.PathLike): the file.
            device (str | torch.device): where its tensors go.

        Raises:
            ValueError: the file is damaged, or holds something else or another version of it.
            FileNotFoundError: there is none.
        """
        data = files.read(path, device)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path} holds no folded network")
        version = data.get("version")
        if version != VERSION:
            raise ValueError(f"this resfuse reads version {VERSION} of a folded network, {path} has {version}")
        try:
            network = cls._from_data(data)
        except (KeyError, AttributeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds a damaged folded network: {type(error).__name__}: {error}") from error
        network._mapped = True
        return network

    @classmethod
    def _from_data(cls, data: Mapping[str, Any]) -> Folded:
        """The network that `save` described; any error of what is wrong with the data."""
        plan, dtype, layout = plan_from_data(data["plan"]), data["dtype"], data["memory_format"]
        if not isinstance(getattr(torch, dtype), torch.dtype) or layout not in ("channels_last", "contiguous_format"):
            raise ValueError(f"it says dtype {dtype!r} and memory_format {layout!r}")
        if data["backend"] is not None and data["backend"] not in engines.ENGINES:
            raise ValueError(f"it says backend {data['backend']!r}")
        files.check_tensors(plan, data["tensors"], getattr(torch, dtype))
        folding = Folding(plan, data["tensors"])
        return cls(folding, {}, {}, getattr(torch, dtype), getattr(torch, layout), data["backend"])


_ROOT = "model"
"""The name under which a network that is stock as a whole is kept."""


class FoldedExplanation(Explanation):
    """The steps of a folded network that have tensors, and its modules that are not folded, and why not."""

    def __str__(self) -> str:
        stock = sum(not block.fused for block in self.blocks)
        lines = [f"{len(self.blocks) - stock} layers folded, {stock} modules stock"]
        width = max((len(block.name or "(model)") for block in self.blocks), default=0)
        for block in self.blocks:
            state = f"folded, by {block.convolutions}" if block.fused else f"stock: {block.reason}"
            lines.append(f"  {block.name or '(model)':{width}}  {block.type:13}  {state}")
        return "\n".join(lines)


def _input_channels(folding: Folding) -> int | None:
    """The channels of the network's input, where a convolution or a normalisation reads it, or its pools."""
    like_input = {INPUT}
    for step in folding.plan.steps:
        if step.input not in like_input:
            continue
        if isinstance(step, Convolution):
            return folding.tensors[step.weight].shape[1] * step.groups
        if isinstance(step, ScaleShiftAct) and step.scale is not None:
            return len(folding.tensors[step.scale])
        if isinstance(step, ScaleShiftAct | MaxPool | AveragePool | AdaptivePool):
            like_input.add(step.output)
    return None


def _absorbed(step: Any) -> str:
    """What a step does besides its first module."""
    parts = [*step.names[1:]]
    parts += ["a residual"] if getattr(step, "residual", None) is not None else []
    return f", with {', '.join(parts)}" if parts else ""


def _holder(root: nn.Module, path: str) -> nn.Module:
    """The module at a path below root, made where it is missing."""
    for name in path.split(".") if path else ():
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]  # type: ignore[assignment]
    return root


def _is_watched(x: Tensor) -> bool:
    """Whether something follows the operators of this call: a tracer, autograd, a transform, a kind of tensor."""
    return (
        torch.jit.is_tracing()
        or (x.requires_grad and torch.is_grad_enabled())
        or type(x) not in (Tensor, nn.Parameter)
        or transformed()
    )
