"""Parity part: one training step of stock and fused networks on photographs, against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resfuse import fuse
from resfuse.bench import parity
from resfuse.bench.peers import import_torchvision
from resfuse.demo.settings import Settings
from resfuse.models import get_model

# label of a run, which library builds the network, whether it is fused, and its memory layout
_RUNS = (
    ("stock channels_last", "torchvision", False, torch.channels_last),
    ("stock contiguous", "torchvision", False, torch.contiguous_format),
    ("stock resfuse.models", "resfuse", False, torch.channels_last),
    ("fused torchvision", "torchvision", True, torch.channels_last),
    ("fused resfuse.models", "resfuse", True, torch.channels_last),
)


def ticks(settings: Settings) -> int:
    """How often :func:`measure` calls tick."""
    return len({settings.photos_of(name) for name in settings.dtypes}) + len(_RUNS) * len(settings.dtypes)


def build(library: str, network: str, seed: int = 0) -> nn.Module:
    """An untrained network of "torchvision" or of "resfuse"; the same seed gives both the same weights."""
    torch.manual_seed(seed)
    if library == "resfuse":
        return get_model(network)
    return getattr(import_torchvision().models, network)()


def to_layout(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """The model with its weights in a memory layout, in place."""
    return model.to(memory_format=layout)  # type: ignore[call-overload]


def measure(photos: Tensor, settings: Settings, backend: str | None, tick: Callable[[], object]) -> dict[str, Any]:
    """Run the step in every dtype by stock and fused networks from the same weights, and in float64 beside them.

    Args:
        photos (Tensor): (N, 3, H, W) float32, normalised; image i has label i.
        settings (Settings): the network and the dtypes.
        backend (str | None): for the fused networks.
        tick (Callable[[], object]): called after every run.

    Returns:
        dict: for each dtype errors of every run, verdicts and whether the two stock networks agree bit for bit; and
        "holds", whether every bound does.
    """
    networks = {"torchvision": parity.condition(build("torchvision", settings.network))}
    networks["resfuse"] = build("resfuse", settings.network)
    networks["resfuse"].load_state_dict(networks["torchvision"].state_dict())
    exact: dict[int, parity.Step] = {}
    found = {}
    for name in settings.dtypes:
        images = photos[: settings.photos_of(name)]
        labels = torch.arange(len(images))
        if len(images) not in exact:
            double = copy.deepcopy(networks["torchvision"]).double()
            exact[len(images)] = parity.training_step(double, images.double(), labels)
            tick()
        dtype = getattr(torch, name)
        autocast = None if dtype == torch.float32 else dtype
        steps: dict[str, parity.Step] = {}
        for label, library, fused, layout in _RUNS:
            model = to_layout(copy.deepcopy(networks[library]), layout)
            if fused:
                fuse(model, backend=backend, strict=True)
            steps[label] = parity.training_step(model, images.contiguous(memory_format=layout), labels, autocast)
            tick()
        found[name] = _judged(steps, exact[len(images)], dtype)
    return {"dtypes": found, "holds": all(v["holds"] for d in found.values() for v in d["verdicts"])}


def _judged(steps: dict[str, parity.Step], exact: parity.Step, dtype: torch.dtype) -> dict[str, Any]:
    errors = {label: parity.step_errors(step, exact) for label, step in steps.items()}
    stock = [found for label, found in errors.items() if label.startswith("stock")]
    verdicts = [
        {"run": label, **verdict._asdict(), "holds": verdict.holds}
        for label, found in errors.items()
        if label.startswith("fused")
        for verdict in parity.judge(found, stock, dtype)
    ]
    plain = {label: {q: e._asdict() for q, e in found.items()} for label, found in errors.items()}
    same = _identical(steps["stock channels_last"], steps["stock resfuse.models"])
    return {"errors": plain, "verdicts": verdicts, "stock_networks_identical": same}


def _identical(a: parity.Step, b: parity.Step) -> bool:
    return all(torch.equal(a[q][name], b[q][name]) for q in a for name in a[q])
