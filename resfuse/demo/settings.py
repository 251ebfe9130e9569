"""The sizes of the demonstration: what `resfuse demo` and `resfuse demo --quick` run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resfuse import backends


@dataclass(frozen=True)
class Settings:
    """How much of everything.

    Attributes:
        network: an ImageNet network that torchvision and resfuse.models share, for parity and speed.
        photos, photo_size: images in a batch, and their side in pixels.
        rounds: timed samples of a training step; inference takes twice as many.
        digits_network: a CIFAR network of resfuse.models.
        train_digits, test_digits, digits_batch, epochs: the training run.
        dtypes: "float32" and, as autocast, "bfloat16".
        emulated_photos, emulated_rounds: at most so many for a dtype whose convolutions torch emulates on this
            processor, which takes it ten times as long.
    """

    network: str = "resnet50"
    photos: int = 8
    photo_size: int = 224
    rounds: int = 5
    digits_network: str = "cifar_resnet20"
    train_digits: int = 4000
    test_digits: int = 1000
    digits_batch: int = 64
    epochs: int = 2
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    emulated_photos: int = 2
    emulated_rounds: int = 2

    def photos_of(self, dtype: str) -> int:
        """How many photographs a dtype gets."""
        return min(self.photos, self.emulated_photos) if _emulated(dtype) else self.photos

    def rounds_of(self, dtype: str) -> int:
        """How many rounds are timed in a dtype."""
        return min(self.rounds, self.emulated_rounds) if _emulated(dtype) else self.rounds


def _emulated(dtype: str) -> bool:
    return backends.emulated("cpu", getattr(torch, dtype))


FULL = Settings()
QUICK = Settings(photos=4, photo_size=128, rounds=3, train_digits=2000, test_digits=500, epochs=1)
