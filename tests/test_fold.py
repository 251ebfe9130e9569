"""fold: every family, on photographs, against the model in float64; what is merged, and what stays stock."""

import copy

import pytest
import torch
from folded import FLOAT_ENGINES, assert_folded, engines_for, photographs, settle
from networks import torchvision_models
from torch import nn

import resfuse
from resfuse.folding.plan import Convolution, ScaleShiftAct, Stock
from resfuse.models.cifar import UNITS, CifarResNet
from resfuse.models.vgg import VGG

pytestmark = pytest.mark.usefixtures("one_thread")


def _cifar(unit, shortcut, bottleneck=False):
    return CifarResNet(20 if bottleneck else 14, unit=unit, shortcut=shortcut, bottleneck=bottleneck)


def _bottlenecks(resnet, **options):
    """One block a stage of torchvision's ResNet or of ours."""
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, **options)


def _small_classifier(make):
    """A VGG whose classifier does not take a second to draw."""
    with torch.device("meta"):
        model = make()
    model.classifier = nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10))
    model.features.to_empty(device="cpu")
    for parameter in model.features.parameters():
        nn.init.kaiming_normal_(parameter) if parameter.dim() > 1 else nn.init.zeros_(parameter)
    return model


def _torchvision_vgg():
    vgg = torchvision_models().vgg
    return _small_classifier(lambda: vgg.VGG(vgg.make_layers([64, "M", 64, "M", 128, "M", 512, "M"], batch_norm=True)))


NETWORKS = {
    "torchvision-resnet18": lambda: torchvision_models().resnet18(num_classes=10),
    "torchvision-bottlenecks": lambda: _bottlenecks(torchvision_models().resnet),
    "torchvision-resnext": lambda: _bottlenecks(torchvision_models().resnet, groups=32, width_per_group=4),
    "torchvision-wide": lambda: _bottlenecks(torchvision_models().resnet, width_per_group=128),
    "torchvision-dilated": lambda: _bottlenecks(
        torchvision_models().resnet, replace_stride_with_dilation=[False, True, True]
    ),
    "torchvision-vgg": _torchvision_vgg,
    "torchvision-densenet": lambda: torchvision_models().DenseNet(16, (2, 2, 2, 2), 16, num_classes=10),
    "resnet-option-A": lambda: resfuse.models.resnet.ResNet(
        resfuse.models.resnet.BasicBlock, [1, 1, 1, 1], 10, shortcut="A"
    ),
    "bottlenecks-option-C": lambda: _bottlenecks(resfuse.models.resnet, shortcut="C", stride_in_1x1=True),
    "checkpointed": lambda: CifarResNet(14, checkpoint_every=1),
    "plain": lambda: CifarResNet(14, shortcut=None),
    "vgg": lambda: _small_classifier(lambda: VGG((1, 1, 1, 1, 1))),
    "densenet": lambda: resfuse.models.densenet.DenseNet(16, (2, 2, 2, 2), 16, num_classes=10),
    **{f"{unit}-A": lambda unit=unit: _cifar(unit, "A") for unit in UNITS},
    **{f"{unit}-B-bottleneck": lambda unit=unit: _cifar(unit, "B", True) for unit in UNITS if unit != "highway"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_is_as_exact_as_stock(name, tmp_path):
    images = photographs()
    model = settle(NETWORKS[name](), images)
    for dtype in (torch.float32, torch.bfloat16):
        assert_folded(resfuse.fold(model, dtype), model, images, dtype)
    before, after = (resfuse.fold(each)(images) for each in (model, resfuse.fuse(copy.deepcopy(model))))
    # the same children in the same order; a highway's blocks are not folded, and stay fused
    torch.testing.assert_close(after, before, **({} if name.startswith("highway") else {"rtol": 0, "atol": 0}))
    folded = resfuse.fold(model)
    stock = [block for block in resfuse.explain(folded).blocks if not block.fused]
    assert {block.type for block in stock} == ({"HighwayBlock"} if name.startswith("highway") else set())
    if not stock:
        folded.save(tmp_path / "network.pt")
        assert resfuse.Folded.load(tmp_path / "network.pt").plan == folded.plan


EVERY_ACTIVATION = {
    kind.__name__: kind
    for kind in (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.Sigmoid, nn.Tanh)
}
EVERY_ACTIVATION |= {
    "LeakyReLU": lambda: nn.LeakyReLU(0.3),
    "ELU": lambda: nn.ELU(0.5),
    "Hardtanh": lambda: nn.Hardtanh(-0.25, 2.0),
}


@FLOAT_ENGINES
def test_a_whole_resnet_on_photographs_by_every_engine(dtype, backend):
    images = photographs(8, 128)
    model = settle(resfuse.models.resnet50(), images)
    folded = resfuse.fold(model, dtype, backend=backend)
    assert_folded(folded, model, images, dtype)
    assert [type(step).__name__ for step in folded.plan.steps].count("Convolution") == 53
    assert len(folded.plan.steps) == 57  # with two pools, the flattening and the linear layer
    sole = folded(images[:1])
    assert (sole.double() - folded(images)[:1].double()).abs().max() <= 0.05 * sole.abs().max()  # another shape


@FLOAT_ENGINES
@pytest.mark.parametrize("kind", EVERY_ACTIVATION.values(), ids=EVERY_ACTIVATION)
def test_a_sequential_folds_with_every_activation(kind, dtype, backend):
    class Sum(nn.Module):
        """Something unknown between two parts that fold."""

        def forward(self, x):
            return x + x.mean((2, 3), keepdim=True)

    model = nn.Sequential(
        nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 2), bias=True), nn.BatchNorm2d(8), kind(),
        nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=4), nn.BatchNorm2d(8, affine=False), kind(),
        Sum(), nn.AvgPool2d(2), nn.Dropout(), nn.BatchNorm2d(8), kind(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16), kind(), nn.Identity(), nn.Linear(16, 10),
    )  # fmt: skip
    images = photographs(4, 33)
    settle(model, images)
    folded = resfuse.fold(model, dtype, backend=backend)
    assert_folded(folded, model, images, dtype)
    kinds = [type(step).__name__ for step in folded.plan.steps]
    assert kinds == ["Convolution", "Convolution", "Stock", "AveragePool", "ScaleShiftAct", "MaxPool", "AdaptivePool",
                     "Flatten", "Linear", "Linear"]  # fmt: skip


@pytest.mark.parametrize("backend", engines_for(torch.float32))
@pytest.mark.parametrize("kind", EVERY_ACTIVATION.values(), ids=EVERY_ACTIVATION)
def test_every_residual_activation_is_merged(kind, backend):
    block = resfuse.models.resnet.BasicBlock(8, 8)
    block.relu = kind()
    images = torch.randn(2, 8, 9, 9)
    settle(block, images)
    folded = resfuse.fold(block, backend=backend)
    assert [type(step) for step in folded.plan.steps] == [Convolution, Convolution]
    torch.testing.assert_close(folded(images), block(images), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", engines_for(torch.float32))
def test_a_shortcut_sees_what_a_branch_has_written_in_place(backend):
    block = resfuse.models.resnet.BasicBlock(8, 8)
    block.conv1 = nn.Sequential(nn.ReLU(inplace=True), block.conv1)
    images = torch.randn(2, 8, 9, 9)
    settle(block, images.clone())
    out = resfuse.fold(block, backend=backend)(images)
    torch.testing.assert_close(out, block(images.clone()), atol=1e-5, rtol=1e-5)


def test_an_unknown_module_sees_what_its_part_has_written_in_place():
    class Cell(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.body = nn.Sequential(nn.ReLU(inplace), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))

        def forward(self, x):
            return self.body(x) + x

    for inplace in (True, False):
        images = torch.randn(2, 8, 9, 9)
        cell = settle(Cell(inplace), images.clone())
        folded = resfuse.fold(cell)
        torch.testing.assert_close(folded(images.clone()), cell(images.clone()), atol=1e-5, rtol=1e-5)
        blocks = resfuse.explain(folded).blocks
        assert any(block.fused for block in blocks) is not inplace
        assert blocks[0].reason == "resfuse folds no Cell" + "; body writes its input" * inplace


@pytest.mark.parametrize("backend", engines_for(torch.float32))
def test_a_branch_comes_before_a_stock_shortcut_that_writes_its_input(backend):
    block = resfuse.models.resnet.BasicBlock(8, 8)
    block.conv1, block.bn1, block.relu = nn.Identity(), nn.Identity(), nn.Identity()
    block.downsample = nn.CELU(inplace=True)
    images = torch.randn(2, 8, 9, 9)
    settle(block, images.clone())
    out = resfuse.fold(block, backend=backend)(images.clone())
    torch.testing.assert_close(out, block(images.clone()), atol=1e-5, rtol=1e-5)


def test_a_sum_that_two_read_keeps_its_own_step():
    model = settle(CifarResNet(14, unit="full_preact"), photographs())
    steps = resfuse.fold(model).plan.steps
    passes = [step for step in steps if isinstance(step, ScaleShiftAct)]
    assert len(passes) == 6  # each unit's bn1 but the first's, which the stem has; and the tail
    assert all(step.scale is not None and step.activation == "relu" for step in passes)
    assert sum(isinstance(step, Convolution) and step.residual is not None for step in steps) == 6


@FLOAT_ENGINES
@pytest.mark.parametrize("size", [33, 30])
def test_a_padded_shortcut_of_every_size(size, dtype, backend):
    """Every second pixel of an odd map is no whole half of it."""
    images = photographs(4, size)
    model = settle(CifarResNet(8, shortcut="A"), images)
    assert_folded(resfuse.fold(model, dtype, backend=backend), model, images, dtype)


@pytest.mark.parametrize("backend", engines_for(torch.float32))
@pytest.mark.parametrize("shortcut", [nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 1, 1)], ids=["pixel", "channel"])
def test_a_shortcut_that_torch_would_repeat(shortcut, backend):
    block = resfuse.models.resnet.BasicBlock(8, 8)
    block.downsample = shortcut
    images = torch.randn(2, 8, 6, 6)
    folded = resfuse.fold(settle(block, images), backend=backend)
    if backend == "reference":
        torch.testing.assert_close(folded(images), block(images), atol=1e-5, rtol=1e-5)
        return
    with pytest.raises(RuntimeError, match=r"conv2 gives \(2, 8, 6, 6\) and adds .*backend='reference' repeats"):
        folded(images)


def test_every_dtype_and_layout():
    images = photographs(2, 32)
    model = settle(CifarResNet(8), images)
    exact = copy.deepcopy(model).double()
    assert resfuse.fold(exact).dtype == torch.float64
    torch.testing.assert_close(resfuse.fold(exact)(images), exact(images.double()), atol=1e-13, rtol=1e-12)
    assert_folded(resfuse.fold(model, torch.float16), model, images, torch.float16)
    contiguous = resfuse.fold(model, memory_format=torch.contiguous_format)
    for x in (images, images.contiguous(), images.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(contiguous(x), model(x), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(resfuse.fold(model)(x), model(x), atol=1e-5, rtol=1e-4)


def test_the_input_and_the_source_are_left_as_they_are():
    images = photographs()
    model = settle(CifarResNet(14, shortcut="B"), images)
    state, x = copy.deepcopy(model.state_dict()), images.clone()
    folded = resfuse.fold(model, example_input=images)
    first = folded(images).clone()
    assert torch.equal(folded(images), first) and torch.equal(images, x)  # nothing was overwritten that is read again
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    addresses = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert addresses.isdisjoint(tensor.data_ptr() for tensor in folded.state_dict().values())


def test_folding_after_further_training_gives_the_new_weights():
    images = photographs()
    model = settle(CifarResNet(8), images)
    folded = resfuse.fold(model)
    before = folded(images)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.5)
    nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
    optimizer.step()
    model.eval()
    assert torch.equal(folded(images), before)  # a copy
    assert (model(images) - before).norm() > 0.01 * before.norm()
    assert_folded(resfuse.fold(model), model, images, torch.float32)


def test_the_known_parts_of_an_unknown_model_fold():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = CifarResNet(8)
            self.backbone.fc = nn.Identity()
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            return self.head(self.backbone(x)) + self.backbone(x.flip(3)).mean()

    images = photographs()
    model = settle(Detector(), images)
    folded = resfuse.fold(model, torch.bfloat16)
    assert_folded(folded, model, images, torch.bfloat16)
    blocks = resfuse.explain(folded).blocks
    assert (blocks[0].type, blocks[0].reason) == ("Detector", "resfuse folds no Detector")
    assert blocks[1].name == "backbone.conv1" and all(block.fused for block in blocks[1:])
    assert all(isinstance(step, Stock) for step in folded.plan.steps)
    assert isinstance(model.backbone, CifarResNet)


def test_an_unknown_model_may_go_through_its_blocks_and_hand_them_a_residual():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            self.stage = nn.Sequential(*(resfuse.models.resnet.BasicBlock(8, 8) for _ in range(3)))
            self.last = resfuse.nn.ConvBNAct2d(8, 8)

        def forward(self, x):
            x = self.stem(x)
            for block in self.stage[:2]:
                x = block(x)
            return self.last(x, x).mean((2, 3))

    images = photographs()
    model = settle(Network(), images)
    folded = resfuse.fold(model)
    assert_folded(folded, model, images, torch.float32)
    names = [block.name for block in resfuse.explain(folded).blocks]
    assert names == ["", "stem.0", *(f"stage.{i}.conv{j}" for i in range(3) for j in (1, 2))]


def test_layers_of_our_own_fold():
    layers = nn.Sequential(resfuse.nn.ConvBNAct2d(3, 8), resfuse.nn.ConvBNAct2d(8, 10, activation="identity"),
                           resfuse.nn.BNAct2d(10), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # fmt: skip
    images = photographs()
    model = settle(layers, images)
    folded = resfuse.fold(model)
    assert_folded(folded, model, images, torch.float32)
    assert [step.activation for step in folded.plan.steps[:3]] == ["relu", "identity", "relu"]


def test_what_cannot_fold_stays_stock_and_explain_says_so():
    model = torchvision_models().ResNet(
        torchvision_models().resnet.BasicBlock, [1, 1, 1, 1], 10, norm_layer=lambda c: nn.GroupNorm(4, c)
    )
    model.layer2[0].conv2.padding_mode = "reflect"
    images = photographs()
    folded = resfuse.fold(model.eval())
    assert_folded(folded, model, images, torch.float32)
    said = {block.name: block for block in resfuse.explain(folded).blocks}
    assert said["bn1"].reason == "resfuse folds no GroupNorm"
    assert "reflect" in said["layer2.0.conv2"].reason
    assert said["conv1"].fused and "stock: resfuse folds no GroupNorm" in str(resfuse.explain(folded))


@pytest.mark.skipif("tiles" not in engines_for(torch.float32), reason="this processor has no tile kernels")
def test_explain_says_what_computes_a_layer():
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    ).eval()
    how = [block.convolutions for block in resfuse.explain(resfuse.fold(model, backend="tiles")).blocks]
    assert how == ["tiles", "tiles, silu by torch, with 2", "tiles, with 4"]
    head = nn.Sequential(nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)).eval()
    how = [block.convolutions for block in resfuse.explain(resfuse.fold(head, backend="tiles")).blocks]
    assert how == ["torch", "torch"]


def test_a_subclass_without_a_forward_of_its_own_folds_and_another_does_not():
    resnet = torchvision_models().resnet

    class Named(resnet.BasicBlock):
        colour = "blue"

    class Scaled(resnet.BasicBlock):
        def forward(self, x):
            return 2 * super().forward(x)

    images = torch.randn(2, 8, 6, 6)
    named, scaled = (settle(kind(8, 8), images) for kind in (Named, Scaled))
    assert all(block.fused for block in resfuse.explain(resfuse.fold(named)).blocks)
    assert not resfuse.explain(resfuse.fold(scaled)).blocks[0].fused
    torch.testing.assert_close(resfuse.fold(scaled)(images), scaled(images))


def test_a_registered_residual_block_folds(monkeypatch):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)

    class FusedMine(resfuse.nn.FusedBasicBlock, Mine):
        pass

    monkeypatch.setattr("resfuse.fusion._registered", {})
    resfuse.register_block(Mine, FusedMine)
    images = torch.randn(2, 8, 6, 6)
    block = settle(Mine(), images)
    folded = resfuse.fold(block)
    assert [type(step) for step in folded.plan.steps] == [Convolution, Convolution]
    torch.testing.assert_close(folded(images), block(images), atol=2e-6, rtol=1e-5)
    assert torch.equal(resfuse.fold(resfuse.fuse(block))(images), folded(images))
