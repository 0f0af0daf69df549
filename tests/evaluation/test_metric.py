"""The metric: sacreBLEU's numbers, through the interface of `evaluate`, without a network."""

import logging
import socket

import evaluate
import pytest
import sacrebleu
from sacrebleu.metrics import BLEU, CHRF

from hf_rskip.evaluation.evaluate import evaluate_translation, split_languages
from hf_rskip.evaluation.metric import TranslationMetric

PREDICTIONS = ["The cat sat, on the mat.", "A dog", "", "Ünïcode “quotes” – and 1,000.5 numbers!"]
REFERENCES = ["The cat sat on the mat.", "A big Dog barks.", "empty", "Unicode “quotes” – and 1,000.5 numbers!"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the metric needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("tokenize", ["13a", "none", "intl", "char"])
@pytest.mark.parametrize("lowercase", [False, True])
def test_equals_sacrebleu(tokenize, lowercase):
    scores = TranslationMetric().compute(
        predictions=PREDICTIONS, references=REFERENCES, tokenize=tokenize, lowercase=lowercase
    )
    bleu, chrf = BLEU(tokenize=tokenize, lowercase=lowercase), CHRF(lowercase=lowercase)
    assert scores == {
        "bleu": bleu.corpus_score(PREDICTIONS, [REFERENCES]).score,
        "chrf": chrf.corpus_score(PREDICTIONS, [REFERENCES]).score,
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
    }


def test_defaults_are_those_of_sacrebleu():
    scores = TranslationMetric().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert scores["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES]).score
    assert scores["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_is_a_metric_of_evaluate_that_takes_batches():
    metric = TranslationMetric()
    assert isinstance(metric, evaluate.Metric)
    whole = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    for start in range(0, 4, 2):
        metric.add_batch(predictions=PREDICTIONS[start : start + 2], references=REFERENCES[start : start + 2])
    assert metric.compute() == whole
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute() == whole
    combined = evaluate.combine([metric]).compute(predictions=PREDICTIONS, references=REFERENCES)
    assert combined == whole


def test_metrics_at_the_same_time_do_not_mix():
    first, second = TranslationMetric(), TranslationMetric()
    first.add_batch(predictions=["a b c d e"], references=["a b c d e"])
    second.add_batch(predictions=["x"], references=["y z"])
    assert first.compute()["bleu"] == pytest.approx(100)
    assert second.compute()["bleu"] == 0


def test_evaluation_scores_what_it_translates(model_and_tokenizer, pairs):
    sources, references = split_languages({"translation": pairs["test"]}, "en", "de")
    assert (sources[3], references[3]) == (pairs["test"][3]["en"], pairs["test"][3]["de"])
    scores, translations = evaluate_translation(*model_and_tokenizer, sources, references, num_beams=1)
    assert len(translations) == len(sources)
    assert scores["bleu"] == sacrebleu.corpus_bleu(translations, [references]).score > 0


def test_tokenized_text_is_no_surprise_where_it_is_said(caplog, monkeypatch):
    """sacreBLEU warns of 100 lines that look tokenized, unless `tokenize` says that they are."""
    monkeypatch.setattr(logging.getLogger("sacrebleu"), "propagate", True)
    lines = ["ein Satz ."] * 101
    TranslationMetric().compute(predictions=lines, references=lines, tokenize="none")
    assert not caplog.records
    TranslationMetric().compute(predictions=lines, references=lines)
    assert "tokenized" in caplog.text
