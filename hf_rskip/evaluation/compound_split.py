"""Tokenised BLEU with compound splitting, the number that Vaswani et al. (2017) report for English-German."""

import re
from collections.abc import Sequence
from importlib.metadata import version

from sacrebleu.metrics import BLEU
from sacremoses import MosesTokenizer
from sacremoses.corpus import NonbreakingPrefixes

from .bleu import separates_words

# On bytes, as Perl reads a file: a hyphen between two letters of several bytes each splits too, as in "ä-ö-ü".
_HYPHEN = re.compile(rb"(\S)-(\S)")


def moses_language(language: str) -> str | None:
    """Returns the language of a code such as `de` or `de_AT` if the Moses tokenizer has rules for it, or `None`.

    Not of one that puts no spaces between words, which the tokenizer would leave in one piece.
    """
    code = re.split("[-_]", language)[0]
    return code if code in NonbreakingPrefixes().available_langs.values() and separates_words(code) else None


def split_compounds(sentence: str) -> str:
    """Splits a tokenized sentence at its hyphens: `rich-text` becomes `rich ##AT##-##AT## text`."""
    return _HYPHEN.sub(rb"\1 ##AT##-##AT## \2", sentence.encode()).decode()


def compound_split_bleu(
    predictions: Sequence[str], references: Sequence[str], language: str, lowercase: bool = False
) -> tuple[float, str]:
    """Computes BLEU as `get_ende_bleu.sh` of tensor2tensor does, with a description of how.

    Both sides are tokenized by Moses' rules and split at hyphens; `multi-bleu.perl` then counts n-grams up to 4 with
    the brevity penalty and without smoothing. Some points above sacreBLEU, and not to be compared with it.

    Args:
        predictions, references: a detokenized sentence each.
        language: one that [`moses_language`] returns.
        lowercase: `multi-bleu.perl -lc`.

    Returns:
        The score from 0 to 100, and the description in the manner of a sacreBLEU signature.
    """
    tokenizer = MosesTokenizer(lang=language)
    sides = [
        [split_compounds(tokenizer.tokenize(sentence, return_str=True)) for sentence in side]
        for side in (predictions, references)
    ]
    bleu = BLEU(tokenize="none", smooth_method="none", lowercase=lowercase, force=True)
    description = (
        f"multi-bleu|nrefs:1|case:{'lc' if lowercase else 'mixed'}|tok:moses-{language}+compound-split|smooth:none|"
        f"sacremoses:{version('sacremoses')}"
    )
    return bleu.corpus_score(sides[0], [sides[1]]).score, description
