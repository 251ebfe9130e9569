"""Diagnosis: what this installation has, why it has not the rest, and whether what it has computes right."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse import BatchNorm2dParameters, backends, fold, functional, fuse, ops
from resfuse.bench.conv_cases import ConvInputs, conv_cases
from resfuse.bench.environment import environment
from resfuse.bench.gate import Gate, RefusedError
from resfuse.bench.parity import FLOOR, relative_l2
from resfuse.bench.peers import PEERS
from resfuse.bench.shapes import ConvShape
from resfuse.bench.unit_cases import Inputs, cases
from resfuse.bench.units import check
from resfuse.models import resnet

_PACKAGES = (
    "torch", "torchvision", "numpy", "triton", "onnx", "onnxscript", "onnxruntime", "openvino", "typer", "rich",
    "plotly", "jinja2", "matplotlib", "scikit-image", "mlxtend",
)  # fmt: skip
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "f16c", "neon", "asimd", "sve", "bf16")
_SHAPE = (2, 64, 7, 9)  # of the self-test: whole vectors of channels, and a map that no tile divides


def diagnose() -> dict[str, Any]:
    """Everything `resfuse doctor` says, as JSON-serialisable values; runs the self-test.

    Returns:
        dict: environment, packages (version or None), backends (backend, device, available, reason), cpu, gpu, caches,
        self_test (name, passed, detail, seconds), healthy: whether every self-test passed.
    """
    tests = list(self_test())
    return {
        "environment": environment("cuda" if torch.cuda.is_available() else "cpu"),
        "packages": {name: _version(name) for name in _PACKAGES},
        "peers": {name: peer.package is None or _importable(peer.package) for name, peer in PEERS.items()},
        "backends": [status._asdict() for status in backends.available()],
        "cpu": cpu(),
        "gpu": gpu(),
        "caches": caches(),
        "self_test": tests,
        "healthy": all(test["passed"] for test in tests),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def cpu() -> dict[str, Any]:
    """The processor's features that matter here, and whose convolutions run on it."""
    flags: set[str] = set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.partition(":")[2].split())
                break
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "features": [flag for flag in _FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "huge_pages": pages.read_text().partition("[")[2].partition("]")[0] if pages.is_file() else None,
        "convolutions": {str(d).removeprefix("torch."): _convolutions(d) for d in (torch.float32, torch.bfloat16)},
    }


def _convolutions(dtype: torch.dtype) -> str:
    reason = backends.why_not_raw("cpu", dtype)
    if reason is not None:
        return f"torch: {reason}"
    return "resfuse" if ops.tile_operands[dtype] == dtype else "resfuse, as float32: the processor has no AVX512_BF16"


def gpu() -> dict[str, Any]:
    """The first NVIDIA GPU, or why there is none."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return {"available": False, "reason": f"torch finds none (built for CUDA {built})" if built else
                "this torch is built without CUDA"}  # fmt: skip
    found = torch.cuda.get_device_properties(0)
    return {"available": True, "name": found.name, "capability": f"sm_{found.major}{found.minor}",
            "memory_bytes": found.total_memory, "multiprocessors": found.multi_processor_count,
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # fmt: skip


def caches() -> list[dict[str, Any]]:
    """The folders where compiled kernels and tuning tables are kept: path, files and bytes in them."""
    home = Path.home()
    base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    folders = {
        "resfuse": base / "resfuse",
        "triton": Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache"),
        "inductor": Path(inductor) if inductor else None,
    }
    return [{"name": name, **_sizes(folder)} for name, folder in folders.items() if folder is not None]


def _sizes(folder: Path) -> dict[str, Any]:
    files = [file for file in folder.rglob("*") if file.is_file()] if folder.is_dir() else []
    return {"path": str(folder), "files": len(files), "bytes": sum(file.stat().st_size for file in files)}


def self_test() -> Iterator[dict[str, Any]]:
    """Every available backend on small shapes, against float64; one result after another."""
    for dtype in (torch.float32, torch.bfloat16):
        name = f"fused and folded block {str(dtype).removeprefix('torch.')}"
        yield _tested(name, partial(_block, dtype))
    for status in backends.available():
        device = "cpu" if status.device == "any" else status.device
        if status.available and status.backend != "native":
            yield _tested(f"{status.backend} {device}", partial(_composition, status.backend, device))
        elif status.available:
            for dtype in (torch.float32, torch.bfloat16):
                name = f"native {device} {str(dtype).removeprefix('torch.')}"
                yield _tested(name, partial(_native, device, dtype))


def _tested(name: str, test: Callable[[], int]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        passed, detail = True, f"{test()} results within their bounds"
    except RefusedError as error:
        passed, detail = False, str(error).removeprefix("refusing to time ")
    except RuntimeError as error:  # a kernel that does not run here is a finding, not a crash
        passed, detail = False, f"it does not run: {str(error).splitlines()[0]}"
    return {"name": name, "passed": passed, "detail": detail, "seconds": round(time.perf_counter() - start, 2)}


def _composition(backend: str, device: str) -> int:
    """Batch normalisation and ReLU in training, forward and backward, by one backend."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(_SHAPE, generator=generator).to(device) for _ in range(2))
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    out = functional.bn_act(ours, BatchNorm2dParameters(None, None, training=True), backend=backend)
    right = F.relu(F.batch_norm(exact, None, None, training=True))
    out.backward(grad)
    right.backward(grad.double())
    assert ours.grad is not None and exact.grad is not None
    gate = Gate("bn_act")
    gate.check(backend, relative_l2(out, right), 2 * FLOOR[torch.float32], "output")
    gate.check(backend, relative_l2(ours.grad, exact.grad), 4 * FLOOR[torch.float32], "gradient")
    return 2


def _block(dtype: torch.dtype) -> int:
    """A bottleneck on the CPU: fused, folding in training, output and gradients; then folded for inference."""
    torch.manual_seed(0)
    stock = resnet.Bottleneck(4 * _SHAPE[1], _SHAPE[1])
    images = torch.randn(_SHAPE[0], 4 * _SHAPE[1], *_SHAPE[2:])
    fused = fuse(copy.deepcopy(stock), folding=True)

    def step(model: nn.Module, wide: bool) -> dict[str, Tensor]:
        x = images.to(torch.float64 if wide else torch.float32, copy=True, memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16 and not wide):
            out = model(x.requires_grad_())
        out.to(x.dtype).square().mean().backward()
        assert x.grad is not None
        return {"output": out.detach(), "gradient": x.grad, "weight's gradient": model.conv3.weight.grad}  # type: ignore

    exact = step(copy.deepcopy(stock).double(), True)
    errors = [{name: relative_l2(found[name], exact[name]) for name in exact}
              for found in (step(copy.deepcopy(stock), False), step(fused, False))]  # fmt: skip
    gate = Gate(f"block {dtype}")
    for name, bound in errors[0].items():
        gate.check("fused", errors[1][name], 2 * bound + FLOOR[dtype], name)
    stock.eval()
    with torch.no_grad():
        exact_out, out = stock.double()(images.double()), stock.to(dtype=dtype)(images.to(dtype))
        served = fold(stock.float(), dtype=dtype)(images.to(dtype))
    gate.check("folded", relative_l2(served, exact_out), 2 * relative_l2(out, exact_out) + FLOOR[dtype], "output")
    return len(exact) + 1


def _native(device: str, dtype: torch.dtype) -> int:
    i = Inputs(_SHAPE, dtype, device)
    found = list(cases(i))
    for case in found:
        check(case, i, Gate(f"{case.unit} {case.form}"))
    if device != "cpu" or dtype not in ops.tile_dtypes:
        return len(found)
    shape = ConvShape("self-test", _SHAPE, _SHAPE, (64, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    j = ConvInputs(shape, dtype)
    convolutions = list(conv_cases(j, shape))
    for case in convolutions:
        check(case, j, Gate(f"{case.unit} {case.form}"))
    return len(found) + len(convolutions)
