"""Every operator in every form on small odd shapes: what `make gpu-check` runs under compute-sanitizer.

Values are not looked at here, so that nearly every launch is one of ours; the tests marked gpu look at them. Arguments
are the device, "cuda" by default, and the backend, "native" by default.
"""

import sys

import test_ops
import torch
from test_cuda_dispatch import Calls
from test_gpu import moved

from resfuse import choices, ops

# one element wide, fewer channels than a vector has, several blocks of whole vectors
SHAPES = ((3, 65, 4, 2), (2, 64, 9, 9), (2, 5, 3, 4))


def native(device):
    calls = 0
    for test_ops.SHAPE in SHAPES:
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            for layout in ("contiguous", "channels_last"):
                for case in test_ops.CASES:
                    test_ops.overload(case)(*case.build(dtype, layout))
                    calls += 1
    return calls


def triton(device):
    """In 16 bits, where products run on the tensor cores; in shapes that the tests have, so that their kernels are
    compiled. Convolutions are the fused kernels' whatever a call would choose."""
    from triton_interpreted import test_conv_stats, test_expand_bn_act

    from resfuse._triton import LAUNCHERS

    kernels, choices.choose = ops.of("triton"), lambda *asked: "fused"
    dtype = torch.bfloat16 if device == "cuda" else torch.float16  # interpreted, bfloat16 is not a GPU's
    test_ops.SHAPE = (3, 65, 9, 9)
    with Calls() as calls:
        for case in test_ops.CASES:
            with torch.device("cpu"):
                args = case.build(dtype, "channels_last")
            getattr(kernels, case.op)(*moved(args, device))
        for name in ("1x1-wide", "3x3-strided"):
            *source, pairs = test_conv_stats.operands(test_conv_stats.CONVS[name], dtype)
            y, y_mean, y_var = kernels.conv_stats(*source, True, *pairs, True)
            loaded = (torch.randn_like(y), y, None, y_mean, y_mean, y_var, False, *source, True, *pairs)
            kernels.conv_stats_backward(*loaded, None, True, True)
            kernels.conv_stats_backward_(*loaded, torch.randn_like(source[0]), True)
        for kind in ("raw", "projection"):
            unit = test_expand_bn_act.make_unit((3, 13, 7, 5), 37, kind, dtype, (2, 1))
            test_expand_bn_act.triton_path(unit.leaves(dtype)[1], True)[0].sum().backward()
    if missed := LAUNCHERS.keys() - calls.ours().keys():
        raise SystemExit(f"never called: {', '.join(sorted(missed))}")
    return sum(calls.ours().values())


def main(device="cuda", backend="native"):
    torch.set_default_device(device)
    calls = {"native": native, "triton": triton}[backend](device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main(*sys.argv[1:])
