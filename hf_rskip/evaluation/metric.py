"""BLEU in its three forms and chrF as a metric of `evaluate` that needs no network."""

import datasets
import evaluate
from sacrebleu.metrics import CHRF

from .bleu import create_bleu, describe_metric, scored_form


class TranslationMetric(evaluate.Metric):
    """Corpus BLEU and chrF by sacreBLEU.

    `compute(predictions=[...], references=[...], tokenize="13a", lowercase=False, target_lang=None)` takes a sentence
    each, detokenized unless `tokenize` is `"none"`, and returns `bleu` and `chrf` (0 to 100), `bleu_signature` and
    `chrf_signature`. A `target_lang` such as `"de"` adds, with their signatures, the two other forms of BLEU in the
    literature: `bleu_intl`, sacreBLEU with its international tokenizer, and, if the Moses tokenizer has the language,
    `bleu_compound_split`, that of Vaswani et al. (2017), which is not sacreBLEU
    ([`~hf_rskip.evaluation.compound_split.compound_split_bleu`]).

    Both sides are scored in Unicode NFC; where that changes a sentence, the signatures say `unicode:nfc`.

    Example:

    ```python
    >>> from hf_rskip.evaluation.metric import TranslationMetric

    >>> scores = TranslationMetric().compute(predictions=["ein kleiner Test ."], references=["ein kleiner Test ."])
    >>> round(scores["bleu"], 1)
    100.0

    ```
    """

    def __init__(self, **kwargs):
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Corpus BLEU and chrF of translations, with the signatures of sacreBLEU.",
            citation="Matt Post. A Call for Clarity in Reporting BLEU Scores. WMT 2018.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://github.com/mjpost/sacrebleu"],
        )

    def _compute(
        self,
        predictions,
        references,
        tokenize: str = "13a",
        lowercase: bool = False,
        target_lang: str | None = None,
    ) -> dict[str, float | str]:
        given = [list(predictions), list(references)]
        predictions, references = scored_form(*given)
        normalized = [predictions, references] != given
        metrics = {
            "bleu": create_bleu(tokenize, lowercase, force=tokenize == "none"),
            "chrf": CHRF(lowercase=lowercase),
        }
        if target_lang is not None:
            metrics["bleu_intl"] = create_bleu("intl", lowercase)
        scores = {}
        for name, metric in metrics.items():
            scores[name] = metric.corpus_score(predictions, [references]).score
            scores[f"{name}_signature"] = describe_metric(metric, normalized)
        if target_lang is not None:
            from .compound_split import compound_split_bleu, moses_language  # its tables take long to import

            if language := moses_language(target_lang):
                score, description = compound_split_bleu(predictions, references, language, lowercase)
                scores |= {"bleu_compound_split": score, "bleu_compound_split_signature": description}
        return scores
