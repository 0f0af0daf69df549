"""The image processor of a model: how evaluation prepares an image."""

from transformers import BitImageProcessorPil
from transformers.image_utils import PILImageResampling

from .arguments import ImageDataArguments


def make_image_processor(args: ImageDataArguments) -> BitImageProcessorPil:
    """Resizes the shorter edge to `image_size / crop_pct`, bilinear, crops the centre, normalises.

    It is Pillow's, so that it loads with `AutoImageProcessor` where torchvision is not installed.
    """
    return BitImageProcessorPil(
        size={"shortest_edge": int(args.image_size / args.crop_pct)},
        crop_size={"height": args.image_size, "width": args.image_size},
        resample=PILImageResampling.BILINEAR,
        image_mean=list(args.image_mean),
        image_std=list(args.image_std),
    )
