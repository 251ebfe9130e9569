"""`resfuse explain`: how each block of a network would run."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

import resfuse
from resfuse.bench.workload import stock
from resfuse.cli.common import DTYPES, checked_backend, checked_device, checked_model, one_of, say


def explain(
    model: Annotated[str, typer.Argument(help="A network's name; resfuse list names them.")],
    dtype: Annotated[str, typer.Option(help="Of parameters and activations.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[str | None, typer.Option(help="A backend for every block.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The blocks as a JSON list.")] = False,
) -> None:
    """Say which blocks of a network are fused, who computes their convolutions, and why the others stay stock."""
    checked_model(model)
    precision = getattr(torch, one_of("dtype", dtype, DTYPES))
    checked_backend(backend, checked_device(device), precision)
    network = stock(model).to(device, precision)
    found = resfuse.explain(resfuse.fuse(network, backend=backend))
    print(found.to_json()) if as_json else say(str(found))
