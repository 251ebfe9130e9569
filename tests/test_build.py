"""The compiled libraries: the settings of the build, and what the C++ library depends on."""

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cuda_build import load_setup
from libraries import assert_stable_symbols_only, needed_libraries, undefined_symbols
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import resfuse
from resfuse import choices

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py as a module that builds nothing."""
    for name in ("RESFUSE_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return load_setup()


@pytest.fixture
def toolkit(tmp_path):
    """A folder for CUDA_HOME whose nvcc knows four GPUs and cannot compile."""
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho sm_75 sm_80 sm_90 sm_120\n")
    nvcc.chmod(0o755)
    return tmp_path / "toolkit"


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


def test_every_file_of_the_package_is_installed(tmp_path):
    """A table of choices among them, as it would ship for a GPU that was measured."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    package = tmp_path / "resfuse"
    shutil.copytree(ROOT / "resfuse", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_triton" / "choices").mkdir(exist_ok=True)
    (package / "_triton" / "choices" / choices.file_name("A Measured GPU")).write_text('{"rows": []}')
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "RESFUSE_NATIVE": "0"}, check=True, capture_output=True)
    files = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    built = tmp_path / "built" / "resfuse"
    assert files == {path.relative_to(built) for path in built.rglob("*") if path.is_file()}


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


@pytest.fixture
def make_venv(tmp_path):
    """Runs `make venv` of a copy of the tree with these settings and pip only named; what it said of the last install.

    Compilers are what the test puts into the folder `tools`.
    """
    for name in ("Makefile", "setup.py", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("csrc", "resfuse", "tools", ".venv"):
        (tmp_path / folder).mkdir()
    for tool in ("sh", "make", "mkdir", "rm", "touch", "cmp", "find", "grep", "true"):
        (tmp_path / "tools" / tool).symlink_to(shutil.which(tool))

    def run(**settings):
        command = [shutil.which("make"), "--no-print-directory", "venv", "PYTHON=true", "PIP=: pip"]
        environment = {"PATH": str(tmp_path / "tools"), **settings}
        time.sleep(0.05)  # the dates of files advance by milliseconds
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return "\n".join(line for line in result.stdout.splitlines() if "isolation" in line or "compiler" in line)

    return run


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_builds_again_where_a_setting_changed(make_venv, tmp_path):
    library = tmp_path / "resfuse" / "_C.abi3.so"
    compilers = {name: tmp_path / "tools" / name for name in ("c++", "other")}
    assert "no C++ compiler found" in make_venv() and make_venv() == "", "a second run does nothing"
    for path in compilers.values():
        path.write_text("#!/bin/sh")
        path.chmod(0o755)
    assert f'CXX="{compilers["c++"]}" : pip install' in make_venv(), "a compiler that appears is used"
    assert make_venv() == ""
    library.touch()
    assert make_venv(RESFUSE_NATIVE="0").startswith("RESFUSE_NATIVE=0 : pip install")
    assert not library.exists(), "without native kernels the old ones must go"
    assert make_venv(RESFUSE_NATIVE="0") == ""
    assert make_venv().startswith("CXX=") and make_venv() == ""
    assert f'CXX="{compilers["other"]}"' in make_venv(CXX="other") and make_venv(CXX="other") == ""
    assert make_venv(CXX="other", RESFUSE_CUDA="1") != "" and make_venv(CXX="other", CUDA_HOME="/cuda") != ""
    time.sleep(0.05)
    (tmp_path / "csrc" / "new.cpp").touch()
    assert make_venv(CXX="other", CUDA_HOME="/cuda") != "" and make_venv(CXX="other", CUDA_HOME="/cuda") == ""


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


@pytest.mark.gpu
def test_the_cuda_library_is_there():
    """Likewise on a machine with a GPU."""
    assert resfuse.ops.missing_native["cuda"] is None


def test_available_reports_every_backend():
    found = {(s.backend, s.device): s for s in resfuse.backends.available()}
    assert {("native", "cpu"), ("native", "cuda"), ("triton", "cuda"), ("reference", "any")} <= found.keys()
    assert found["reference", "any"].available
    assert found["native", "cpu"].available == (importlib.util.find_spec("resfuse._C") is not None)
    assert all(s.available != bool(s.reason) for s in found.values())
