"""What Triton's kernels load and store, counted in the interpreter, against the bytes that bench/roofline.py predicts.

float16 activations are told from float32 vectors by their size. A pass touches each value once; a pool's kernels come
back to what neighbouring windows share, which a GPU has in cache, so there the values touched are counted.
"""

import pytest
import torch
from accesses import Accesses
from numerics import image

from resfuse import ops
from resfuse.bench.roofline import POOL_PASSES, bytes_moved

SHAPE = (2, 8, 14, 14)
WINDOW = ([3, 3], [2, 2], [1, 1])


def calls():
    """(unit, form): a call of the operator."""
    triton = ops.of("triton")
    x, r, out, grad = (image(SHAPE, torch.float16, "channels_last") for _ in range(4))
    v = torch.rand(SHAPE[1])
    raw, none = (r, v, v, v), (None,) * 4
    pooled, indices = triton.scale_shift_relu_maxpool(x, v, v, *WINDOW)
    behind = (pooled, indices, x, v, v, v)
    return {
        ("moments", ""): lambda: triton.moments(x),
        ("add_relu", ""): lambda: triton.add_relu(x, r),
        ("scale_shift_act", "none"): lambda: triton.scale_shift_act(x, v, v, None, None, None, True),
        ("scale_shift_act", "identity"): lambda: triton.scale_shift_act(x, v, v, r, None, None, True),
        ("scale_shift_act", "raw"): lambda: triton.scale_shift_act(x, v, v, r, v, v, True),
        ("backward_reduce", "none"): lambda: triton.scale_shift_act_backward_reduce(
            grad, x, v, v, v, *none, None, True
        ),
        ("backward_reduce", "identity"): lambda: triton.scale_shift_act_backward_reduce(
            grad, x, v, v, v, *none, out, True
        ),
        ("backward_reduce", "raw"): lambda: triton.scale_shift_act_backward_reduce(grad, x, v, v, v, *raw, None, True),
        ("backward_apply", "none"): lambda: triton.scale_shift_act_backward_apply(
            grad, x, v, v, v, v, v, *none, None, None, True
        ),
        ("backward_apply", "identity"): lambda: triton.scale_shift_act_backward_apply(
            grad, x, v, v, v, v, v, *none, None, None, False
        ),
        ("backward_apply", "raw"): lambda: triton.scale_shift_act_backward_apply(
            grad, x, v, v, v, v, v, *raw, v, v, True
        ),
        ("scale_shift_relu_maxpool", ""): lambda: triton.scale_shift_relu_maxpool(x, v, v, *WINDOW),
        ("scale_shift_relu_maxpool backward_reduce", ""): lambda: triton.scale_shift_relu_maxpool_backward_reduce(
            *behind, *WINDOW
        ),
        ("scale_shift_relu_maxpool backward_apply", ""): lambda: triton.scale_shift_relu_maxpool_backward_apply(
            *behind, v, v, *WINDOW
        ),
    }


@pytest.mark.parametrize("unit", calls(), ids=lambda unit: "-".join(filter(None, unit)))
def test_a_kernel_moves_what_was_predicted(unit, monkeypatch):
    call, predicted = calls()[unit], bytes_moved(*unit, SHAPE, 2)
    accesses = Accesses(monkeypatch)
    call()
    assert accesses.touched() == predicted
    if unit not in POOL_PASSES:
        programs = 2 * SHAPE[0]  # at most, each of which looks once at the value that deviations are taken from
        pivots = 2 * SHAPE[1] * programs if unit[0] == "moments" else 0
        assert predicted <= accesses.all() <= predicted + pivots
