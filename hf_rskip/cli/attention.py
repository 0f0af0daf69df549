"""`hf-rskip attention`."""

import argparse
import sys

from .options import add_model_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("sentence", metavar="SENTENCE", help="in the source language")
    parser.add_argument("output_file", metavar="PICTURE", help="such as attention.png or attention.pdf")
    parser.add_argument("--translation", help="default: the model's own")


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Translates a sentence, unless a translation is given, draws its cross-attention, and prints it."""
    from ..decoding.attention_plot import plot_attention
    from ..decoding.loading import load_model
    from ..decoding.translate import translate

    model, tokenizer = load_model(args.model)
    translation = args.translation
    if translation is None:
        (translation,) = translate(model, tokenizer, [args.sentence])
    plot_attention(model, tokenizer, args.sentence, translation, args.output_file)
    print(translation)
    print(f"picture: {args.output_file}", file=sys.stderr)
