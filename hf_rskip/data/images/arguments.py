"""Keys of a dataset of images, checked before any data is read."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ...errors import UserError
from ..arguments import DatasetArguments


@dataclass
class ImageDataArguments(DatasetArguments):
    """A dataset of images in classes and how to prepare it, for [`transformers.HfArgumentParser`].

    Raises:
        UserError: if a value is not allowed; the message names the field and what is allowed.
    """

    dataset_name: str | None = HfArg(default=None, help="Hub id or local folder of a dataset with images and labels.")
    image_column: str | None = HfArg(default=None, help="The only column of images unless given.")
    label_column: str | None = HfArg(
        default=None, help="The only column of class labels, or that called label, unless given."
    )
    validation_size: int | None = HfArg(
        default=None, help="Hold out so many training images for validation, in the proportions of the classes."
    )
    max_train_samples: int | None = HfArg(
        default=None,
        help="Use so many images of the training split only: the first, or where these lack classes some at "
        "even distances (of a stream always the first).",
    )
    streaming: bool = HfArg(default=False, help="Read images while training, rather than all of them before.")
    shuffle_buffer_size: int = HfArg(default=1000, help="Streaming draws the next image from so many at random.")
    image_size: int = HfArg(default=32, help="Height and width of the images, in pixels.")
    crop_pct: float = HfArg(
        default=1.0, help="Resize the shorter edge to image_size / crop_pct, then take the centre (evaluation)."
    )
    image_mean: list[float] = HfArg(
        default_factory=lambda: list(IMAGENET_DEFAULT_MEAN), help="Mean of each channel, from 0 to 1."
    )
    image_std: list[float] = HfArg(
        default_factory=lambda: list(IMAGENET_DEFAULT_STD), help="Standard deviation of each channel."
    )
    crop_padding: int = HfArg(
        default=4, help="Train on random crops of images with so many pixels of padding; 0 is off."
    )
    random_resized_crop: bool = HfArg(
        default=False,
        help="Train on random parts, 8%% to 100%% of the area, resized to image_size, in place of crop_padding; a "
        "resumed run draws other ones.",
    )
    horizontal_flip: bool = HfArg(default=True, help="Mirror half of the training images.")

    def __post_init__(self):
        super().__post_init__()
        if self.dataset_name is None:
            raise UserError("No dataset is named: set dataset_name.")
        if self.validation_size is not None and self.streaming:
            raise UserError("validation_size cannot hold out images that are streamed: set validation_split.")
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise UserError(f"{name} must be three numbers, for red, green and blue, not {getattr(self, name)!r}.")
        if not all(abs(value) < float("inf") for value in self.image_mean):
            raise UserError(f"image_mean must be finite, not {self.image_mean!r}.")
        if not all(0 < value < float("inf") for value in self.image_std):
            raise UserError(f"image_std must be above 0, not {self.image_std!r}.")
