"""Register tiles one panel wide and two panels wide: sums run in the same order, so results are the same bits."""

import os
import subprocess
import sys

import pytest
import torch
from numerics import image

import resfuse
from resfuse import ops

pytestmark = pytest.mark.skipif(ops.tile_lanes != 16, reason="tiles of AVX2 are one panel wide")

# channels in and out, size, kernel, stride, groups: pairs of panels, one left over, part of one, few pixels, windows of
# groups that differ and that are the same
CONVOLUTIONS = [
    (64, 128, 12, 1, 1, 1),
    (96, 96, 9, 3, 1, 1),
    (64, 160, 3, 1, 1, 1),
    (48, 72, 11, 3, 2, 1),
    (64, 64, 8, 1, 2, 1),
    (128, 128, 7, 3, 1, 2),
    (64, 64, 10, 3, 1, 16),
]


def results():
    """Outputs and gradients of convolutions with statistics, and of a network that is served."""
    for dtype in sorted(ops.tile_dtypes, key=str):
        for number, (channels, out, size, kernel, stride, groups) in enumerate(CONVOLUTIONS):
            torch.manual_seed(number)
            x = image((2, channels, size, size), dtype, "channels_last")
            weight = torch.randn(out, channels // groups, kernel, kernel)
            affine, mean = torch.randn(2, channels), torch.randn(channels)
            geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1], groups)
            y, y_mean, y_var = ops.conv_stats(x, affine, mean, weight, True, *geometry, True)
            yield from (y, y_mean, y_var)
            grad = image(tuple(y.shape), dtype, "channels_last")
            reader = (torch.randn(2, out), y_mean, torch.randn(out), torch.randn(out), True)
            yield from ops.conv_stats_backward(
                grad, y, *reader, x, affine, mean, weight, True, *geometry, None, True, True
            )
        torch.manual_seed(0)
        served = resfuse.fold(resfuse.models.get_model("resnet18", num_classes=100).eval(), dtype)
        yield served(image((2, 3, 64, 64), dtype))


def test_wide_and_narrow_tiles_give_the_same_bits(tmp_path):
    found = []
    for setting in "01":
        path = tmp_path / setting
        command = [
            sys.executable,
            "-c",
            f"import test_wide_tiles as t, torch; torch.save(list(t.results()), {str(path)!r})",
        ]
        env = {**os.environ, "RESFUSE_WIDE_TILES": setting, "PYTHONPATH": os.path.dirname(__file__)}
        subprocess.run(command, env=env, check=True)
        found.append(torch.load(path))
    narrow, wide = found
    assert len(narrow) == len(wide) > 0
    for one, other in zip(narrow, wide, strict=True):
        assert one.isfinite().all() and torch.equal(one, other)
