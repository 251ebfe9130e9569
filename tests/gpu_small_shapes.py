"""Every operator in every form on small odd shapes: what `make gpu-check` runs under compute-sanitizer.

Values are not looked at here, so that nearly every launch is one of ours; the tests marked gpu look at them. The device
is the argument, "cuda" by default.
"""

import sys

import test_ops
import torch

# one element wide, fewer channels than a vector has, several blocks of whole vectors
SHAPES = ((3, 65, 4, 2), (2, 64, 9, 9), (2, 5, 3, 4))


def main(device="cuda"):
    torch.set_default_device(device)
    calls = 0
    for test_ops.SHAPE in SHAPES:
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            for layout in ("contiguous", "channels_last"):
                for case in test_ops.CASES:
                    test_ops.overload(case)(*case.build(dtype, layout))
                    calls += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main(*sys.argv[1:])
