"""`hf-rskip evaluate` for image classifiers."""

import argparse
import json
from functools import partial

from transformers import AutoModelForImageClassification

from ..data.image_arguments import ImageDataArguments
from ..data.images import load_image_dataset, name_row
from ..decoding.loading import load_complete, load_image_processor
from ..errors import UserError
from ..evaluation.evaluate_images import evaluate_images


def evaluate(args: argparse.Namespace) -> None:
    """Prints the accuracies of a model on one split as JSON."""
    if args.dataset_name is None:
        raise UserError("An image classifier is evaluated on a --dataset_name.")
    for option in ("output_file", "num_beams", "length_penalty", "max_new_tokens", "source_lang", "target_lang"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} is for models that translate, and {args.model!r} classifies images.")
    model = load_complete(AutoModelForImageClassification, args.model)
    processor = load_image_processor(args.model)
    data = ImageDataArguments(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        test_split=args.split,
        max_predict_samples=args.max_samples,
    )
    images = load_image_dataset(data, splits=("test",))
    class_names = [name for _, name in sorted(model.config.id2label.items())]
    if images.class_names != class_names:
        raise UserError(
            f"The classes of {args.dataset_name!r} are not those of the model: {_shorten(images.class_names)}, and "
            f"{_shorten(class_names)}."
        )
    test_set = images.splits["test"]
    scores = evaluate_images(model, processor, test_set, partial(name_row, data, "test"), args.batch_size)
    print(json.dumps({**scores, "images": len(test_set)}, indent=2))


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
