"""What a fused network asks of a GPU, shown without one: which operators it calls, and that nothing waits for a value.

The meta device stands for CUDA: like it, it has native units (their fakes) and no convolution kernels of ours, so a
step takes the same way through Python; and since meta tensors hold no values, a step that ends has read none.
"""

from collections import Counter

import pytest
import torch
from numerics import image
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import resfuse
from resfuse import backends, models, ops
from resfuse.bench.peers import import_torchvision

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
# what makes the host wait for a GPU
WAITS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
COPIES = {"aten::clone", "aten::copy_", "aten::_to_copy"}


class Calls(TorchDispatchMode):
    """Counts operators by name, and the activations that are copied for their layout's or dtype's sake."""

    def __init__(self):
        super().__init__()
        self.of, self.copied = Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split(".")[0]
        self.of[name] += 1
        if name in COPIES and args[0].dim() == 4:
            self.copied.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))

    def ours(self):
        return {name.removeprefix("resfuse::"): n for name, n in self.of.items() if name.startswith("resfuse::")}


@pytest.fixture
def gpu(monkeypatch):
    """The device that stands for a GPU with its native library."""
    monkeypatch.setitem(ops.missing_native, "meta", None)
    return torch.device("meta")


@pytest.fixture
def no_tiles(monkeypatch):
    """The CPU without convolution kernels, which is how CUDA is dispatched."""
    monkeypatch.setattr(ops, "tile_dtypes", frozenset())


def training_step(build, device, dtype, shape=(2, 3, 64, 64)):
    """The operators of one forward and backward, and the fused model."""
    with device:
        model = resfuse.fuse(build().to(dtype, memory_format=torch.channels_last), strict=True)
        x = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    with Calls() as calls:
        model(x).sum().backward()
    return calls, model


@DTYPES
def test_a_resnet50_trains_on_the_units(gpu, dtype):
    calls, model = training_step(models.resnet50, gpu, dtype)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    passes = len(norms) - 4 - 1  # projections are normalised in the pass that adds them, the stem where it is pooled
    assert calls.ours() == {
        "moments": len(norms),
        "finalize": len(norms),
        "finalize_backward": len(norms),
        "scale_shift_act": passes,
        "scale_shift_act_backward_reduce": passes,
        "scale_shift_act_backward_apply_": passes,
        "scale_shift_relu_maxpool": 1,
        "scale_shift_relu_maxpool_backward_reduce": 1,
        "scale_shift_relu_maxpool_backward_apply_": 1,
    }
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert calls.of["aten::convolution"] == calls.of["aten::convolution_backward"] == convolutions
    assert not [name for name in calls.of if "batch_norm" in name or "max_pool" in name or "relu" in name[:10]]
    for name, parameter in model.named_parameters():
        assert parameter.grad.shape == parameter.shape and parameter.grad.dtype == dtype, name


def test_no_activation_is_copied(no_tiles):
    """On the CPU: of convolutions' backwards, meta tensors do not know the layout."""
    calls, _ = training_step(models.resnet18, torch.device("cpu"), torch.float32)
    assert calls.ours()["scale_shift_act"] == 16
    assert calls.copied == [(2, 512, 2, 2)], "the gradient of the average, which is one value for a whole map"


@DTYPES
def test_inference_overwrites_what_the_convolutions_wrote(gpu, dtype):
    with gpu:
        model = resfuse.fuse(models.resnet18().to(dtype)).eval()
        x = torch.empty(2, 3, 64, 64, dtype=dtype)
    with torch.no_grad(), Calls() as calls:
        model(x)
    assert calls.ours() == {"finalize": 20, "scale_shift_act_": 16, "scale_shift_relu_maxpool": 1}


def test_torchvisions_networks_take_the_same_way(gpu):
    torchvision = import_torchvision().models
    theirs, ours = (training_step(m.resnet18, gpu, torch.float32)[0].of for m in (torchvision, models))
    assert theirs == ours


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_nothing_waits_for_a_value(no_tiles, autocast):
    """On the CPU, whose tensors could be read: the meta device would refuse, and knows no autocast."""
    model = resfuse.fuse(models.CifarResNet(8), strict=True)
    for bn, momentum in zip((m for m in model.modules() if isinstance(m, nn.BatchNorm2d)), (None, 0.0), strict=False):
        bn.momentum = momentum
    x = image((4, 3, 16, 16), layout="channels_last")
    with Calls() as calls:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            out = model(x)
        out.float().sum().backward()
    assert calls.ours()["scale_shift_act"] > 0
    assert not WAITS & calls.of.keys()


@DTYPES
def test_the_rules_for_cuda(monkeypatch, dtype):
    monkeypatch.setitem(ops.missing_native, "cuda", None)
    for unit in backends._UNITS:
        assert backends.choose(unit, "cuda", dtype) == "native"
    monkeypatch.setitem(ops.missing_triton, "cuda", "Triton is not installed")
    assert "convolution kernels for cuda: Triton is not" in backends.why_not_raw("cuda", dtype)
    monkeypatch.setitem(ops.missing_triton, "cuda", None)
    assert (backends.why_not_raw("cuda", dtype) is None) == (dtype != torch.float64)
    assert "convolution kernels for cuda" in backends.why_not_raw("cuda", dtype, requested="native")
    monkeypatch.setitem(ops.missing_triton, "cuda", "Triton is not installed")
    monkeypatch.setitem(ops.missing_native, "cuda", "the CUDA library was not built")
    assert backends.choose("bn_act", "cuda", dtype) == "reference"
    with pytest.raises(RuntimeError, match="'native' does not serve bn_act on cuda: the CUDA library was not built"):
        backends.choose("bn_act", "cuda", dtype, "native")


def on_cuda(model):
    """The model's tensors as fake ones on a GPU."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in [(name, t) for name, t in tensors.items() if t is not None]:
                order = torch.channels_last if t.dim() == 4 else torch.contiguous_format
                fake = torch.empty(t.shape, dtype=t.dtype, device="cuda:0", memory_format=order)
                tensors[name] = nn.Parameter(fake) if isinstance(t, nn.Parameter) else fake
    return model


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the real device is tested")
def test_explain_and_forward_of_a_model_on_cuda(monkeypatch):
    with FakeTensorMode(), torch.no_grad():
        model = resfuse.fuse(on_cuda(models.resnet18()))
        monkeypatch.setitem(ops.missing_native, "cuda", "test")
        reasons = {block.reason for block in resfuse.explain(model).blocks}
        assert reasons == {"no backend serves torch.float32 on cuda: test"}
        monkeypatch.setitem(ops.missing_native, "cuda", None)
        blocks = resfuse.explain(model).blocks
        assert all(block.fused for block in blocks) and "for cuda" in blocks[1].convolutions
        with Calls() as calls:
            out = model(torch.empty(2, 3, 64, 64, device="cuda:0", memory_format=torch.channels_last))
    assert (out.device, out.shape) == (torch.device("cuda:0"), (2, 1000))
    assert calls.ours() == {"moments": 20, "finalize": 20, "scale_shift_act_": 16, "scale_shift_relu_maxpool": 1}
