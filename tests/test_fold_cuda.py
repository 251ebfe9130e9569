"""What can be shown of the CUDA engine without a GPU: its candidates' arithmetic and its choice among them."""

import contextlib

import pytest
import torch
from folded import settle

import resfuse
from resfuse import backends
from resfuse.folding.engines import cuda, reference
from resfuse.folding.plan import Convolution, Plan
from resfuse.models.cifar import CifarResNet

needs_native = pytest.mark.skipif(
    backends.missing("bn_act", "native", "cpu", torch.float32) is not None, reason="the native library is missing"
)


@needs_native
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_a_convolution_and_one_pass_are_the_step(activation, residual):
    step = Convolution(0, 1, weight="w", bias="b", stride=(2, 1), padding=(1, 2), groups=4, activation=activation,
                       residual=2 if residual else None)  # fmt: skip
    x, weight = torch.randn(2, 8, 9, 7), torch.randn(16, 2, 3, 5)
    inputs = [x] + [torch.randn(2, 16, 5, 7)] * residual
    found = cuda.candidates(step, {"w": weight, "b": torch.randn(16)})
    assert {"plain", "pass"} <= found.keys() and "cudnn" not in found  # that one needs a GPU
    torch.testing.assert_close(found["pass"](*inputs), found["plain"](*inputs), atol=1e-5, rtol=1e-5)


def test_other_activations_and_missing_biases_are_plain():
    tensors = {"w": torch.randn(4, 4, 1, 1), "b": torch.randn(4)}
    assert list(cuda.candidates(Convolution(0, 1, weight="w", bias="b", activation="silu"), tensors)) == ["plain"]
    assert list(cuda.candidates(Convolution(0, 1, weight="w"), tensors)) == ["plain"]


def test_the_fastest_that_works_is_chosen():
    def refuse(x):
        raise RuntimeError("no engine for this shape")

    found = {"plain": lambda x: x, "cudnn": refuse, "pass": lambda x: x + 0}

    def seconds(run, inputs):
        run(*inputs)
        return {found["plain"]: 3.0, found["pass"]: 2.0}[run]

    assert cuda.fastest(found, [torch.zeros(1)], seconds) is found["pass"]
    found["plain"] = refuse
    with pytest.raises(RuntimeError, match="no engine for this shape"):
        cuda.fastest(found, [torch.zeros(1)], seconds)


def test_each_shape_has_kernels_of_its_own(monkeypatch):
    """Measured once when it comes, then captured; past the last, those of the first shape, as they are."""
    steps = (
        Convolution(0, 1, weight="w", bias="b", activation="relu"),
        Convolution(1, 2, weight="w", bias="b", residual=1, activation="relu"),
    )
    tensors = {"w": torch.randn(4, 4, 1, 1), "b": torch.randn(4)}
    measured, captured, capturing = [], [], False

    def seconds(run, inputs):
        measured.append(inputs[0].shape[2])
        return 1.0

    def capture(run, x):
        captured.append(x.shape[2])
        return lambda x: (captured.append("replayed"), run(x))[1]

    monkeypatch.setattr(cuda, "_device_seconds", seconds)
    monkeypatch.setattr(cuda, "_Graph", capture)
    monkeypatch.setattr(cuda, "_MAX_SHAPES", 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    images = {size: torch.randn(2, 4, size, size) for size in (5, 7, 9)}
    wanted = {size: reference.run(Plan(steps, 2), tensors, {}, x) for size, x in images.items()}
    run, first = cuda.prepare(Plan(steps, 2), tensors, {}, images[5])
    torch.testing.assert_close(first, wanted[5])
    for size in (7, 5, 7, 9):
        torch.testing.assert_close(run(images[size]), wanted[size])
    capturing = True  # by the caller: nothing is measured or replayed
    for size in (5, 9):
        torch.testing.assert_close(run(images[size]), wanted[size])
    assert sorted(set(measured)) == [5, 7] and measured.count(5) == measured.count(7)
    assert captured == [5, 7, "replayed", "replayed"]


def test_the_engine_serves_no_cpu():
    model = settle(CifarResNet(8), torch.randn(2, 3, 32, 32))
    with pytest.raises(RuntimeError, match="backend='cuda' does not serve this network: it computes on NVIDIA GPUs"):
        resfuse.fold(model, backend="cuda")


def test_torch_has_the_operators_that_the_engine_calls():
    relu = torch.ops.aten.cudnn_convolution_relu.default._schema
    add = torch.ops.aten.cudnn_convolution_add_relu.default._schema
    assert [a.name for a in relu.arguments] == ["self", "weight", "bias", "stride", "padding", "dilation", "groups"]
    assert [a.name for a in add.arguments][:5] == ["self", "weight", "z", "alpha", "bias"]
    names = [a.name for a in torch.ops.resfuse.conv_act.default._schema.arguments]
    assert names[:8] == ["x", "affine", "mean", "relu_x", "weight", "scale", "shift", "residual"]
    assert names[8:] == ["residual_affine", "residual_mean", "branch", "branch_weight", "branch_stride", "relu",
                         "stride", "padding", "dilation", "groups", "moments"]  # fmt: skip
