"""What a training run needs to be interrupted and continued: files written whole or not at all, and a polite stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resfuse.models.weights import load_weights


class TrainingError(RuntimeError):
    """What the user has to put right: a file that cannot be read, or options that do not go together."""


def one_line(error: BaseException) -> str:
    """What an error says, without the traceback of the worker process that it may come from."""
    return str(error).rpartition("TrainingError: ")[2].strip()


def device_of(name: str) -> torch.device:
    """The device of this name, if torch has it here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TrainingError(f"--device {name}: {str(error).partition(chr(10))[0]}") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise TrainingError(f"--device {name}: torch finds {count or 'no'} NVIDIA GPU{'s' if count > 1 else ''}")
    return device


def positive(text: str) -> int:
    """The number of an option that must be at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def write(content: Any, path: Path) -> None:
    """torch.save to a new file that then takes the old one's place: a failure leaves the old one."""
    fresh = path.with_name(path.name + ".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except (OSError, RuntimeError) as error:
        fresh.unlink(missing_ok=True)
        raise TrainingError(f"{path} cannot be written, what was there stays: {error}") from error


def read(path: Path) -> Any:
    """What :func:`write` wrote."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes surface as almost any type
        reason = str(error).partition("\n")[0]
        raise TrainingError(f"checkpoint {path} cannot be read: {type(error).__name__}: {reason}") from error


def read_run(path: Path, keys: set[str], course: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint that holds these keys, and under "course" what decides the course of a run: that of this one."""
    state = read(path)
    missing = {*keys, "course"}.difference(state if isinstance(state, dict) else ())
    if missing:
        raise TrainingError(f"checkpoint {path} is none of this script's: missing keys: {sorted(missing)}")
    then = state["course"]
    changed = [f"{k} was {then.get(k)!r}, is {now!r}" for k, now in course.items() if then.get(k) != now]
    if changed:
        raise TrainingError(f"checkpoint {path} belongs to another run: {'; '.join(changed)}")
    return state


def restore(parts: Mapping[str, Any], state: Mapping[str, Any], path: Path) -> None:
    """Give the model, the optimizer and whatever else has a state_dict the state that was read from `path`."""
    try:
        for name, part in parts.items():
            if name == "model" and isinstance(part, nn.Module):
                load_weights(part, state[name])  # says what does not fit, before anything is changed
            else:
                part.load_state_dict(state[name])
    except (ValueError, RuntimeError, KeyError) as error:
        raise TrainingError(f"checkpoint {path}: {error}") from error


class Stop:
    """Whether SIGINT or SIGTERM has asked this process to stop, after what is under way. Asked twice, it dies."""

    def __enter__(self) -> Stop:
        self.asked = False
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True
        self.__exit__()
