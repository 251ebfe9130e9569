"""`resfuse tune`: measure kernel candidates on this GPU and keep the table of the fastest."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from resfuse.cli.common import WRONG, all_of, checked_device, checked_model, import_or_stop, say, stop

_DTYPES = ("float32", "bfloat16", "float16")


def tune(
    models: Annotated[list[str] | None, typer.Argument(help="Networks whose layers are tuned; resnet50.")] = None,
    device: Annotated[str, typer.Option(help="The kind of device to tune for.")] = "cuda",
    dtype: Annotated[list[str] | None, typer.Option(help="Once for each, or with commas; bfloat16.")] = None,
) -> None:
    """Measure the candidates of each layer on the GPU at hand; later runs on it choose by the table this writes.

    Exits with 2 where there is no GPU.
    """
    tuning = import_or_stop("resfuse.bench.tune", "kernels to tune: it needs Triton kernels on a GPU", "triton")
    if checked_device(device) == "cpu":
        raise stop("tune measures kernels on a GPU: device must not be cpu")
    names = [checked_model(name) for name in models or ["resnet50"]]
    dtypes = [getattr(torch, name) for name in all_of("dtype", dtype, _DTYPES, ["bfloat16"])]
    try:
        table = tuning.tune(device, names, dtypes)
    except RuntimeError as error:
        raise stop(error, WRONG) from None
    say(f"Written: {table}")
