"""`hf-rskip evaluate`."""

import argparse
import contextlib
import json

from transformers import PreTrainedConfig
from transformers.utils import logging

from ..data.text.arguments import DataArguments
from ..data.text.corpora import load_translation_dataset
from ..decoding.loading import load_config, load_ensemble
from ..errors import UserError
from ..evaluation.bleu import choose_tokenizer, create_bleu
from ..evaluation.evaluate import evaluate_translation, split_languages
from ..models import RSkipResNetConfig
from . import evaluate_images
from .translate import check_output, generation_kwargs, new_file, write_lines

logger = logging.get_logger(__name__)


def evaluate(args: argparse.Namespace) -> None:
    """Prints the scores of a model on one split as JSON."""
    if load_config(args.model).model_type == RSkipResNetConfig.model_type:
        evaluate_images.evaluate(args)
    else:
        _evaluate_translation(args)


def find_languages(args: argparse.Namespace, configs: dict[str, PreTrainedConfig]) -> list[str]:
    """Source and target language: those of the command line, or of the models of `configs`, which must agree.

    Says so where the command line has another than a model, as a data set may have codes of its own.
    """
    languages = []
    for key in ("source_lang", "target_lang"):
        given = getattr(args, key)
        said = {model: language for model, config in configs.items() if (language := getattr(config, key, None))}
        if given is None and len(set(said.values())) > 1:
            raise UserError(
                f"The models differ in their {key}: {', '.join(f'{m} has {code!r}' for m, code in said.items())}."
            )
        if given is None and not said and (configs or not args.test_files):
            raise UserError(f"No model says what the {key} is: give --{key}.")
        for model, language in said.items():
            if given not in (None, language):
                logger.warning(f"--{key} is {given!r}, and {model} was trained with {key} {language!r}")
        languages.append(given or next(iter(said.values()), key))  # no language is needed to pair two files
    return languages


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
    generation, config = generation_kwargs(args), load_config(args.model)
    languages = find_languages(args, {args.model: config})
    with new_file(args.output_file) if args.output_file else contextlib.nullcontext() as file:
        sources, references = load_test_set(args, *languages)
        model, tokenizer = load_ensemble([args.model, *args.ensemble])
        scores, translations = evaluate_translation(
            model,
            tokenizer,
            sources,
            references,
            choose_tokenizer(args.bleu_tokenize, languages[1]),
            languages[1],
            max_batch_tokens=args.max_batch_tokens or 4096,
            **generation,
        )
        if file:
            write_lines(file, translations)
    print(json.dumps({**scores, "sentences": len(translations)}, indent=2))
