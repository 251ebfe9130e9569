"""What tests share: a seed, fresh memory that is NaN, threads that are put back, and skips for missing hardware."""

import os

import pytest
import torch

from resfuse import backends, ops

# these run in a process of their own: test_triton_interpreted.py
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton_interpreted"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def tiles_for_every_width(monkeypatch):
    """Small blocks run on tile kernels too, where there are any; how many channels pay is test_tiles's."""
    for rule in ("_TILE_CHANNELS", "_TILE_GROUP_CHANNELS"):
        monkeypatch.setattr(backends, rule, dict.fromkeys(getattr(backends, rule), 1))


# modules without a strided 1x1 convolution of fewer than eight channels, which need torch's own speed, or its errors
WIDE = {"test_chain", "test_degradation", "test_fusion", "test_training", "test_winograd"}


@pytest.fixture(autouse=True)
def sound_convolutions(request):
    """Without AVX-512 torch convolves without oneDNN, whose gradient of a weight writes past its memory there.

    That of a strided 1x1 convolution of fewer than eight channels, channels_last, as in many small blocks:
    uxlfoundation/oneDNN#6035.
    """
    enabled = torch._C._get_mkldnn_enabled()
    unsound = torch.backends.cpu.get_cpu_capability() == "AVX2" and request.module.__name__ not in WIDE
    torch._C._set_mkldnn_enabled(enabled and not unsound)
    yield
    torch._C._set_mkldnn_enabled(enabled)


@pytest.fixture
def poisoned():
    """Fresh memory is NaN, in C++ kernels too, and operators without a deterministic form raise."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """The work is small: a second thread only waits for the first, long where the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _device_of_a_gpu(backend):
    reason = backends.missing("bn_act", backend, "cuda", torch.float32)
    if reason is not None:
        pytest.skip(f"needs {backend} kernels for CUDA: {reason}")
    torch.set_default_device("cuda")
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
    torch.set_default_device(None)


@pytest.fixture(scope="module")
def on_gpu():
    """Tensors are made on the GPU, and stock computes there as exactly as it can, without TF32."""
    yield from _device_of_a_gpu("native")


@pytest.fixture(scope="module")
def on_gpu_with_triton():
    """The same for Triton's kernels."""
    yield from _device_of_a_gpu("triton")


@pytest.fixture
def native_is_triton(monkeypatch):
    """The tests of the native kernels run on Triton's: what asks for "native" is given the overloads `.triton`."""
    from resfuse._triton import LAUNCHERS

    triton = ops.of("triton")
    monkeypatch.setitem(ops._overloads, "native", triton)
    monkeypatch.setitem(ops.missing_native, "cuda", ops.missing_triton["cuda"])
    for name in LAUNCHERS:
        monkeypatch.setattr(ops, name, getattr(triton, name))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


def pytest_terminal_summary(terminalreporter):
    """Tables that tests made for whoever reads the log: record_property("table", text)."""
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        for name, text in report.user_properties:
            if name == "table":
                terminalreporter.section(report.nodeid)
                terminalreporter.write_line(text)
