"""What can be shown of the CUDA engine without a GPU: its candidates' arithmetic and its choice among them."""

import pytest
import torch
from folded import settle

import resfuse
from resfuse import backends
from resfuse.folding.engines import cuda
from resfuse.folding.plan import Convolution
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
