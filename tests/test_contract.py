"""What a fused block promises wherever a stock one works: modes, hooks, wrappers, copies, tracers and autograd."""

import copy
import io
import pickle

import pytest
import torch
from numerics import assert_all_as_exact, judged, step
from torch import nn
from torch.func import functional_call
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import resfuse
from resfuse import models

FUSED = "BNActFunctionBackward"


def projection(inplanes=6, planes=8):
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride=2, bias=False), nn.BatchNorm2d(planes))


BLOCKS = {
    "basic": lambda: models.BasicBlock(6, 6),
    "plain": lambda: models.PlainBlock(6, 6),
    "projection": lambda: models.BasicBlock(6, 8, 2, projection()),
    "bottleneck": lambda: models.Bottleneck(16, 4),
    "bottleneck-projection": lambda: models.Bottleneck(6, 4, 2, projection(6, 16)),
}
EVERY_BLOCK = pytest.mark.parametrize("name", BLOCKS)


def norms(block):
    return [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]


@torch.no_grad()
def build(name="projection"):
    """A stock block whose normalisations are not at their initial values."""
    block = BLOCKS[name]()
    for bn in norms(block):
        bn.weight.uniform_(0.5, 1.5).mul_(torch.where(torch.rand(bn.num_features) < 0.3, -1, 1))
        bn.bias.uniform_(-0.5, 0.5)
        bn.running_mean.uniform_(-0.5, 0.5)
        bn.running_var.uniform_(0.5, 1.5)
    return block


def three(name="projection", prepare=lambda block: None):
    """A fused block, a stock one and a stock one in float64 with the same state, prepared alike."""
    stock = build(name)
    blocks = resfuse.fuse(copy.deepcopy(stock)), copy.deepcopy(stock), copy.deepcopy(stock).double()
    for block in blocks:
        prepare(block)
    return blocks


def image(block, batch=8):
    return torch.randn(batch, block.conv1.in_channels, 7, 7) + 0.5


def assert_as_stock(blocks, x, wrap=lambda block: block, *, margin=100, **options):
    """A step of the fused block is as exact as one of the stock block."""
    results = [step(b, x.to(next(b.parameters()).dtype), call=wrap(b), **options) for b in blocks[:2]]
    exact = step(blocks[2], x.double(), call=wrap(blocks[2]), **options | {"autocast": False})
    assert_all_as_exact(*(judged(result, exact) for result in (*results, exact)), margin=margin)


def runs_fused(block, x=None):
    return block(image(block) if x is None else x).grad_fn.name() == FUSED


MODES = {
    "train": lambda block: block.train(),
    "eval": lambda block: block.eval(),
    "frozen-statistics": lambda block: [bn.eval() for bn in norms(block)],
    "one-frozen": lambda block: block.bn1.eval(),
    "frozen-weight": lambda block: [bn.weight.requires_grad_(False) for bn in norms(block)],
    "frozen-bias": lambda block: [bn.bias.requires_grad_(False) for bn in norms(block)],
    "frozen-convolutions": lambda block: [m.weight.requires_grad_(False) for m in (block.conv1, block.conv2)],
    "frozen": lambda block: block.requires_grad_(False).eval(),
    "momentum-none": lambda block: [setattr(bn, "momentum", None) for bn in norms(block)],
    "momentum-1.5": lambda block: setattr(block.bn1, "momentum", 1.5),
    "eps-0-in-eval": lambda block: setattr(block.eval().bn1, "eps", 0.0),
    "momentum-0": lambda block: [setattr(bn, "momentum", 0.0) for bn in norms(block)],
    "untracked": lambda block: [setattr(bn, "track_running_stats", False) for bn in norms(block)],
    "no-bias": lambda block: [setattr(bn, "bias", None) for bn in norms(block)],
    "no-weight": lambda block: [setattr(bn, "weight", None) for bn in norms(block)],
}


@EVERY_BLOCK
@pytest.mark.parametrize("mode", MODES)
def test_modes(name, mode):
    blocks = three(name, MODES[mode])
    for _ in range(2):
        assert_as_stock(blocks, image(blocks[0]))
    # stock computes with numbers that resfuse refuses: such a block runs stock
    assert runs_fused(blocks[0], image(blocks[0]).requires_grad_()) == (mode not in ("momentum-1.5", "eps-0-in-eval"))


@EVERY_BLOCK
def test_autocast(name):
    blocks = three(name)
    assert_as_stock(
        blocks, image(blocks[0], 64), autocast=True, margin=1
    )  # many values, so that flips of relu even out
    with torch.autocast("cpu", torch.bfloat16):
        assert blocks[0](image(blocks[0])).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"scale": 65536.0}, {"needs_grad": False}], ids=["scaled-loss", "frozen-input"])
def test_a_scaled_loss_and_an_input_without_gradient(options):
    blocks = three()
    assert_as_stock(blocks, image(blocks[0]), **options)


def test_grad_scaler():
    block = resfuse.fuse(build())
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(block.parameters(), 0.1)
    before = block.conv1.weight.detach().clone()
    scaler.scale(block(image(block)).sum()).backward()
    scaler.step(optimizer)
    assert block.conv1.weight.isfinite().all() and not torch.equal(block.conv1.weight, before)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_empty_batch(training):
    fused, stock, _ = (block.train(training) for block in three())
    found, wanted = (step(block, image(block, 0)) for block in (fused, stock))
    for key, expected in wanted.items():
        torch.testing.assert_close(found[key], expected, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}")


def test_one_value_per_channel_raises_and_changes_nothing():
    block = resfuse.fuse(build("basic"))
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block(torch.randn(1, 6, 1, 1))
    assert all(torch.equal(block.state_dict()[key], t) for key, t in before.items())


KINDS = ["forward", "forward_pre", "full_backward", "full_backward_pre"]
CHILDREN = ["conv1", "bn1", "conv2", "bn2", "relu", "downsample", "downsample.0", "downsample.1"]


# a stock block adds in place to bn2's output, which torch forbids where that has a backward hook
@pytest.mark.parametrize(
    ("child", "kind"), [(c, k) for c in CHILDREN for k in KINDS if (c, "backward" in k) != ("bn2", True)]
)
def test_a_hooked_child_keeps_its_block_stock(child, kind):
    blocks, calls = three(prepare=lambda b: setattr(b.relu, "inplace", False)), []
    handle = getattr(blocks[0].get_submodule(child), f"register_{kind}_hook")(lambda *_: calls.append(1))
    assert_as_stock(blocks, image(blocks[0]))
    assert len(calls) == (2 if child == "relu" else 1)
    (report,) = resfuse.explain(blocks[0]).blocks
    assert (report.fused, report.reason) == (False, f"{child} has a hook")
    handle.remove()
    assert runs_fused(blocks[0]) and resfuse.explain(blocks[0]).blocks[0].fused


@pytest.mark.parametrize("child", [c for c in CHILDREN if c != "relu"])
def test_a_child_that_is_compiled_by_itself_is_called(child):
    blocks, calls = three(), []
    module = blocks[0].get_submodule(child)
    module._compiled_call_impl = lambda x: calls.append(1) or module._call_impl(x)  # as module.compile() sets it
    assert_as_stock(blocks, image(blocks[0]))
    assert len(calls) == 1
    (report,) = resfuse.explain(blocks[0]).blocks
    assert (report.fused, report.reason) == (False, f"{child} is compiled by itself")


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_the_block_itself_are_called(kind):
    blocks, calls = three(), []
    getattr(blocks[0], f"register_{kind}_hook")(lambda *_: calls.append(1))
    assert_as_stock(blocks, image(blocks[0]))
    assert calls == [1] and resfuse.explain(blocks[0]).blocks[0].fused


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_global_hooks_are_called_for_every_child(kind):
    block, types = resfuse.fuse(build()), []
    handle = getattr(torch_module, f"register_module_{kind}_hook")(lambda m, *_: types.append(type(m)))
    try:
        block(image(block).requires_grad_()).sum().backward()
        (report,) = resfuse.explain(block).blocks
    finally:
        handle.remove()
    assert [types.count(t) for t in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)] == [3, 3, 2]
    assert (report.fused, report.reason) == (False, "a global module hook is registered")
    assert runs_fused(block)


def own_forward(block):
    stock = type(block.bn1).forward
    block.bn1.forward = lambda x: stock(block.bn1, x) + 1


REPLACED = {
    "weight_norm": lambda b: parametrizations.weight_norm(b.conv1),
    "parametrization": lambda b: parametrize.register_parametrization(b.conv2, "weight", nn.Tanh()),
    "parametrized-bn": lambda b: parametrize.register_parametrization(b.bn1, "weight", nn.Tanh()),
    "pruning": lambda b: prune.l1_unstructured(b.conv1, "weight", 0.5),
    "forward-override": own_forward,
    "padding-mode": lambda b: (
        setattr(b.conv1, "padding_mode", "reflect")
        or setattr(b.conv1, "_reversed_padding_repeated_twice", [1, 1, 1, 1])
    ),
    "relu6": lambda b: setattr(b, "relu", nn.ReLU6()),
    "group-norm": lambda b: setattr(b, "bn2", nn.GroupNorm(2, 8, dtype=b.conv1.weight.dtype)),
    "hooked-projection": lambda b: b.downsample[1].register_forward_hook(lambda m, i, o: o + 1),
}


@pytest.mark.parametrize("what", REPLACED)
def test_a_replaced_child_keeps_its_block_stock(what):
    torch.manual_seed(1)
    blocks = three(prepare=REPLACED[what])
    x = image(blocks[0])
    ours, theirs = (step(block, x) for block in blocks[:2])
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    (report,) = resfuse.explain(blocks[0]).blocks
    assert not report.fused and report.reason


@pytest.mark.parametrize("hooked", [False, True])
def test_a_shortcut_of_any_kind_is_called(hooked):
    blocks, calls = three(prepare=lambda b: b.downsample.append(nn.Tanh())), []
    if hooked:
        blocks[0].downsample.register_forward_hook(lambda *_: calls.append(1))
    assert_as_stock(blocks, image(blocks[0]))
    assert runs_fused(blocks[0]) and len(calls) == 2 * hooked


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved_and_loaded}


@pytest.mark.parametrize("how", COPIES)
def test_copies_stay_fused_and_are_independent(how):
    _, *stocks = blocks = three()
    other = COPIES[how](blocks[0])
    state = copy.deepcopy(blocks[0].state_dict())
    assert type(other) is type(blocks[0]) and runs_fused(copy.deepcopy(other))
    assert_as_stock((other, *stocks), image(other))
    assert all(torch.equal(blocks[0].state_dict()[key], t) for key, t in state.items())


def through_safetensors(state):
    torch_tensors = pytest.importorskip("safetensors.torch")
    return torch_tensors.load(torch_tensors.save(state))


@pytest.mark.parametrize("through", [dict, through_safetensors], ids=["dict", "safetensors"])
def test_state_dicts_go_both_ways(through):
    stock, fused = models.CifarResNet(8), resfuse.fuse(models.CifarResNet(8))
    for source, target in ((stock, fused), (fused, stock)):
        source(torch.randn(2, 3, 8, 8))
        assert list(source.state_dict()) == list(target.state_dict())
        target.load_state_dict(through(source.state_dict()), strict=True)
        for key, tensor in source.state_dict().items():
            assert torch.equal(target.state_dict()[key], tensor)


def test_averaged_model_and_update_bn():
    results, data = [], [torch.randn(4, 6, 7, 7) + 1 for _ in range(3)]
    for block in three():
        averaged = torch.optim.swa_utils.AveragedModel(block)
        averaged.update_parameters(block)
        dtype = next(block.parameters()).dtype
        torch.optim.swa_utils.update_bn([x.to(dtype) for x in data], averaged)
        results.append(dict(averaged.named_buffers()))
    assert_all_as_exact(*results)
    assert results[0]["module.bn1.num_batches_tracked"] == 3


def test_convert_sync_batchnorm_after_fuse():
    stock = build().eval()
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(resfuse.fuse(copy.deepcopy(stock)))
    x = image(stock)
    assert type(fused.bn1) is nn.SyncBatchNorm
    assert torch.equal(fused(x), stock(x))
    assert "SyncBatchNorm" in resfuse.explain(fused).blocks[0].reason


def test_the_identity_at_zero_gamma():
    for name in ("basic", "bottleneck"):
        block = resfuse.fuse(build(name))
        last = norms(block)[-1]
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        x = image(block)
        assert torch.equal(block(x), torch.relu(x)) and runs_fused(block)


WRAPPED = {
    "twice-in-a-row": lambda block: lambda x: block(block(x)),
    "two-forwards-then-backward": lambda block: lambda x: block(x) + block(2 * x),
    "functional_call": lambda block: lambda x: functional_call(block, dict(block.named_parameters()), (x,)),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_calls_around_a_block(how):
    assert_as_stock(blocks := three("basic"), image(blocks[0]), WRAPPED[how])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@EVERY_BLOCK
def test_checkpointing_updates_the_statistics_once(name, momentum, reentrant):
    """The recomputation has the gradients and the statistics of a step without it, where stock's are updated twice."""
    found, fused = [], resfuse.fuse(build(name))
    for call in (lambda block, x: block(x), lambda block, x: checkpoint(block, x, use_reentrant=reentrant)):
        block = copy.deepcopy(fused)
        for bn in norms(block):
            bn.momentum = momentum
        torch.manual_seed(1)
        x = image(block).requires_grad_()
        call(block, x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in block.parameters()), *block.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_backward_twice_over_a_retained_graph():
    block = resfuse.fuse(build())
    out = block(image(block))
    out.sum().backward(retain_graph=True)
    once = [p.grad.clone() for p in block.parameters()]
    out.sum().backward()
    assert all(torch.equal(p.grad, 2 * grad) for p, grad in zip(block.parameters(), once, strict=True))


@pytest.mark.parametrize("mode", ["train", "eval"])
@EVERY_BLOCK
def test_double_backward(name, mode):
    results = []
    for block in three(name, MODES[mode]):
        torch.manual_seed(1)
        x = image(block).to(block.conv1.weight.dtype).requires_grad_()
        wanted = [x, *block.parameters()]
        first = torch.autograd.grad(block(x).pow(2).sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), wanted)
        results.append({f"grad {i}": grad for i, grad in enumerate(second)})
    assert_all_as_exact(*(judged(result, results[2]) for result in results))


def test_func_transforms_in_eval():
    results = []
    for block in three("basic", MODES["eval"]):
        torch.manual_seed(1)
        x, state = image(block).to(block.conv1.weight.dtype), {k: p.detach() for k, p in block.named_parameters()}

        def loss(state, x, block=block):
            return functional_call(block, state, (x[None],)).pow(2).sum()

        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(state, x)
        results.append({f"grad {key}": grad.detach() for key, grad in per_sample.items()})
        results[-1]["jvp"] = torch.func.jvp(block, (x,), (x.cos(),))[1].detach()
    assert_all_as_exact(*(judged(result, results[2]) for result in results))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_gradients(mode, training):
    blocks, results = [block.train(training) for block in three()], []
    x = image(blocks[0])
    with mode():
        for block in blocks:
            results.append({"out": block(x.to(block.conv1.weight.dtype)), **dict(block.named_buffers())})
    assert_all_as_exact(*results)
