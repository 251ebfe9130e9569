"""The networks of resfuse.models against torchvision's, the papers' figures and their own contracts."""

import copy
import itertools
import pickle
import sys
from functools import partial

import pytest
import torch
from torch import nn

from resfuse import models
from resfuse.bench.peers import import_torchvision
from resfuse.models import BasicBlock, Bottleneck, CifarResNet, ResNet, ZeroPadShortcut, get_model, list_models
from resfuse.models.weights import load_weights

PARAMETERS = {  # exact, and in millions as the paper prints it
    "resnet18": (11_689_512, None),
    "resnet34": (21_797_672, None),
    "resnet50": (25_557_032, None),
    "resnet101": (44_549_160, None),
    "resnet152": (60_192_808, None),
    "cifar_resnet20": (269_722, "0.27"),
    "cifar_resnet32": (464_154, "0.46"),
    "cifar_resnet44": (658_586, "0.66"),
    "cifar_resnet56": (853_018, "0.85"),
    "cifar_resnet110": (1_727_962, "1.7"),
}


FAMILY = pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("resnet18", {}, id="18"),
        pytest.param("resnet18", {"zero_init_residual": True}, id="18-zero"),
        pytest.param("resnet18", {"norm_layer": partial(nn.GroupNorm, 4)}, id="18-groupnorm"),
        pytest.param("resnet50", {}, id="50"),
        pytest.param("resnet50", {"groups": 32, "width_per_group": 4}, id="50-grouped"),
        pytest.param("resnet50", {"zero_init_residual": True}, id="50-zero"),
        pytest.param("resnet50", {"replace_stride_with_dilation": [False, True, True]}, id="50-dilated"),
    ],
)


@pytest.fixture(scope="module")
def torchvision():
    try:
        return import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")


@pytest.fixture
def tiny():
    torch.manual_seed(1)
    return CifarResNet(8)


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


def test_list_models_is_sorted_and_complete():
    assert list_models() == sorted(PARAMETERS)
    assert all(callable(getattr(models, name)) for name in list_models())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = get_model(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    exact, published = PARAMETERS[name]
    assert count == exact
    if published:
        assert f"{count / 1e6:.{len(published) - 2}f}" == published


@pytest.mark.parametrize(("name", "classes"), [("resnet18", 1000), ("cifar_resnet20", 10)])
def test_num_classes_defaults_to_the_published_one(name, classes):
    with torch.device("meta"):
        assert get_model(name).fc.out_features == classes
        assert getattr(models, name)().fc.out_features == classes
        assert get_model(name, num_classes=7).fc.out_features == 7


def test_convolutions_are_he_normal():
    torch.manual_seed(0)
    for key, parameter in get_model("cifar_resnet56").named_parameters():
        if key.startswith("layer3") and "conv" in key:
            expected = (2 / (parameter.shape[0] * 9)) ** 0.5
            assert abs(parameter.std().item() / expected - 1) < 0.05


@FAMILY
def test_same_seed_gives_torchvisions_bits(torchvision, name, options):
    torch.manual_seed(0)
    ours = get_model(name, **options)
    our_next_draw = torch.rand(3)
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(**options)
    assert torch.equal(our_next_draw, torch.rand(3))
    assert_same_state(ours.state_dict(), theirs.state_dict())


@FAMILY
def test_checkpoints_move_both_ways_and_outputs_are_equal(torchvision, name, options):
    torch.manual_seed(0)
    theirs = randomise(getattr(torchvision.models, name)(num_classes=10, **options))
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
    assert not torch.equal(ours.conv1.weight, theirs.conv1.weight)


@pytest.mark.parametrize("name", ["resnet34", "resnet101", "resnet152"])
def test_deep_networks_have_torchvisions_keys_and_shapes(torchvision, name):
    with torch.device("meta"):
        ours, theirs = get_model(name), getattr(torchvision.models, name)()
    shapes = [(key, tensor.shape) for key, tensor in ours.state_dict().items()]
    assert shapes == [(key, tensor.shape) for key, tensor in theirs.state_dict().items()]
    assert [str(module) for module in ours.modules()][1:] == [str(module) for module in theirs.modules()][1:]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_block_with_zero_last_gamma_is_relu(block, training):
    torch.manual_seed(0)
    module = randomise(block(64, 64 // block.expansion)).train(training)
    last = module.bn3 if block is Bottleneck else module.bn2
    x = torch.randn(2, 64, 7, 7)
    assert not torch.equal(module(x), x.relu())
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    assert torch.equal(module(x), x.relu())


def test_zero_init_residual_starts_every_block_as_its_shortcut():
    model = CifarResNet(20, zero_init_residual=True)
    x = torch.randn(2, 3, 8, 8)
    shallow = model._stem(x)
    for stage in (model.layer1, model.layer2, model.layer3):
        shortcut = stage[0].downsample or nn.Identity()
        shallow = shortcut(shallow).relu()
    assert torch.equal(model(x), model.fc(shallow.mean((2, 3))))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1)], ids=str)
@pytest.mark.parametrize(("channels", "stride"), [((16, 32), 2), ((3, 8), 1), ((5, 5), 3)], ids=str)
def test_zero_pad_shortcut_is_its_formula(channels, stride, size, layout):
    torch.manual_seed(0)
    x = torch.randn(2, channels[0], *size).to(memory_format=layout)
    height, width = (-(-extent // stride) for extent in size)
    expected = torch.zeros(2, channels[1], height, width)
    for c, h, w in itertools.product(range(channels[0]), range(height), range(width)):
        expected[:, c, h, w] = x[:, c, stride * h, stride * w]
    shortcut = ZeroPadShortcut(*channels, stride=stride)
    assert torch.equal(shortcut(x), expected)
    assert not list(shortcut.parameters()) and not shortcut.state_dict()


def test_zero_pad_shortcut_rejects():
    with pytest.raises(ValueError, match="out_channels must be at least in_channels 8, got 4"):
        ZeroPadShortcut(8, 4)
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        ZeroPadShortcut(4, 8, 0)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 4, H, W\), got \(1, 5, 2, 2\)"):
        ZeroPadShortcut(4, 8)(torch.zeros(1, 5, 2, 2))


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_equal_and_independent(name, duplicate):
    model = get_model(name).eval()
    clone = duplicate(model)
    x = torch.randn(1, 3, 32, 32)
    assert type(clone) is type(model)
    assert torch.equal(clone(x), model(x))
    nn.init.zeros_(clone.conv1.weight)
    assert model.conv1.weight.any()


def test_meta_construction_has_the_real_shapes():
    with torch.device("meta"):
        model = get_model("resnet18", zero_init_residual=True)
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 1000)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    real = get_model("resnet18").state_dict()
    load_weights(model.to_empty(device="cpu"), real)
    assert_same_state(model.state_dict(), real)


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet51", "resnet50"), ("cifar_resnet21", "cifar_resnet20"), ("zzz", ""), (50, "")]
)
def test_unknown_name_suggests(name, nearest):
    nearest = f"nearest: .*{nearest}.*" if nearest else ""
    with pytest.raises(ValueError, match=rf"got {name!r}; {nearest}.*list_models\(\) lists them all"):
        get_model(name)


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20"])
@pytest.mark.parametrize(
    ("classes", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), ("10", TypeError), (True, TypeError)]
)
def test_bad_num_classes(name, classes, error):
    with pytest.raises(error, match=f"num_classes must be .*{classes}"):
        get_model(name, num_classes=classes)


def test_unexpected_options_name_the_accepted():
    accepted = "accept: weights, num_classes, in_channels, zero_init_residual, norm_layer$"
    for build in (models.cifar_resnet20, partial(get_model, "cifar_resnet20")):
        with pytest.raises(TypeError, match=f"pretrained, depth; .*{accepted}"):
            build(pretrained=True, depth=20)
    with pytest.raises(TypeError, match=r"replace_stride_with_dilation, norm_layer$"):
        models.resnet50(block=BasicBlock)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("resnet50", {"replace_stride_with_dilation": [True]}, ValueError, "replace_stride_with_dilation must have 3"),
        ("resnet50", {"replace_stride_with_dilation": True}, TypeError, "replace_stride_with_dilation must be"),
        ("resnet50", {"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ("resnet50", {"width_per_group": 6.4}, TypeError, "width_per_group must be an int, got 6.4"),
        ("resnet18", {"groups": 2}, ValueError, "groups 1 and base width 64, got 2 and 64"),
        ("resnet18", {"replace_stride_with_dilation": (False, False, True)}, NotImplementedError, "dilation 1, got 2"),
        ("resnet18", {"zero_init_residual": True, "norm_layer": nn.Identity}, ValueError, "zero_init_residual must"),
        ("cifar_resnet20", {"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
    ],
)
def test_bad_options(name, options, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        get_model(name, **options)


def test_bad_structure():
    for depth in (2, 18, 21):
        with pytest.raises(ValueError, match=f"depth must be 6n.2 .* got {depth}"):
            CifarResNet(depth)
    with pytest.raises(ValueError, match="layers must have 4 elements"):
        ResNet(BasicBlock, (1, 1))
    with pytest.raises(ValueError, match=r"layers\[2\] must be at least 1, got 0"):
        ResNet(BasicBlock, (1, 1, 0, 1))


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
    with pytest.raises(ValueError, match=r"missing keys: conv1.weight, bn1.weight, .* and 27 more"):
        load_weights(tiny, {})


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda model: {"model": snapshot(model)}, "plain state_dict.* got dict at 'model'; pass .* at 'model'$"),
        (lambda model: {"step": 3, "model": snapshot(model)}, "plain state_dict.* got int at 'step'; .* at 'model'$"),
        (lambda model: {0: model.fc.bias}, "plain state_dict.* got Parameter at 0$"),
        (lambda model: [model.fc.bias], "plain state_dict.* got list$"),
        (lambda model: model, "cannot be read, .* more than tensors"),
    ],
    ids=["wrapped", "training", "int-key", "list", "module"],
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
