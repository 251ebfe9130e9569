"""Memory: the bytes autograd keeps between a forward and its backward, a process's peak, and what is freed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

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
