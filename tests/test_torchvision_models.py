"""The networks that torchvision has too: the same keys, bits and outputs, and checkpoints both ways."""

from functools import partial

import pytest
import torch
from networks import assert_same_state, randomise, torchvision_models
from torch import nn

from resfuse.models import get_model

NAMES = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
    *("vgg16_bn", "vgg19_bn", "densenet121"),
)

VARIANTS = [
    pytest.param("resnet18", {}, id="18"),
    pytest.param("resnet18", {"zero_init_residual": True}, id="18-zero"),
    pytest.param("resnet18", {"norm_layer": partial(nn.GroupNorm, 4)}, id="18-groupnorm"),
    pytest.param("resnet50", {}, id="50"),
    pytest.param("resnet50", {"groups": 32, "width_per_group": 4}, id="50-grouped"),
    pytest.param("resnet50", {"zero_init_residual": True}, id="50-zero"),
    pytest.param("densenet121", {}, id="dense"),
    pytest.param("resnet50", {"replace_stride_with_dilation": [False, True, True]}, id="50-dilated"),
]


@pytest.mark.parametrize(("name", "options"), [*VARIANTS, pytest.param("vgg16_bn", {}, id="vgg")])
def test_same_seed_gives_torchvisions_bits(name, options):
    torch.manual_seed(0)
    ours = get_model(name, **options)
    our_next_draw = torch.rand(3)
    torch.manual_seed(0)
    theirs = getattr(torchvision_models(), name)(**options)
    assert torch.equal(our_next_draw, torch.rand(3))
    assert_same_state(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_checkpoints_move_both_ways_and_outputs_are_equal(name, options):
    torch.manual_seed(0)
    theirs = randomise(getattr(torchvision_models(), name)(num_classes=10, **options))
    ours = get_model(name, weights=theirs.state_dict(), num_classes=10, **options)
    x = torch.randn(2, 3, 64, 64)
    for training in (False, True):
        out, expected = ours.train(training)(x), theirs.train(training)(x)
        assert expected.std() > 0
        assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in ours.named_parameters()}
    assert_same_state(gradients, {key: parameter.grad for key, parameter in theirs.named_parameters()})
    assert_same_state(ours.state_dict(), theirs.state_dict())

    torch.manual_seed(3)
    theirs.load_state_dict(get_model(name, num_classes=10, **options).state_dict(), strict=True)
    assert not torch.equal(next(ours.parameters()), next(theirs.parameters()))


def with_values(model):
    """The model, built on the meta device, in memory and with weights that are cheap to draw and keep signals alive."""
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        if tensor.dim() > 1:
            bound = (6 / tensor[0].numel()) ** 0.5
            tensor.uniform_(-bound, bound)
        elif tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.zero_()
    return model


@pytest.mark.parametrize("name", NAMES)
def test_every_network_is_torchvisions(name):
    with torch.device("meta"):
        ours, theirs = get_model(name), getattr(torchvision_models(), name)()
    with_values(theirs)
    buffers = {key: buffer.clone() for key, buffer in theirs.named_buffers()}
    ours.load_state_dict({**theirs.state_dict(), **buffers}, strict=True, assign=True)  # shares the weights' memory
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for training in (False, True):
            outputs = []
            for model in (ours, theirs):
                torch.manual_seed(3)  # of dropout
                outputs.append(model.train(training)(x))
            assert outputs[1].std() > 0
            assert torch.equal(*outputs)
    assert_same_state(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    assert all(tensor == 1 for key, tensor in ours.named_buffers() if key.endswith("num_batches_tracked"))
