"""Options shared by several commands; quick to import."""

import argparse
from collections.abc import Iterable

from ..checks import parse_count
from ..errors import UserError

_GENERATION = ("num_beams", "length_penalty", "gnmt_length_penalty", "max_new_tokens", "max_len_a", "max_len_b")
DECODING = (*_GENERATION, "max_batch_tokens")
"""Options that [`add_decoding_arguments`] adds, apart from `--ensemble`."""


def count(word: str) -> int:
    """A whole number of at least 1, as a type of argparse."""
    try:
        return parse_count("the value", word)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a trained model")


def add_decoding_arguments(parser: argparse.ArgumentParser, ensemble: bool = True) -> None:
    group = parser.add_argument_group("generation (default: the model's own)")
    group.add_argument("--num_beams", type=count)
    penalty = group.add_mutually_exclusive_group()
    penalty.add_argument("--length_penalty", type=float, help="scores are divided by length ** this")
    penalty.add_argument(
        "--gnmt_length_penalty", type=float, metavar="ALPHA", help="by ((5 + length) / 6) ** ALPHA instead"
    )
    group.add_argument("--max_new_tokens", type=count)
    group.add_argument("--max_len_a", type=float, metavar="A", help="n tokens get at most A * n + B tokens")
    group.add_argument("--max_len_b", type=int, metavar="B")
    if ensemble:
        group.add_argument(
            "--ensemble", nargs="+", default=[], metavar="MODEL", help="average probabilities with these models'"
        )
    parser.add_argument(
        "--max_batch_tokens", type=count, help="padded source tokens times beams a batch (default: 4096)"
    )


def decoding_kwargs(args: argparse.Namespace) -> dict:
    """Returns the decoding options as keywords of [`~hf_rskip.decoding.translate.translate`].

    Raises:
        [`UserError`]: if it says what a recipe may not say.
    """
    from ..recipe.translation import GenerationArguments

    given = {name: value for name in DECODING if (value := getattr(args, name)) is not None}
    GenerationArguments(**{name: given[name] for name in _GENERATION if name in given})
    return given


def refuse(args: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Raises a [`UserError`], "--NAME REASON", about the first of the options `names` that is given."""
    for name in names:
        if getattr(args, name) not in (None, []):
            raise UserError(f"--{name} {reason}")


def add_test_set_arguments(parser: argparse.ArgumentParser, or_images: str = "", required: bool = True) -> None:
    """Adds a corpus, by which a model is tested or, where it is not `required`, folded."""
    corpus = parser.add_mutually_exclusive_group(required=required)
    add_corpus_arguments(parser, corpus, or_images, "test" if required else "validation")
    parser.add_argument("--max_samples", type=count, help=f"only the first so many sentences{or_images}")
    parser.add_argument("--bleu_tokenize", help="sacreBLEU's `tokenize` (default: that of the target language)")


def add_corpus_arguments(
    parser: argparse.ArgumentParser, corpus, or_images: str = "", default_split: str = "test"
) -> None:
    """Adds the options that name a corpus and its split; `corpus` is the group of which one is given."""
    corpus.add_argument("--dataset_name", help=f"Hub id or folder with a `translation` column{or_images}, or cldr")
    corpus.add_argument("--test_files", nargs=2, metavar=("SOURCE", "TARGET"), help="two UTF-8 text files")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--source_lang", help="default: that of the model's training")
    parser.add_argument("--target_lang", help="default: that of the model's training")
    parser.add_argument("--split", help=f"of the dataset (default: {default_split})")


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image_column", help="of images (default: as in the model's training)")
    parser.add_argument("--label_column", help="of their classes (default: as in the model's training)")
