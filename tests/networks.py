"""What tests of networks share: states compared and copied, parameters moved away from their start, torchvision."""

import pytest
import torch

from resfuse.bench.peers import import_torchvision


def torchvision_models():
    """torchvision.models, or a skip."""
    try:
        return import_torchvision().models
    except ImportError:
        pytest.skip("torchvision is not installed")


def assert_same_state(actual, expected):
    assert list(actual) == list(expected)
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


def snapshot(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def randomise(model):
    """Move biases, norms and statistics away from their initial values, so that no term of the network is trivial."""
    for tensor in model.state_dict().values():
        if tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
    return model


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())
