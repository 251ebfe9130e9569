"""moments on AVX-512: pairs of vectors, by intrinsics, sum the same bits as the loops that the compiler vectorises."""

import os
import subprocess
import sys

import pytest
import torch
from numerics import image

from resfuse import ops

pytestmark = pytest.mark.skipif(ops.tile_lanes != 16, reason="without AVX-512 there are the compiler's loops alone")


def moments_of_images():
    """Mean and variance for rows of whole pairs of vectors, of pairs and a rest, and of less; both layouts."""
    torch.manual_seed(0)
    shapes = [(2, 256, 9, 7), (3, 64, 5, 5), (2, 100, 6, 6), (2, 131, 4, 3), (4, 3, 8, 8), (2, 48, 40, 40)]
    images = [
        image(shape, dtype, layout)
        for shape in shapes
        for layout in ("channels_last", "contiguous")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    images[-1][0, 0, 0, :3] = torch.tensor([6e-8, -3e-6, 0.0])  # subnormal in float16
    return [result for x in images for result in ops.moments(x)]


def test_moments_are_the_same_bits_as_the_portable_loops(tmp_path):
    path = tmp_path / "moments.pt"
    script = f"import test_moments_lanes as t, torch; torch.save(t.moments_of_images(), {str(path)!r})"
    env = {**os.environ, "RESFUSE_AVX512": "0", "PYTHONPATH": os.path.dirname(__file__)}
    subprocess.run([sys.executable, "-c", script], env=env, check=True)
    found = moments_of_images()
    assert all(one.isfinite().all() for one in found)
    assert all(torch.equal(one, other) for one, other in zip(found, torch.load(path), strict=True))
