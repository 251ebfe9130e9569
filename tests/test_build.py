"""The compiled libraries: the settings of the build, what the libraries depend on, and the CUDA kernels as far as the
hardware goes: compiled and registered where nvcc is, run where an NVIDIA GPU is."""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from numerics import DTYPES, assert_as_exact, image
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import resfuse
from resfuse import backends, ops, reference

ROOT = Path(__file__).parents[1]
CUDA_UNITS = ("add_relu", "add_relu_backward")
# of setup.py's extensions only the CUDA library
BUILD_CUDA = """
import runpy, setuptools
setup = setuptools.setup
setuptools.setup = lambda ext_modules, **options: setup(ext_modules=ext_modules[1:], **options)
runpy.run_path("setup.py", run_name="__main__")
"""
# torch.ops.resfuse knows the kernels of a library whose one symbol that a CPU-only torch lacks is a stub
REGISTER = """
import ctypes, sys
import torch, resfuse
if torch.version.cuda is None:
    ctypes.CDLL(sys.argv[2], ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[1])
for name in sys.argv[3:]:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("resfuse::" + name, "CUDA"), name
"""
# every conversion of 16-bit floats once
CONVERT = f"""
#include "{ROOT / "csrc" / "math.h"}"
extern "C" __global__ void convert(resfuse::Half* half, resfuse::BFloat16* bfloat16, float* values) {{
  values[0] = load(half[0]), values[1] = load(bfloat16[0]);
  store(half + 1, values[2]), store(bfloat16 + 1, values[3]);
}}
"""
STUB = "int aoti_torch_get_current_cuda_stream(int device, void** stream) { *stream = 0; return device; }"


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py as a module that builds nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("RESFUSE_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("resfuse_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path):
    """A folder for CUDA_HOME whose nvcc knows four GPUs and cannot compile."""
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho sm_75 sm_80 sm_90 sm_120\n")
    nvcc.chmod(0o755)
    return tmp_path / "toolkit"


def real_nvcc():
    homes = [os.environ.get("CUDA_HOME", ""), *sorted(map(str, Path("/usr/local").glob("cuda*")), reverse=True)]
    found = [path for home in homes if home and (path := Path(home, "bin", "nvcc")).is_file()]
    on_path = shutil.which("nvcc")
    return found[0] if found else Path(on_path) if on_path else None


def listing(tool, *arguments):
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}, of binutils")
    return subprocess.check_output([tool, *map(str, arguments)], text=True)


def undefined_symbols(library):
    return {line.split()[-1].split("@")[0] for line in listing("nm", "-D", "--undefined-only", library).splitlines()}


def needed_libraries(library):
    return re.findall(r"\(NEEDED\).*\[(.+)\]", listing("readelf", "-d", library))


def assert_stable_symbols_only(symbols):
    """No C++ of torch is needed: only the C functions of its stable ABI."""
    mangled = [s for s in symbols if re.search(r"\d(torch|c10|at|aten|aoti\w*)(?=[A-Z\d])", s)]
    assert not mangled
    of_torch = {s for s in symbols if "torch" in s}
    assert len(of_torch) > 10
    assert all(re.fullmatch(r"(aoti_torch|torch)_\w+", s) for s in of_torch)


@pytest.mark.parametrize(
    ("listed", "flags"),
    [
        pytest.param(None, ["80:sm_80", "90:sm_90", "90:compute_90"], id="default"),
        pytest.param("9.0", ["90:sm_90"], id="one"),
        pytest.param("9.0a", ["90a:sm_90a"], id="specific"),
        pytest.param("8.0;9.0+PTX", ["80:sm_80", "90:sm_90", "90:compute_90"], id="semicolons"),
        pytest.param("8.0 9.0", ["80:sm_80", "90:sm_90"], id="spaces"),
        pytest.param("12.0", ["120:sm_120"], id="three-digits"),
    ],
)
def test_architectures(setup_py, toolkit, monkeypatch, listed, flags):
    if listed is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    expected = [f"-gencode=arch=compute_{flag.replace(':', ',code=')}" for flag in flags]
    assert setup_py.architecture_flags(str(toolkit / "bin" / "nvcc")) == expected


@pytest.mark.parametrize("listed", ["Hopper", "9", "7.0", "8.0;9.0x", "native"])
def test_unknown_architectures_are_named(setup_py, toolkit, monkeypatch, listed):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(SystemExit, match=rf"names '{listed.split(';')[-1]}'.* knows 7\.5, 8\.0, 9\.0, 12\.0"):
        setup_py.architecture_flags(str(toolkit / "bin" / "nvcc"))


def test_settings_decide_about_cuda(setup_py, toolkit, monkeypatch):
    monkeypatch.setattr(setup_py.cpp_extension, "CUDA_HOME", None)
    assert setup_py.find_nvcc() is None
    monkeypatch.setenv("RESFUSE_CUDA", "1")
    with pytest.raises(SystemExit, match="RESFUSE_CUDA=1 needs CUDA_HOME with bin/nvcc, got CUDA_HOME=None"):
        setup_py.find_nvcc()
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert setup_py.find_nvcc() == str(toolkit / "bin" / "nvcc")
    monkeypatch.setenv("RESFUSE_CUDA", "0")
    assert setup_py.find_nvcc() is None
    monkeypatch.setenv("RESFUSE_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0, 1 or unset, got 'yes'"):
        setup_py.find_nvcc()
    monkeypatch.delenv("RESFUSE_CUDA")
    assert setup_py.find_nvcc() == str(toolkit / "bin" / "nvcc")


def test_every_source_is_built_or_shipped(setup_py):
    extension = setup_py.cpu_extension
    known = {*extension.sources, *extension.depends, *setup_py.files("cuda/*.cu")}
    assert known >= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-lint.txt"])
def test_every_pin_supports_the_oldest_python(name):
    """As far as packages are installed here; a pin that a marker keeps from Python 3.10 is not asked."""
    pins = [Requirement(line) for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    pins = [p for p in pins if p.marker is None or p.marker.evaluate({"python_version": "3.10"})]
    for pin in pins:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed = importlib.metadata.distribution(pin.name)
            if installed.version in pin.specifier:
                assert "3.10" in SpecifierSet(installed.metadata["Requires-Python"] or ""), pin


def test_missing_compiler_is_one_clear_line(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    environment = {**os.environ, "CXX": "no-such-compiler", "RESFUSE_CUDA": "0"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == "resfuse needs a C++17 compiler, and no-such-compiler is not found"
    assert "Traceback" not in result.stderr


def test_cpu_library_needs_stable_symbols_only():
    spec = importlib.util.find_spec("resfuse._C")
    if spec is None:
        pytest.skip("needs the compiled C++ library")
    symbols = undefined_symbols(spec.origin)
    assert_stable_symbols_only(symbols)
    assert {s for s in symbols if s.startswith(("Py", "_Py"))} == {"PyModule_Create2"}
    assert not [name for name in needed_libraries(spec.origin) if "python" in name or "cuda" in name]


@pytest.mark.skipif(os.environ.get("RESFUSE_NATIVE") == "0", reason="RESFUSE_NATIVE=0: built without native kernels")
def test_the_native_library_is_there():
    """Tests of kernels skip where the library is missing; this one fails, so that their silence is no pass."""
    assert resfuse.ops.missing_native["cpu"] is None


def test_available_reports_every_backend():
    found = {(s.backend, s.device): s for s in resfuse.backends.available()}
    assert {("native", "cpu"), ("native", "cuda"), ("triton", "cuda"), ("reference", "any")} <= found.keys()
    assert found["reference", "any"].available
    assert found["native", "cpu"].available == (importlib.util.find_spec("resfuse._C") is not None)
    assert all(s.available != bool(s.reason) for s in found.values())


@pytest.fixture(scope="module")
def cuda_build(tmp_path_factory):
    """The CUDA library, built for one GPU, and what the compiler said."""
    nvcc = real_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    build = tmp_path_factory.mktemp("cuda")
    environment = {
        **os.environ,
        "CUDA_HOME": str(nvcc.parents[1]),
        "RESFUSE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "NVCC_APPEND_FLAGS": "-Xptxas -v",
    }
    command = [sys.executable, "-c", BUILD_CUDA, "build_ext", "--build-lib", build, "--build-temp", build / "objects"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return build / "resfuse" / "_cuda.so", result.stdout + result.stderr


def test_cuda_library_links_to_torch_alone(cuda_build):
    library, _ = cuda_build
    symbols = undefined_symbols(library)
    assert_stable_symbols_only(symbols)
    assert {"torch_library_impl", "aoti_torch_get_current_cuda_stream"} <= symbols
    assert not [s for s in symbols if s.startswith(("cuda", "__cuda", "Py"))], "cudart is linked statically"
    needed = needed_libraries(library)
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name or "c10" in name]


def test_cuda_kernels_register(cuda_build, tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "stub.c").write_text(STUB)
    stub = tmp_path / "stub.so"
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "stub.c", "-o", stub], check=True)
    command = [sys.executable, "-c", REGISTER, cuda_build[0], stub, *CUDA_UNITS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_cuda_kernels_stay_in_registers(cuda_build):
    _, log = cuda_build
    functions = re.findall(r"Function properties for (\S+)\n(.+)", log)
    assert len(functions) >= 4 * len(CUDA_UNITS), log
    spilling = [entry for entry in functions if set(re.findall(r"(\d+) bytes", entry[1])) != {"0"}]
    assert not spilling


@pytest.mark.parametrize("architecture", [75, 80, 90])
def test_cuda_converts_16_bit_floats_in_hardware(tmp_path, architecture):
    nvcc = real_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    (tmp_path / "convert.cu").write_text(CONVERT)
    command = [nvcc, "-std=c++17", f"-arch=compute_{architecture}", "--ptx", "convert.cu"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = set(re.findall(r"\bcvt\.(?:rn\.)?b?f\d+\.b?f\d+", (tmp_path / "convert.ptx").read_text()))
    bfloat16 = {"cvt.rn.bf16.f32"} if architecture >= 80 else set()  # below, there is no such instruction
    assert found == {"cvt.f32.f16", "cvt.rn.f16.f32"} | bfloat16


@pytest.fixture
def on_gpu(poisoned):
    """The native CUDA kernels, over memory that is NaN before it is written."""
    reason = backends.missing("add_relu", "native", "cuda", torch.float32)
    if reason is not None:
        pytest.skip(f"needs the CUDA library: {reason}")


# whole vectors, tails, fewer values than a vector, more than one sweep of the grid
SHAPES = [(1, 1, 1, 1), (1, 3, 1, 1), (2, 65, 7, 7), (3, 57, 1, 3), (2, 64, 56, 56), (32, 129, 57, 57)]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_cuda_add_relu(on_gpu, dtype, shape, layout):
    x = image(shape, dtype, layout, mean=0.5).cuda()
    residual, grad_out = torch.randn_like(x), torch.randn_like(x)
    out = ops.add_relu(x, residual)
    assert out.stride() == x.stride()
    assert_as_exact(out, torch.relu(x + residual), reference.add_relu(x.double(), residual.double()))
    grad = ops.add_relu_backward(grad_out, out)
    assert torch.equal(grad, torch.where(out > 0, grad_out, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [(1, 0), (0, 1), (3, 3)], ids=["x", "residual", "both"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_cuda_add_relu_of_unaligned_memory(on_gpu, dtype, offset):
    x, residual = (torch.randn(100_003 + o, device="cuda").to(dtype)[o:] for o in offset)
    exact = reference.add_relu(x.double(), residual.double())
    assert_as_exact(ops.add_relu(x, residual), torch.relu(x + residual), exact)


@pytest.mark.gpu
def test_cuda_add_relu_of_nothing_and_of_nan(on_gpu):
    assert ops.add_relu(*torch.empty(2, 0, 3, 4, 4, device="cuda")).shape == (0, 3, 4, 4)
    nan = torch.full((9,), float("nan"), device="cuda")
    assert ops.add_relu(nan, torch.zeros_like(nan)).isnan().all()
    assert ops.add_relu_backward(torch.ones_like(nan), nan).eq(1).all()


@pytest.mark.gpu
def test_cuda_add_relu_uses_the_current_stream(on_gpu):
    x, stream = torch.zeros(1 << 24, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.fill_(1)
        out = ops.add_relu(x, x)
    stream.synchronize()
    assert out.eq(2).all()


@pytest.mark.gpu
def test_cuda_add_relu_on_another_device(on_gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    x = torch.ones(1000, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert ops.add_relu(x, x).eq(2).all()
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_cuda_refuses_mixed_devices_and_layouts(on_gpu):
    x = torch.randn(2, 3, 4, 4, device="cuda")
    with pytest.raises(RuntimeError, match="dtype and device"):
        ops.add_relu(x, x.cpu())
    with pytest.raises(RuntimeError, match="shape and strides"):
        ops.add_relu(x, x.contiguous(memory_format=torch.channels_last))
