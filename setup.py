"""Builds the compiled library: csrc/cpu into resfuse._C, and csrc/cuda, where nvcc is, into resfuse/_cuda.so.

Metadata is in pyproject.toml. The build reads two settings, and neither the network nor a GPU:
    CUDA_HOME        the CUDA toolkit; its bin/nvcc compiles csrc/cuda, also beside a CPU-only torch
    RESFUSE_CUDA     0: never build for CUDA; 1: fail where nvcc is missing; unset: build where nvcc is
    TORCH_CUDA_ARCH_LIST   as for any torch extension; default "8.0;9.0;10.0+PTX"
"""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
# LibTorch's stable ABI of 2.10: one binary for every later torch. py_limited_api does the same for Python.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# torch's headers are system headers: their warnings are not ours
INCLUDES = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
# -ffp-contract=off: every clone of a loop, and the mask recomputed in backward, gives the bits of the forward pass
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]
WARNINGS = ["-Wall", "-Wextra"]


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def find_nvcc() -> str | None:
    """The CUDA compiler of CUDA_HOME, or None where CUDA is not wanted or not there."""
    wanted = os.environ.get("RESFUSE_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"RESFUSE_CUDA must be 0, 1 or unset, got {wanted!r}")
    home = os.environ.get("CUDA_HOME") or cpp_extension.CUDA_HOME
    nvcc = Path(home) / "bin" / "nvcc" if home else None
    if wanted == "0":
        return None
    if nvcc is not None and nvcc.is_file():
        return str(nvcc)
    if wanted == "1":
        raise SystemExit(f"RESFUSE_CUDA=1 needs CUDA_HOME with bin/nvcc, got CUDA_HOME={home!r}")
    return None


def architecture_flags() -> list[str]:
    flags = []
    for name in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX").replace(" ", ";").split(";"):
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildExtension(cpp_extension.BuildExtension):
    """torch's builder for the C++ library, and nvcc for the CUDA library beside it."""

    def build_extensions(self) -> None:
        super().build_extensions()
        nvcc = find_nvcc()
        if nvcc is not None:
            self.build_cuda(nvcc)

    def build_cuda(self, nvcc: str) -> None:
        common = [nvcc, "-std=c++17", "-O3", "-DUSE_CUDA", STABLE_ABI, *INCLUDES, *architecture_flags()]
        common += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "--expt-relaxed-constexpr", "--threads", "0"]
        objects = Path(self.build_temp) / "cuda"
        objects.mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            output = str(objects / (Path(source).stem + ".o"))
            subprocess.run([*common, "-c", source, "-o", output], check=True)
            return output

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_one, sources("cuda", ".cu")))
        library = Path(self.get_ext_fullpath("resfuse._C")).parent / "_cuda.so"
        library.parent.mkdir(parents=True, exist_ok=True)
        # cudart is linked statically; torch's symbols are found in the torch that is loaded first
        subprocess.run([nvcc, "-shared", "-cudart=static", *compiled, "-o", str(library)], check=True)
        self.announce(f"built {library}", level=2)


extension = Extension(
    "resfuse._C",
    sources=["csrc/module.cpp", *sources("cpu", ".cpp")],
    library_dirs=cpp_extension.library_paths(),
    libraries=["torch", "torch_cpu", "c10"],
    extra_compile_args={"cxx": [*FLAGS, *WARNINGS, STABLE_ABI, *INCLUDES]},
    depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")],
    py_limited_api=True,
    language="c++",
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
