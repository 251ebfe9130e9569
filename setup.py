"""Builds the compiled library: csrc/cpu into resfuse._C, and csrc/cuda, where nvcc is, into resfuse/_cuda.so.

Metadata is in pyproject.toml. The build reads these settings, and neither the network nor a GPU:
    CUDA_HOME        the CUDA toolkit; its bin/nvcc compiles csrc/cuda, also beside a CPU-only torch
    RESFUSE_CUDA     0: never build for CUDA; 1: fail where nvcc is missing; unset: build where nvcc is
    TORCH_CUDA_ARCH_LIST   as for any torch extension, in numbers; default "8.0;9.0;10.0+PTX", as far as nvcc knows them
    MAX_JOBS         compilers that run at once;  RESFUSE_NATIVE=0: build nothing, everything runs on torch alone
"""

import hashlib
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE, STDOUT, check_output, run

from setuptools import Extension, setup
from setuptools.modified import newer_group
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # LibTorch's of 2.10: one binary for every later torch
INCLUDES = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]  # whose warnings are torch's
# no contraction to FMA: every clone of a loop, and the mask recomputed in backward, gives the bits of the forward pass
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra"]
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
CUDA_FLAGS += [STABLE_ABI, *INCLUDES, "-c", "-Xptxas", "-v"]  # registers and spills, for tests/cuda_build.py
PTXAS_REPORT = re.compile(r"ptxas info +:|    \d+ bytes stack frame,")  # all else that nvcc says is worth reading


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def find_nvcc() -> str | None:
    """The CUDA compiler of CUDA_HOME, or None where CUDA is not wanted or not there."""
    wanted = os.environ.get("RESFUSE_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"RESFUSE_CUDA must be 0, 1 or unset, got {wanted!r}")
    home = os.environ.get("CUDA_HOME") or cpp_extension.CUDA_HOME
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
    if wanted == "1" and nvcc is None:
        raise SystemExit(f"RESFUSE_CUDA=1 needs CUDA_HOME with bin/nvcc, got CUDA_HOME={home!r}")
    return nvcc if wanted != "0" else None


def architecture_flags(nvcc: str) -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST: "9.0", "9.0a", "8.0;9.0+PTX" or "8.0 9.0"."""
    known = [f"{c[3:-1]}.{c[-1]}" for c in check_output([nvcc, "--list-gpu-code"], text=True).split()]
    default = ";".join(name for name in ("8.0", "9.0", "10.0") if name in known) + "+PTX"
    flags, listed = [], os.environ.get("TORCH_CUDA_ARCH_LIST") or default
    for name in listed.replace(";", " ").split():
        match = re.fullmatch(r"(\d+\.\d)([af]?)(\+PTX)?", name)
        if match is None or match[1] not in known:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST names {name!r}; {nvcc} knows {', '.join(known)}, with a or f, +PTX")
        number = match[1].replace(".", "") + match[2]
        kinds = ("sm", "compute") if match[3] else ("sm",)
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return flags


def object_folder(nvcc: str) -> Path:
    """Where the CUDA objects of these flags and this compiler are: all builds of a checkout share them."""
    decisive = [*CUDA_FLAGS, *architecture_flags(nvcc), check_output([nvcc, "--version"], text=True)]
    return ROOT / "build" / f"cuda-{hashlib.sha256(' '.join(decisive).encode()).hexdigest()[:16]}"


def compile_cuda(nvcc: str, source: str) -> str:
    """The object of one .cu file, compiled if it is stale; beside it what the compiler said."""
    output, log = (object_folder(nvcc) / (Path(source).stem + suffix) for suffix in (".o", ".log"))
    if newer_group([source, *files("*.h", "cuda/*.cuh")], str(log)):
        command = [nvcc, *CUDA_FLAGS, *architecture_flags(nvcc), source, "-o", output]
        done = run(command, stdout=PIPE, stderr=STDOUT, text=True)
        print("".join(line for line in done.stdout.splitlines(True) if not PTXAS_REPORT.match(line)), end="")
        done.check_returncode()
        log.write_text(done.stdout)  # last: an object with a log is a whole one
    return str(output)


class BuildExtension(cpp_extension.BuildExtension):
    """torch's builder for the C++ library, and nvcc for the CUDA library beside it, which is no Python module."""

    def get_ext_filename(self, name: str) -> str:
        return os.path.join(*name.split(".")) + ".so" if name.endswith("_cuda") else super().get_ext_filename(name)

    def build_extensions(self) -> None:
        if shutil.which(self.compiler.compiler_cxx[0]) is None:
            raise SystemExit(f"resfuse needs a C++17 compiler, and {self.compiler.compiler_cxx[0]} is not found")
        if cuda_extension not in self.extensions:  # what an earlier build left is not part of this one
            Path(self.build_lib, "resfuse", "_cuda.so").unlink(missing_ok=True)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        if ext is not cuda_extension:
            return super().build_extension(ext)
        nvcc, library = find_nvcc(), Path(self.get_ext_fullpath(cuda_extension.name))
        for folder in (object_folder(nvcc), library.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
            compiled = list(pool.map(lambda source: compile_cuda(nvcc, source), files("cuda/*.cu")))
        # cudart is linked statically; libtorch.so stands for libtorch_cuda.so, which a CPU-only torch does not have
        link = ["-shared", "-cudart=static", "-Xlinker", "--no-as-needed", "-ltorch", "-o", library]
        run([nvcc, *compiled, f"-L{cpu_extension.library_dirs[0]}", *link], check=True)


cpu_extension = Extension(
    "resfuse._C",
    sources=files("*.cpp", "cpu/*.cpp"),
    library_dirs=cpp_extension.library_paths(),
    libraries=["torch", "torch_cpu", "c10"],
    extra_compile_args={"cxx": [*FLAGS, STABLE_ABI, *INCLUDES]},
    depends=["setup.py", *files("**/*.h", "**/*.cu", "**/*.cuh")],  # a source distribution takes these files too
    py_limited_api=True,  # one binary for every later Python
    language="c++",
)
cuda_extension = Extension("resfuse._cuda", sources=[])  # torch's builder would refuse .cu beside a CPU-only torch
native = [cpu_extension, *([cuda_extension] if find_nvcc() else [])] if os.environ.get("RESFUSE_NATIVE") != "0" else []
setup(ext_modules=native, cmdclass={"build_ext": BuildExtension}, options={"bdist_wheel": {"py_limited_api": "cp310"}})
