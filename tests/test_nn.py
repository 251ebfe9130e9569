"""AddReLU, BNAct2d and ConvBNAct2d against the stock modules they replace: state, numbers, construction and copies."""

import copy
import pickle

import pytest
import torch
from numerics import assert_as_exact, image, step
from torch import nn

import resfuse
from resfuse import models
from resfuse.nn import AddReLU, BNAct2d, ConvBNAct2d

CHANNELS = 7


class StockBNAct(nn.Module):
    """act(BN(x) + residual) in stock modules."""

    def __init__(self, bn, activation="relu"):
        super().__init__()
        self.bn, self.activation = bn, activation

    def forward(self, x, residual=None):
        z = self.bn(x) if residual is None else self.bn(x) + residual
        return torch.relu(z) if self.activation == "relu" else z


class StockConvBNAct(StockBNAct):
    """act(BN(conv(x)) + residual) in stock modules."""

    def __init__(self, conv, bn):
        super().__init__(bn)
        self.conv = conv

    def forward(self, x, residual=None):
        return super().forward(self.conv(x), residual)


def randomise(module):
    """Move parameters and statistics away from their initial values."""
    for tensor in module.state_dict().values():
        if tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
    return module


def assert_same_steps(ours, stock, exact, *, steps=3, residual=True, prefix="bn.", channels=CHANNELS, outputs=CHANNELS):
    """Several calls agree by the rule of numerics.py; stock's names begin with `prefix`."""
    for _ in range(steps):
        inputs = {"x": image((4, channels, 5, 6))}
        if residual:
            inputs["residual"] = torch.randn(4, outputs, 5, 6)
        found = step(ours, **inputs)
        theirs = {name.replace(prefix, ""): t for name, t in step(stock, **inputs).items()}
        wanted = {
            name.replace(prefix, ""): t for name, t in step(exact, **{k: x.double() for k, x in inputs.items()}).items()
        }
        assert found.keys() == theirs.keys() == wanted.keys()
        for name in wanted:
            assert_as_exact(found[name], theirs[name], wanted[name], name)


def trio(activation="relu", **options):
    """A BNAct2d, its stock counterpart and that in float64, with the same state."""
    ours = randomise(BNAct2d(CHANNELS, activation=activation, **options))
    stock = nn.BatchNorm2d(CHANNELS, **options)
    stock.load_state_dict(ours.state_dict())
    stock = StockBNAct(stock, activation)
    return ours, stock, copy.deepcopy(stock).double()


def set_tracking(module, value):
    for m in module.modules():
        if hasattr(m, "track_running_stats"):
            m.track_running_stats = value


def test_add_relu_matches_stock():
    x, residual = torch.randn(3, 5, 7, 7), torch.randn(3, 5, 7, 7)

    class Stock(nn.Module):
        def forward(self, x, residual):
            return torch.relu(x + residual)

    inputs = {"x": x, "residual": residual}
    found, theirs = step(AddReLU(), **inputs), step(Stock(), **inputs)
    assert all(torch.equal(found[name], theirs[name]) for name in theirs)
    assert found["grad x"].count_nonzero() > 0


@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_bn_act_state_dict_goes_both_ways(affine, tracked):
    options = {"affine": affine, "track_running_stats": tracked}
    ours, stock = BNAct2d(CHANNELS, **options), nn.BatchNorm2d(CHANNELS, **options)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
    for source, target in ((randomise(ours), stock), (randomise(stock), ours)):
        target.load_state_dict(source.state_dict(), strict=True)
        for key, tensor in source.state_dict().items():
            assert torch.equal(target.state_dict()[key], tensor)


OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "momentum-0": {"momentum": 0.0},
    "plain": {"affine": False},
    "untracked": {"track_running_stats": False},
    "eps": {"eps": 0.3},
    "identity": {"activation": "identity"},
}


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_bn_act_matches_stock(options, mode, residual):
    modules = [module.train(mode == "train") for module in trio(**options)]
    assert_same_steps(*modules, residual=residual)


def test_bn_act_follows_mode_and_tracking_as_they_change():
    modules = trio()
    for change in (
        lambda m: m.eval(),
        lambda m: m.train(),
        lambda m: set_tracking(m, False),  # the statistics stay, and are used in eval only
        lambda m: m.eval(),
        lambda m: (m.train(), set_tracking(m, True)),
    ):
        for module in modules:
            change(module)
        assert_same_steps(*modules, steps=2)
    assert modules[0].num_batches_tracked == modules[1].bn.num_batches_tracked > 0


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
def test_bn_act_with_frozen_parameters(frozen):
    modules = trio()
    for module in modules:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.removeprefix("bn.") not in frozen)
    assert_same_steps(*modules, steps=1)


def test_bn_act_in_low_precision_with_float32_parameters():
    ours, stock, exact = trio()
    x = image((4, CHANNELS, 5, 6), torch.bfloat16)
    inputs = {"x": x, "residual": torch.randn(4, CHANNELS, 5, 6).bfloat16()}
    found, theirs = step(ours, **inputs), step(stock, **inputs)
    wanted = step(exact, **{name: t.double() for name, t in inputs.items()})
    assert found["out"].dtype == torch.bfloat16 and found["grad weight"].dtype == torch.float32
    for name, tensor in wanted.items():
        # stock reduces float32 sums, ours too: only what is stored in bfloat16 is coarse
        assert_as_exact(found[name.replace("bn.", "")], theirs[name], tensor, name, margin=1)


def conv_trio(**options):
    ours = randomise(ConvBNAct2d(6, 8, **options))
    stock = StockConvBNAct(copy.deepcopy(ours.conv), copy.deepcopy(ours.bn))
    return ours, stock, copy.deepcopy(stock).double()


CONVOLUTIONS = {
    "3x3": {},
    "1x1": {"kernel_size": 1},
    "5x5-bias": {"kernel_size": 5, "bias": True},
    "dilated": {"dilation": 2},
    "grouped": {"groups": 2},
    "cumulative": {"momentum": None},
}


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_conv_bn_act_matches_stock(options, mode):
    modules = conv_trio(**options)
    if options.get("bias") and mode == "train":  # batch statistics take the bias away: its gradient is zero
        for module in modules:
            module.conv.bias.requires_grad_(False)
    for module in modules:
        module.train(mode != "eval")
        if mode == "frozen":
            module.bn.eval()
    assert_same_steps(*modules, steps=2, prefix="", channels=6, outputs=8)


def test_conv_bn_act_strides_and_pads():
    x = torch.randn(2, 6, 9, 9)
    assert ConvBNAct2d(6, 8, stride=2)(x).shape == (2, 8, 5, 5)
    assert ConvBNAct2d(6, 8, padding=0)(x).shape == (2, 8, 7, 7)


def test_conv_bn_act_state_is_that_of_its_children():
    ours = ConvBNAct2d(6, 8, bias=True)
    stock = nn.Sequential()
    stock.add_module("conv", nn.Conv2d(6, 8, 3, padding=1))
    stock.add_module("bn", nn.BatchNorm2d(8))
    assert list(ours.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(randomise(ours).state_dict(), strict=True)
    ours.load_state_dict(randomise(stock).state_dict(), strict=True)
    assert type(ours.conv) is nn.Conv2d and type(ours.bn) is nn.BatchNorm2d


@pytest.mark.parametrize("child", ["conv", "bn"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_the_children_of_conv_bn_act_are_called(child, kind):
    ours, stock, exact = conv_trio()
    calls = []
    getattr(getattr(ours, child), f"register_{kind}_hook")(lambda *_: calls.append(kind))
    assert_same_steps(ours, stock, exact, steps=1, prefix="", channels=6, outputs=8)
    assert len(calls) == 1


def test_a_forward_hook_on_a_child_can_change_its_output():
    module = ConvBNAct2d(6, 8).eval()
    module.bn.register_forward_hook(lambda *_: torch.full((2, 8, 3, 3), 5.0))
    assert module(torch.randn(2, 6, 3, 3)).unique().tolist() == [5.0]


MODULES = {
    "AddReLU": lambda: AddReLU(),
    "BNAct2d": lambda: randomise(BNAct2d(6, momentum=None)),
    "ConvBNAct2d": lambda: randomise(ConvBNAct2d(6, 6, groups=2, activation="identity")),
}
EVERY_MODULE = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


@EVERY_MODULE
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent_and_equal(make, clone):
    module = make()
    other = clone(module)
    x, residual = torch.randn(2, 6, 3, 3), torch.randn(2, 6, 3, 3)
    state = {key: t.clone() for key, t in module.state_dict().items()}
    out = other(x, residual)
    assert all(torch.equal(module.state_dict()[key], state[key]) for key in state)
    assert torch.equal(out, module(x, residual))
    assert all(torch.equal(module.state_dict()[key], t) for key, t in other.state_dict().items())
    assert repr(other) == repr(module)


@EVERY_MODULE
def test_meta_modules_give_shapes_and_materialise(make):
    module = make().to("meta")
    x = torch.empty(2, 6, 3, 3, device="meta")
    assert module(x, torch.empty_like(x)).shape == x.shape
    module.to_empty(device="cpu").load_state_dict(make().state_dict())
    assert module(torch.randn(2, 6, 3, 3), torch.randn(2, 6, 3, 3)).isfinite().all()


@pytest.mark.parametrize("cls", [BNAct2d, ConvBNAct2d])
def test_modules_are_made_on_the_asked_device_and_dtype(cls):
    arguments = (6,) if cls is BNAct2d else (6, 6)
    made = cls(*arguments, device="meta", dtype=torch.float64)
    assert all(t.device.type == "meta" for t in made.state_dict().values())
    assert {p.dtype for p in made.parameters()} == {torch.float64}
    with torch.device("meta"):
        assert all(t.device.type == "meta" for t in cls(*arguments).state_dict().values())
    made = cls(*arguments, dtype=torch.float64)
    assert made(torch.randn(2, 6, 3, 3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", ["BNAct2d", "ConvBNAct2d"])
def test_convert_sync_batchnorm_keeps_the_activation(name):
    layer = BNAct2d(6) if name == "BNAct2d" else ConvBNAct2d(6, 6)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer)).eval()
    out = converted(torch.randn(4, 6, 5, 5))
    assert out.min() == 0 < out.max()


def test_extra_repr():
    assert repr(AddReLU()) == "AddReLU()"
    assert repr(AddReLU(backend="native")) == "AddReLU(backend='native')"
    inner = "5, eps=1e-05, momentum=None, affine=False"
    assert repr(BNAct2d(5, momentum=None, affine=False)).startswith(f"BNAct2d({inner}")
    assert "activation='identity', backend='reference'" in repr(BNAct2d(5, activation="identity", backend="reference"))
    assert repr(ConvBNAct2d(3, 4)).startswith("ConvBNAct2d(\n  activation='relu'\n  (conv): Conv2d(3, 4")


@pytest.mark.parametrize("make", [lambda **o: BNAct2d(4, **o), lambda **o: ConvBNAct2d(4, 4, **o)], ids=["bn", "conv"])
def test_constructors_refuse_what_they_do_not_know(make):
    with pytest.raises(ValueError, match="activation must be one of relu, identity, got 'gelu'"):
        make(activation="gelu")
    with pytest.raises(ValueError, match="eps must be positive, got -1"):
        make(eps=-1)


@pytest.mark.parametrize("momentum", [-0.1, 1.5])
def test_bn_act_refuses_a_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match="momentum must be None or in"):
        BNAct2d(4, momentum=momentum)(torch.randn(2, 4, 3, 3))


def test_a_missing_backend_raises():
    with pytest.raises(RuntimeError, match="backend='triton' does not serve add_relu"):
        AddReLU(backend="triton")(torch.randn(2), torch.randn(2))
    module = BNAct2d(4, backend="triton")
    with pytest.raises(RuntimeError, match="backend='triton' does not serve bn_act"):
        module(torch.randn(2, 4, 3, 3))
    assert module.num_batches_tracked == 0


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_named_backend_is_used(backend):
    names = set()

    def visit(node):
        names.add(node.name())
        for following, _ in node.next_functions:
            if following is not None:
                visit(following)

    visit(ConvBNAct2d(4, 4, backend=backend)(torch.randn(2, 4, 3, 3)).grad_fn)
    assert ("BNActFunctionBackward" in names) == (backend == "native")
    assert not any("BatchNorm" in name for name in names)


def test_own_layers_count_as_fused():
    model = nn.Sequential(ConvBNAct2d(3, 4), models.BasicBlock(4, 4))
    assert [b.name for b in resfuse.explain(resfuse.fuse(model, strict=True)).blocks if not b.fused] == []
