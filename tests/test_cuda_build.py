"""The CUDA library as the compiler makes it, without a GPU: what it links to and registers, and that every kernel keeps
to registers, within its budget, with accesses of 128 bits. Where no nvcc is, these tests skip."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_build
import pytest
from libraries import assert_stable_symbols_only, needed_libraries, undefined_symbols

from resfuse import ops

ROOT = Path(__file__).parents[1]
PASSES = ("add_relu", "moments", "finalize", "scale_shift")  # how the names of the units start that CUDA has
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# torch.ops.resfuse knows the kernels of a library whose one symbol that a CPU-only torch lacks is a stub
REGISTER = """
import ctypes, sys
import torch, resfuse
if torch.version.cuda is None:
    ctypes.CDLL(sys.argv[2], ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[1])
missing = [n for n in sys.argv[3:] if not torch._C._dispatch_has_kernel_for_dispatch_key("resfuse::" + n, "CUDA")]
assert not missing, missing
"""
STUB = "int aoti_torch_get_current_cuda_stream(int device, void** stream) { *stream = 0; return device; }"
# every conversion of 16-bit floats once
CONVERT = f"""
#include "{ROOT / "csrc" / "math.h"}"
extern "C" __global__ void convert(resfuse::Half* half, resfuse::BFloat16* bfloat16, float* values) {{
  values[0] = load(half[0]), values[1] = load(bfloat16[0]);
  store(half + 1, values[2]), store(bfloat16 + 1, values[3]);
}}
"""
# registers: tight <= 20 in the file's header; 40 live values in 32 registers; 8 values of 16 bits by halves of a vector
PLANTED = """
// registers: tight <= 20
// registers: good <= 255
// registers: halves <= 255
// registers: spilling <= 255
struct Half { unsigned short bits; };
template <class T, int kWidth> struct alignas(sizeof(T) * kWidth) Vector { T values[kWidth]; };
template <class T, int kWidth> __global__ void good(const T* in, T* out) {
  using V = Vector<T, kWidth>;
  reinterpret_cast<V*>(out)[threadIdx.x] = reinterpret_cast<const V*>(in)[threadIdx.x];
}
template <class T, int kWidth> __global__ void halves(const T* in, T* out) {
  for (int i = 0; i < kWidth; ++i) out[kWidth * threadIdx.x + i] = in[kWidth * threadIdx.x + i];
}
template <class T, int kWidth> __device__ void many(const T* in, T* out) {
  T values[40];
  for (int i = 0; i < 40; ++i) values[i] = in[i * 64 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 40; ++i) out[i * 64 + threadIdx.x] = values[39 - i] + 1;
}
template <class T, int kWidth> __global__ void tight(const T* in, T* out) { many<T, kWidth>(in, out); }
template <class T, int kWidth> __global__ void spilling(const T* in, T* out) { many<T, kWidth>(in, out); }
template <class T, int kWidth> __global__ void unbudgeted(const T* in, T* out) { many<T, kWidth>(in, out); }
template __global__ void good<Half, 1>(const Half*, Half*);
template __global__ void good<Half, 8>(const Half*, Half*);
template __global__ void halves<Half, 1>(const Half*, Half*);
template __global__ void halves<Half, 8>(const Half*, Half*);
"""
HUNGRY = """
template __global__ void tight<float, 1>(const float*, float*);
template __global__ void unbudgeted<float, 1>(const float*, float*);
"""
SPILLING = "template __global__ void spilling<float, 1>(const float*, float*);"


@pytest.fixture(scope="module")
def nvcc():
    if cuda_build.find_nvcc() is None:
        pytest.skip("needs nvcc")
    return cuda_build.find_nvcc()


@pytest.fixture
def disassembler():
    if cuda_build.find_disassembler() is None:
        pytest.skip("needs cuobjdump: of the CUDA toolkit, nvidia-cuda-cuobjdump or Triton")


@pytest.fixture(scope="module")
def built(nvcc, tmp_path_factory):
    """The library for all architectures, and the objects with what the compiler said of each."""
    return cuda_build.build(tmp_path_factory.mktemp("cuda"))


def test_the_library_links_to_torch_alone(built):
    symbols = undefined_symbols(built[0])
    assert_stable_symbols_only(symbols)
    assert {"torch_library_impl", "aoti_torch_get_current_cuda_stream"} <= symbols
    assert not [s for s in symbols if s.startswith(("cuda", "__cuda", "Py"))], "cudart is linked statically"
    needed = needed_libraries(built[0])
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name or "c10" in name]


def test_every_pass_has_a_kernel(built, tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "stub.c").write_text(STUB)
    stub = tmp_path / "stub.so"
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "stub.c", "-o", stub], check=True)
    names = [name for name in ops._FAKES if name.startswith(PASSES)]
    command = [sys.executable, "-c", REGISTER, built[0], stub, *names]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_kernels_keep_to_registers_and_budgets(built, record_property):
    kernels, budget_of = cuda_build.kernels_in(built[1]), cuda_build.all_budgets()
    record_property("table", cuda_build.table(kernels, budget_of))
    assert {(k.source, k.architecture) for k in kernels} == {
        (s.name, a) for s in cuda_build.SOURCES for a in ARCHITECTURES
    }
    assert not cuda_build.faults(kernels, budget_of)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vectors_are_accessed_128_bits_at_once(built, disassembler, architecture):
    kinds = set()
    for source in cuda_build.SOURCES:
        found = cuda_build.accesses(built[1] / f"{source.stem}.o", architecture)
        kinds |= {cuda_build.element(instance) for instance in found}
        assert not cuda_build.narrow(found)
    assert kinds - {None} == set(cuda_build.WIDTHS), "no vector kernels of some dtype: another way to name them?"


def test_objects_hold_code_for_each_architecture_and_ptx(built, disassembler):
    tool = cuda_build.find_disassembler()
    for source in cuda_build.SOURCES:
        for kind, expected in (("--list-elf", set(ARCHITECTURES)), ("--list-ptx", {ARCHITECTURES[-1]})):
            listed = subprocess.check_output([tool, kind, built[1] / f"{source.stem}.o"], text=True)
            assert set(re.findall(r"\bsm_\d+", listed)) == expected


def planted(nvcc, folder, code, *flags):
    """The kernels of a file with faults, its budgets, and its machine code."""
    source = folder / "planted.cu"
    source.write_text(code)
    command = [nvcc, "-arch=sm_90", "-cubin", "-Xptxas", "-v", *flags, source, "-o", folder / "planted.cubin"]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return cuda_build.parse(said.stdout + said.stderr, source.name), {source.name: cuda_build.budgets(source)}


def test_the_gate_refuses_what_is_planted(nvcc, tmp_path):
    assert not cuda_build.faults(*planted(nvcc, tmp_path, PLANTED))
    hungry = cuda_build.faults(*planted(nvcc, tmp_path, PLANTED + HUNGRY))
    assert len(hungry) == 2
    assert re.match(r"planted.cu: tight<float, 1> on sm_90 takes \d+ registers, 20 allowed$", hungry[0])
    assert re.match(r"planted.cu: unbudgeted has no budget: .* `// registers: unbudgeted <= \d+`$", hungry[1])
    kernels, budget_of = planted(nvcc, tmp_path, PLANTED + SPILLING, "-maxrregcount=32")
    (spilling,) = cuda_build.faults(kernels, budget_of)
    assert re.search(r"spilling<float, 1> on sm_90 has a stack frame of [1-9]\d* bytes and spills [1-9]", spilling)
    (row,) = (line for line in cuda_build.table(kernels, budget_of).splitlines() if " spilling " in line)
    assert re.fullmatch(r"planted.cu spilling +sm_90 +1 +\d+ +255 +0 +[1-9]\d* +[1-9]\d*", row)


def test_the_gate_refuses_narrow_accesses(nvcc, disassembler, tmp_path):
    planted(nvcc, tmp_path, PLANTED)
    wrong = cuda_build.narrow(cuda_build.accesses(tmp_path / "planted.cubin", "sm_90"))
    assert len(wrong) == 3 and all(line.startswith("halves<Half, 8>") for line in wrong)


@pytest.mark.parametrize("architecture", [75, 80, 90])
def test_16_bit_floats_are_converted_in_hardware(nvcc, tmp_path, architecture):
    (tmp_path / "convert.cu").write_text(CONVERT)
    command = [nvcc, "-std=c++17", f"-arch=compute_{architecture}", "--ptx", "convert.cu"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = set(re.findall(r"\bcvt\.(?:rn\.)?b?f\d+\.b?f\d+", (tmp_path / "convert.ptx").read_text()))
    bfloat16 = {"cvt.rn.bf16.f32"} if architecture >= 80 else set()  # below, there is no such instruction
    assert found == {"cvt.f32.f16", "cvt.rn.f16.f32"} | bfloat16
