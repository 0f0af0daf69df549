"""Augmentation of whole batches against the same done image by image."""

import pytest
import torch

from hf_rskip.data.images.augmentation import normalize, random_crop, random_flip


def create_images(count, height=6, width=5):
    generator = torch.Generator().manual_seed(0)
    # No zeros, which are the padding.
    return torch.randint(1, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def crops_of(image, padding):
    """All crops of one image, by their offsets."""
    _, height, width = image.shape
    padded = image.new_zeros(3, height + 2 * padding, width + 2 * padding)
    padded[:, padding : padding + height, padding : padding + width] = image
    return {
        (top, left): padded[:, top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    }


def test_each_crop_is_one_of_its_image_and_all_occur_equally_often():
    image, padding = create_images(1)[0], 2
    images = image.expand(5000, -1, -1, -1)
    cropped = random_crop(images, padding, torch.Generator().manual_seed(1))
    counts = {
        offsets: int((cropped == crop).flatten(1).all(1).sum()) for offsets, crop in crops_of(image, padding).items()
    }
    assert len(counts) == 25 and sum(counts.values()) == 5000
    assert min(counts.values()) > 140 and max(counts.values()) < 260  # 200 expected, standard deviation 14


def test_images_are_cropped_independently_and_stay_in_their_order():
    images = create_images(64)
    cropped = random_crop(images, 2, torch.Generator().manual_seed(1))
    offsets = [
        [place for place, crop in crops_of(image, 2).items() if torch.equal(crop, result)]
        for image, result in zip(images, cropped, strict=True)
    ]
    assert all(len(places) == 1 for places in offsets)
    assert len({places[0] for places in offsets}) > 15


def test_half_of_the_images_are_mirrored():
    images = create_images(2000)
    flipped = random_flip(images, torch.Generator().manual_seed(1))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert torch.equal(mirrored, ~kept) and 900 < int(mirrored.sum()) < 1100


@pytest.mark.parametrize("count", [0, 1])
def test_small_batches(count):
    images = create_images(count)
    assert random_crop(images, 4).shape == random_flip(images).shape == images.shape


def test_normalize():
    images, mean, std = create_images(4), [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    expected = images.double() / 255
    for channel in range(3):
        expected[:, channel] = (expected[:, channel] - mean[channel]) / std[channel]
    torch.testing.assert_close(normalize(images, mean, std).double(), expected, rtol=1e-6, atol=1e-6)
