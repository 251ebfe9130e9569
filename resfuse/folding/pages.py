"""Memory of a mapped file that is given back while an engine packs weights: a loaded network is not in memory twice."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_PAGEOUT = 21  # linux/mman.h: pages leave memory, their contents stay what they are


def give_back(tensor: Tensor) -> None:
    """Tell Linux that a tensor's memory will not be read soon; it is read from its file again when it is.

    Advice: nothing happens elsewhere, and to what no file backs.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu":
        return
    page, start = mmap.PAGESIZE, tensor.data_ptr()
    first = -(-start // page) * page
    length = (start + tensor.nbytes) // page * page - first
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _PAGEOUT)


class OneAtATime(dict[str, Tensor]):
    """Tensors of which each is given back when the next is read."""

    _last: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        if self._last is not None and self._last is not tensor:
            give_back(self._last)
        self._last = tensor
        return tensor
