"""BLEU with compound splitting, against multi-bleu's formula and what Perl's substitution does."""

import math
import re
from collections import Counter

import pytest
import sacrebleu

from hf_rskip.evaluation.compound_split import compound_split_bleu, moses_language, split_compounds
from hf_rskip.evaluation.metric import TranslationMetric

REFERENCES = [
    "Der rich-text-Editor, den wir in Köln-Deutz kauften, war zu teuer.",
    "Die E-Mail kam um 9 Uhr an; niemand las sie.",
    "Das Nord-Süd-Gefälle (seit 1990) nimmt wieder ab!",
]
PREDICTIONS = [
    "Der rich-text Editor, den wir in Köln-Kalk kauften, war zu teuer.",
    "Die E-Mail kam um 9 Uhr an, aber niemand las sie.",
    "Das Nord-Süd-Gefälle (seit 1990) nimmt ab.",
]


@pytest.mark.parametrize(
    ("sentence", "split"),
    [
        ("rich-text format", "rich ##AT##-##AT## text format"),
        ("rich-text-format", "rich ##AT##-##AT## text ##AT##-##AT## format"),
        ("a - b -c d- e", "a - b -c d- e"),
        # The letter between is used up by the first match; of a letter of two bytes one byte is left.
        ("a-b-c", "a ##AT##-##AT## b-c"),
        ("ä-ö-ü", "ä ##AT##-##AT## ö ##AT##-##AT## ü"),
        ("a--b", "a ##AT##-##AT## -b"),
        ("", ""),
    ],
)
def test_splits_at_hyphens_as_perl(sentence, split):
    assert split_compounds(sentence) == split


def multi_bleu(predictions: list[list[str]], references: list[list[str]]) -> float:
    """The formula of multi-bleu.perl with one reference: no smoothing."""
    log_precision = 0.0
    for order in range(1, 5):
        matches = total = 0
        for prediction, reference in zip(predictions, references, strict=True):
            counts, known = (
                Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))
                for words in (prediction, reference)
            )
            matches += sum(min(count, known[ngram]) for ngram, count in counts.items())
            total += counts.total()
        if not matches:
            return 0.0
        log_precision += math.log(matches / total) / 4
    length, target = (sum(map(len, side)) for side in (predictions, references))
    return 100 * math.exp(log_precision + min(0, 1 - target / length))


def tokenize(sentence: str) -> list[str]:
    """What Moses' rules come to in the sentences above: punctuation apart, except hyphens inside words."""
    words = re.sub(r"([.,;!()])", r" \1 ", sentence).split()
    return [piece for word in words for piece in re.sub(r"(?<=\w)-(?=\w)", " ##AT##-##AT## ", word).split()]


@pytest.mark.parametrize("lowercase", [False, True])
def test_equals_the_formula_of_multi_bleu(lowercase):
    score, description = compound_split_bleu(PREDICTIONS, REFERENCES, "de", lowercase)
    fold = str.lower if lowercase else str
    sides = [[tokenize(fold(sentence)) for sentence in side] for side in (PREDICTIONS, REFERENCES)]
    expected = multi_bleu(*sides)
    assert 30 < expected < 90 and score == pytest.approx(expected, abs=1e-9)
    case = "lc" if lowercase else "mixed"
    assert description.startswith(f"multi-bleu|nrefs:1|case:{case}|tok:moses-de+compound-split|smooth:none|sacremoses:")


def test_brevity_and_no_smoothing():
    short = [" ".join(sentence.split()[:6]) for sentence in REFERENCES]
    sides = [[tokenize(sentence) for sentence in side] for side in (short, REFERENCES)]
    assert compound_split_bleu(short, REFERENCES, "de")[0] == pytest.approx(multi_bleu(*sides), abs=1e-9)
    assert compound_split_bleu(["eins zwei"], ["eins zwei drei vier fünf"], "de")[0] == 0
    assert compound_split_bleu(["", ""], ["eins", "zwei"], "de")[0] == 0


def test_splitting_raises_the_score_where_a_part_is_right():
    plain = multi_bleu(*([re.findall(r"[\w-]+|[^\w\s]", s) for s in side] for side in (PREDICTIONS, REFERENCES)))
    assert compound_split_bleu(PREDICTIONS, REFERENCES, "de")[0] > plain + 2


def test_languages_of_the_tokenizer():
    codes = {"de": "de", "de_DE": "de", "de-AT": "de", "en": "en", "german": None, "xx": None, "": None, "zh": None}
    assert {code: moses_language(code) for code in codes} == codes


def test_the_metric_names_each_form():
    # A hyphen between numbers is one that only compound splitting splits.
    predictions, references = [*PREDICTIONS, "Er lebte 1990-95 dort."], [*REFERENCES, "Er lebte 1990-96 dort."]
    scores = TranslationMetric().compute(predictions=predictions, references=references, target_lang="de")
    intl = sacrebleu.metrics.BLEU(tokenize="intl")
    assert scores["bleu"] == sacrebleu.corpus_bleu(predictions, [references]).score
    assert scores["bleu_intl"] == intl.corpus_score(predictions, [references]).score
    assert scores["bleu_intl_signature"] == str(intl.get_signature())
    expected = compound_split_bleu(predictions, references, "de")
    assert (scores["bleu_compound_split"], scores["bleu_compound_split_signature"]) == expected
    assert len({scores[f"bleu{form}"] for form in ("", "_intl", "_compound_split")}) == 3
    others = TranslationMetric().compute(predictions=predictions, references=references, target_lang="xx")
    assert "bleu_intl" in others and "bleu_compound_split" not in others
