"""How Triton's products multiply float32: as torch's switches say, whichever of them is set. No GPU is needed."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from resfuse._triton.launch import precision

MATMUL = torch.backends.cuda.matmul


def stand_in(dtype, shape=(2, 64, 7, 7)):
    """What precision asks of an activation on a GPU."""
    return SimpleNamespace(is_cuda=True, dtype=dtype, shape=shape)


@pytest.fixture(autouse=True)
def switches():
    """As a fresh process has them, before the test and after it."""
    before = torch.backends.fp32_precision, MATMUL.fp32_precision
    torch.backends.fp32_precision = MATMUL.fp32_precision = "none"
    yield
    torch.backends.fp32_precision, MATMUL.fp32_precision = before


@pytest.mark.parametrize(
    ("where", "name", "on", "off"),
    [
        (MATMUL, "fp32_precision", "tf32", "ieee"),
        (torch.backends, "fp32_precision", "tf32", "ieee"),
        (MATMUL, "allow_tf32", True, False),
    ],
    ids=["matmul", "everything", "allow_tf32"],
)
def test_float32_is_multiplied_as_torch_multiplies_it(where, name, on, off):
    assert precision(stand_in(torch.float32)) == "ieee"
    setattr(where, name, on)
    assert precision(stand_in(torch.float32)) == "tf32"
    assert precision(stand_in(torch.bfloat16)) == precision(stand_in(torch.float16)) == "ieee"
    assert precision(torch.zeros(2, 64, 7, 7)) == "ieee"  # interpreted
    assert precision(stand_in(torch.float32, (2, 64, 1, 1))) == "ieee"  # the algebra of folding
    setattr(where, name, off)
    assert precision(stand_in(torch.float32)) == "ieee"
