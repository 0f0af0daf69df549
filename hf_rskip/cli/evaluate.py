"""`hf-rskip evaluate`."""

import argparse
import contextlib
import json
from functools import partial

from ..errors import UserError
from .files import check_output, new_file, write_lines
from .options import (
    DECODING,
    add_decoding_arguments,
    add_image_arguments,
    add_model_argument,
    add_test_set_arguments,
    count,
    decoding_kwargs,
    refuse,
)

_OF_IMAGES = ("image_column", "label_column", "batch_size")
_OF_TRANSLATION = (*DECODING, "ensemble", "output_file", "source_lang", "target_lang", "bleu_tokenize")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    add_test_set_arguments(parser, " or images")
    add_image_arguments(parser)
    parser.add_argument("--batch_size", type=count, help="images at once (default: 256)")
    parser.add_argument("--output_file", help="write the translations here, a line each")
    add_decoding_arguments(parser)


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Prints the scores of a model on one split as JSON."""
    from ..decoding.loading import classifies_images

    evaluate = _evaluate_images if classifies_images(args.model) else _evaluate_translation
    print(json.dumps(evaluate(args), indent=2))


def _evaluate_translation(args: argparse.Namespace) -> dict:
    """Scores of a translation model, with the signatures of the metrics and the number of sentences."""
    from ..decoding.loading import load_config, load_ensemble
    from ..evaluation.bleu import choose_tokenizer
    from ..evaluation.evaluate import evaluate_translation
    from .corpus import find_languages, load_test_set

    refuse(args, _OF_IMAGES, f"is for models that classify images, and {args.model!r} translates.")
    check_output(args.output_file, args.test_files or ())
    decoding = decoding_kwargs(args)
    languages = find_languages(args, {args.model: load_config(args.model)})
    bleu_tokenize = choose_tokenizer(args.bleu_tokenize, languages[1])
    with new_file(args.output_file) if args.output_file else contextlib.nullcontext() as file:
        sources, references = load_test_set(args, *languages, args.max_samples)
        model, tokenizer = load_ensemble([args.model, *args.ensemble])
        scores, translations = evaluate_translation(
            model, tokenizer, sources, references, bleu_tokenize, languages[1], **decoding
        )
        if file:
            write_lines(file, translations)
    return {**scores, "sentences": len(translations)}


def _evaluate_images(args: argparse.Namespace) -> dict:
    """Accuracies of an image classifier, with the number of images."""
    from ..data.images.loading import name_row
    from ..decoding.loading import load_image_classifier
    from ..evaluation.image_metric import evaluate_images
    from .corpus import load_test_images

    if args.dataset_name is None:
        raise UserError("An image classifier is evaluated on a --dataset_name.")
    refuse(args, _OF_TRANSLATION, f"is for models that translate, and {args.model!r} classifies images.")
    model, processor = load_image_classifier(args.model)
    data, images = load_test_images(args, model.config, args.max_samples)
    test_set = images.splits["test"]
    scores = evaluate_images(model, processor, test_set, partial(name_row, data, "test"), args.batch_size or 256)
    return {**scores, "images": len(test_set)}
