"""Loading a checkpoint into a network: all of it, or an error that says what does not fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

WeightsSource: TypeAlias = str | os.PathLike[str] | Mapping[str, torch.Tensor]
"""Where weights come from: a checkpoint's path or a state_dict."""

_KEYS_SHOWN = 10


def load_weights(model: nn.Module, weights: WeightsSource) -> None:
    """Copy a checkpoint into ``model``, all of it or nothing.

    Everything is checked before the first tensor is copied: after an error the model is as it was.

    Args:
        model (nn.Module): the network to load into; it keeps its dtype and device.
        weights (str | os.PathLike | Mapping[str, Tensor]): a ``.pth`` or ``.pt`` file (read with
            ``torch.load(weights_only=True)``), a ``.safetensors`` file, or a state_dict. It must be plain, tensors by
            parameter name, with the model's exact names and shapes. Only ``num_batches_tracked`` may be absent: older
            checkpoints do not have it, and the model then keeps its own.

    Raises:
        TypeError: ``weights`` is neither a path nor a mapping.
        ValueError: unknown extension, unreadable file, not a plain state_dict, names or shapes that do not fit, or a
            model on the meta device.
        FileNotFoundError: no such file.
        ImportError: a ``.safetensors`` file without the safetensors package.
    """
    if not isinstance(weights, str | os.PathLike | Mapping):
        raise TypeError(f"weights must be a path, a state_dict or None, got {type(weights).__name__}")
    expected = model.state_dict()
    if any(tensor.is_meta for tensor in expected.values()):
        raise ValueError("weights cannot be loaded into a model on the meta device: it has no memory to copy them to")
    if isinstance(weights, Mapping):
        origin, state = "weights", weights
    else:
        origin = f"weights {os.fspath(weights)!r}"
        state = _read(Path(weights))
    _check_plain(state, origin)
    counters = {key: tensor for key, tensor in expected.items() if key.endswith("num_batches_tracked")}
    state = {**counters, **state}
    _check_fit(state, expected, f"{origin} do not fit {type(model).__name__}")
    model.load_state_dict(state, strict=True)


def _read_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"reading {str(path)!r} needs the safetensors package: pip install safetensors") from error
    return load_file(path, device="cpu")


_READERS: dict[str, Callable[[Path], Any]] = {
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".safetensors": _read_safetensors,
}


def _read(path: Path) -> Any:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"weights must be a file that ends in {', '.join(_READERS)}, got {str(path)!r}")
    path.open("rb").close()  # a missing or forbidden file is reported by Python, with its path
    try:
        return reader(path)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # damaged bytes surface as almost any type
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"weights {str(path)!r} cannot be read, the file is damaged or holds more than tensors: "
            f"{type(error).__name__}: {reason}"
        ) from error


def _check_plain(state: object, origin: str) -> None:
    rule = f"{origin} must be a plain state_dict, tensors by parameter name"
    if not isinstance(state, Mapping):
        raise ValueError(f"{rule}, got {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            nested = [repr(name) for name, inner in state.items() if isinstance(inner, Mapping)]
            hint = f"; pass only the state_dict inside it, at {' or '.join(nested)}" if nested else ""
            raise ValueError(f"{rule}, got {type(value).__name__} at {key!r}{hint}")
        if value.is_meta:
            raise ValueError(f"{rule}, got a tensor without data (meta device) at {key!r}")
        if value.is_complex() or value.is_quantized:  # copying it would drop the imaginary part, or fail half-way
            raise ValueError(f"{rule}, got {value.dtype} at {key!r}")
        if value.layout != torch.strided:
            raise ValueError(f"{rule}, got a {value.layout} tensor at {key!r}")


def _check_fit(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], problem: str) -> None:
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    mismatched = [
        f"{key} must be {tuple(expected[key].shape)}, got {tuple(tensor.shape)}"
        for key, tensor in state.items()
        if key in expected and tensor.shape != expected[key].shape
    ]
    other_kinds = [
        f"{key} must be {expected[key].dtype}, got {tensor.dtype}"
        for key, tensor in state.items()
        if key in expected and expected[key].is_floating_point() and not tensor.is_floating_point()
    ]
    findings = [
        f"{title}: {_first_few(entries)}"
        for title, entries in (
            ("missing keys", missing),
            ("unexpected keys", unexpected),
            ("shape mismatches", mismatched),
            ("dtype mismatches", other_kinds),
        )
        if entries
    ]
    if findings:
        raise ValueError("\n  ".join([f"{problem}:", *findings]))


def _first_few(entries: list[str]) -> str:
    rest = len(entries) - _KEYS_SHOWN
    return ", ".join(entries[:_KEYS_SHOWN]) + (f", and {rest} more" if rest > 0 else "")
