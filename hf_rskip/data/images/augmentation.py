"""Augmentation of training images: tensor operations on whole batches, on their device."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def random_crop(images: torch.Tensor, padding: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Pads each image with zeros and crops it to its size at a random place.

    Args:
        images: `(batch, channels, height, width)`.
        padding: zeros on each side, in pixels.
        generator: on the device of the images.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """
    batch, _, height, width = images.shape
    offsets = torch.randint(2 * padding + 1, (2, batch, 1), generator=generator, device=images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    image = torch.arange(batch, device=images.device)[:, None, None]
    padded = F.pad(images, (padding, padding, padding, padding)).permute(0, 2, 3, 1)
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Mirrors half of the images, chosen at random, left to right; `(batch, channels, height, width)`."""
    flipped = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < 0.5
    return torch.where(flipped, images.flip(-1), images)


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Computes `(images / 255 - mean) / std` by channel, of bytes `(batch, channels, height, width)`, in float32."""
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
    return (images.float() / 255 - mean) / std
