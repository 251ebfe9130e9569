"""Addresses of 8- and 16-bit values that kernels load and store in the interpreter: activations, and weights."""

import numpy as np
from triton.runtime import interpreter


class Accesses:
    """What every kernel accesses from here on."""

    def __init__(self, monkeypatch):
        self.loads, self.stores = [], []
        builder = interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def counted_load(this, pointers, mask, *rest):
            self._note(self.loads, pointers, mask)
            return load(this, pointers, mask, *rest)

        def counted_store(this, pointers, value, mask, *rest):
            self._note(self.stores, pointers, mask)
            return store(this, pointers, value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(builder, "create_masked_store", counted_store)

    @staticmethod
    def _note(where, pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        if size <= 2:
            where.append((size, pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]))

    def all(self):
        """Bytes of every access."""
        return sum(size * len(addresses) for size, addresses in [*self.loads, *self.stores])

    def touched(self):
        """Bytes of distinct values, each kind of access by itself."""
        return sum(
            width * len(np.unique(np.concatenate(found)))
            for accesses in (self.loads, self.stores)
            for width in (1, 2)
            if (found := [addresses for size, addresses in accesses if size == width])
        )

    def of(self, tensor):
        """Distinct values of a tensor that are accessed, and accesses to it."""
        first = tensor.data_ptr()
        found = np.concatenate([addresses for _, addresses in [*self.loads, *self.stores]])
        found = found[(found >= first) & (found < first + tensor.numel() * tensor.itemsize)]
        return len(np.unique(found)), len(found)
