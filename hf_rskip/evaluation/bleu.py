"""sacreBLEU's BLEU for a target language, and the normalization of text before scoring."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics import BLEU
from sacrebleu.metrics.base import Metric
from transformers.utils import logging

from ..errors import UserError

logger = logging.get_logger(__name__)

_OWN_TOKENIZERS = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}
_ALIASES = {"zho": "zh", "cmn": "zh", "yue": "zh", "jpn": "ja", "kor": "ko"}
_WITHOUT_SPACES = {"th", "tha", "lo", "lao", "km", "khm", "my", "mya", "bo", "bod", "dz", "dzo"}


def choose_tokenizer(tokenize: str | None, target_lang: str | None) -> str:
    """Chooses sacreBLEU's `tokenize`: the given one, or that of the target language.

    Chinese, Japanese and Korean have their own, as on sacreBLEU's command line; `char` is that of further languages,
    which do not put spaces between words, and stands in for a tokenizer that is not installed, with a warning; of all
    others it is `13a`.

    Args:
        tokenize: `None` to choose.
        target_lang: a code such as `zh`, `zh_TW` or `zho_Hans`.

    Raises:
        [`UserError`]: if sacreBLEU has no such tokenizer.
    """
    if tokenize is not None:
        create_bleu(tokenize)
        return tokenize
    code = _code(target_lang)
    if code in _WITHOUT_SPACES:
        return "char"
    own = _OWN_TOKENIZERS.get(code, "13a")
    try:
        create_bleu(own)
    except UserError:
        logger.warning_once(
            f"BLEU counts characters (tok:char), as {own} is not installed: `pip install 'sacrebleu[{own[:2]}]'`"
        )
        return "char"
    return own


def separates_words(language: str) -> bool:
    """Whether BLEU takes the words of a language from its spaces; those of Korean, which has spaces, it splits."""
    return _code(language) not in {*_OWN_TOKENIZERS, *_WITHOUT_SPACES}


def _code(language: str | None) -> str:
    code = re.split("[-_]", language or "")[0].lower()
    return _ALIASES.get(code, code)


def create_bleu(tokenize: str, lowercase: bool = False, force: bool = True) -> BLEU:
    """Creates sacreBLEU's BLEU.

    Unless `force`, it warns of text that looks tokenized.

    Raises:
        [`UserError`]: if sacreBLEU has no such tokenizer.
    """
    try:
        return BLEU(lowercase, force, tokenize)
    # An unknown name, a package that is not installed, a model that cannot be downloaded.
    except (KeyError, ValueError, ImportError, RuntimeError, OSError) as error:
        raise UserError(f"bleu_tokenize {tokenize!r} is not to be had from sacreBLEU.") from error


def scored_form(*texts: Sequence[str], lowercase: bool = False) -> list[list[str]]:
    """Normalizes texts to Unicode NFC, as tokenizers of this package do, and with `lowercase` to lower case.

    NFC also where a tokenizer puts out NFKC: NFC writes the same text in one way, while NFKC makes another of it (`x²`
    becomes `x2`), and a model that cannot give the text of the reference has not given it.
    """
    forms = ([unicodedata.normalize("NFC", sentence) for sentence in text] for text in texts)
    return [[sentence.lower() for sentence in form] if lowercase else form for form in forms]


def describe_metric(metric: Metric, normalized: bool, **values: Any) -> str:
    """Returns sacreBLEU's signature of a metric that was computed.

    Args:
        metric: of sacreBLEU.
        normalized: whether [`scored_form`] changed a sentence: sacreBLEU alone would give another score.
        values: further entries of the signature.
    """
    signature = metric.get_signature()
    for name, value in (values | ({"unicode": "nfc"} if normalized else {})).items():
        signature.update(name, value)
    return str(signature)
