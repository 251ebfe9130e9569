"""The interpreter's tests of folding once more: compiled, on a GPU, and with bfloat16."""

import os

import pytest
import torch

from resfuse import backends

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process compiles nothing", allow_module_level=True)


@pytest.fixture(scope="module")
def triton_on_gpu():
    """Tensors are made on the GPU, and stock computes there as exactly as it can, without TF32."""
    reason = backends.missing("bn_act", "triton", "cuda", torch.float32)
    if reason is not None:
        pytest.skip(f"needs Triton's kernels on a GPU: {reason}")
    torch.set_default_device("cuda")
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
    torch.set_default_device(None)


from triton_interpreted.test_conv_act import *  # noqa: E402, F403  the tests themselves
from triton_interpreted.test_expand_bn_act import *  # noqa: E402, F403
from triton_interpreted.test_second_moments import *  # noqa: E402, F403

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("triton_on_gpu")]
