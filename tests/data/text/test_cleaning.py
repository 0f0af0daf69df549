"""Which pairs are dropped by their text, and for which reason."""

import sys
import unicodedata

import pytest
from datasets import Dataset

from hf_rskip.data.text.arguments import DataArguments
from hf_rskip.data.text.cleaning import clean_corpus
from hf_rskip.errors import UserError


def clean(pairs, **values):
    args = DataArguments(**{"source_lang": "en", "target_lang": "de", "dataset_name": "data"} | values)
    rows = [None if pair is None else {"de": pair[1], "en": pair[0]} for pair in pairs]
    dataset, counts = clean_corpus(Dataset.from_dict({"translation": rows}), args)
    return [(pair["en"], pair["de"]) for pair in dataset["translation"]], counts


@pytest.mark.parametrize("processes", [None, 2])
def test_pairs_are_dropped_for_the_first_reason_that_applies(processes):
    good = [("A dog.", "Ein Hund."), ("A dog.", "Der Hund."), ("x" * 50, "ü" * 50), ("a\tb\u00ad", "c\u2028d\x85")]
    bad = {
        "empty": [("", "Leer."), ("Blank.", " \t\u00a0"), ("None.", None), None],
        "with control characters": [("a\x00", "b" * 100_000), ("caf\x82", "b"), ("a", "\x7f"), ("a\x1b[0m", "b")],
        "longer than 50 characters": [("word " * 100_000, "b"), ("a", "ü" * 51)],
        "duplicate": [good[0], good[0], good[2]],
    }
    mixed = [good[0], *bad["empty"], *good[1:], *bad["with control characters"], *bad["longer than 50 characters"]]
    kept, counts = clean([*mixed, *bad["duplicate"]], max_characters=50, preprocessing_num_workers=processes)
    assert kept == [*good, *bad["duplicate"]] and counts["duplicate"] == 0
    kept, counts = clean(
        [*mixed, *bad["duplicate"]], max_characters=50, preprocessing_num_workers=processes, remove_duplicates=True
    )
    assert kept == good
    assert counts == {reason: len(pairs) for reason, pairs in bad.items()}


def test_control_characters_are_those_of_unicode_but_white_space():
    dropped = [
        code
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) == "Cc" and not chr(code).isspace()
    ]
    others = [code for code in range(0x300) if code not in dropped]
    kept, counts = clean([(f"a{chr(code)}b", "c") for code in [*dropped, *others]])
    assert counts["with control characters"] == len(dropped) == 55
    assert kept == [(f"a{chr(code)}b", "c") for code in others]


def test_duplicates_among_many():
    pairs = [(f"source {number % 15_001}", f"target {number % 7}") for number in range(40_000)]
    kept, counts = clean(pairs, remove_duplicates=True)
    assert kept == list(dict.fromkeys(pairs))
    assert counts["duplicate"] == len(pairs) - len(kept)
    swapped = [("a", "bc"), ("ab", "c"), ("bc", "a")]
    assert clean(swapped, remove_duplicates=True)[0] == swapped


def test_a_clean_corpus_is_left_as_it_is():
    args = DataArguments(source_lang="en", target_lang="de", dataset_name="data")
    dataset = Dataset.from_dict({"translation": [{"en": "a", "de": "b"}]})
    assert clean_corpus(dataset, args)[0] is dataset


def test_nothing_left():
    with pytest.raises(UserError) as error:
        clean([("", "a"), ("b\x01", "c")])
    assert str(error.value) == (
        "No training pair is left after cleaning "
        "(train: 0 of 2 pairs kept; dropped 1 empty, 1 with control characters)."
    )
