"""sacreBLEU and chrF as a metric of `evaluate` that needs no network."""

import datasets
import evaluate
from sacrebleu.metrics import BLEU, CHRF

_CITATION = "Matt Post. A Call for Clarity in Reporting BLEU Scores. WMT 2018."

_DESCRIPTION = "Corpus BLEU and chrF of translations, with the signatures of sacreBLEU."


class TranslationMetric(evaluate.Metric):
    """Corpus BLEU and chrF by sacreBLEU.

    `compute(predictions=[...], references=[...], tokenize="13a", lowercase=False)` takes a sentence each, detokenized
    unless `tokenize` is `"none"`, and returns `bleu` and `chrf` (0 to 100), `bleu_signature` and `chrf_signature`.

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
            description=_DESCRIPTION,
            citation=_CITATION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://github.com/mjpost/sacrebleu"],
        )

    def _compute(self, predictions, references, tokenize: str = "13a", lowercase: bool = False) -> dict:
        bleu, chrf = BLEU(tokenize=tokenize, lowercase=lowercase), CHRF(lowercase=lowercase)
        return {
            "bleu": bleu.corpus_score(predictions, [references]).score,
            "chrf": chrf.corpus_score(predictions, [references]).score,
            "bleu_signature": str(bleu.get_signature()),
            "chrf_signature": str(chrf.get_signature()),
        }
