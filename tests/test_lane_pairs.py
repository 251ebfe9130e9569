"""scale_shift_act of bfloat16 on AVX-512: by vectors of even and odd values, the same bits as the portable loops.

Of NaN there is one here: AVX512_BF16 keeps a NaN's sign, the portable loops do not.
"""

import os
import subprocess
import sys

import pytest
import torch
from numerics import image

from resfuse import ops

pytestmark = pytest.mark.skipif(ops.tile_lanes != 16, reason="without AVX-512 there are the compiler's loops alone")


def results():
    """Every form, on rows of whole pairs of vectors and on others, with all that rounding has to look at."""
    torch.manual_seed(0)
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -1e-40, 3.3895e38, 1.00390625, 1.01171875]
    found = []
    for shape in [(2, 64, 9, 7), (3, 32, 5, 5), (2, 256, 8, 8), (2, 100, 6, 6), (2, 48, 8, 8), (4, 3, 8, 8)]:
        channels = shape[1]
        for layout in ("channels_last", "contiguous"):
            x, residual = image(shape, torch.bfloat16, layout), image(shape, torch.bfloat16, layout)
            for n, value in enumerate(special):
                x[n % shape[0], n % channels, n % shape[2], :] = value
            vectors = list(torch.randn(4, channels))
            vectors[0][0], vectors[1][channels - 1] = float("nan"), float("inf")
            for others in ([None] * 3, [residual, None, None], [residual, *vectors[2:]]):
                for relu in (False, True):
                    arguments = (x, *vectors[:2], *others, relu)
                    in_place = x.clone(memory_format=torch.preserve_format)
                    ops.scale_shift_act_(in_place, *arguments[1:])
                    found += [ops.scale_shift_act(*arguments), in_place, *ops.scale_shift_act_moments(*arguments)]
    found = [one.contiguous().where(~one.isnan(), torch.nan) for one in found]
    return [one.view(torch.int16 if one.dtype == torch.bfloat16 else torch.int32) for one in found]


@pytest.mark.parametrize("hidden", ["RESFUSE_AVX512", "RESFUSE_AVX512_BF16"])
def test_the_same_bits_as_the_portable_loops(hidden, tmp_path):
    path = tmp_path / "results.pt"
    script = f"import test_lane_pairs as t, torch; torch.save(t.results(), {str(path)!r})"
    env = {**os.environ, hidden: "0", "PYTHONPATH": os.path.dirname(__file__)}
    subprocess.run([sys.executable, "-c", script], env=env, check=True)
    assert all(torch.equal(one, other) for one, other in zip(results(), torch.load(path), strict=True))
