"""The libraries that resfuse is compared with: which are here, and a network or a unit as each of them runs it.

A peer that is not installed, or does not do what is asked, is left out with a reason that the row keeps; none of them
is a dependency.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resfuse.bench.timing import Samples, compare

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_kept: list[torch.library.Library] = []  # a library's definitions live as long as the object


def import_torchvision() -> types.ModuleType:
    """Import torchvision, also where its compiled operators do not load.

    A CUDA build of torchvision beside a CPU-only torch fails at import, because the operators whose fakes it registers
    were never defined. Declaring their schemas first is enough: no network of ``torchvision.models`` calls them.

    Returns:
        types.ModuleType: the torchvision package.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    _declare_missing_operators()
    return importlib.import_module("torchvision")


def _declare_missing_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _OPERATORS:
        library.define(schema)
    _kept.append(library)


class Peer(NamedTuple):
    """One way to run a network.

    Attributes:
        what: in one line.
        package: what must be importable besides torch; None for torch's own.
        devices: where it runs.
        trains: whether it also runs training steps.
        dtypes: those that it computes in; empty for all.
    """

    what: str
    package: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    trains: bool = False
    dtypes: tuple[str, ...] = ()


PEERS = {
    "eager": Peer("torch, channels_last", trains=True),
    "eager-contiguous": Peer("torch in the default layout", trains=True),
    "compile": Peer("torch.compile, channels_last", trains=True),
    "compile-max-autotune": Peer("torch.compile(mode='max-autotune'), channels_last", trains=True),
    "freeze": Peer("torch.compile with Inductor's freezing, channels_last"),
    "onnxruntime": Peer("ONNX Runtime", "onnxruntime", ("cpu",), dtypes=("float32",)),
    "openvino": Peer("OpenVINO", "openvino", ("cpu",), dtypes=("float32", "bfloat16")),
    "torch-tensorrt": Peer("Torch-TensorRT", "torch_tensorrt", ("cuda",)),
}
OURS = {
    "fused": Peer("resfuse.fuse, channels_last", trains=True),
    "fused-compile": Peer("torch.compile of what resfuse.fuse makes", trains=True),
}


def why_missing(name: str, mode: str, device: str, dtype: str) -> str | None:
    """Why a peer is not measured here; None where it is.

    Args:
        name (str): of PEERS or OURS.
        mode (str): "inference", or a mode that needs gradients.
        device (str): "cpu" or "cuda".
        dtype (str): as "float32".

    Raises:
        ValueError: nobody has this name.
    """
    known = {**PEERS, **OURS}
    if name not in known:
        raise ValueError(f"peer must be one of {', '.join(known)}, got {name!r}")
    peer = known[name]
    if peer.package is not None and importlib.util.find_spec(peer.package) is None:
        return f"{peer.package} is not installed"
    if device not in peer.devices:
        return f"it is not compared on {device}"
    if mode != "inference" and not peer.trains:
        return "it does not train"
    if peer.dtypes and dtype not in peer.dtypes:
        return f"it has no {dtype} networks on {device}"
    return None


def ratios(samples: Samples, names: Sequence[str]) -> dict[str, Any]:
    """Our variants over each of the others."""
    return {
        f"{ours}/{other}": compare(samples, ours, other)._asdict()
        for ours in names
        for other in names
        if ours in OURS and other not in OURS
    }


def as_module(name: str, model: nn.Module) -> nn.Module:
    """A channels_last network as one of torch's own peers runs it: the module to train or to call."""
    if name == "eager-contiguous":
        return model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if name == "compile":
        return torch.compile(model)  # type: ignore[return-value]
    if name == "compile-max-autotune":
        return torch.compile(model, mode="max-autotune")  # type: ignore[return-value]
    if name == "freeze":
        torch._inductor.config.freezing = True  # of the process, which has no other network
        return torch.compile(model)  # type: ignore[return-value]
    return model


def engine(name: str, model: nn.Module, images: Tensor, dtype: str) -> Callable[[], Tensor]:
    """A network as an inference engine runs it on these images: outputs at each call.

    Args:
        name (str): "onnxruntime", "openvino" or "torch-tensorrt"; :func:`why_missing` has no objection.
        model (nn.Module): stock, float32, in evaluation mode.
        images (Tensor): (N, C, H, W) float32, given to the engine in the layout that it takes, once.
        dtype (str): what it computes in.
    """
    return {"onnxruntime": _onnxruntime, "openvino": _openvino, "torch-tensorrt": _tensorrt}[name](model, images, dtype)


def _onnxruntime(model: nn.Module, images: Tensor, dtype: str) -> Callable[[], Tensor]:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # of its warnings none is about this network
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(_onnx(model, images), options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def _openvino(model: nn.Module, images: Tensor, dtype: str) -> Callable[[], Tensor]:
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype], "NUM_STREAMS": "1",
               "INFERENCE_NUM_THREADS": str(torch.get_num_threads())}  # fmt: skip
    compiled = core.compile_model(core.read_model(io.BytesIO(_onnx(model, images))), "CPU", options)
    request, data = compiled.create_infer_request(), images.contiguous().numpy()
    return lambda: torch.from_numpy(request.infer([data], share_inputs=True)[0])


def _onnx(model: nn.Module, images: Tensor) -> bytes:
    """The network as ONNX for images of this shape."""
    program = torch.onnx.export(model, (images.contiguous(),), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


def _tensorrt(model: nn.Module, images: Tensor, dtype: str) -> Callable[[], Tensor]:
    tensorrt = importlib.import_module("torch_tensorrt")
    wanted: Any = {torch.float32, getattr(torch, dtype)}
    compiled = tensorrt.compile(model, ir="dynamo", inputs=[images], enabled_precisions=wanted)
    return lambda: compiled(images)
