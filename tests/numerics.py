"""What counts as right: the tolerance of every numerical test, and what tests are built from: inputs and steps.

The rule: against a float64 reference, the error is at most twice that of stock torch's own path in the same dtype, plus
one floor per dtype. Errors are relative in the L2 norm, gradients are judged by their cosine too.
"""

import pytest
import torch
import torch.nn.functional as F

from resfuse import BatchNorm2dParameters

# what a correct result may be off by where stock happens to be exact: a few roundings, or one quarter of a coarse one
FLOOR = {torch.float64: 1e-15, torch.float32: 5e-7, torch.float16: 2.5e-4, torch.bfloat16: 2e-3}
GRADIENT_MARGIN = 100  # an exact gradient must be this many error bounds long: a zero one cannot pass
CHAIN_MARGIN = 10  # likewise behind several 16-bit convolutions, where stock's own error nears a hundredth

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced")
RESIDUALS = ("none", "identity", "raw")

# what tests run over
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
DENSE = pytest.mark.parametrize("layout", LAYOUTS[:2])
TRAIN_EVAL = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def _relative(error, size):
    return (error / size).item() if size > 0 else float(error.item() > 0)


def assert_as_exact(ours, stock, exact, name="out", *, scale=None, margin=GRADIENT_MARGIN):
    """ours is as close to exact as the rule demands; a name that starts with "grad" is held to a gradient's rules.

    scale: the length (L2 norm) that errors are relative to, where exact's own may be near 0, as a running mean's.
    """
    assert (ours is None) == (exact is None), f"{name} is {'missing' if ours is None else 'not None'}"
    if exact is None:
        return
    assert ours.shape == exact.shape, f"{name} has shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    assert ours.dtype == stock.dtype, f"{name} is {ours.dtype}, stock {stock.dtype}"
    if not exact.is_floating_point():
        assert torch.equal(ours, exact), f"{name} is {ours}, not {exact}"
        return
    dtype = ours.dtype
    ours, stock, exact = (t.detach().double().flatten() for t in (ours, stock, exact))
    assert exact.isfinite().all() and stock.isfinite().all(), f"{name}: the oracle is not finite"
    assert ours.isfinite().all(), f"{name} has {(~ours.isfinite()).sum()} values that are not finite"
    size = exact.norm() if scale is None else torch.as_tensor(scale, dtype=torch.float64)
    bound = 2 * _relative((stock - exact).norm(), size) + FLOOR[dtype]
    error = _relative((ours - exact).norm(), size)
    assert error <= bound, f"{name} is off by {error:.2e}, allowed {bound:.2e} ({dtype})"
    if name.startswith("grad"):
        _assert_gradient(ours, exact, bound * size, margin, name)


def _assert_gradient(ours, exact, allowed, margin, name):
    length = exact.norm()
    if exact.numel() == 0:
        return
    assert length > margin * allowed, f"{name}: a gradient of norm {length:.2e} proves nothing"
    distance = 1 - F.cosine_similarity(ours, exact, dim=0)
    assert distance <= (allowed / length) ** 2 + 1e-12, f"{name} points elsewhere: 1 - cosine is {distance:.2e}"


def assert_all_as_exact(ours, stock, exact, **options):
    """assert_as_exact for dicts of results by name."""
    assert ours.keys() == stock.keys() == exact.keys()
    for name in exact:
        assert_as_exact(ours[name], stock[name], exact[name], name, **options)


def laid_out(x, layout):
    """x's values in another memory layout. What lies between a slice's values is NaN."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "permuted":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        room = x.new_full((*x.shape[:3], 2 * x.shape[3] + 1), float("nan"))
        room[..., 1::2] = x
        return room[..., 1::2]
    return x.contiguous()


def image(shape, dtype=torch.float32, layout="contiguous", *, mean=1.0, std=1.0):
    """A random activation whose channels have means within `mean` +- 0.5 and standard deviations around `std`."""
    centers = mean + torch.rand(shape[1], 1, 1) - 0.5
    spread = std * (0.75 + 0.5 * torch.rand(shape[1], 1, 1))
    return laid_out((torch.randn(shape, dtype=torch.float64) * spread + centers).to(dtype), layout)


def gradient_for(z, dtype):
    """A random incoming gradient of relu(z) in `dtype`: zero where a rounding error of z may flip the mask."""
    return (torch.randn(z.shape) * (z.abs() > 16 * torch.finfo(dtype).eps)).to(dtype)


def batch_norm(channels, dtype=torch.float32, *, training=True, statistics=None, affine="wb", **options):
    """Random parameters; `affine` names those that there are: "w", "b", "wb" or ""."""
    statistics = dtype if statistics is None else statistics
    weight = (torch.rand(channels) + 0.5) * torch.where(torch.rand(channels) < 0.3, -1.0, 1.0)
    return BatchNorm2dParameters(
        running_mean=(0.5 + torch.rand(channels)).to(statistics),
        running_var=(0.5 + torch.rand(channels)).to(statistics),
        weight=weight.to(dtype) if "w" in affine else None,
        bias=(torch.randn(channels) / 4).to(dtype) if "b" in affine else None,
        training=training,
        num_batches_tracked=torch.tensor(3),
        **options,
    )


def leaf(tensor, dtype=None):
    """A copy to differentiate with respect to, in the same memory layout."""
    if tensor is None:
        return None
    if dtype is None:
        return tensor.detach().requires_grad_()
    return tensor.detach().to(dtype, copy=True).requires_grad_()


def copy_of(bn, dtype=None):
    """bn's parameters as fresh leaves and its statistics as fresh tensors, so that each path updates its own."""
    if bn is None:
        return None
    fresh = {
        field: None if (t := getattr(bn, field)) is None else t.detach().to(dtype or t.dtype, copy=True)
        for field in ("running_mean", "running_var", "weight", "bias")
    }
    for field in ("weight", "bias"):
        if fresh[field] is not None:
            fresh[field].requires_grad_()
    batches = bn.num_batches_tracked
    return bn._replace(**fresh, num_batches_tracked=None if batches is None else batches.clone())


def stock_batch_norm(x, bn):
    """torch.nn.BatchNorm2d's forward on plain parameters."""
    factor = bn.momentum or 0.0
    if bn.training and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        factor = 1 / bn.num_batches_tracked.item() if bn.momentum is None else bn.momentum
    mean, var = bn.running_mean, bn.running_var
    return F.batch_norm(x, mean, var, bn.weight, bn.bias, bn.training or mean is None, factor, bn.eps)


def stock_bn_act(x, bn, residual=None, residual_bn=None, activation="relu"):
    """What a network of stock modules computes: act(BN(x) + r), each step rounded to x's dtype."""
    z = stock_batch_norm(x, bn)
    if residual is not None:
        z = z + (residual if residual_bn is None else stock_batch_norm(residual, residual_bn))
    return F.relu(z) if activation == "relu" else z


def outcome(out, inputs, grad_out, norms=()):
    """Everything a call leaves behind, by name: its output, the gradients of `inputs`, and updated statistics."""
    wanted = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), grad_out.to(out.dtype), allow_unused=True)
    found = {"out": out.detach(), **{f"grad_{name}": grad for name, grad in zip(wanted, grads, strict=True)}}
    for i, bn in enumerate(norms):
        for field in ("running_mean", "running_var", "num_batches_tracked"):
            if getattr(bn, field) is not None:
                found[f"{field} {i}"] = getattr(bn, field).detach().clone()
    return found


def step(module, x, residual=None, *, call=None, target=None, scale=1.0, autocast=False, needs_grad=True):
    """Everything a training step leaves behind, by name: its output, every gradient, the buffers.

    call: what runs the module, where it is not the module itself, as what torch.compile made of it.
    target: classes, for the cross entropy of every output as the loss; without it out's gradient is a ramp times scale.
    """
    module.zero_grad()
    inputs = {
        name: leaf(t).requires_grad_(needs_grad) for name, t in (("x", x), ("residual", residual)) if t is not None
    }
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        out = (module if call is None else call)(*inputs.values())
        loss = None if target is None else F.cross_entropy(out, target, reduction="none")
    found = {"out": out.detach()}
    if loss is None:
        out.backward(scale * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out))
    else:
        loss.sum().backward()
        found["loss"] = loss.detach()
    leaves = inputs | dict(module.named_parameters())
    found |= {f"grad {name}": t.grad for name, t in leaves.items()}
    return found | {name: b.clone() for name, b in module.named_buffers()}


def judged(result, exact):
    """Results by name, all gradients as one vector in which each has length 1: few channels make an error haphazard."""
    assert [t is None for t in result.values()] == [t is None for t in exact.values()]
    found = {key: t for key, t in result.items() if not key.startswith("grad") and t is not None}
    grads = [(t, exact[key]) for key, t in result.items() if key.startswith("grad") and t is not None]
    if grads:
        found["grads"] = torch.cat([(t / wanted.norm().to(t.dtype)).flatten() for t, wanted in grads])
    return found
