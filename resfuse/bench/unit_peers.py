"""The units of other libraries: torch.compile's, and on NVIDIA GPUs those of apex, inplace_abn and cuDNN's frontend.

Like every peer they are used where they are installed, and their results are checked before they are timed. The three
for GPUs are written from their documentation; they have not been run here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resfuse.bench.unit_cases import EPS, Case, Results

# the module that each is imported from
PACKAGES = {
    "compile": "torch",
    "apex": "apex",
    "inplace-abn": "inplace_abn",
    "cudnn-frontend": "cudnn",
    "max-autotune": "torch",
}
# torch.compile's mode; a graph would copy its inputs
_MODES = {"compile": None, "max-autotune": "max-autotune-no-cudagraphs"}
_SLOPE = 0.01  # inplace_abn inverts its activation, and no ReLU can be: with this slope results agree within 1 %


def why_missing(name: str, device: str) -> str | None:
    """Why a peer's units are not measured on a device; None where they are.

    Raises:
        ValueError: nobody has this name.
    """
    if name not in PACKAGES:
        raise ValueError(f"peer must be one of {', '.join(PACKAGES)}, got {name!r}")
    if importlib.util.find_spec(PACKAGES[name]) is None:
        return f"{PACKAGES[name]} is not installed"
    return None if name in _MODES or device == "cuda" else f"it has no units for {device}"


def unit_peer(name: str, case: Case, inputs: Any) -> Callable[[], Results] | None:
    """A case as a peer of :data:`PACKAGES` runs it; None where it has no such unit.

    Args:
        name (str): :func:`why_missing` has no objection.
        case (Case): what to compute.
        inputs (Inputs | ConvInputs): the operands that the case was made with.
    """
    if name in _MODES:
        if case.stock is None or case.unit.endswith("backward"):
            return None  # the graph of a backward pass is its forward's
        if name == "max-autotune" and not case.unit.startswith("conv"):
            return None  # a pass has little to choose from
        torch._dynamo.reset()  # rows share their code: from the second shape on it would be compiled for any
        return torch.compile(case.stock, mode=_MODES[name], dynamic=False)
    if case.unit != "bn_act forward" or case.form == "raw":
        return None
    residual = inputs.residual if case.form == "identity" else None
    if name == "apex":
        return _apex(inputs, residual) if inputs.x.dtype == torch.float16 else None
    if name == "inplace-abn":
        return _inplace_abn(inputs) if residual is None else None
    return _cudnn(inputs, residual)


def _apex(i: Any, residual: Tensor | None) -> Callable[[], Results]:
    module = importlib.import_module("apex.contrib.groupbn.batch_norm")
    layer = module.BatchNorm2d_NHWC(i.x.shape[1], fuse_relu=True).to(i.x.device)
    layer.weight.data.copy_(i.scale)
    layer.bias.data.copy_(i.shift)
    x, z = (None if value is None else value.permute(0, 2, 3, 1) for value in (i.x, residual))
    return lambda: (layer(x, z).permute(0, 3, 1, 2),)


def _inplace_abn(i: Any) -> Callable[[], Results]:
    """It overwrites its input: after the first call it normalises what it wrote, which takes the same time."""
    module = importlib.import_module("inplace_abn")
    layer = module.InPlaceABN(i.x.shape[1], eps=EPS, activation="leaky_relu", activation_param=_SLOPE)
    layer = layer.to(i.x.device)
    layer.weight.data.copy_(i.scale)
    layer.bias.data.copy_(i.shift)
    x = i.x.clone()

    def run() -> Results:
        with torch.no_grad():
            return (layer(x),)

    return run


def _cudnn(i: Any, residual: Tensor | None) -> Callable[[], Results]:
    cudnn = importlib.import_module("cudnn")
    kind = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16,
            torch.float32: cudnn.data_type.FLOAT}[i.x.dtype]  # fmt: skip
    graph = cudnn.pygraph(
        io_data_type=kind, intermediate_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT
    )
    vectors = {name: value.view(1, -1, 1, 1).float() for name, value in (("scale", i.scale), ("bias", i.shift))}
    epsilon = torch.full((1, 1, 1, 1), EPS)  # on the host: passed by value
    x, eps = graph.tensor_like(i.x), graph.tensor_like(epsilon)
    scale, bias = (graph.tensor_like(vectors[name]) for name in ("scale", "bias"))
    y, mean, invstd, *_ = graph.batchnorm(name="bn", input=x, scale=scale, bias=bias, in_running_mean=None,
                                          in_running_var=None, epsilon=eps, momentum=None, peer_stats=[])  # fmt: skip
    pack = {x: i.x, eps: epsilon, scale: vectors["scale"], bias: vectors["bias"]}
    if residual is not None:
        z = graph.tensor_like(residual)
        pack[z] = residual
        y = graph.add(name="add", a=y, b=z)
    y = graph.relu(name="relu", input=y)
    y.set_output(True).set_data_type(kind)
    for statistic in (mean, invstd):
        statistic.set_output(True).set_data_type(cudnn.data_type.FLOAT)
        pack[statistic] = torch.empty_like(vectors["scale"])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    pack[y] = torch.empty_like(i.x)
    workspace = torch.empty(graph.get_workspace_size(), device=i.x.device, dtype=torch.uint8)

    def run() -> Results:
        graph.execute(pack, workspace)
        return (pack[y],)

    return run
