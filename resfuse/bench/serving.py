"""Serving: a network written to files, and how each engine loads and runs it; bench_serving.py's workers.

Every engine starts from a file, in a process of its own, as it is deployed: what another engine or an export needs is
in nobody's memory and in nobody's first call.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resfuse import Folded, fold, models
from resfuse.bench.memory import peak_resident_bytes
from resfuse.bench.parity import relative_l2
from resfuse.bench.peers import import_torchvision

VARIANTS = ("eager", "freeze", "onnxruntime", "openvino", "folded")
"""torch in channels_last, torch.compile with Inductor's freezing, and engines; "folded" is resfuse.fold's result."""

_STATE, _IMAGES, _EXACT, _ONNX = "state.pt", "images.pt", "exact.pt", "network.onnx"


def build(network: str) -> nn.Module:
    """The network as torchvision builds it, or resfuse.models where torchvision has none, in eval."""
    torchvision = import_torchvision().models
    make = getattr(torchvision, network, None) or (lambda: models.get_model(network))
    return make().eval()


def write(network: str, images: Tensor, dtypes: tuple[str, ...], folder: Path, *, onnx: bool) -> None:
    """Write a network whose statistics are those of `images`, the images, and what it gives for them in float64.

    Args:
        network (str): a name that :func:`build` knows; its weights are random, with a fixed seed.
        images (Tensor): (N, 3, H, W) float32.
        dtypes (tuple[str, ...]): of the folded networks, as "float32".
        folder (Path): where the files go.
        onnx (bool): also export to ONNX, for images of this shape.
    """
    torch.manual_seed(0)
    model = _settled(build(network), images)
    torch.save(model.state_dict(), folder / _STATE)
    torch.save(images, folder / _IMAGES)
    for dtype in dtypes:
        fold(model, getattr(torch, dtype)).save(_folded(folder, dtype))
    if onnx:
        torch.onnx.export(model, (images.contiguous(),), folder / _ONNX, dynamo=True, verbose=False)
    with torch.no_grad():
        torch.save(model.double()(images.double()), folder / _EXACT)


def _settled(model: nn.Module, images: Tensor) -> nn.Module:
    """The model with running statistics of these images, so that activations have the size of a trained network's."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def _folded(folder: Path, dtype: str) -> Path:
    return folder / f"folded-{dtype}.pt"


def why_missing(variant: str, dtype: str) -> str | None:
    """Why an engine cannot be measured in a dtype; None where it can."""
    if variant == "onnxruntime" and dtype != "float32":
        return f"ONNX Runtime has no {dtype} convolutions on CPUs"
    if variant in ("onnxruntime", "openvino"):
        try:
            __import__(variant)
        except ImportError:
            return f"{variant} is not installed"
    return None


def load(variant: str, network: str, folder: Path, dtype: str) -> Callable[[Tensor], Tensor]:
    """What runs the network of a folder by one of VARIANTS, or by "fold", which folds it first."""
    wanted = getattr(torch, dtype)
    if variant == "folded":
        return Folded.load(_folded(folder, dtype))
    if variant in ("onnxruntime", "openvino"):
        return {"onnxruntime": _onnxruntime, "openvino": _openvino}[variant](folder / _ONNX, dtype)
    model = build(network)
    model.load_state_dict(torch.load(folder / _STATE, weights_only=True))
    if variant == "fold":
        return fold(model, wanted)
    model = model.to(wanted, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if variant == "freeze":
        torch._inductor.config.freezing = True  # of the process, which has no other network
        model = torch.compile(model)  # type: ignore[assignment]
    return lambda x: model(x.to(wanted))


def _onnxruntime(path: Path, dtype: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(path: Path, dtype: str) -> Callable[[Tensor], Tensor]:
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0])


def work(variant: str, network: str, folder: str, dtype: str, threads: str) -> None:
    """A worker: load and call once, then answer lines of standard input with lines of JSON.

    "first" gives the seconds of loading and the first call, "run N" those of N calls, "error" the relative L2 error of
    the outputs against float64; "memory" gives bytes after the imports and at most, and ends the worker.
    """
    torch.set_num_threads(int(threads))
    _import(variant)
    images = torch.load(Path(folder) / _IMAGES, weights_only=True)
    # each engine gets what it reads fastest, as its users would prepare it
    images = images.contiguous() if variant in ("onnxruntime", "openvino") else images.to(getattr(torch, dtype))
    imported = peak_resident_bytes()
    start = time.perf_counter()
    with torch.inference_mode():
        run = load(variant, network, Path(folder), dtype)
        run(images)
        first = time.perf_counter() - start
        for line in sys.stdin:
            word, *rest = line.split()
            if word == "run":
                answer: Any = [_seconds(run, images) for _ in range(int(rest[0]))]
            elif word == "error":
                answer = relative_l2(run(images), torch.load(Path(folder) / _EXACT, weights_only=True))
            elif word == "first":
                answer = first
            else:
                answer = {"imported_rss_bytes": imported, "peak_rss_bytes": peak_resident_bytes()}
            print(json.dumps(answer), flush=True)
            if word == "memory":
                return


def _import(variant: str) -> None:
    """What the process has imported before anything is counted."""
    import_torchvision()
    if variant in ("onnxruntime", "openvino"):
        __import__(variant)


def _seconds(run: Callable[[Tensor], Tensor], images: Tensor) -> float:
    start = time.perf_counter()
    run(images)
    return time.perf_counter() - start
