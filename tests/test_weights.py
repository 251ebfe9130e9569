"""Checkpoints of resfuse.models: read whole or refused with what is wrong, and the model is then as it was."""

import sys

import pytest
import torch
from networks import assert_same_state, randomise, snapshot
from torch import nn

from resfuse.models import CifarResNet, get_model
from resfuse.models.weights import load_weights


@pytest.fixture
def tiny():
    torch.manual_seed(1)
    return CifarResNet(8)


def save(state, path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".PTH", ".safetensors"])
def test_file_round_trip(tmp_path, suffix):
    source = randomise(get_model("cifar_resnet20", in_channels=1))
    path = tmp_path / f"weights{suffix}"
    save(source.state_dict(), path)
    model = get_model("cifar_resnet20", weights=path if suffix == ".pth" else str(path), in_channels=1)
    assert_same_state(model.state_dict(), source.state_dict())
    assert model(torch.randn(2, 1, 29, 31)).shape == (2, 10)


def test_weights_are_copied_and_keep_the_models_dtype(tiny):
    other = CifarResNet(8)
    state = {key: nn.Parameter(tensor.double(), requires_grad=False) for key, tensor in snapshot(tiny).items()}
    load_weights(other, state)
    state["conv1.weight"].zero_()
    assert other.conv1.weight.dtype == torch.float32
    assert_same_state(other.state_dict(), tiny.state_dict())


def test_checkpoint_without_batch_counters_loads(tiny):
    state = {key: tensor for key, tensor in tiny.state_dict().items() if "num_batches_tracked" not in key}
    other = CifarResNet(8)
    load_weights(other, state)
    assert_same_state(other.state_dict(), tiny.state_dict())


def test_misfit_names_everything_and_leaves_the_model_alone(tiny, tmp_path):
    before = snapshot(tiny)
    bad = {key: tensor + 1 for key, tensor in before.items()}
    del bad["fc.bias"]
    bad |= {"module.extra": torch.zeros(1), "conv1.weight": torch.zeros(16, 1, 3, 3)}
    path = tmp_path / "bad.pth"
    torch.save(bad, path)
    for weights in (bad, path):
        with pytest.raises(ValueError) as caught:
            load_weights(tiny, weights)
        message = str(caught.value)
        assert "do not fit CifarResNet" in message
        assert "missing keys: fc.bias\n" in message
        assert "unexpected keys: module.extra\n" in message
        assert message.endswith("shape mismatches: conv1.weight must be (16, 3, 3, 3), got (16, 1, 3, 3)")
        assert (str(path) in message) == (weights is path)
        assert_same_state(tiny.state_dict(), before)
    for value, message in (
        (torch.zeros(10, 64).to_sparse(), "got a torch.sparse_coo tensor at 'fc.weight'"),
        (torch.zeros(10, 64, dtype=torch.int8), "dtype mismatches: fc.weight must be torch.float32, got torch.int8"),
        (torch.quantize_per_tensor(torch.zeros(10, 64), 1.0, 0, torch.qint8), "got torch.qint8 at 'fc.weight'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_weights(tiny, {key: tensor + 1 for key, tensor in before.items()} | {"fc.weight": value})
        assert_same_state(tiny.state_dict(), before)
    with pytest.raises(ValueError, match=r"missing keys: conv1.weight, bn1.weight, .* and 27 more"):
        load_weights(tiny, {})


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda model: {"model": snapshot(model)}, "plain state_dict.* got dict at 'model'; pass .* at 'model'$"),
        (lambda model: {"step": 3, "model": snapshot(model)}, "plain state_dict.* got int at 'step'; .* at 'model'$"),
        (lambda model: {**snapshot(model), "fc.bias": torch.ones(10) * 1j}, "got torch.complex64 at 'fc.bias'$"),
        (lambda model: {0: model.fc.bias}, "plain state_dict.* got Parameter at 0$"),
        (lambda model: [model.fc.bias], "plain state_dict.* got list$"),
        (lambda model: model, "cannot be read, .* more than tensors"),
    ],
    ids=["wrapped", "training", "complex", "int-key", "list", "module"],
)
def test_only_plain_state_dicts(tiny, tmp_path, wrap, message):
    content = wrap(tiny)
    path = tmp_path / "content.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"content.pt.*{message}"):
        load_weights(tiny, path)
    if isinstance(content, dict):
        with pytest.raises(ValueError, match=message):
            load_weights(tiny, content)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"\xff" * 100, lambda data: b""])
def test_damaged_file_names_its_path(tiny, tmp_path, suffix, damage):
    before = snapshot(tiny)
    path = tmp_path / f"damaged{suffix}"
    save(before, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"damaged{suffix}.* cannot be read") as caught:
        load_weights(tiny, path)
    assert str(path) in str(caught.value)
    assert_same_state(tiny.state_dict(), before)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ("absent.pth", FileNotFoundError, "absent.pth"),
        ("absent.safetensors", FileNotFoundError, "absent.safetensors"),
        ("IMAGENET1K_V1", ValueError, r"ends in \.pth, \.pt, \.safetensors, got 'IMAGENET1K_V1'"),
        (True, TypeError, "weights must be a path, a state_dict or None, got bool"),
        ([("fc.bias", torch.zeros(10))], TypeError, "weights must be a path, a state_dict or None, got list"),
    ],
    ids=str,
)
def test_weights_that_are_no_checkpoint(weights, error, message):
    with pytest.raises(error, match=message):
        get_model("cifar_resnet20", weights=weights)


def test_safetensors_absent_says_what_to_install(tiny, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"weights.safetensors.*pip install safetensors"):
        load_weights(tiny, path)


def test_meta_tensors_are_refused(tiny):
    state = tiny.state_dict()
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        get_model("cifar_resnet20", weights=state)
    before = snapshot(tiny)
    with pytest.raises(ValueError, match=r"without data .* at 'fc.weight'"):
        load_weights(tiny, {**state, "fc.weight": state["fc.weight"].to("meta")})
    assert_same_state(tiny.state_dict(), before)
