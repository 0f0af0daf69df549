"""Loads the test set that the options of a command name."""

import argparse
from collections import Counter

from transformers import PreTrainedConfig
from transformers.utils import logging

from ..data.images.arguments import ImageDataArguments
from ..data.images.loading import ImageDatasets, load_image_dataset
from ..data.text.arguments import DataArguments
from ..data.text.corpora import load_translation_dataset
from ..errors import UserError
from ..evaluation.evaluate import split_languages
from .options import refuse

logger = logging.get_logger(__name__)


def find_languages(args: argparse.Namespace, configs: dict[str, PreTrainedConfig]) -> list[str]:
    """Source and target language: those of the command line, or of the models of `configs`, which must agree.

    Warns where the command line has another than a model, as a data set may have codes of its own.
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
    args: argparse.Namespace, source_lang: str, target_lang: str, max_samples: int | None = None
) -> tuple[list[str], list[str]]:
    """The sources and references of a translation corpus."""
    if args.test_files:
        refuse(args, ["dataset_config_name", "split"], "has no effect with --test_files: leave it out.")
    languages = {"source_lang": source_lang, "target_lang": target_lang}
    data = DataArguments(test_files=args.test_files, **languages, **_test_split(args, max_samples))
    data.split_key = "--split"
    return split_languages(load_translation_dataset(data, splits=("test",))["test"], source_lang, target_lang)


def load_test_images(
    args: argparse.Namespace, config: PreTrainedConfig, max_samples: int | None = None
) -> tuple[ImageDataArguments, ImageDatasets]:
    """The images of a split, in the columns of the model's training unless the command line names others.

    Labels are indices of the model's classes, which are found by name.
    """
    class_names = [name for _, name in sorted(config.id2label.items())]
    (name, number), *_ = Counter(class_names).most_common(1)
    if number > 1:
        raise UserError(f"The model has {number} classes {name!r}, and the classes of a dataset are found by name.")
    columns = {key: getattr(args, key) or getattr(config, key) for key in ("image_column", "label_column")}
    data = ImageDataArguments(**columns, **_test_split(args, max_samples))
    data.split_key = "--split"
    return data, load_image_dataset(data, ("test",), class_names)


def _test_split(args: argparse.Namespace, max_samples: int | None) -> dict:
    """The keys of a dataset that both kinds of models share."""
    keys = {key: getattr(args, key) for key in ("dataset_name", "dataset_config_name")}
    return {**keys, "test_split": args.split or "test", "max_predict_samples": max_samples}
