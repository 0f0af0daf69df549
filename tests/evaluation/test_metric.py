"""The metric: sacreBLEU's numbers, through the interface of `evaluate`, without a network."""

import copy
import importlib.util
import logging
import socket
import unicodedata

import evaluate
import pytest
import sacrebleu
from sacrebleu.metrics import BLEU, CHRF
from tokenizers import normalizers
from transformers.utils import logging as transformers_logging

from hf_rskip.data.text.tokenizer import train_tokenizer
from hf_rskip.errors import UserError
from hf_rskip.evaluation.bleu import choose_tokenizer
from hf_rskip.evaluation.evaluate import evaluate_translation, lowercases, split_languages
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


@pytest.mark.parametrize(
    ("language", "tokenize", "own"),
    [("zh", "zh", True), ("zh_TW", "zh", True), ("zho_Hans", "zh", True), ("de", "13a", True), ("th", "char", True)]
    + [
        ("ja", "ja-mecab", importlib.util.find_spec("MeCab")),
        ("kor", "ko-mecab", importlib.util.find_spec("mecab_ko")),
    ],
)
def test_the_tokenizer_is_that_of_the_language(language, tokenize, own, caplog):
    transformers_logging.get_logger("hf_rskip.evaluation.bleu").warning_once.cache_clear()
    assert choose_tokenizer(None, language) == (tokenize if own else "char")
    assert [record.levelname for record in caplog.records] == ([] if own else ["WARNING"])
    assert own or f"as {tokenize} is not installed: `pip install 'sacrebleu[{tokenize[:2]}]'`" in caplog.text
    assert choose_tokenizer("intl", language) == "intl"
    with pytest.raises(UserError, match="bleu_tokenize 'no_such' is not to be had from sacreBLEU"):
        choose_tokenizer("no_such", language)


def test_sentences_without_spaces_have_a_score():
    predictions, references = ["他们明天去北京。", "我喜欢猫。"], ["他们明天去上海。", "我喜欢猫。"]
    scores = TranslationMetric().compute(
        predictions=predictions, references=references, tokenize=choose_tokenizer(None, "zh")
    )
    assert scores["bleu"] == sacrebleu.corpus_bleu(predictions, [references], tokenize="zh").score > 50
    assert "|tok:zh|" in scores["bleu_signature"]


def test_both_sides_are_scored_in_one_form():
    sentences = ["Tôi đã đọc quyển sách này rồi.", "Ngày mai trời sẽ đẹp."]
    decomposed = [unicodedata.normalize("NFD", sentence) for sentence in sentences]
    scores = TranslationMetric().compute(predictions=sentences, references=decomposed, target_lang="vi")
    assert [scores[name] for name in ("bleu", "bleu_intl", "chrf")] == pytest.approx([100] * 3)
    assert all("|unicode:nfc|version:" in scores[f"{name}_signature"] for name in ("bleu", "bleu_intl", "chrf"))
    plain = TranslationMetric().compute(predictions=sentences, references=sentences)
    assert plain["bleu"] == pytest.approx(100) and "unicode" not in plain["bleu_signature"] + plain["chrf_signature"]


def test_case_does_not_count_where_the_tokenizer_gives_none(model_and_tokenizer, pairs):
    model, cased = model_and_tokenizer
    uncased = copy.deepcopy(cased)
    tokenizer = uncased.backend_tokenizer
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), tokenizer.normalizer])
    assert (lowercases(cased), lowercases(uncased)) == (False, True)
    assert not lowercases(train_tokenizer([], 260)) and lowercases(train_tokenizer([], 260, lowercase=True))
    sources, references = (["the cat sees a mouse ."], ["DIE KATZE SIEHT EINE MAUS ."])
    scores, translations = evaluate_translation(model, uncased, sources, references)
    lowered = [translations[0].lower()], [[references[0].lower()]]
    assert scores["chrf"] == sacrebleu.corpus_chrf(*lowered).score > 20
    assert "|case:lc|" in scores["bleu_signature"] and "|case:lc|" in scores["chrf_signature"]


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
