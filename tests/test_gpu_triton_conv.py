"""The interpreter's tests of conv_stats once more: compiled, on a GPU, and with bfloat16."""

import os

import pytest

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process compiles nothing", allow_module_level=True)

from triton_interpreted.test_conv_stats import *  # noqa: F403  the tests themselves

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu_with_triton", "poisoned")]
