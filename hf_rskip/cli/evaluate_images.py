"""`hf-rskip evaluate` for image classifiers."""

import argparse
import json
from functools import partial

from transformers import AutoModelForImageClassification, PreTrainedConfig

from ..data.images.arguments import ImageDataArguments
from ..data.images.loading import ImageDatasets, load_image_dataset, name_row
from ..decoding.loading import load_complete, load_image_processor
from ..errors import UserError
from ..evaluation.evaluate_images import evaluate_images

_OF_TRANSLATION = (
    *("output_file", "num_beams", "length_penalty", "gnmt_length_penalty", "max_new_tokens", "max_len_a", "max_len_b"),
    *("ensemble", "source_lang", "target_lang", "bleu_tokenize", "max_batch_tokens"),
)


def evaluate(args: argparse.Namespace) -> None:
    """Prints the accuracies of a model on one split as JSON."""
    if args.dataset_name is None:
        raise UserError("An image classifier is evaluated on a --dataset_name.")
    for option in _OF_TRANSLATION:
        if getattr(args, option) not in (None, []):
            raise UserError(f"--{option} is for models that translate, and {args.model!r} classifies images.")
    model = load_complete(AutoModelForImageClassification, args.model)
    processor = load_image_processor(args.model)
    data, images = load_test_images(args, model.config, args.max_samples)
    class_names = [name for _, name in sorted(model.config.id2label.items())]
    if images.class_names != class_names:
        raise UserError(
            f"The classes of {args.dataset_name!r} are not those of the model: {_shorten(images.class_names)}, and "
            f"{_shorten(class_names)}."
        )
    test_set = images.splits["test"]
    scores = evaluate_images(model, processor, test_set, partial(name_row, data, "test"), args.batch_size or 256)
    print(json.dumps({**scores, "images": len(test_set)}, indent=2))


def load_test_images(
    args: argparse.Namespace, config: PreTrainedConfig, max_samples: int | None = None
) -> tuple[ImageDataArguments, ImageDatasets]:
    """The split that the command line names, with the columns of the model's training unless it names others."""
    data = ImageDataArguments(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        image_column=args.image_column or config.image_column,
        label_column=args.label_column or config.label_column,
        test_split=args.split,
        max_predict_samples=max_samples,
    )
    return data, load_image_dataset(data, splits=("test",))


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
