"""The CUDA kernels without a GPU: compiled as C++, run thread by thread on the host, under sanitizers.

tests/cuda_on_host stands in for CUDA. A block's threads run one after the other, from barrier to barrier, in several
orders; AddressSanitizer and UndefinedBehaviorSanitizer watch them; memory is NaN before it is written. That this net
holds is shown by planting errors in the kernels' source: each of them is caught.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import setuptools

from resfuse import ops

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests" / "cuda_on_host"
CUDA = ROOT / "csrc" / "cuda"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# checks of every dereference that AddressSanitizer makes too, and that double the time to compile
SANITIZERS += ["-fno-sanitize=vptr,null,object-size,pointer-overflow"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-w", *SANITIZERS]
# What runs on the host: all that compares with the CPU's kernels, and of the units' own tests against reference.py
# those that reach every kernel and the edges of its arithmetic.
TESTS = ["tests/cuda_on_host/kernels.py", "tests/test_units.py", "tests/test_stem.py"]
SELECTED = "test_bn_act[ or moments or mean_much or special or own_dtype or test_windows or selection"
SELECTED = f"kernels.py or ({SELECTED}) and not permuted and not sliced"


def compiler():
    found = shutil.which("g++")
    if found is None:
        pytest.skip("needs g++")
    return found


def runtime(name):
    path = subprocess.check_output([compiler(), f"-print-file-name={name}"], text=True).strip()
    if not os.path.isabs(path):
        pytest.skip(f"needs {name} of g++")
    return path


def sanitized(command, **variables):
    """Run a command; what it printed and whether it succeeded."""
    # Python and torch leave memory behind on purpose
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    return result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def torch_flags(monkeypatch):
    """The include paths, macros and libraries with which setup.py builds, and beside them those for linking."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    settings = runpy.run_path(str(ROOT / "setup.py"))
    folder = settings["cpu_extension"].library_dirs[0]
    return [settings["STABLE_ABI"], *settings["INCLUDES"]], [f"-L{folder}", "-ltorch", "-ltorch_cpu", "-lc10"]


@pytest.fixture
def library(tmp_path, torch_flags):
    """Every .cu file in one library for the host, compiled in two parts."""
    headers, link = torch_flags
    sources = sorted(CUDA.glob("*.cu"), key=lambda path: path.stat().st_size)
    parts = [[*sources[::2], HERE / "controls.cpp"], sources[1::2]]

    def compile_part(i):
        part, output = tmp_path / f"part{i}.cpp", tmp_path / f"part{i}.o"
        part.write_text("".join(f'#include "{source}"\n' for source in parts[i]))
        command = [compiler(), *FLAGS, f"-I{HERE}", *headers, "-c", part, "-o", output]
        subprocess.run(command, check=True)
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_part, range(2)))
    subprocess.run([compiler(), *FLAGS, "-shared", *objects, *link, "-o", tmp_path / "host.so"], check=True)
    return tmp_path / "host.so"


@pytest.mark.skipif(ops.missing_native["cpu"] is not None, reason=str(ops.missing_native["cpu"]))
def test_kernels_agree_with_the_reference_and_the_cpu(library):
    """In a process of their own, into which the sanitizers are loaded before Python."""
    passed, output = sanitized(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "plugin", "-k", SELECTED, *TESTS],
        LD_PRELOAD=f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(HERE)]),
        CUDA_ON_HOST=str(library),
    )
    assert passed, output[-20000:]
    assert "skipped" not in output and re.search(r"\d+ passed", output), output[-20000:]


def walks(folder, source):
    """Compile walks.cpp beside the kernels in `source`, run it, and return what sanitized() does."""
    folder.mkdir()
    command = [compiler(), *FLAGS, f"-I{HERE}", f"-I{source}", HERE / "walks.cpp", "-o", folder / "walks"]
    subprocess.run(list(map(str, command)), check=True)
    return sanitized([folder / "walks"])


def test_walks_in_every_order_and_beyond_32_bits(tmp_path):
    passed, output = walks(tmp_path / "built", ROOT / "csrc")
    assert passed, output


PLANTED = {
    "write out of bounds": ("walk.cuh", "if (u < valid)", "if (u <= valid)", "heap-buffer-overflow"),
    "read out of bounds": (
        "walk.cuh",
        "if (step + u * walk.stride < walk.steps)",
        "if (step + u * walk.stride <= walk.steps)",
        "heap-buffer-overflow",
    ),
    "unwritten element": ("walk.cuh", "step < walk.steps; step +=", "step < walk.steps - 1; step +=", "is wrong"),
    "no barrier after the coefficients": ("walk.cuh", "    __syncthreads();\n", "", "is wrong"),
    "no barrier before a merge": (
        "reduce.cuh",
        "    __syncthreads();\n    if (thread < half)",
        "    if (thread < half)",
        "is wrong",
    ),
    "no barrier after a merge": ("reduce.cuh", "    __syncthreads();\n  }\n", "  }\n", "is wrong"),
    "idle threads leave": (
        "reduce.cuh",
        "  merge_rows(part, walk.lanes",
        "  if (at.column >= walk.columns) return;\n  merge_rows(part, walk.lanes",
        "threads diverge",
    ),
    "positions of 32 bits": (
        "walk.cuh",
        "  int64_t index_, left_;",
        "  int index_;\n  int64_t left_;",
        "SEGV|beyond 32 bits",
    ),
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_caught(tmp_path, error):
    name, old, new, symptom = PLANTED[error]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    file = tmp_path / "csrc" / "cuda" / name
    source = file.read_text()
    assert source.count(old) == 1, "the line to spoil has changed"
    file.write_text(source.replace(old, new))
    passed, output = walks(tmp_path / "built", tmp_path / "csrc")
    assert not passed and re.search(symptom, output), output
