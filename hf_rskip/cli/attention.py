"""`hf-rskip attention`."""

import argparse

from ..decoding.attention_plot import plot_attention
from ..decoding.loading import load_model
from ..decoding.translate import translate


def attention(args: argparse.Namespace) -> None:
    """Translates a sentence, unless a translation is given, draws its cross-attention, and prints it."""
    model, tokenizer = load_model(args.model)
    translation = args.translation
    if translation is None:
        (translation,) = translate(model, tokenizer, [args.sentence])
    plot_attention(model, tokenizer, args.sentence, translation, args.output_file)
    print(translation)
