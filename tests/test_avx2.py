"""Tile kernels compiled for AVX2, on a processor that has AVX-512 and would not use them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resfuse import ops

WIDEST = 16  # lanes of AVX-512


@pytest.mark.skipif(ops.tile_lanes != WIDEST, reason="without AVX-512 every test runs this way already")
def test_avx2_passes_the_tests_of_tile_kernels():
    names = ("test_tiles.py", "test_bfloat16_tiles.py", "test_tile_engine.py", "test_winograd.py", "test_groups.py")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:xdist", *(Path(__file__).with_name(n) for n in names)],
        env={**os.environ, "RESFUSE_AVX512": "0"}, capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert found.returncode == 0 and " passed" in found.stdout, found.stdout[-4000:] + found.stderr[-2000:]


def test_a_setting_hides_avx512():
    found = subprocess.run(
        [sys.executable, "-c", "from resfuse import ops; print(ops.tile_lanes)"],
        env={**os.environ, "RESFUSE_AVX512": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert int(found.stdout) == min(ops.tile_lanes, WIDEST // 2), found.stderr
