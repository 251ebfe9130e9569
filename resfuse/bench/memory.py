"""Memory: the bytes autograd keeps between a forward and its backward, a process's peak, and what is freed."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class SavedMemory(NamedTuple):
    """What a forward pass keeps for its backward."""

    bytes: int
    storages: int


def saved_memory(forward: Callable[[], Tensor], excluded: Iterable[Tensor] = ()) -> SavedMemory:
    """Run a forward pass and count what autograd saves for its backward.

    Each storage counts once with all its bytes, however many tensors on it are saved: that is the memory that cannot
    be freed. Counted too are the input and the low-precision copies of weights that autocast makes, which a stock and
    a fused network keep alike.

    Args:
        forward (Callable[[], Tensor]): builds a graph and returns its end.
        excluded (Iterable[Tensor]): tensors that exist anyway, such as a model's parameters and buffers.

    Returns:
        SavedMemory: bytes, and number of distinct storages.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a saved output that refers to itself would keep its graph alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        end = forward()
    del end  # alive until here: an address that is freed may come again
    return SavedMemory(sum(found.values()), len(found))


def peak_allocated_bytes(function: Callable[[], object]) -> int:
    """Call a function and count the most memory that torch's allocators held during it, above what they held before.

    On a CPU by the profiler's record of every allocation; where CUDA is in use, by the GPU's own count.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profiler([torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return max((held for _, held in timeline_in(trace_events(path))), default=0)


def profiler(activities: list[torch.profiler.ProfilerActivity], **options: Any) -> torch.profiler.profile:
    """torch's profiler, which otherwise reports its own beginning and end on the error stream."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    return torch.profiler.profile(activities=activities, **options)


def trace_events(path: Path) -> list[dict[str, Any]]:
    """The events of a trace that torch's profiler has written."""
    return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def timeline_in(events: list[dict[str, Any]]) -> list[tuple[float, int]]:
    """Allocations in a trace with memory: (microseconds since the first, bytes held above those before it).

    A GPU's where there are any, else the CPU's.
    """
    found = [event for event in events if event.get("name") == "[memory]"]
    kinds = {event["args"]["Device Type"] for event in found}
    wanted = _CUDA if _CUDA in kinds else _CPU
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in found if e["args"]["Device Type"] == wanted)
    held, line = 0, []
    for moment, change in changes:
        held += change
        line.append((moment - changes[0][0], held))
    return line


_CPU, _CUDA = 0, 1  # c10::DeviceType


def model_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers: what exists whether or not a step is taken."""
    return [*model.parameters(), *model.buffers()]


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let the C allocator keep what is freed for the tensors that follow, from here on: nobody pays page faults again.

    glibc gives large blocks back to the operating system, so every fresh large tensor is unmapped memory, whose first
    touch costs more than a pass over it. jemalloc and tcmalloc keep such blocks.

    Returns:
        bool: whether this allocator can be told so (glibc's can).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def peak_resident_bytes() -> int:
    """The most memory this process has held at once, as the operating system counts it (Linux and macOS)."""
    status = Path("/proc/self/status")
    if status.is_file():
        # not ru_maxrss: on Linux a child starts with its parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # absent on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
