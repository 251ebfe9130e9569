"""bfloat16 in tile kernels: multiplied in pairs with AVX512_BF16, as float32 without; what both must do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import image

import resfuse
from resfuse import ops

BFLOAT16 = torch.bfloat16
pytestmark = pytest.mark.skipif(BFLOAT16 not in ops.tile_dtypes, reason="this processor has no bfloat16 tile kernels")
PAIRS = ([1, 1], [0, 0], [1, 1], 1)


def test_results_are_rounded_to_nearest_even():
    """A 1x1 convolution of one channel multiplies by one: what it stores is its prologue's result, rounded."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (1, 1, 64, 64), generator=generator, dtype=torch.int16)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.38e38, -3.38e38], dtype=BFLOAT16)
    x = torch.cat([bits.view(BFLOAT16).flatten(), special, special]).view(1, 1, 10, -1)
    x = x.contiguous(memory_format=torch.channels_last)
    for scale in (1.0, 1.00390625, 1 / 3, -1.0078125):
        affine, mean = torch.tensor([[0.0], [scale]]), torch.zeros(1)
        y, *_ = ops.conv_stats(x, affine, mean, torch.ones(1, 1, 1, 1), False, *PAIRS, False)
        exact = (x.float() * scale).to(BFLOAT16)
        # AVX512_BF16 takes subnormal numbers for zero
        normal = exact.float().abs() >= torch.finfo(BFLOAT16).tiny
        assert torch.equal(y[normal], exact[normal]) and torch.equal(y.isnan(), exact.isnan())
        assert (y[~normal & ~exact.isnan()].float().abs() <= torch.finfo(BFLOAT16).tiny).all()


def test_serving_computes_what_the_processor_multiplies():
    """A bfloat16 network takes and gives bfloat16, and its weights are packed as they are multiplied."""
    torch.manual_seed(0)
    model = resfuse.models.get_model("cifar_resnet20").eval()
    folded = resfuse.fold(model, BFLOAT16)
    x = image((2, 3, 32, 32), BFLOAT16)
    y = folded(x)
    assert y.dtype == folded.dtype == BFLOAT16
    exact = model.double()(x.double())
    assert (y - exact).norm() < 0.03 * exact.norm()


@pytest.mark.skipif(
    ops.tile_operands.get(BFLOAT16) != BFLOAT16, reason="without AVX512_BF16 every test runs this way already"
)
def test_what_is_multiplied_as_float_passes_the_same_tests():
    selected = "bfloat16 and (conv_stats or conv_act or second_moments or folding or scale_shift_act or add_relu)"
    files = [
        str(Path(__file__).with_name(name)) for name in ("test_tiles.py", "test_folded_blocks.py", "test_units.py")
    ]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:xdist", "-k", selected, *files],
        env={**os.environ, "RESFUSE_AVX512_BF16": "0"}, capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert found.returncode == 0 and " passed" in found.stdout, found.stdout[-4000:] + found.stderr[-2000:]
