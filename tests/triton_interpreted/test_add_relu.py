"""add_relu in Triton's interpreter: outputs and gradients against the reference, through the public function."""

import pytest
import torch
from numerics import EVERY_DTYPE, EVERY_LAYOUT, assert_all_as_exact, image, leaf, outcome

from resfuse import functional, reference


@EVERY_DTYPE
@EVERY_LAYOUT
def test_outputs_and_gradients(dtype, layout):
    x, r = image((2, 65, 7, 5), dtype, layout), image((2, 65, 7, 5), dtype, layout, mean=-1)
    grad = torch.randn(x.shape)
    found = {}
    for name, call, kind in (
        ("ours", lambda a, b: functional.add_relu(a, b, backend="triton"), dtype),
        ("stock", lambda a, b: torch.relu(a + b), dtype),
        ("exact", reference.add_relu, torch.float64),
    ):
        inputs = {"x": leaf(x, kind), "residual": leaf(r, kind)}
        found[name] = outcome(call(*inputs.values()), inputs, grad)
    assert_all_as_exact(**found)


def test_special_values_and_every_order_of_memory():
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1.0, -1.0])
    x, r = torch.meshgrid(values, values, indexing="ij")
    out = functional.add_relu(x, r, backend="triton")
    assert torch.equal(out.nan_to_num(nan=7), torch.relu(x + r).nan_to_num(nan=7))
    assert functional.add_relu(torch.empty(0, 3), torch.empty(0, 3), backend="triton").shape == (0, 3)


def test_a_missing_dtype_is_named():
    with pytest.raises(TypeError, match=r"x must be float16, bfloat16, float32 or float64, got torch\.int32"):
        functional.add_relu(torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32), backend="triton")
