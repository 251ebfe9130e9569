"""What the ResNet papers say of their units, exactly: orders, identity, nesting, clean shortcuts, gradient flow."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from networks import randomise
from torch import nn

import resfuse
from resfuse.models import (
    BasicBlock,
    Bottleneck,
    CifarResNet,
    HighwayBlock,
    PlainBlock,
    ResidualUnit,
    ResNet,
    ZeroPadShortcut,
    get_model,
)
from resfuse.models.units import ORDERS

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
EVERY_ORDER = pytest.mark.parametrize("order", ORDERS)
CLEAN_ORDERS = pytest.mark.parametrize("order", ["relu_only_preact", "full_preact"])
BASIC_OR_BOTTLENECK = pytest.mark.parametrize("bottleneck", [False, True], ids=["basic", "bottleneck"])


def make_unit(order, bottleneck=False):
    return randomise(ResidualUnit(16, 4 if bottleneck else 16, order=ORDERS[order], bottleneck=bottleneck))


def close(block):
    """Put zeros where the residual path of a randomised block ends."""
    ends = {BasicBlock: ("bn2",), Bottleneck: ("bn3",)}.get(type(block)) or block.path
    for parameter in block.get_submodule([name for name in ends if name != "relu"][-1]).parameters():
        nn.init.zeros_(parameter)
    return block


def as_the_table_says(order, unit, x):
    """The papers' table of orders, written out for a basic unit."""
    conv = [lambda t, conv=conv: F.conv2d(t, conv.weight, padding=1) for conv in (unit.conv1, unit.conv2)]
    bn = [unit.bn1, unit.bn2]
    if order == "bn_after_add":
        return bn[1](x + conv[1](bn[0](conv[0](x)).relu())).relu()
    if order == "relu_before_add":
        return x + bn[1](conv[1](bn[0](conv[0](x)).relu())).relu()
    if order == "relu_only_preact":
        return x + bn[1](conv[1](bn[0](conv[0](x.relu())).relu()))
    return x + conv[1](bn[1](conv[0](bn[0](x).relu())).relu())


@TRAINING
@EVERY_ORDER
def test_a_unit_is_its_row_of_the_table(order, training):
    unit = make_unit(order).train(training)
    x = torch.randn(3, 16, 5, 5)
    expected, kept = as_the_table_says(order, unit, x), x.clone()
    assert torch.equal(unit(x), expected)
    assert torch.equal(x, kept)  # no activation works in place on the shortcut


def test_the_original_order_is_the_post_activation_network():
    basic, bottlenecks = (get_model(f"cifar_preresnet{depth}", unit="original") for depth in (110, 164))
    assert [type(m) for m in basic.modules()] == [type(m) for m in get_model("cifar_resnet110").modules()]
    assert {type(block) for block in bottlenecks.layer2} == {Bottleneck}
    assert bottlenecks.layer2[0].conv1.stride == (2, 2)


@CLEAN_ORDERS
def test_a_network_enters_once_and_ends_with_what_units_begin_with(order):
    model = randomise(CifarResNet(8, unit=order, shortcut="B", widths=(16, 16, 32))).eval()
    x = torch.randn(2, 3, 8, 8)
    out = model._stem(x)  # has the first unit's normalisation and activation
    first, second, third = model.layer1[0], model.layer2[0], model.layer3[0]
    assert first.entry == () and second.entry == third.entry != ()
    out = out + first._run(first.path, out)
    for unit in (second, third):  # both paths read the pre-activation where the shortcut projects
        entered = unit._run(unit.entry, out)
        out = unit.downsample(entered) + unit._run(unit.path, entered)
    out = (model.tail.bn(out) if order == "full_preact" else out).relu()
    assert torch.equal(model(x), model.fc(out.mean((2, 3))))


def test_a_projection_is_normalised_as_the_residual_path_is():
    for order in ORDERS:
        projection = CifarResNet(8, unit=order, shortcut="B").layer2[0].downsample
        assert isinstance(projection, nn.Sequential) == (order in ("relu_before_add", "relu_only_preact"))
    assert CifarResNet(8, shortcut="C").layer1[0].downsample[0].kernel_size == (1, 1)


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


@TRAINING
@BASIC_OR_BOTTLENECK
@EVERY_ORDER
def test_a_unit_without_residual_is_its_shortcut(order, bottleneck, training):
    unit = make_unit(order, bottleneck).train(training)
    x = torch.randn(3, 16, 5, 5)
    before = unit(x)
    expected = unit._run(unit.exit, x.clone())  # x itself unless something follows the addition
    assert torch.equal(expected, x) == (order != "bn_after_add")
    assert torch.equal(close(unit)(x), expected) and not torch.equal(before, expected)


def test_zero_init_residual_starts_every_block_as_its_shortcut():
    model = CifarResNet(20, zero_init_residual=True)
    x = torch.randn(2, 3, 8, 8)
    shallow = model._stem(x)
    for stage in (model.layer1, model.layer2, model.layer3):
        shortcut = stage[0].downsample or nn.Identity()
        shallow = shortcut(shallow).relu()
    assert torch.equal(model(x), model.fc(shallow.mean((2, 3))))


@pytest.mark.parametrize("order", [order for order in ORDERS if order != "relu_before_add"])
def test_zero_init_residual_starts_every_unit_as_its_shortcut(order):
    model = CifarResNet(20, unit=order, zero_init_residual=True)
    x = torch.randn(2, 16, 4, 4)
    for unit in model.layer1:
        assert torch.equal(unit(x), unit._run(unit.exit, x.clone()))


NESTED = {  # a network of one block a stage, and a deeper one
    "resnet": (ResNet, {"block": BasicBlock, "layers": (1, 1, 1, 1)}, {"block": BasicBlock, "layers": (2, 1, 3, 2)}),
    "bottleneck": (
        ResNet,
        {"block": Bottleneck, "layers": (1, 1, 1, 1)},
        {"block": Bottleneck, "layers": (1, 2, 2, 1)},
    ),
    "cifar": (CifarResNet, {"depth": 8}, {"depth": 20}),
    "cifar-bottleneck": (
        CifarResNet,
        {"depth": 11, "bottleneck": True, "shortcut": "B"},
        {"depth": 29, "bottleneck": True, "shortcut": "B"},
    ),
    **{
        order: (CifarResNet, {"depth": 8, "unit": order}, {"depth": 20, "unit": order})
        for order in ORDERS
        if order != "bn_after_add"  # what follows the addition is no identity
    },
}


@TRAINING
@pytest.mark.parametrize("how", [lambda model: model, resfuse.fuse], ids=["stock", "fused"])
@pytest.mark.parametrize("name", NESTED)
def test_a_deeper_network_computes_the_shallower_ones_function(name, how, training):
    network, fewer, more = NESTED[name]
    shallow, deep = randomise(network(**fewer)), network(**more)
    missing, unexpected = deep.load_state_dict(shallow.state_dict(), strict=False)
    added = {key.rsplit(".", 2)[0] for key in missing}
    assert added and not unexpected
    for block in added:
        close(randomise(deep.get_submodule(block)))
    x = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    out, expected = how(deep).train(training)(x), how(shallow).train(training)(x)
    assert expected.std() > 0 and torch.equal(out, expected)


@CLEAN_ORDERS
def test_a_clean_shortcut_passes_the_gradient_unchanged(order):
    chain = nn.Sequential(*(close(make_unit(order, bottleneck=i % 2 == 1)) for i in range(6)))
    x, grad_out = torch.randn(3, 16, 5, 5, requires_grad=True), torch.randn(3, 16, 5, 5)
    assert torch.equal(torch.autograd.grad(chain(x), x, grad_out)[0], grad_out)
    masked = nn.Sequential(*(close(randomise(BasicBlock(16, 16))) for _ in range(6)))
    assert torch.equal(torch.autograd.grad(masked(x), x, grad_out)[0], grad_out * (x > 0))


@CLEAN_ORDERS
def test_the_gradient_is_that_of_the_output_plus_what_each_residual_adds(order):
    chain = [make_unit(order, bottleneck=i % 2 == 1) for i in range(4)]
    inputs = [torch.randn(3, 16, 5, 5, requires_grad=True)]
    for unit in chain:
        inputs.append(unit(inputs[-1]))
    grad_out = torch.randn(3, 16, 5, 5)
    (found,) = torch.autograd.grad(inputs[-1], inputs[0], grad_out)
    expected = grad_out
    for unit, x in zip(reversed(chain), reversed(inputs[:-1]), strict=True):
        x = x.detach().requires_grad_()
        (added,) = torch.autograd.grad(unit._run(unit.path, unit._run(unit.entry, x)), x, expected)
        assert added.norm() > 0
        expected = expected + added
    assert torch.equal(found, expected)


def test_a_plain_block_is_a_basic_block_whose_shortcut_is_zero():
    class Nothing(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    plain = randomise(PlainBlock(8, 8))
    basic = BasicBlock(8, 8, 1, Nothing())
    basic.load_state_dict(plain.state_dict())
    x = torch.randn(3, 8, 5, 5)
    assert torch.equal(plain(x), basic(x))


def test_a_highways_gate_chooses_between_its_input_and_a_plain_block():
    block = randomise(HighwayBlock(8, 12, 2, ZeroPadShortcut(8, 12, 2)))
    x = torch.randn(3, 8, 6, 6)
    nn.init.constant_(block.gate.bias, -200)
    assert torch.equal(block(x), block.downsample(x))
    nn.init.constant_(block.gate.bias, 200)
    assert torch.equal(block(x), PlainBlock.forward(block, x))
    fresh = HighwayBlock(8, 8)
    nn.init.zeros_(fresh.gate.weight)
    carried = torch.sigmoid(torch.tensor(-3.0))
    torch.testing.assert_close(fresh(x), PlainBlock.forward(fresh, x) * carried + x * (1 - carried))


def gradient_spread(**options):
    """By what factor the first unit's gradient exceeds the last one's, before training."""
    model, outputs = CifarResNet(56, **options), []
    for unit in (*model.layer1, *model.layer2, *model.layer3):
        unit.register_forward_hook(lambda m, i, out: outputs.append(out))
    loss = F.cross_entropy(model(torch.randn(16, 3, 16, 16)), torch.arange(16) % 10)
    first, *_, last = torch.autograd.grad(loss, outputs)
    return (first.norm() / last.norm()).item()


def test_gradients_flow_through_a_residual_network_and_not_through_a_plain_one():
    plain, original, preact = (gradient_spread(**o) for o in ({"shortcut": None}, {}, {"unit": "full_preact"}))
    assert plain > 1000
    assert original < 50 and preact < 50


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
