"""`hf-rskip evaluate`."""

import argparse
import contextlib
import json

from ..data.arguments import DataArguments
from ..data.corpora import load_translation_dataset
from ..decoding.loading import load_config, load_ensemble
from ..errors import UserError
from ..evaluation.bleu import choose_tokenizer, create_bleu
from ..evaluation.evaluate import evaluate_translation, split_languages
from ..models import RSkipResNetConfig
from . import evaluate_images
from .translate import check_output, generation_kwargs, new_file, write_lines


def evaluate(args: argparse.Namespace) -> None:
    """Prints the scores of a model on one split as JSON."""
    if load_config(args.model).model_type == RSkipResNetConfig.model_type:
        evaluate_images.evaluate(args)
    else:
        _evaluate_translation(args)


def load_test_set(
    args: argparse.Namespace, source_lang: str | None, target_lang: str | None
) -> tuple[list[str], list[str]]:
    """The sources and references that the command line names."""
    data = DataArguments(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        test_files=args.test_files,
        source_lang=source_lang,
        target_lang=target_lang,
        test_split=args.split,
        max_predict_samples=args.max_samples,
    )
    return split_languages(load_translation_dataset(data, splits=("test",))["test"], source_lang, target_lang)


def _evaluate_translation(args: argparse.Namespace) -> None:
    """With the signatures and what decoding used."""
    for option in ("image_column", "label_column", "batch_size"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} is for models that classify images, and {args.model!r} translates.")
    check_output(args.output_file, args.test_files or ())
    if args.bleu_tokenize is not None:
        create_bleu(args.bleu_tokenize)
    with new_file(args.output_file) if args.output_file else contextlib.nullcontext() as file:
        scores, translations = _score_translations(args, generation_kwargs(args))
        if file:
            write_lines(file, translations)
    print(json.dumps({**scores, "sentences": len(translations)}, indent=2))


def _score_translations(args: argparse.Namespace, generation: dict) -> tuple[dict[str, float | str], list[str]]:
    model, tokenizer = load_ensemble([args.model, *args.ensemble])
    source_lang = args.source_lang or getattr(model.config, "source_lang", None)
    target_lang = args.target_lang or getattr(model.config, "target_lang", None)
    bleu_tokenize = choose_tokenizer(args.bleu_tokenize, target_lang)
    sources, references = load_test_set(args, source_lang, target_lang)
    return evaluate_translation(
        model,
        tokenizer,
        sources,
        references,
        bleu_tokenize,
        target_lang,
        max_batch_tokens=args.max_batch_tokens or 4096,
        **generation,
    )
