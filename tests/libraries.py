"""What a shared library asks of others, read with binutils, and which of that the stable ABI allows."""

import re
import shutil
import subprocess

import pytest


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
