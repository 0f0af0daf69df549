"""Token ids from pairs: their values, their cache, and which pairs training drops."""

import pytest
from datasets import Dataset

from hf_rskip.data.text.arguments import DataArguments
from hf_rskip.data.text.corpora import load_translation_dataset
from hf_rskip.data.text.preprocessing import describe_dropped, filter_by_length, tokenize_corpus, tokenizer_cache_file
from hf_rskip.data.text.tokenizer import load_tokenizer, train_tokenizer
from hf_rskip.errors import UserError

EOS = 2


def arguments(**values):
    return DataArguments(**{"source_lang": "en", "target_lang": "de", "dataset_name": "data"} | values)


def corpus(pairs):
    return Dataset.from_dict({"translation": [{"en": source, "de": target} for source, target in pairs]})


def lengths(pairs):
    return Dataset.from_dict({"source_length": [s for s, _ in pairs], "target_length": [t for _, t in pairs]})


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The dog sees the house.", "Der Hund sieht das Haus."] * 2, 300)


def test_both_sides_are_tokenized(tokenizer):
    pairs = [("The dog", "Der Hund sieht"), ("x" * 400, "</s>"), ("", " \t\u00a0")]
    dataset = tokenize_corpus(corpus(pairs), tokenizer, arguments(max_source_length=5))
    assert dataset.column_names == ["input_ids", "labels", "source_length", "target_length"]
    for row, (source, target) in zip(dataset, pairs, strict=True):
        assert row["source_length"] == len(row["input_ids"]) and row["target_length"] == len(row["labels"])
        assert row["input_ids"] == tokenizer(source).input_ids
        if target.strip():
            assert row["labels"] == tokenizer(target).input_ids
        assert row["labels"].index(EOS) == len(row["labels"]) - 1
    assert dataset[1]["source_length"] > 5  # not truncated
    assert dataset[2] == {"input_ids": [EOS], "labels": [EOS], "source_length": 1, "target_length": 1}
    assert dataset.features["labels"].feature.dtype == "uint16", "of a vocabulary of at most 65,536"


def test_the_direction_follows_the_languages(tokenizer):
    dataset = corpus([("The dog", "Der Hund")])
    forth = tokenize_corpus(dataset, tokenizer, arguments())[0]
    back = tokenize_corpus(dataset, tokenizer, arguments(source_lang="de", target_lang="en"))[0]
    assert (forth["input_ids"], forth["labels"]) == (back["labels"], back["input_ids"])


def test_the_result_is_cached_for_the_same_tokenizer_and_languages(tokenizer, tmp_path):
    files = [tmp_path / "train.en", tmp_path / "train.de"]
    for file in files:
        file.write_text("The dog\n\nDas Haus\n", encoding="utf-8")
    args = arguments(dataset_name=None, train_files=[str(file) for file in files])
    dataset = load_translation_dataset(args, ("train",))["train"]
    first = tokenize_corpus(dataset, tokenizer, args)
    assert first.cache_files

    # Neither using the tokenizer nor saving and loading it changes what it does.
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for same in (tokenizer, load_tokenizer(str(tmp_path / "tokenizer"))):
        again = tokenize_corpus(dataset, same, args)
        assert again.cache_files == first.cache_files and again._fingerprint == first._fingerprint

    longer = arguments(dataset_name="data", max_source_length=7)
    assert tokenize_corpus(dataset, tokenizer, longer).cache_files == first.cache_files
    other = train_tokenizer(["The dog"] * 2, 280)
    swapped = arguments(source_lang="de", target_lang="en")
    for changed in (tokenize_corpus(dataset, other, args), tokenize_corpus(dataset, tokenizer, swapped)):
        assert changed.cache_files != first.cache_files and changed._fingerprint != first._fingerprint


def test_a_tokenizer_is_cached_for_its_corpus_and_options(corpus_folder):
    args = arguments(dataset_name=corpus_folder)
    train_set = load_translation_dataset(args)["train"]
    file = tokenizer_cache_file(train_set, args, 300)
    assert file == tokenizer_cache_file(load_translation_dataset(args)["train"], args, 300)
    others = [
        tokenizer_cache_file(train_set, args, 301),
        tokenizer_cache_file(train_set, arguments(dataset_name=corpus_folder, lowercase=True), 300),
        tokenizer_cache_file(train_set.select(range(100, 300)), args, 300),
    ]
    assert len({file, *others}) == 4 and {other.parent for other in others} == {file.parent}
    assert tokenizer_cache_file(corpus([("a", "b")]), args, 300) is None  # in memory, nowhere beside it


def test_more_processes_give_the_same_ids(tokenizer):
    dataset = corpus([("The dog", "Der Hund"), ("the house", "das Haus"), ("", "leer")])
    one = tokenize_corpus(dataset, tokenizer, arguments())
    assert tokenize_corpus(dataset, tokenizer, arguments(preprocessing_num_workers=2))[:] == one[:]


def test_pairs_are_dropped_for_the_first_reason_that_applies():
    pairs = [(5, 5), (1, 9), (9, 1), (21, 30), (20, 31), (20, 30), (4, 12), (4, 13), (13, 4), (12, 4)]
    args = arguments(max_source_length=20, max_target_length=30, max_length_ratio=3)
    kept, counts = filter_by_length(lengths(pairs), args)
    assert counts == {
        "empty": 2,
        "source longer than 20 tokens": 1,
        "target longer than 30 tokens": 1,
        "length ratio above 3.0": 2,
    }
    remaining = list(zip(kept["source_length"], kept["target_length"], strict=True))
    assert remaining == [(5, 5), (20, 30), (4, 12), (12, 4)]
    assert describe_dropped(counts, len(kept)) == (
        "train: 4 of 10 pairs kept; dropped 2 empty, 1 source longer than 20 tokens, 1 target longer than 30 tokens, "
        "2 length ratio above 3.0"
    )


def test_no_ratio_is_no_limit():
    dataset = lengths([(2, 200), (200, 2)])
    kept, counts = filter_by_length(dataset, arguments())
    assert kept is dataset
    assert counts == {"empty": 0, "source longer than 256 tokens": 0, "target longer than 256 tokens": 0}
    assert describe_dropped(counts, 29_000) == "train: 29,000 of 29,000 pairs kept"


def test_lines_that_are_blank_on_one_side_are_dropped(tokenizer):
    dataset = tokenize_corpus(corpus([("The dog", ""), (" \t ", "Hund"), ("dog", "Hund")]), tokenizer, arguments())
    kept, counts = filter_by_length(dataset, arguments())
    assert counts["empty"] == 2
    assert kept["input_ids"][:] == [tokenizer("dog").input_ids]


def test_nothing_left():
    with pytest.raises(UserError) as error:
        filter_by_length(lengths([(1, 5), (300, 5)]), arguments())
    assert str(error.value) == (
        "No training pair is left after the length limits "
        "(train: 0 of 2 pairs kept; dropped 1 empty, 1 source longer than 256 tokens)."
    )
