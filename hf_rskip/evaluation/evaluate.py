"""Translates a test set and scores it, for validation, test and the command line."""

from collections.abc import Sequence

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decoding.translate import translate
from .metric import TranslationMetric


def evaluate_translation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    references: Sequence[str],
    bleu_tokenize: str = "13a",
    target_lang: str | None = None,
    **translate_kwargs,
) -> tuple[dict[str, float | str], list[str]]:
    """Returns scores and translations of a model; under several processes each translates a share.

    Case does not count where the tokenizer lower-cases all text, and the signatures say so.

    Args:
        model, tokenizer: as the Auto classes load them.
        sources, references: a sentence each, in the same order.
        bleu_tokenize: sacreBLEU's `tokenize`.
        target_lang: asks for all forms of BLEU; see [`~hf_rskip.evaluation.metric.TranslationMetric`].
        translate_kwargs: of [`~hf_rskip.decoding.translate.translate`].
    """
    with PartialState().split_between_processes(list(sources)) as share:
        translations = gather_object(translate(model, tokenizer, share, **translate_kwargs))
    scores = TranslationMetric().compute(
        predictions=translations,
        references=references,
        tokenize=bleu_tokenize,
        lowercase=lowercases(tokenizer),
        target_lang=target_lang,
    )
    return scores, translations


def lowercases(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer lower-cases text, so that a model cannot restore its case."""
    return tokenizer.decode(tokenizer("Upper Case").input_ids, skip_special_tokens=True).strip() == "upper case"


def split_languages(dataset: Dataset, source_lang: str, target_lang: str) -> tuple[list[str], list[str]]:
    """Returns the sources and the references of a dataset with a `translation` column."""
    pairs = dataset["translation"]
    return [pair[source_lang] for pair in pairs], [pair[target_lang] for pair in pairs]
