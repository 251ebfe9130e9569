"""The operators: schemas, output shapes for fake tensors, handles, and the loading of the compiled libraries.

An operator's name is its mathematics, its overload the backend: the default overload is native (C++ on the CPU key,
CUDA C++ on the CUDA key), `.triton` is Triton's. Operators are private. Called with tensors that require gradients they
give none; :mod:`resfuse.autograd` stands around them. `relu` chooses the activation: ReLU, or the identity.

Per-channel vectors are float32, or float64 beside float64 activations, except those that belong to the user (weight,
bias, running statistics), which keep their own dtype.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

SCHEMAS = (
    "add_relu(Tensor x, Tensor residual) -> Tensor",
    "add_relu_backward(Tensor grad_out, Tensor out) -> Tensor",
    "moments(Tensor x) -> (Tensor mean, Tensor var)",
    "moments_backward(Tensor grad_mean, Tensor grad_var, Tensor x, Tensor mean) -> Tensor",
    "finalize(Tensor mean, Tensor var, SymInt count, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps) "
    "-> (Tensor scale, Tensor shift)",
    "finalize_backward(Tensor grad_centered, Tensor grad_shift, Tensor var, Tensor? weight, float eps) "
    "-> (Tensor grad_mean, Tensor grad_var, Tensor grad_weight)",
    "scale_shift_act(Tensor x, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale, "
    "Tensor? residual_shift, bool relu) -> Tensor",
    "scale_shift_act_(Tensor(a!) x, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale, "
    "Tensor? residual_shift, bool relu) -> ()",
    "scale_shift_act_moments(Tensor x, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale, "
    "Tensor? residual_shift, bool relu) -> (Tensor out, Tensor mean, Tensor var)",
    "scale_shift_act_backward_reduce(Tensor grad_out, Tensor x, Tensor scale, Tensor shift, Tensor mean, "
    "Tensor? raw_residual, Tensor? residual_scale, Tensor? residual_shift, Tensor? residual_mean, Tensor? out, "
    "bool relu) -> (Tensor sums, Tensor dz)",
    "scale_shift_act_backward_apply(Tensor grad_out, Tensor x, Tensor scale, Tensor shift, Tensor mean, "
    "Tensor? grad_mean, Tensor? grad_var, Tensor? raw_residual, Tensor? residual_scale, Tensor? residual_shift, "
    "Tensor? residual_mean, Tensor? residual_grad_mean, Tensor? residual_grad_var, bool relu) "
    "-> (Tensor grad_x, Tensor grad_residual)",
    "scale_shift_act_backward_apply_(Tensor grad_out, Tensor(a!) x, Tensor scale, Tensor shift, Tensor mean, "
    "Tensor? grad_mean, Tensor? grad_var, Tensor(b!)? raw_residual, Tensor? residual_scale, Tensor? residual_shift, "
    "Tensor? residual_mean, Tensor? residual_grad_mean, Tensor? residual_grad_var, bool relu) -> ()",
    "scale_shift_relu_maxpool(Tensor x, Tensor scale, Tensor shift, int[2] kernel_size, int[2] stride, int[2] padding) "
    "-> (Tensor out, Tensor indices)",
    "scale_shift_relu_maxpool_backward_reduce(Tensor grad_out, Tensor indices, Tensor x, Tensor scale, Tensor shift, "
    "Tensor mean, int[2] kernel_size, int[2] stride, int[2] padding) -> Tensor sums",
    "scale_shift_relu_maxpool_backward_apply(Tensor grad_out, Tensor indices, Tensor x, Tensor scale, Tensor shift, "
    "Tensor mean, Tensor? grad_mean, Tensor? grad_var, int[2] kernel_size, int[2] stride, int[2] padding) "
    "-> Tensor grad_x",
    "scale_shift_relu_maxpool_backward_apply_(Tensor grad_out, Tensor indices, Tensor(a!) x, Tensor scale, "
    "Tensor shift, Tensor mean, Tensor? grad_mean, Tensor? grad_var, int[2] kernel_size, int[2] stride, "
    "int[2] padding) -> ()",
    "tile_kernels(Tensor like) -> (int, int)",
    "conv_stats(Tensor x, Tensor? affine, Tensor? mean, Tensor weight, bool relu, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, bool moments) -> (Tensor y, Tensor y_mean, Tensor y_var)",
    "conv_stats_backward(Tensor grad_y, Tensor? y, Tensor? y_affine, Tensor? y_mean, Tensor? grad_mean, "
    "Tensor? grad_var, bool y_relu, Tensor x, Tensor? affine, Tensor? mean, Tensor weight, bool relu, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, Tensor? other, bool need_x, bool need_weight) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor sums)",
    "conv_stats_backward_(Tensor grad_y, Tensor? y, Tensor? y_affine, Tensor? y_mean, Tensor? grad_mean, "
    "Tensor? grad_var, bool y_relu, Tensor x, Tensor? affine, Tensor? mean, Tensor weight, bool relu, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, Tensor(a!) other, bool need_weight) "
    "-> (Tensor grad_weight, Tensor sums)",
    "conv_act(Tensor x, Tensor? affine, Tensor? mean, bool relu_x, Tensor weight, Tensor? scale, Tensor shift, "
    "Tensor? residual, Tensor? residual_affine, Tensor? residual_mean, Tensor? branch, Tensor? branch_weight, "
    "int[2] branch_stride, bool relu, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "bool moments) "
    "-> (Tensor out, Tensor out_mean, Tensor out_var)",
    "second_moments(Tensor x, Tensor? affine, Tensor? mean, bool relu, int[2] stride) "
    "-> (Tensor a_mean, Tensor covariance)",
    "expand_bn_act_backward_weight(Tensor grad_out, Tensor? out, Tensor x, Tensor? affine, Tensor? mean, bool relu) "
    "-> (Tensor dz, Tensor product, Tensor sums)",
    "expand_bn_act_backward_weight_(Tensor(a!) grad_out, Tensor? out, Tensor x, Tensor? affine, Tensor? mean, "
    "bool relu) -> (Tensor product, Tensor sums)",
    "expand_bn_act_backward_input(Tensor dz, Tensor x, Tensor? affine, Tensor? mean, bool relu, Tensor weight, "
    "Tensor correction, Tensor row, int[2] stride) -> (Tensor grad_x, Tensor sums)",
    "folded_moments(Tensor weight, Tensor a_mean, Tensor covariance) -> (Tensor mean, Tensor var)",
    "folded_weight(Tensor weight, Tensor scale, Tensor? bias, Tensor a_mean, Tensor like) "
    "-> (Tensor folded, Tensor shift)",
    "folded_weight_backward(Tensor gram, Tensor grad_bias, Tensor weight, Tensor a_mean, Tensor covariance, "
    "Tensor var, Tensor scale, SymInt pixels, float eps, Tensor like, bool need_x, bool need_weight) "
    "-> (Tensor grad_weight_bn, Tensor grad_weight, Tensor folded, Tensor correction, Tensor row)",
    "pack_weight(Tensor weight, int groups) -> Tensor",
    "run_plan(Tensor[] inputs, Tensor[] constants, int[] program, int[] sizes) -> Tensor[]",
)

_library = torch.library.Library("resfuse", "DEF")
for _schema in SCHEMAS:
    for _overload in (_schema, _schema.replace("(", ".triton(", 1)):
        _library.define(_overload, tags=(torch.Tag.pt2_compliant_tag,))


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of per-channel vectors beside activations of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _vector(x: Tensor, *shape: int | torch.SymInt) -> Tensor:
    return x.new_empty(shape, dtype=accumulate_dtype(x.dtype))


def _channels(x: Tensor) -> Tensor:
    return _vector(x, x.shape[1])


def _fake_finalize(mean: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _vector(mean, mean.shape[0]), _vector(mean, mean.shape[0])


def _fake_finalize_backward(
    grad_centered: Tensor, grad_shift: Tensor, var: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    grad_mean, grad_var, grad_weight = (_vector(grad_shift, var.shape[0]) for _ in range(3))
    return grad_mean, grad_var, grad_weight


def _fake_reduce(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, *rest
) -> tuple[Tensor, Tensor]:
    raw_residual, out, relu = rest[3], rest[-2], rest[-1]
    sums = _vector(x, 2 if raw_residual is None else 3, x.shape[1])
    return sums, torch.empty_like(x) if relu and out is not None else x.new_empty(0)


def _fake_apply(grad_out: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    raw_residual = rest[5]
    return torch.empty_like(x), x.new_empty(0) if raw_residual is None else torch.empty_like(x)


def _pooled(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """A pooled activation: channels_last where x is that and not contiguous too."""
    size = [(x.shape[2 + i] + 2 * padding[i] - kernel_size[i]) // stride[i] + 1 for i in (0, 1)]
    order = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=order)


def _fake_pool(x: Tensor, scale: Tensor, shift: Tensor, *window: Sequence[int]) -> tuple[Tensor, Tensor]:
    out = _pooled(x, *window)
    return out, torch.empty_like(out, dtype=torch.uint8)


def _convolved(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    spatial = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    shape = (x.shape[0], weight.shape[0], *spatial)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_conv_stats(
    x: Tensor,
    affine: Any,
    mean: Any,
    weight: Tensor,
    relu: bool,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    size = weight.shape[0] if moments else 0
    return _convolved(x, weight, stride, padding, dilation), _vector(x, size), _vector(x, size)


def _fake_conv_stats_backward(grad_y: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, affine, weight, need_x, need_weight = rest[6], rest[7], rest[9], rest[-2], rest[-1]
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    grad_weight = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    return grad_x, grad_weight, _vector(x, 2, x.shape[1]) if need_x and affine is not None else _vector(x, 0)


def _fake_conv_stats_backward_(grad_y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_conv_stats_backward(grad_y, *rest[:-1], True, rest[-1])[1:]


def _fake_conv_act(
    x: Tensor, affine: Any, mean: Any, relu_x: bool, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    size = weight.shape[0] if rest[-1] else 0
    return _convolved(x, weight, *rest[-5:-2]), _vector(x, size), _vector(x, size)


def _fake_expand_weight(grad_out: Tensor, out: Any, x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(grad_out), _vector(x, grad_out.shape[1], x.shape[1]), _channels(grad_out)


def _fake_folded_weight_backward(
    gram: Tensor, grad_bias: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (rows, columns), (like, need_x, need_weight) = weight.shape, rest[-3:]
    return (
        weight.new_empty(rows),
        weight.new_empty(rows if need_weight else 0, columns),
        like.new_empty(rows if need_x else 0, columns),
        weight.new_empty(columns if need_x else 0, columns),
        weight.new_empty(columns if need_x else 0),
    )


def _fake_pack_weight(weight: Tensor, groups: int) -> Tensor:
    """Strips of two vectors, or of one where that makes the window of channels that a strip's groups read shorter."""
    lanes, depth, *kernel = weight.shape
    own, unit = lanes // groups, 4 // weight.dtype.itemsize

    def strips(width: int) -> tuple[int, int]:
        windows = [(i // own * depth, ((min(i + width, lanes) - 1) // own + 1) * depth) for i in range(0, lanes, width)]
        return max(-(-end // unit) - begin // unit for begin, end in windows), len(windows) * width

    units, width = min((strips(2 * tile_lanes), strips(tile_lanes)), key=lambda form: form[0])
    return weight.new_empty(units * width * unit * kernel[0] * kernel[1])


def _fake_run_plan(inputs: Sequence[Tensor], constants: Any, program: Any, sizes: Sequence[int]) -> list[Tensor]:
    shapes = (sizes[i : i + 4] for i in range(0, len(sizes), 4))
    return [inputs[0].new_empty(shape).to(memory_format=torch.channels_last) for shape in shapes]


_FAKES: dict[str, Callable[..., Any]] = {
    "add_relu": lambda x, residual: torch.empty_like(x),
    "add_relu_backward": lambda grad_out, out: torch.empty_like(out),
    "moments": lambda x: (_channels(x), _channels(x)),
    "moments_backward": lambda grad_mean, grad_var, x, mean: torch.empty_like(x),
    "finalize": _fake_finalize,
    "finalize_backward": _fake_finalize_backward,
    "scale_shift_act": lambda x, *_: torch.empty_like(x),
    "scale_shift_act_": lambda *_: None,
    "scale_shift_act_moments": lambda x, *_: (torch.empty_like(x), _channels(x), _channels(x)),
    "scale_shift_act_backward_reduce": _fake_reduce,
    "scale_shift_act_backward_apply": _fake_apply,
    "scale_shift_act_backward_apply_": lambda *_: None,
    "scale_shift_relu_maxpool": _fake_pool,
    "scale_shift_relu_maxpool_backward_reduce": lambda grad_out, indices, x, *_: _vector(x, 2, x.shape[1]),
    "scale_shift_relu_maxpool_backward_apply": lambda grad_out, indices, x, *_: torch.empty_like(x),
    "scale_shift_relu_maxpool_backward_apply_": lambda *_: None,
    "tile_kernels": lambda like: (0, 0),
    "conv_stats": _fake_conv_stats,
    "conv_stats_backward": _fake_conv_stats_backward,
    "conv_stats_backward_": _fake_conv_stats_backward_,
    "conv_act": _fake_conv_act,
    "second_moments": lambda x, *_: (_channels(x), _vector(x, x.shape[1], x.shape[1])),
    "expand_bn_act_backward_weight": _fake_expand_weight,
    "expand_bn_act_backward_weight_": lambda *arguments: _fake_expand_weight(*arguments)[1:],
    "expand_bn_act_backward_input": lambda dz, x, affine, *_: (
        torch.empty_like(x),
        _vector(x, 0) if affine is None else _vector(x, 2, x.shape[1]),
    ),
    "folded_moments": lambda weight, *_: (weight.new_empty(weight.shape[0]), weight.new_empty(weight.shape[0])),
    "folded_weight": lambda weight, scale, bias, a_mean, like: (
        like.new_empty(weight.shape),
        weight.new_empty(weight.shape[0]),
    ),
    "folded_weight_backward": _fake_folded_weight_backward,
    "pack_weight": _fake_pack_weight,
    "run_plan": _fake_run_plan,
}
for _name, _fake in _FAKES.items():
    for _overload in (_name, f"{_name}.triton"):
        torch.library.register_fake(f"resfuse::{_overload}", _fake, lib=_library)


def _load_native() -> str | None:
    """Load the C++ library; return why it could not be loaded, or None."""
    spec = importlib.util.find_spec("resfuse._C")
    if spec is None or spec.origin is None:
        return "the C++ library was not built (it needs a C++17 compiler at install time)"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"the C++ library does not load: {error}"
    return None


def _load_cuda() -> str | None:
    """Load the CUDA library; return why it could not be loaded, or None."""
    path = Path(__file__).with_name("_cuda.so")
    if not path.is_file():
        return "the CUDA library was not built (it needs nvcc, found through CUDA_HOME, at install time)"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the CUDA library does not load: {error}"
    return None


def _load_triton(device: str) -> str | None:
    """Register Triton's kernels for a kind of device; return why there are none, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cpu" and not interpreted:
        return "Triton compiles for GPUs (with TRITON_INTERPRET=1 its interpreter runs the kernels, slowly)"
    if device == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built without CUDA"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        from resfuse._triton import LAUNCHERS
    except ImportError as error:
        return f"Triton's kernels do not load: {error}"
    for name, launcher in LAUNCHERS.items():
        _library.impl(f"{name}.triton", _on_its_device(launcher) if device == "cuda" else launcher, device.upper())
    return None


def _on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device: here, that of the first operand. Native kernels see to it themselves."""

    @functools.wraps(launcher)
    def call(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):
            return launcher(first, *rest)

    return call


# Why a native library is missing; None where it is loaded. Keys are device types.
missing_native: dict[str, str | None] = {"cpu": _load_native(), "cuda": _load_cuda()}
# The same for Triton's kernels.
missing_triton: dict[str, str | None] = {device: _load_triton(device) for device in ("cpu", "cuda")}

_ops = torch.ops.resfuse
_overloads = {
    backend: SimpleNamespace(**{name: getattr(getattr(_ops, name), overload) for name in _FAKES})
    for backend, overload in (("native", "default"), ("triton", "triton"))
}


def of(backend: str) -> Any:
    """The operators of a backend, "native" or "triton", by name: of("triton").add_relu is resfuse::add_relu.triton."""
    return _overloads[backend]


# native handles
add_relu = _ops.add_relu.default
add_relu_backward = _ops.add_relu_backward.default
moments = _ops.moments.default
moments_backward = _ops.moments_backward.default
finalize = _ops.finalize.default
finalize_backward = _ops.finalize_backward.default
scale_shift_act = _ops.scale_shift_act.default
scale_shift_act_ = _ops.scale_shift_act_.default
scale_shift_act_moments = _ops.scale_shift_act_moments.default
scale_shift_act_backward_reduce = _ops.scale_shift_act_backward_reduce.default
scale_shift_act_backward_apply = _ops.scale_shift_act_backward_apply.default
scale_shift_act_backward_apply_ = _ops.scale_shift_act_backward_apply_.default
scale_shift_relu_maxpool = _ops.scale_shift_relu_maxpool.default
scale_shift_relu_maxpool_backward_reduce = _ops.scale_shift_relu_maxpool_backward_reduce.default
scale_shift_relu_maxpool_backward_apply = _ops.scale_shift_relu_maxpool_backward_apply.default
scale_shift_relu_maxpool_backward_apply_ = _ops.scale_shift_relu_maxpool_backward_apply_.default
tile_kernels = _ops.tile_kernels.default
_sizes = {
    dtype: (0, 0) if missing_native["cpu"] else tile_kernels(torch.empty(0, dtype=dtype, device="cpu"))
    for dtype in (torch.float32, torch.bfloat16)
}
# The dtypes for which this machine has tile kernels, convolutions with a prologue and an epilogue, and what those
# multiply: without AVX512_BF16, bfloat16 as float32.
tile_operands: dict[torch.dtype, torch.dtype] = {
    dtype: dtype if size == dtype.itemsize else torch.float32 for dtype, (size, _) in _sizes.items() if size
}
tile_dtypes = frozenset(tile_operands)
# The channels of a vector: 16 of AVX-512, 8 of AVX2; 0 where there are no tile kernels.
tile_lanes: int = _sizes[torch.float32][1]
conv_stats = _ops.conv_stats.default
conv_stats_backward = _ops.conv_stats_backward.default
conv_stats_backward_ = _ops.conv_stats_backward_.default
conv_act = _ops.conv_act.default
second_moments = _ops.second_moments.default
pack_weight = _ops.pack_weight.default
run_plan = _ops.run_plan.default
expand_bn_act_backward_weight = _ops.expand_bn_act_backward_weight.default
expand_bn_act_backward_weight_ = _ops.expand_bn_act_backward_weight_.default
expand_bn_act_backward_input = _ops.expand_bn_act_backward_input.default
folded_moments = _ops.folded_moments.default
folded_weight = _ops.folded_weight.default
folded_weight_backward = _ops.folded_weight_backward.default
