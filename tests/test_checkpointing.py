"""Checkpointed networks: the same bits as without, running statistics included, in less memory."""

import copy
import weakref
from functools import partial

import pytest
import torch
from networks import assert_same_state
from numerics import step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import resfuse
from resfuse.models import BasicBlock, CheckpointedSequential, CifarResNet, DenseNet, ResNet, get_model

EVERY = pytest.mark.parametrize("every", [1, 2, 5])
# units alone: what a fused network hands on to the next unit, a checkpointed one computes anew, rounded otherwise
FUSE_UNITS = partial(resfuse.fuse, filter_fn=lambda _, name: name != "")
HOW = pytest.mark.parametrize("how", [lambda model: model, FUSE_UNITS], ids=["stock", "fused"])
NETWORKS = {
    "resnet": lambda **options: ResNet(BasicBlock, (1, 2, 1, 1), num_classes=10, **options),
    "cifar": lambda **options: CifarResNet(20, **options),
    "preact": lambda **options: CifarResNet(20, unit="full_preact", **options),
    "plain": lambda **options: CifarResNet(20, shortcut=None, **options),
    "highway": lambda **options: CifarResNet(20, unit="highway", **options),
    "groupnorm": lambda **options: CifarResNet(8, norm_layer=lambda c: nn.GroupNorm(4, c), **options),
    "cumulative": lambda **options: CifarResNet(8, norm_layer=lambda c: nn.BatchNorm2d(c, momentum=None), **options),
}


def twice(build, options, how, mode=lambda model: model):
    """The network without and with the options, from the same start."""
    pair = []
    for given in ({}, options):
        torch.manual_seed(0)
        pair.append(how(mode(build(**given).to(memory_format=torch.channels_last))))
    return pair


def assert_same_steps(models, call=lambda model: model, count=2):
    x, target = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last), torch.arange(4)
    for _ in range(count):
        results = []
        for model in models:
            torch.manual_seed(7)  # of dropout
            results.append(step(model, x, target=target, call=call(model)))
        assert_same_state(*results)


@HOW
@pytest.mark.parametrize("name", NETWORKS)
def test_a_checkpointed_step_is_the_plain_step(name, how):
    models = twice(NETWORKS[name], {"checkpoint_every": 2}, how)
    assert_same_steps(models)
    if name == "cumulative":
        assert models[1].layer3[0].bn1.num_batches_tracked == 2


@HOW
@EVERY
def test_any_number_of_blocks_is_recomputed_together(every, how):
    assert_same_steps(twice(NETWORKS["cifar"], {"checkpoint_every": every}, how), count=1)


@HOW
def test_frozen_norms_and_eval(how):
    def freeze(model):
        for module in model.layer2.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return model

    assert_same_steps(twice(NETWORKS["cifar"], {"checkpoint_every": 2}, how, freeze))
    assert_same_steps(twice(NETWORKS["cifar"], {"checkpoint_every": 2}, how, lambda model: model.eval()))


def test_a_memory_efficient_densenet_takes_the_same_step_dropout_included():
    def build(**options):
        return DenseNet(4, (2, 2, 2, 2), 8, 2, drop_rate=0.3, num_classes=10, **options)

    x, target, results = torch.randn(4, 3, 64, 64), torch.arange(4), []
    for model in twice(build, {"memory_efficient": True}, lambda model: model):
        torch.manual_seed(7)
        results.append(step(model, x, target=target))
    assert_same_state(*results)


def test_statistics_are_put_back_after_an_error_in_the_recomputation():
    class Fails(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 2:
                raise ArithmeticError("second call")
            return x.square()

    bn = nn.BatchNorm2d(3)
    buffers = dict(bn.named_buffers())
    out = CheckpointedSequential(bn, Fails(), every=2)(torch.randn(4, 3, 5, 5, requires_grad=True))
    after = {key: tensor.clone() for key, tensor in buffers.items()}
    with pytest.raises(ArithmeticError):
        out.sum().backward()
    assert all(tensor is buffers[key] for key, tensor in bn.named_buffers())
    assert_same_state(dict(bn.named_buffers()), after)


def test_structure_is_that_of_a_sequential():
    plain, checkpointed = CifarResNet(8), CifarResNet(8, checkpoint_every=2)
    checkpointed.load_state_dict(plain.state_dict(), strict=True)
    assert list(plain.state_dict()) == list(checkpointed.state_dict())
    assert len(CifarResNet(20, checkpoint_every=2).layer1[:2]) == 2
    assert "every=2" in repr(copy.deepcopy(checkpointed))
    with pytest.raises(TypeError, match=r"every must be an int, got 1\.5"):
        CheckpointedSequential(nn.ReLU(), every=1.5)


def test_hooks_of_a_stage_are_called_once():
    model, calls = CifarResNet(8, checkpoint_every=1), []
    model.layer2.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert calls == [1]


@HOW
def test_compiled(how):
    models = twice(lambda **options: CifarResNet(8, **options), {"checkpoint_every": 1}, how)
    stages = [model.layer1 for model in models]
    compiled = torch.compile(stages[1], backend="aot_eager", fullgraph=True)
    x, results = torch.randn(4, 16, 8, 8).to(memory_format=torch.channels_last), []
    for stage, call in ((stages[0], None), (stages[1], compiled)):
        results.append(step(stage, x, call=call, scale=0.01))
    for key, expected in results[0].items():
        torch.testing.assert_close(
            results[1][key], expected, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


class Activations(TorchDispatchMode):
    """The most bytes of 4-D tensors of one batch size that were alive at once."""

    def __init__(self, batch):
        super().__init__()
        self.batch, self.now, self.peak, self.known = batch, 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and tensor.shape[0] == self.batch:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self.known.discard(key)
        self.now -= size


def peak(model):
    with Activations(2) as activations:
        model(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)).sum().backward()
    return activations.peak


def test_depth_1202_trains_in_the_memory_of_depth_110():
    deep = resfuse.fuse(get_model("cifar_resnet1202", checkpoint_every=14).to(memory_format=torch.channels_last))
    before = deep.layer3[199].bn2.running_mean.clone()
    limit = peak(resfuse.fuse(get_model("cifar_resnet110").to(memory_format=torch.channels_last)))
    assert 0 < peak(deep) < limit
    assert all(parameter.grad is not None for parameter in deep.parameters())
    assert not torch.equal(deep.layer3[199].bn2.running_mean, before)
    assert deep.layer1[0].bn1.num_batches_tracked == 1
