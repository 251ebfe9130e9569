"""What fold refuses, and that the error names the module."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import resfuse
from resfuse.models.cifar import CifarResNet


def _network():
    return CifarResNet(8).eval()


def test_a_module_in_training_mode():
    with pytest.raises(ValueError, match=r"the model is in training mode: call model.eval\(\) before fold"):
        resfuse.fold(CifarResNet(8))
    model = _network()
    model.layer2[0].bn1.train()
    with pytest.raises(ValueError, match=r"layer2.0.bn1 is in training mode"):
        resfuse.fold(model)


def test_missing_running_statistics():
    model = _network()
    model.layer1[0].bn2 = nn.BatchNorm2d(16, track_running_stats=False).eval()
    with pytest.raises(ValueError, match=r"layer1.0.bn2 has no running statistics"):
        resfuse.fold(model)


@pytest.mark.parametrize("name", ["layer1.0.conv1", "bn1", "layer3", "fc", "relu", ""])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_a_hook(name, kind):
    model = _network()
    handle = getattr(model.get_submodule(name), kind)(lambda *args: None)
    with pytest.raises(ValueError, match=rf"{name or 'the model'} has a hook, which folding would drop"):
        resfuse.fold(model)
    handle.remove()
    resfuse.fold(model)


def test_a_parametrization():
    model = _network()
    parametrizations.weight_norm(model.layer1[0].conv2).eval()
    with pytest.raises(ValueError, match=r"layer1.0.conv2 has a parametrization.*remove_parametrizations"):
        resfuse.fold(model)


def test_a_forward_of_its_own():
    model = _network()
    model.layer1[0].conv1.forward = torch.relu
    with pytest.raises(ValueError, match=r"layer1.0.conv1 has its own forward"):
        resfuse.fold(model)


def test_a_hook_on_a_module_that_stays_stock_is_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)).eval()
    model[1].register_forward_hook(lambda module, inputs, out: out + 1)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(resfuse.fold(model)(x), model(x))


def test_a_convolution_shared_by_two_normalisations():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), conv, nn.BatchNorm2d(4)).eval()
    with pytest.raises(ValueError, match=r"0 is called twice, followed by 1 and 4: its weight folds with one only"):
        resfuse.fold(model)
    alone = nn.Sequential(conv, nn.ReLU(), conv, nn.BatchNorm2d(4)).eval()
    with pytest.raises(ValueError, match=r"0 is called twice, followed by no normalisation and 3"):
        resfuse.fold(alone)


def test_a_block_that_is_called_twice_folds():
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    nn.init.uniform_(block[1].running_mean)
    model = nn.Sequential(block, block).eval()
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(resfuse.fold(model)(x), model(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["running_mean", "running_var", "weight"])
def test_weights_that_are_not_finite(value, tensor):
    model = _network()
    with torch.no_grad():
        getattr(model.layer1[0].bn2, tensor)[3] = value
    if (tensor, value) == ("running_var", float("inf")):  # the channel is switched off
        assert resfuse.fold(model)(torch.randn(1, 3, 32, 32)).isfinite().all()
        return
    with pytest.raises(ValueError, match=r"layer1.0.conv2 folds with layer1.0.bn2.* NaN or infinite in torch.float32"):
        resfuse.fold(model)


def test_weights_that_overflow_the_asked_dtype():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).eval()
    nn.init.constant_(model[1].running_var, 1e-10)
    nn.init.constant_(model[1].weight, 1e6)
    nn.init.constant_(model[0].weight, 1e3)
    with pytest.raises(ValueError, match=r"0 folds with 1 to a weight of which 1 values are NaN or infinite in .*16"):
        resfuse.fold(model, torch.float16)
    assert resfuse.fold(model, torch.bfloat16).dtype == torch.bfloat16


def test_a_network_that_takes_more_than_one_tensor():
    class Pair(nn.Module):
        def forward(self, x, y):
            return x + y

    class Sum(nn.Module):
        def forward(self, images):
            return torch.stack(list(images)).sum(0)

    with pytest.raises(TypeError, match=r"Pair.forward\(x, y\) cannot be called with one tensor .*fold its parts"):
        resfuse.fold(Pair().eval())
    with pytest.raises(TypeError, match=r"x must be a tensor, got list"):
        resfuse.fold(Sum().eval())([torch.ones(2)])


def test_an_input_on_another_device():
    folded = resfuse.fold(_network())
    x = torch.randn(1, 3, 32, 32)
    for _ in range(2):  # not yet prepared, and prepared
        with pytest.raises(RuntimeError, match=r"x must be on cpu, where the network is, got meta"):
            folded(x.to("meta"))
        folded(x)


def test_arguments():
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got builtin"):
        resfuse.fold(torch.relu)
    with pytest.raises(TypeError, match=r"dtype must be one of torch.float16, .* got torch.int8"):
        resfuse.fold(_network(), torch.int8)
    with pytest.raises(ValueError, match=r"backend must be one of .*reference or None, got 'magic'"):
        resfuse.fold(_network(), backend="magic")
    with pytest.raises(RuntimeError, match=r"backend='onednn' does not serve this network: .*float64"):
        resfuse.fold(_network().double(), backend="onednn")
    for layout in ("channels_last", torch.float32):
        with pytest.raises(TypeError, match=r"memory_format must be a torch.memory_format, got"):
            resfuse.fold(_network(), memory_format=layout)
    for layout in (torch.preserve_format, torch.channels_last_3d):
        with pytest.raises(ValueError, match=r"memory_format must be .*, got torch.(preserve_format|channels_last_3d)"):
            resfuse.fold(_network(), memory_format=layout)
    model = resfuse.models.resnet.BasicBlock(4, 4).eval()
    model.relu = None
    del model._modules["relu"]
    model.relu = torch.relu
    with pytest.raises(TypeError, match=r"relu must be an nn.Module to be folded, got builtin_function_or_method"):
        resfuse.fold(model)
