"""The networks of resfuse.models by name: their published sizes, their shapes stage by stage, options and errors."""

import copy
import pickle
from functools import partial

import pytest
import torch
from networks import assert_same_state, count
from torch import nn

from resfuse import models
from resfuse.models import BasicBlock, CifarResNet, ResNet, get_model, list_models
from resfuse.models.cifar import UNITS
from resfuse.models.weights import load_weights

PARAMETERS = {  # exact, and in millions as a paper prints it
    "resnet18": (11_689_512, None),
    "resnet34": (21_797_672, None),
    "resnet50": (25_557_032, None),
    "resnet101": (44_549_160, None),
    "resnet152": (60_192_808, None),
    "plain18": (11_515_688, None),
    "plain34": (21_623_848, None),
    "resnext50_32x4d": (25_028_904, None),
    "resnext101_32x8d": (88_791_336, None),
    "resnext101_64x4d": (83_455_272, None),
    "wide_resnet50_2": (68_883_240, None),
    "wide_resnet101_2": (126_886_696, None),
    "vgg16_bn": (138_365_992, None),
    "vgg19_bn": (143_678_248, None),
    "densenet121": (7_978_856, None),
    "cifar_resnet20": (269_722, "0.27"),
    "cifar_resnet32": (464_154, "0.46"),
    "cifar_resnet44": (658_586, "0.66"),
    "cifar_resnet56": (853_018, "0.85"),
    "cifar_resnet110": (1_727_962, "1.7"),
    "cifar_resnet1202": (19_421_274, "19.4"),
    "cifar_plain20": (269_722, "0.27"),
    "cifar_plain32": (464_154, "0.46"),
    "cifar_plain44": (658_586, "0.66"),
    "cifar_plain56": (853_018, "0.85"),
    "cifar_plain110": (1_727_962, "1.7"),
    "cifar_preresnet110": (1_727_962, "1.7"),
    "cifar_preresnet164": (1_703_258, "1.7"),
    "cifar_preresnet1001": (10_327_706, None),
    "cifar_highway20": (283_626, None),
    "cifar_highway32": (489_034, None),
    "cifar_highway110": (1_824_186, None),
    "wrn28_10": (36_479_194, "36.5"),
}

# the output of each stage, (channels, size), for images of 224 pixels or 32
BASIC = [(64, 56), (128, 28), (256, 14), (512, 7)]
EXPANDED = [(256, 56), (512, 28), (1024, 14), (2048, 7)]
SMALL = [(16, 32), (32, 16), (64, 8)]
STAGES = {
    "resnet34": BASIC,
    "plain18": BASIC,
    "resnet50": EXPANDED,
    "resnext50_32x4d": EXPANDED,
    "wide_resnet50_2": EXPANDED,
    "vgg16_bn": [(512, 7)],
    "densenet121": [(256, 56), (512, 28), (1024, 14), (1024, 7)],
    "cifar_resnet20": SMALL,
    "cifar_plain20": SMALL,
    "cifar_preresnet110": SMALL,
    "cifar_preresnet164": [(64, 32), (128, 16), (256, 8)],
    "cifar_highway20": SMALL,
    "wrn28_10": [(160, 32), (320, 16), (640, 8)],
}


def on_meta(name, **options):
    with torch.device("meta"):
        return get_model(name, **options)


def test_list_models_is_sorted_and_complete():
    assert list_models() == sorted(PARAMETERS)
    assert all(callable(getattr(models, name)) for name in list_models())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    exact, published = PARAMETERS[name]
    found = count(on_meta(name))
    assert found == exact
    if published:
        assert f"{found / 1e6:.{len(published.split('.')[1])}f}" == published


def test_shortcuts_cost_what_their_option_says():
    for name, plain in (("resnet18", "plain18"), ("cifar_resnet20", "cifar_plain20")):
        padded, nothing, projected, everywhere = (
            count(on_meta(*which[:1], **which[1]))
            for which in ((name, {"shortcut": "A"}), (plain, {}), (name, {"shortcut": "B"}), (name, {"shortcut": "C"}))
        )
        assert padded == nothing < projected < everywhere
    projections = sum(64 * 2**i * 128 * 2**i + 2 * 128 * 2**i for i in range(3))
    assert count(on_meta("resnet34")) == count(on_meta("plain34")) + projections


def test_stride_in_1x1_moves_the_stride_and_nothing_else():
    paper, v1_5 = on_meta("resnet50", stride_in_1x1=True), on_meta("resnet50")
    assert [(k, t.shape) for k, t in paper.state_dict().items()] == [(k, t.shape) for k, t in v1_5.state_dict().items()]
    for model, strides in ((paper, (2, 1)), (v1_5, (1, 2))):
        block = model.layer2[0]
        assert (block.conv1.stride[0], block.conv2.stride[0]) == strides


@pytest.mark.parametrize("name", STAGES)
def test_stages_have_the_published_shapes(name):
    model, found = on_meta(name), []
    imagenet = not name.startswith(("cifar", "wrn"))
    blocks = ("layer1", "layer2", "layer3", "layer4")
    if name == "vgg16_bn":
        blocks = ("features",)
    elif name == "densenet121":
        blocks = [f"features.denseblock{i}" for i in range(1, 5)]
    for block in blocks[: len(STAGES[name])]:
        model.get_submodule(block).register_forward_hook(lambda m, i, out: found.append(out.shape))
    size, classes = (224, 1000) if imagenet else (32, 10)
    assert model(torch.empty(2, 3, size, size, device="meta")).shape == (2, classes)
    assert found == [(2, channels, side, side) for channels, side in STAGES[name]]


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
    with pytest.raises(
        ValueError, match=rf"got {name!r}; {nearest}.*list_models\(\) lists them all: cifar_.*, wrn28_10$"
    ):
        get_model(name)


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20"])
@pytest.mark.parametrize(
    ("classes", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), ("10", TypeError), (True, TypeError)]
)
def test_bad_num_classes(name, classes, error):
    with pytest.raises(error, match=f"num_classes must be .*{classes}"):
        get_model(name, num_classes=classes)


@pytest.mark.parametrize("name", ["resnet18", "vgg16_bn", "densenet121", "cifar_resnet20"])
def test_builders_take_torchvisions_progress(name):
    with torch.device("meta"):
        assert models.get_model(name, progress=False, num_classes=3)(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_unexpected_options_name_the_accepted():
    accepted = (
        "accepted are: weights, num_classes, in_channels, zero_init_residual, norm_layer, unit, shortcut, bottleneck, "
        "stride_in_1x1, widths, checkpoint_every$"
    )
    for build in (models.cifar_resnet20, partial(get_model, "cifar_resnet20")):
        with pytest.raises(TypeError, match=f"pretrained, depth; .*{accepted}"):
            build(pretrained=True, depth=20)
    for fixed in ({"block": BasicBlock}, {"groups": 2}):
        with pytest.raises(TypeError, match=r"accepted are: weights, num_classes, zero_init_residual, replace_stride"):
            models.resnext50_32x4d(**fixed)
    with pytest.raises(AttributeError, match=r"no attribute 'resnet51'; list_models\(\) lists the networks"):
        _ = models.resnet51
    assert {"resnet50", "ResNet"} <= set(dir(models))


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
        ("resnet18", {"shortcut": "D"}, ValueError, "shortcut must be one of A, B, C, None, got 'D'"),
        ("resnet50", {"shortcut": None}, ValueError, "shortcut must be one of A, B, C with Bottleneck, got None"),
        ("resnet18", {"stride_in_1x1": True}, ValueError, "stride_in_1x1 must be False with BasicBlock"),
        ("resnet18", {"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1, got 0"),
        ("plain18", {"zero_init_residual": True}, ValueError, "zero_init_residual must be False in a plain"),
        ("cifar_highway20", {"zero_init_residual": True}, ValueError, "zero_init_residual must be False in a highway"),
        ("cifar_highway20", {"shortcut": None}, ValueError, "A, B, C with unit 'highway', got None"),
        ("cifar_preresnet110", {"unit": "preact"}, ValueError, f"unit must be one of {', '.join(UNITS)}, got 'preact'"),
        ("cifar_preresnet110", {"shortcut": None}, ValueError, "A, B, C with unit 'full_preact', got None"),
        ("cifar_preresnet110", {"shortcut": "b"}, ValueError, "shortcut must be one of A, B, C, None, got 'b'"),
        ("cifar_preresnet110", {"stride_in_1x1": True}, ValueError, "stride_in_1x1 must be False without bottle"),
        ("cifar_resnet20", {"widths": (16, 32)}, ValueError, "widths must have 3 elements"),
        ("cifar_resnet20", {"widths": (16, 32, 0)}, ValueError, r"widths\[2\] must be at least 1, got 0"),
        (
            "cifar_preresnet110",
            {"unit": "relu_before_add", "zero_init_residual": True},
            ValueError,
            "zero_init_residual must be False where ReLU ends",
        ),
        ("vgg16_bn", {"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ("densenet121", {"bn_size": 0}, ValueError, "bn_size must be at least 1, got 0"),
        ("densenet121", {"drop_rate": "x"}, TypeError, r"drop_rate must be a number in \[0, 1\], got 'x'"),
        ("densenet121", {"drop_rate": 1.5}, ValueError, r"drop_rate must be in \[0, 1\], got 1.5"),
        ("vgg16_bn", {"dropout": "x"}, TypeError, r"dropout must be a number in \[0, 1\], got 'x'"),
    ],
)
def test_bad_options(name, options, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        get_model(name, **options)


def test_bad_structure():
    with pytest.raises(ValueError, match=r"depth must be 9n.2 with n >= 1 \(11, 20, 29, ...\), got 112"):
        CifarResNet(112, bottleneck=True)
    with pytest.raises(ValueError, match="with bottlenecks, got 'highway'"):
        CifarResNet(11, bottleneck=True, unit="highway")
    with pytest.raises(ValueError, match="downsample must be None in a plain block"):
        models.PlainBlock(4, 4, 1, nn.Identity())
    with pytest.raises(ValueError, match="layers must have 5 elements"):
        models.VGG((1, 2))
    with pytest.raises(ValueError, match=r"block_config\[1\] must be at least 1, got 0"):
        models.DenseNet(block_config=(1, 0, 1, 1))
    for depth in (2, 18, 21):
        with pytest.raises(ValueError, match=f"depth must be 6n.2 .* got {depth}"):
            CifarResNet(depth)
    with pytest.raises(ValueError, match="layers must have 4 elements"):
        ResNet(BasicBlock, (1, 1))
    with pytest.raises(ValueError, match=r"layers\[2\] must be at least 1, got 0"):
        ResNet(BasicBlock, (1, 1, 0, 1))
