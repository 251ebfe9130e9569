"""The environment record: what a measurement must say about the machine and the code it was taken with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import resfuse
from resfuse import backends

_PACKAGE = Path(resfuse.__file__).resolve().parent
# results are appended while measuring, and pages and figures generated from them: none changes what is measured
_CODE = (".", ":(exclude)benchmarks/results", ":(exclude)docs", ":(exclude)README.md")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Everything a record says about where it comes from, as JSON-serialisable values.

    Args:
        device (str): device type that is measured, "cpu" or "cuda".

    Returns:
        dict: date (UTC, ISO 8601), commit and dirty (None outside a checkout), resfuse, device, device_name,
        capability, driver, threads, load (one-minute average before the run: other work on the machine), torch,
        triton, python, os.
    """
    commit, dirty = _git_state(_PACKAGE.parent)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "resfuse": resfuse.__version__,
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "capability": _capability(device),
        "driver": _driver() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
    }


def native_environment(dtypes: Iterable[str], device: str = "cpu", backend: str = "native") -> dict[str, Any]:
    """The environment of a run that measures the native kernels, or another backend's, also printed in one line.

    Args:
        dtypes (Iterable[str]): the dtypes that will be measured, as "float32".
        device (str): device type, "cpu" or "cuda".
        backend (str): whose kernels are measured.

    Raises:
        SystemExit: there is no such device, or a dtype has no such kernels there; with the reason.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("nothing to measure: torch finds no NVIDIA GPU")
    for dtype in dtypes:
        reason = backends.missing("bn_act", backend, device, getattr(torch, dtype))
        if reason is not None:
            raise SystemExit(f"nothing to measure: no {backend} kernels for {dtype}: {reason}")
    record = environment(device)
    print(describe(record))
    return record


def gpu_state() -> dict[str, float] | None:
    """The first GPU's clocks (MHz), power (W) and temperature (C) now; None where nvidia-smi does not say."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
    said = _output(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"])
    try:
        return None if said is None else dict(zip(fields, map(float, said.split(",")), strict=True))
    except ValueError:  # a field that this GPU does not have reads [N/A]
        return None


def describe(record: dict[str, Any]) -> str:
    """An environment record in one line, for captions."""
    commit = record["commit"][:9] if record["commit"] else "no checkout"
    dirty = " + uncommitted changes" if record["dirty"] else ""
    where = f"{record['device_name']} ({record['capability']}), {record['threads']} threads"
    return f"{where}, torch {record['torch']}, resfuse {record['resfuse']} ({commit}{dirty}), {record['date'][:10]}"


def cpu_name() -> str:
    """The processor as the operating system names it, with family and model where it has them: names repeat."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        pairs = (line.partition(":") for line in reversed(cpuinfo.read_text().splitlines()))
        facts = {key.strip(): value.strip() for key, _, value in pairs}
        if "model name" in facts:
            parts = (("family", "cpu family"), ("model", "model"))
            generation = " ".join(f"{word} {facts[key]}" for word, key in parts if key in facts)
            return ", ".join(filter(None, (facts["model name"], generation)))
    return platform.processor() or platform.machine()


def _capability(device: str) -> str:
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"
    return torch.backends.cpu.get_cpu_capability()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"])


def _git_state(root: Path) -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout whose root this is; None and None for an installed package."""
    top = _output(["git", "-C", str(root), "rev-parse", "--show-toplevel"])
    if top is None or Path(top).resolve() != root:
        return None, None
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    status = _output(["git", "-C", str(root), "status", "--porcelain", "--", *_CODE])
    return commit, None if status is None else status != ""


def _output(command: list[str]) -> str | None:
    """A command's output without surrounding space; None where the program is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
