"""Whose tensor it is: what resfuse.ownership says of every way in which a gradient, or what a node saved, can be
somebody else's too."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import resfuse
from resfuse import BatchNorm2dParameters, Conv2dParameters, functional, ops, ownership
from resfuse.ownership import owns

W = torch.randn(2, 3, 4, 4)
kept = []
said = []

pytestmark = pytest.mark.skipif(not hasattr(torch.Tensor, "_use_count"), reason="this torch does not count references")


class Overwrite(torch.autograd.Function):
    """The identity, which spoils a gradient that is said to be its own."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad_out):
        said.append(owns(grad_out))
        grad = grad_out.clone()
        if said[-1]:
            grad_out.fill_(float("nan"))
        return grad


class Keeping(Overwrite):
    """The identity, which keeps what it returns as a gradient."""

    @staticmethod
    def backward(ctx, grad_out):
        kept.append(grad_out * 1)
        return kept[-1]


class Saved(torch.autograd.Function):
    """Its gradient is a tensor that it saved."""

    @staticmethod
    def forward(ctx, x, saved):
        ctx.save_for_backward(saved)
        return x.clone()

    @staticmethod
    def backward(ctx, grad_out):
        return ctx.saved_tensors[0], None


@pytest.fixture(autouse=True)
def fresh():
    kept.clear()
    said.clear()


def leaf():
    return torch.randn(2, 3, 4, 4, requires_grad=True)


def test_a_gradient_of_a_chain_is_its_own():
    x = leaf()
    (Overwrite.apply(Overwrite.apply(Overwrite.apply(x)).relu()) * W).sum().backward()
    assert said == [True] * 3
    assert not x.grad.isnan().any()


def test_an_accumulated_gradient_is_its_own():
    x = leaf()
    y = Overwrite.apply(x)
    (y * W).sum().add((y * W).sum()).backward()
    assert said == [True]
    assert torch.equal(x.grad, 2 * W)


def test_a_gradient_for_two_readers_is_the_last_ones():
    a, b = leaf(), leaf()
    ((Overwrite.apply(a) + Overwrite.apply(b)) * W).sum().backward()
    assert said == [False, True]
    assert torch.equal(a.grad, W) and torch.equal(b.grad, W)


def test_a_leaf_beside_it_keeps_its_gradient():
    a, b = leaf(), leaf()
    ((Overwrite.apply(a) + b) * W).sum().backward()
    assert torch.equal(a.grad, W) and torch.equal(b.grad, W)


@pytest.mark.parametrize("form", [lambda t: t, lambda t: t.view(-1), lambda t: t.transpose(0, 1)], ids=range(3))
def test_what_a_caller_gives_stays_the_callers(form):
    x, given = leaf(), W.clone()
    form(Overwrite.apply(x)).backward(form(given))
    assert said == [False]
    assert torch.equal(given, W) and torch.equal(x.grad, W)


def test_a_temporary_of_the_caller_is_not_taken():
    Overwrite.apply(leaf()).backward(W.clone())
    assert said == [False]


@pytest.mark.parametrize("where", ["tensor", "before the node", "after the node"])
def test_hooks_may_keep_a_gradient(where):
    x = leaf()
    y = Overwrite.apply(x)
    if where == "tensor":
        y.register_hook(kept.append)
    elif where == "before the node":
        y.grad_fn.register_prehook(lambda grads: kept.append(grads[0]))
    else:
        y.grad_fn.register_hook(lambda inputs, outputs: kept.append(outputs[0]))
    (y * W).sum().backward()
    assert torch.equal(kept[0], W) and torch.equal(x.grad, W)


@pytest.mark.parametrize("how", ["retain_grad", "inputs", "grad"])
def test_asked_for_the_gradient_itself(how):
    x = leaf()
    y = Overwrite.apply(x)
    loss = (y * W).sum()
    if how == "grad":
        found, _ = torch.autograd.grad(loss, [y, x])
    else:
        y.retain_grad()
        loss.backward(inputs=[y, x] if how == "inputs" else None)
        found = y.grad
    assert torch.equal(found, W)


def test_a_maker_may_keep_what_it_returns():
    x = leaf()
    (Keeping.apply(Overwrite.apply(x)) * W).sum().backward()
    assert said == [False]
    assert torch.equal(kept[0], W)


def test_a_saved_tensor_is_not_spoilt():
    x, saved = leaf(), W.clone()
    loss = Saved.apply(Overwrite.apply(x), saved).sum()
    del saved
    for _ in range(2):
        x.grad = None
        loss.backward(retain_graph=True)
        assert torch.equal(x.grad, W)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    x = leaf()
    (checkpoint(Overwrite.apply, x, use_reentrant=reentrant) * W).sum().backward()
    assert torch.equal(x.grad, W)


def test_a_torch_without_counts_takes_nothing(monkeypatch):
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    ownership._of_one_owner.cache_clear()
    try:
        (Overwrite.apply(leaf()) * W).sum().backward()
    finally:
        monkeypatch.undo()
        ownership._of_one_owner.cache_clear()
    assert said == [False]


def test_a_folded_block_leaves_a_callers_gradient_alone():
    block = resfuse.models.resnet50(num_classes=4).layer1[1].train()
    resfuse.fuse(block)
    x = torch.randn(2, 256, 14, 14).to(memory_format=torch.channels_last).requires_grad_()
    given = torch.randn_like(x)
    before, grads = given.clone(), []
    for own in (False, True):
        out = block(x)
        out = out * 1 if own else out
        grads.append(torch.autograd.grad(out, [x, *block.parameters()], given))
    assert torch.equal(given, before)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.skipif(torch.float32 not in ops.tile_dtypes, reason="this processor has no tile kernels")
def test_a_folded_block_writes_over_the_next_blocks_gradient(monkeypatch):
    blocks = resfuse.models.resnet50(num_classes=4).layer1[1:].train()
    resfuse.fuse(blocks)
    memory, kernel = [], ops.expand_bn_act_backward_weight_
    monkeypatch.setattr(ops, "expand_bn_act_backward_weight_", lambda *a: memory.append(a[0].data_ptr()) or kernel(*a))
    x = torch.randn(2, 256, 14, 14).to(memory_format=torch.channels_last).requires_grad_()
    (blocks(x) * torch.randn(2, 256, 14, 14)).sum().backward()
    assert len(memory) == 2 and len(set(memory)) == 1
    assert memory[0] == x.grad.data_ptr()


class Watching(TorchDispatchMode):
    """Names the operators that run, and keeps what they return."""

    def __init__(self, keep):
        super().__init__()
        self.names, self.outputs, self.keep = [], [], keep

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.append(function.name())
        if self.keep:
            self.outputs.append(out)
        return out

    def in_place(self):
        return [name for name in self.names if name.startswith("resfuse::") and name.endswith("_")]


def test_what_observes_the_first_backward_is_not_counted():
    counted = ownership._of_one_owner()
    measure = ownership._of_one_owner.__wrapped__
    with Watching(keep=True):
        assert measure() == counted

    def trace(frame, event, argument):
        assert frame.f_locals is not None  # reading them makes a copy, which holds what they hold
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        observed = measure()
    finally:
        sys.settrace(before)
    assert observed == counted


def parameters(channels, kernel=3, inputs=None):
    bn = BatchNorm2dParameters(
        torch.zeros(channels), torch.ones(channels), torch.rand(channels).add(0.5).requires_grad_(),
        torch.randn(channels).requires_grad_(), True,
    )  # fmt: skip
    weight = torch.randn(channels, inputs or channels, kernel, kernel).requires_grad_()
    return Conv2dParameters(weight, None, 1, kernel // 2), bn


def image(channels):
    return torch.randn(2, channels, 8, 8)


def last(x):
    return x.to(memory_format=torch.channels_last)


# what writes over a tensor that it saved
SAVED = {
    "bn_relu_maxpool": lambda: functional.conv_bn_relu_maxpool(image(3), *parameters(64, inputs=3)),
    "conv_bn_act": lambda: functional.conv_bn_act(image(16), *parameters(16)),
    "projection": lambda: functional.basic_block(image(16), *parameters(16), *parameters(16), parameters(16, 1)),
}
# and over the gradient of a shortcut
SHORTCUT = {
    "basic": lambda x: functional.basic_block(x, *parameters(16), *parameters(16)),
    "identity": lambda x: functional.basic_block(x, *parameters(16), *parameters(16), activation="identity"),
    "bottleneck": lambda x: functional.bottleneck(x, *(parameters(16) * 3)),
    "folded": lambda x: functional.bottleneck(x, *parameters(16, 1), *parameters(16), *parameters(16, 1), folding=True),
    "preact": lambda x: functional.preact_block(x, [parameters(16)[::-1], parameters(16)[::-1]], x)[0],
}
needs_tiles = pytest.mark.skipif(torch.float32 not in ops.tile_dtypes, reason="this processor has no tile kernels")
if torch.float32 in ops.tile_dtypes:
    SAVED["stem"] = lambda: functional.conv_bn_relu_maxpool(last(image(3)), *parameters(64, inputs=3))


@pytest.mark.parametrize("name", SAVED)
def test_what_a_node_saved_is_written_over_where_nobody_holds_it(name):
    out = SAVED[name]() * 2
    with Watching(keep=False) as watching:
        out.sum().backward()
    assert any("apply_" in found for found in watching.in_place())


@pytest.mark.parametrize("name", SAVED)
def test_what_a_hook_keeps_of_what_a_node_saved_stays(name):
    held = []

    def pack(tensor):
        held.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = SAVED[name]()
    out.sum().backward()
    assert held
    assert all(torch.equal(tensor.detach(), before) for tensor, before in held)


@pytest.mark.parametrize("name", SAVED)
def test_what_a_caller_reads_of_what_a_node_saved_stays(name):
    out = SAVED[name]()
    held = [t for t in out.grad_fn.saved_tensors if t is not None]
    before = [t.detach().clone() for t in held]
    out.sum().backward()
    assert held
    assert all(torch.equal(t.detach(), b) for t, b in zip(held, before, strict=True))


@needs_tiles
@pytest.mark.parametrize("name", SHORTCUT)
def test_a_shortcuts_gradient_is_written_over_where_nobody_holds_it(name):
    out = SHORTCUT[name](last(image(16)).requires_grad_()) * 2
    with Watching(keep=False) as watching:
        out.sum().backward()
    assert "resfuse::conv_stats_backward_" in watching.in_place()


@pytest.mark.parametrize("when", ["before the node", "after the node"])
@pytest.mark.parametrize("name", SHORTCUT)
def test_a_shortcuts_gradient_that_a_hook_keeps_stays(name, when):
    out = SHORTCUT[name](last(image(16)).requires_grad_())
    held = []

    def keep(grads, *_):
        held.extend((grad, grad.clone()) for grad in grads if grad is not None)

    nodes = [out.grad_fn, *[node for node, _ in out.grad_fn.next_functions if node is not None]]
    for node in nodes:
        node.register_prehook(keep) if when == "before the node" else node.register_hook(keep)
    (out * last(image(16))).sum().backward()
    assert held
    assert all(torch.equal(grad, before) for grad, before in held)


@needs_tiles
@pytest.mark.parametrize("name", SHORTCUT)
def test_a_shortcuts_gradient_may_be_asked_for(name):
    x = last(image(16)).requires_grad_()
    out, given = SHORTCUT[name](x), last(image(16))
    edges = [edge for edge in out.grad_fn.next_functions if edge[0] is not None and edge[1] == 3]
    edge = torch.autograd.graph.GradientEdge(*edges[0])
    (alone,) = torch.autograd.grad(out, [edge], given, retain_graph=True)
    alone = alone.clone()
    beside, _ = torch.autograd.grad(out, [edge, x], given)
    assert torch.equal(alone, beside)
