"""`hf-rskip evaluate` for image classifiers."""

import argparse
import json

from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..data.image_arguments import ImageDataArguments
from ..data.images import load_image_dataset
from ..data.pixels import decode_images
from ..decoding.loading import load_complete
from ..errors import UserError
from ..evaluation.evaluate_images import evaluate_images


def evaluate(args: argparse.Namespace) -> None:
    """Prints the accuracies of a model on one split as JSON."""
    if args.dataset_name is None:
        raise UserError("An image classifier is evaluated on a --dataset_name.")
    model = load_complete(AutoModelForImageClassification, args.model)
    try:
        processor = AutoImageProcessor.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise UserError(f"{args.model!r} has no image processor: {str(error).strip().splitlines()[0]}") from error
    data = ImageDataArguments(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        test_split=args.split,
        max_predict_samples=args.max_samples,
        image_size=processor.crop_size["height"],
        crop_pct=processor.crop_size["height"] / processor.size["shortest_edge"],
        image_mean=list(processor.image_mean),
        image_std=list(processor.image_std),
    )
    images = load_image_dataset(data, splits=("test",))
    class_names = [name for _, name in sorted(model.config.id2label.items())]
    if images.class_names != class_names:
        raise UserError(
            f"The classes of {args.dataset_name!r} ({', '.join(images.class_names[:3])}, ...) are not those of the "
            f"model ({', '.join(class_names[:3])}, ...)."
        )
    test_set = decode_images(images.splits["test"], data, "test")
    scores = evaluate_images(model, test_set, data, args.batch_size)
    print(json.dumps({**scores, "images": len(test_set)}, indent=2))
