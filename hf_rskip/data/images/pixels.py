"""Decodes images to bytes of one size, before or during training."""

import zlib
from io import BytesIO

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from PIL import Image as PilImage
from PIL import UnidentifiedImageError
from torch.utils.data import default_collate
from transformers import BitImageProcessorPil
from transformers.image_utils import PILImageResampling, load_image

from ...errors import UserError, first_line
from .arguments import ImageDataArguments
from .loading import name_row


class ImageTensors(torch.utils.data.Dataset):
    """Decoded images in memory. A batch is one indexing of a tensor.

    Args:
        pixel_values: uint8, `(images, 3, height, width)`.
        labels: int64, `(images,)`.
        rows: of the images in their split, int64, `(images,)`; from 0 unless given.
    """

    def __init__(self, pixel_values: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None = None):
        self.pixel_values, self.labels = pixel_values, labels
        self.rows = torch.arange(len(labels)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index], "row": self.rows[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return self[torch.as_tensor(indices)]

    def checksum(self) -> int:
        """CRC-32 of the images and their labels."""
        return zlib.crc32(self.labels.numpy(), zlib.crc32(self.pixel_values.numpy()))


def collate(examples: dict[str, torch.Tensor] | list[dict]) -> dict[str, torch.Tensor]:
    """Stacks examples to a batch; those of [`ImageTensors`] are one already."""
    return examples if isinstance(examples, dict) else default_collate(examples)


def make_image_processor(args: ImageDataArguments) -> BitImageProcessorPil:
    """The processor with which evaluation prepares an image: resizes the shorter edge, crops the centre, normalises.

    It is Pillow's, so that it loads with `AutoImageProcessor` where torchvision is not installed.
    """
    return BitImageProcessorPil(
        size={"shortest_edge": int(args.image_size / args.crop_pct)},
        crop_size={"height": args.image_size, "width": args.image_size},
        resample=PILImageResampling.BILINEAR,
        image_mean=list(args.image_mean),
        image_std=list(args.image_std),
    )


def decode_images(dataset: Dataset, args: ImageDataArguments, split: str) -> ImageTensors:
    """Decodes all images of a split, resized and cropped as the image processor does, into memory.

    They are cached on disk beside the dataset, and reused for the same dataset and size.

    Args:
        dataset: a split of [`load_image_dataset`], not streamed.

    Raises:
        UserError: if an image cannot be decoded; the message names the row.
    """
    size, decoder = args.image_size, _Decoder(args, split)

    def decode(batch):
        rows = zip(batch["image"], batch["row"], strict=True)
        return {
            "pixel_values": [decoder.decode(image, row).reshape(-1) for image, row in rows],
            "label": batch["label"],
        }

    decoded = dataset.map(
        decode,
        batched=True,
        batch_size=100,
        remove_columns=dataset.column_names,
        features=Features({"pixel_values": List(Value("uint8"), length=3 * size * size), "label": Value("int64")}),
        num_proc=args.preprocessing_num_workers,
        new_fingerprint=Hasher.hash((dataset._fingerprint, size, args.crop_pct, "pixels")),
        desc="Decoding images",
    )
    chunks = [chunk.flatten().to_numpy() for chunk in decoded.data.column("pixel_values").chunks]
    pixel_values = torch.from_numpy(np.concatenate(chunks)).view(-1, 3, size, size)
    return ImageTensors(pixel_values, torch.tensor(decoded["label"][:]), torch.tensor(dataset["row"][:]))


def stream_images(dataset: IterableDataset, args: ImageDataArguments, split: str, seed: int) -> IterableDataset:
    """The images of a streamed split as `pixel_values`, uint8 `(3, image_size, image_size)`, and `labels`.

    Those of the training split are shuffled and, with `random_resized_crop`, cropped at random.

    Args:
        dataset: a split of [`load_image_dataset`], streamed.

    Raises:
        UserError: while reading, if an image cannot be decoded or has no label; the message names the row.
    """
    if split == "train":
        dataset = dataset.shuffle(seed=seed, buffer_size=args.shuffle_buffer_size)
    return dataset.map(_Decoder(args, split), remove_columns=["image", "label"])


class CroppedImages(torch.utils.data.Dataset):
    """Images of a split of [`load_image_dataset`] that are decoded, and maybe cropped at random, at each access."""

    def __init__(self, dataset: Dataset, args: ImageDataArguments, split: str):
        self.dataset, self.decoder = dataset, _Decoder(args, split)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.decoder(self.dataset[index])

    def checksum(self) -> int:
        """CRC-32 of the labels: to read all images would take as long as an epoch."""
        return zlib.crc32(np.asarray(self.dataset["label"][:], np.int64))


class _Decoder:
    """Decodes an example to `pixel_values`, bytes `(3, image_size, image_size)`, with its `labels` and `row`."""

    def __init__(self, args: ImageDataArguments, split: str):
        self.args, self.split = args, split
        self.processor = make_image_processor(args)
        self.crops = split == "train" and args.random_resized_crop

    def __call__(self, example: dict) -> dict:
        pixel_values = torch.from_numpy(self.decode(example["image"], example["row"]))
        return {"pixel_values": pixel_values, "labels": example["label"], "row": example["row"]}

    def decode(self, image: dict, row: int) -> np.ndarray:
        decoded = open_image(image, name_row(self.args, self.split, row))
        size = self.args.image_size
        if self.crops:
            decoded = random_resized_crop(decoded, size)
        elif decoded.size != (size, size) or self.args.crop_pct != 1:
            images = self.processor(decoded, do_rescale=False, do_normalize=False, return_tensors="np")
            return images["pixel_values"][0].astype(np.uint8)
        return np.ascontiguousarray(np.asarray(decoded).transpose(2, 0, 1))


def open_image(image: dict | None, where: str) -> PilImage.Image:
    """Decodes `{"bytes": ..., "path": ...}`, upright and in RGB as a pipeline of Transformers does.

    Raises a [`UserError`] that begins with `where` if that is not possible.
    """
    if image is None:
        raise UserError(f"{where} has no image.")
    try:
        opened = PilImage.open(BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])
        mode, decoded = opened.mode, load_image(opened)
    except UnidentifiedImageError as error:
        raise UserError(f"{where} has no image that can be decoded: it is of no known format.") from error
    except Exception as error:  # Pillow's readers raise errors of any class for broken files
        raise UserError(f"{where} has no image that can be decoded: {first_line(error)}.") from error
    if mode.startswith(("I", "F")):
        raise UserError(
            f"{where} has an image of more than 8 bits a channel ({mode}), which would be clipped: convert it."
        )
    return decoded


def random_resized_crop(image: PilImage.Image, size: int) -> PilImage.Image:
    """Crops a random part, 8% to 100% of the area and 3:4 to 4:3 in shape, and resizes it to `size` x `size` pixels.

    Source: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, section 6.
    """
    for _ in range(10):
        area, ratio = torch.rand(2).tolist()
        area = (0.08 + 0.92 * area) * image.width * image.height
        ratio = (3 / 4) ** (1 - 2 * ratio)
        width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < width <= image.width and 0 < height <= image.height:
            break
    else:
        width = height = min(image.size)
    left = int(torch.randint(image.width - width + 1, ()))
    top = int(torch.randint(image.height - height + 1, ()))
    box = (left, top, left + width, top + height)
    return image.resize((size, size), PilImage.Resampling.BILINEAR, box=box)
