"""Memory: the bytes autograd keeps between a forward and its backward, and a process's peak."""

from __future__ import annotations

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


def peak_resident_bytes() -> int:
    """The most memory this process has held at once, as the operating system counts it (Linux and macOS)."""
    status = Path("/proc/self/status")
    if status.is_file():
        # not ru_maxrss: on Linux a child starts with its parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # absent on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
