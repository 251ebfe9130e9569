"""What commands share: where they print, how they stop, and the checks of names that a user types."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from resfuse import backends
from resfuse.bench.workload import stock

OK, WRONG, UNUSABLE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: all is well; a result is wrong; the command cannot run as it was given; Ctrl-C."""

console = Console()


def say(text: str, style: str | None = None) -> None:
    """Print one line as it is: neither wrapped nor coloured by its content."""
    console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)


def stop(reason: object, code: int = UNUSABLE) -> typer.Exit:
    """The exception that ends a command, with one line on the error stream."""
    print(f"resfuse: {reason}", file=sys.stderr)
    return typer.Exit(code)


def made_folder(path: Path) -> Path:
    """The folder, made if it is missing; else the command stops."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise stop(f"cannot write to {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise stop(f"cannot write to {path}: {os.strerror(errno.EACCES)}")
    return path


def one_of(kind: str, name: str, choices: Iterable[str]) -> str:
    """The name if it is one of the choices; else the command stops and names the nearest."""
    known = list(choices)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise stop(f"{kind} must be one of {', '.join(known)}, got {name!r}{hint}")


def all_of(kind: str, names: Sequence[str] | None, choices: Iterable[str], default: Sequence[str] = ()) -> list[str]:
    """Names as :func:`one_of`, each once, separated by commas too; the default where there are none."""
    given = [part for name in names or () for part in name.split(",") if part]
    known = list(choices)
    return list(dict.fromkeys(one_of(kind, name, known) for name in given)) or list(default)


def checked_device(device: str) -> str:
    """ "cpu", or "cuda" where torch finds a GPU."""
    one_of("device", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise stop("device cuda: torch finds no NVIDIA GPU; resfuse doctor says what there is")
    return device


DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in backends.DTYPES)


def checked_dtypes(
    names: Sequence[str] | None, device: str, default: Sequence[str], choices: Sequence[str] = DTYPES
) -> list[str]:
    """Dtypes, of the choices, that have native kernels on the device."""
    found = all_of("dtype", names, choices, default)
    for name in found:
        reason = backends.missing("bn_act", "native", device, getattr(torch, name))
        if reason is not None:
            raise stop(f"no native kernels for {name} on {device}: {reason}")
    return found


def checked_backend(name: str | None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> str | None:
    """A backend that serves this device and dtype, or None for the best."""
    if name is not None:
        one_of("backend", name, backends.BACKENDS)
        reason = backends.missing("bn_act", name, device, dtype)
        if reason is not None:
            raise stop(f"backend {name} does not serve {device}: {reason}")
    return name


def checked_model(name: str) -> str:
    """A network's name, of torchvision or resfuse.models."""
    try:
        with torch.device("meta"):
            stock(name)
    except ValueError as error:
        raise stop(str(error).replace("list_models() lists them all", "resfuse list names them all")) from None
    return name


def shape_of(text: str) -> tuple[int, ...]:
    """NxCxHxW as four positive numbers."""
    parts = text.lower().replace(",", "x").split("x")
    if len(parts) != 4 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise stop(f"shape must be four positive numbers NxCxHxW, as 16x64x56x56, got {text!r}")
    return tuple(map(int, parts))


def at_least(name: str, value: int | None, least: int = 1) -> int | None:
    """A number that is given and large enough, or None."""
    if value is not None and value < least:
        raise stop(f"{name} must be at least {least}, got {value}")
    return value


def import_or_stop(name: str, what: str, extra: str) -> Any:
    """A module of this package whose own imports may be missing; the command then stops and says what to install."""
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise stop(f"this version has no {what}") from None
        raise stop(f'{what} needs {error.name}: pip install "resfuse[{extra}]"') from None


def check_writable(path: Path) -> None:
    """Stop before anything is measured if a file could not be written; its folder is made, and nothing else left."""
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise stop(f"cannot write {path}: {error.strerror}") from None
    if not there:
        path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file, making its folder; the command stops where it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise stop(f"cannot write {path}: {error.strerror}") from None
