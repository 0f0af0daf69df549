"""The corpus made from CLDR: what its pairs say, and what the splits share and do not share."""

import os
import re
import subprocess
import sys

import pytest
from datasets import Features, Translation

from hf_rskip.data.text.arguments import DataArguments
from hf_rskip.data.text.cldr import build_cldr_corpus
from hf_rskip.data.text.corpora import load_translation_dataset
from hf_rskip.errors import UserError

MONTHS = {
    "January": "Januar",
    "February": "Februar",
    "March": "März",
    "April": "April",
    "May": "Mai",
    "June": "Juni",
    "July": "Juli",
    "August": "August",
    "September": "September",
    "October": "Oktober",
    "November": "November",
    "December": "Dezember",
}


def swap_separators(number):
    return number.translate(str.maketrans(",.", ".,"))


def to_24_hours(hour, half):
    return f"{int(hour) % 12 + 12 * (half == 'PM'):02}"


# Sentence, its translation, and the fewest pairs of this kind in the training split.
RULES = {
    "date": (r"([A-Z]\w{3,}|May) (\d+), (\d{4})", lambda m, d, y: f"{d}. {MONTHS[m]} {y}", 500),
    "day": (r"([A-Z]\w+) (\d{1,2})", lambda m, d: f"{d}. {MONTHS[m]}", 100),
    "numeric date": (r"(\d+)/(\d+)/(\d{4})", lambda m, d, y: f"{d}.{m}.{y}", 500),
    "date and time": (
        r"(\w+) (\d+), (\d+), (\d+):(\d\d) (AM|PM)",
        lambda m, d, y, h, minute, half: f"{d}. {MONTHS[m]} {y}, {to_24_hours(h, half)}:{minute}",
        500,
    ),
    "time": (r"(\d+):(\d\d) (AM|PM)", lambda h, minute, half: f"{to_24_hours(h, half)}:{minute}", 300),
    "hours": (r"([\d.]+) hours", lambda n: f"{swap_separators(n)} Stunden", 50),
    "kilometres": (r"([\d.]+) kilometers", lambda n: f"{swap_separators(n)} Kilometer", 50),
    "sign of money": (r"\$([\d,.]+)", lambda n: f"{swap_separators(n)} $", 50),
    "name of money": (r"([\d,.]+) US dollars", lambda n: f"{swap_separators(n)} US-Dollar", 50),
    "percent": (r"([\d.]+)%", lambda n: f"{swap_separators(n)} %", 300),
    "number": (r"([\d,.]+)", swap_separators, 300),
    "time span": (r"(\d+) hours and (\d+) minutes", lambda h, m: f"{h} Stunden und {m} Minuten", 50),
    "future": (r"in (\d+) days", lambda n: f"in {n} Tagen", 20),
    "past": (r"(\d+) days ago", lambda n: f"vor {n} Tagen", 20),
}


@pytest.fixture(scope="module")
def corpus():
    """What the dataset name `cldr` loads."""
    args = DataArguments(dataset_name="cldr", source_lang="en", target_lang="de")
    return load_translation_dataset(args, ["train", "validation", "test"])


def pairs(dataset, source="en", target="de"):
    return [(row[source], row[target]) for row in dataset["translation"]]


@pytest.fixture(scope="module")
def train(corpus):
    """The pairs of the training split."""
    return pairs(corpus["train"])


def words(sentences):
    return set(re.findall(r"[^\W\d_]+", " ".join(sentences)))


def test_splits_and_schema(corpus):
    sizes = {"train": 24_000, "validation": 500, "test": 500}
    assert {name: len(split) for name, split in corpus.items()} == sizes
    for split in corpus.values():
        assert split.features == Features({"translation": Translation(["en", "de"])})
    assert all(sentence for split in corpus.values() for pair in pairs(split) for sentence in pair)


def test_no_source_sentence_occurs_twice(corpus):
    sources = [source for split in corpus.values() for source, _ in pairs(split)]
    assert len(sources) == len(set(sources))


def test_a_source_sentence_has_one_target_whatever_the_seed(corpus):
    targets = dict(pair for split in corpus.values() for pair in pairs(split))
    others = [pair for split in build_cldr_corpus(seed=1, train_size=8_000).values() for pair in pairs(split)]
    assert len({source for source, _ in others} & targets.keys()) > 1_000
    assert all(targets.get(source, target) == target for source, target in others)


def test_spaces_are_plain_and_single(corpus):
    for split in corpus.values():
        for sentence in (sentence for pair in pairs(split) for sentence in pair):
            assert sentence == " ".join(sentence.split())


def test_training_split_has_every_word_and_name_of_the_others(corpus, train):
    known = [words(sentences) for sentences in zip(*train, strict=True)]
    for name in ("validation", "test"):
        for sentences, vocabulary in zip(zip(*pairs(corpus[name]), strict=True), known, strict=True):
            assert words(sentences) <= vocabulary
    names = {
        ("Germany", "Deutschland"),
        ("Côte d’Ivoire", "Côte d’Ivoire"),
        ("Bosnia & Herzegovina", "Bosnien und Herzegowina"),
        ("Chinese", "Chinesisch"),
        ("March", "März"),
        ("Sunday", "Sonntag"),
    }
    assert names <= set(train)


@pytest.mark.parametrize("rule", RULES)
def test_translations(train, rule):
    pattern, translate, least = RULES[rule]
    found = [(re.fullmatch(pattern, source), target) for source, target in train]
    found = [(match, target) for match, target in found if match]
    assert len(found) >= least
    assert [target for _, target in found] == [translate(*match.groups()) for match, _ in found]


def test_lists_of_names(corpus, train):
    names = {source: target for source, target in train if not re.search(r"\d|, | (and|or) ", source)}
    lists = [(re.fullmatch(r"(\w+) (and|or) (\w+)", source), target) for source, target in pairs(corpus["test"])]
    # English calls the language of Nauru by the name of the territory; German does not.
    lists = [(match.groups(), target) for match, target in lists if match and "Nauru" not in match.groups()]
    assert len(lists) > 20
    for (first, word, second), target in lists:
        assert target == f"{names[first]} {'und' if word == 'and' else 'oder'} {names[second]}"


def test_forms_that_look_alike_in_the_source_share_one_target():
    corpus = build_cldr_corpus("fr", "es", train_size=5_000)
    french_dates = [
        (re.fullmatch(r"(\d+) mai (\d{4})", source), target) for source, target in pairs(corpus["train"], "fr", "es")
    ]
    french_dates = [(match.groups(), target) for match, target in french_dates if match]
    assert len(french_dates) > 10
    assert all(target == f"{day} de mayo de {year}" for (day, year), target in french_dates)


@pytest.mark.parametrize("languages", [("pt-BR", "zh_Hant"), ("aa", "en")])
def test_other_languages(languages):
    corpus = build_cldr_corpus(*languages, train_size=1_000, validation_size=20, test_size=10)
    assert {name: len(split) for name, split in corpus.items()} == {"train": 1_000, "validation": 20, "test": 10}
    assert corpus["test"].features["translation"].languages == list(languages)


def test_same_corpus_for_a_seed_in_every_process():
    program = (
        "from hf_rskip.data.text.cldr import build_cldr_corpus\n"
        "print([split.to_list() for split in build_cldr_corpus(train_size=1_000).values()])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, encoding="utf-8", check=True
    )

    corpus, other = (build_cldr_corpus(train_size=1_000, seed=seed) for seed in (0, 1))
    rows = [split.to_list() for split in corpus.values()]
    assert done.stdout.strip() == repr(rows)
    assert set(pairs(other["test"])) != set(pairs(corpus["test"]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_lang": "xx"}, "CLDR has no language 'xx': set target_lang to a code such as 'en' or 'de'."),
        ({"source_lang": "1"}, "CLDR has no language '1': set source_lang to a code such as 'en' or 'de'."),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        build_cldr_corpus(**values)
