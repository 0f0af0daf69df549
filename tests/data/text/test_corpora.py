"""Loading: what comes out of every kind of source, and the one sentence a user reads when a source is wrong."""

import os

import pytest
from datasets import Dataset, DatasetDict, Features, Translation
from transformers import HfArgumentParser

from hf_rskip.data.text.arguments import DataArguments
from hf_rskip.data.text.corpora import hold_out, iterate_sentences, load_translation_dataset
from hf_rskip.errors import UserError
from hf_rskip.recipe.parsing import parse_recipe
from hf_rskip.training import translation

PAIRS = [("A dog.", "Ein Hund."), ("Two cats.", "Zwei Katzen."), ("", "Leer.")]


def rows(pairs, languages=("en", "de")):
    return {"translation": [dict(zip(languages, pair, strict=True)) for pair in pairs]}


def text_files(folder, source: bytes, target: bytes, name="train"):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.en", folder / f"{name}.de"]
    for path, content in zip(paths, (source, target), strict=True):
        path.write_bytes(content)
    return [str(path) for path in paths]


def parquet(folder, features=None, **splits):
    for split, columns in splits.items():
        folder.mkdir(exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def arguments(**values):
    return DataArguments(**{"source_lang": "en", "target_lang": "de"} | values)


def load_train(**values):
    return load_translation_dataset(arguments(**values), ("train",))["train"]


def refused(**values):
    with pytest.raises(UserError) as error:
        load_train(**values)
    message = str(error.value)
    assert "\n" not in message and message.endswith((".", "?"))
    return message


# Arguments


def test_arguments_come_from_the_command_line_and_from_a_dictionary():
    parser = HfArgumentParser(DataArguments)
    command = "--source_lang en --target_lang de --train_files a.en a.de --max_length_ratio 2 --lowercase"
    (args,) = parser.parse_args_into_dataclasses([*command.split(), "--max_train_samples", "7"])
    assert (args.train_files, args.max_length_ratio, args.lowercase) == (["a.en", "a.de"], 2.0, True)
    assert (args.max_train_samples, args.max_eval_samples, args.max_source_length) == (7, None, 256)
    (again,) = parser.parse_dict(vars(args))
    assert again == args


def test_every_argument_has_a_help_text():
    assert all(field.metadata["help"] for field in DataArguments.__dataclass_fields__.values())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"source_lang": None}, "source_lang must be a language code such as 'en', not None."),
        ({"target_lang": False}, "target_lang must be a language code such as 'en', not False."),
        ({"source_lang": "english"}, "source_lang must be the language's code, 'en', not its name 'english'."),
        ({"target_lang": "Norwegian"}, "target_lang must be the language's code, 'no', not its name 'Norwegian'."),
        (
            {"validation_size": 5, "validation_split": "dev"},
            "validation_size and validation_split are both set: give one or the other.",
        ),
        (
            {"validation_size": 5, "dataset_name": None, "train_files": ["a", "b"], "validation_files": ["c", "d"]},
            "validation_size and validation_files are both set: give one or the other.",
        ),
        ({"validation_size": 0}, "validation_size must be a whole number of at least 1, not 0."),
        ({"target_lang": "en"}, "source_lang and target_lang must differ, but both are 'en'."),
        (
            {"dataset_name": None},
            "No corpus is named: set dataset_name or train_files (source file, then target file).",
        ),
        ({"train_files": ["a", "b"]}, "dataset_name and train_files are both set: give one or the other."),
        (
            {"dataset_name": None, "test_files": ["a"]},
            "test_files must be exactly two files, source then target, not ['a'].",
        ),
        (
            {"dataset_name": None, "train_files": ["x.de", "x.en"]},
            "train_files must be the en file, then the de file, but they are named the other way round: x.de, x.en.",
        ),
        ({"max_train_samples": 0}, "max_train_samples must be a whole number of at least 1, not 0."),
        ({"max_source_length": None}, "max_source_length must be a whole number of at least 1, not None."),
        ({"max_target_length": 2.5}, "max_target_length must be a whole number of at least 1, not 2.5."),
        ({"max_length_ratio": 0.5}, "max_length_ratio must be at least 1, not 0.5."),
        (
            {"lowercase": True, "tokenizer_name": "t"},
            "lowercase shapes a tokenizer that is trained, so it cannot be set with tokenizer_name.",
        ),
    ],
)
def test_arguments_that_are_not_allowed(values, sentence):
    with pytest.raises(UserError) as error:
        arguments(**{"dataset_name": "data"} | values)
    assert str(error.value) == sentence


@pytest.mark.parametrize("files", [["en-de.en", "en-de.de"], ["x.de.en.en", "x.de.en.de"], ["a.txt", "b.txt"]])
def test_file_names_that_do_not_contradict_the_languages_are_taken(files):
    assert arguments(train_files=files).train_files == files


def test_sentences_of_evenly_spaced_pairs():
    dataset = Dataset.from_dict(rows([(f"s{number}", f"t{number}") for number in range(25_000)]))
    everything = list(iterate_sentences(dataset, arguments(dataset_name="data"), 30_000))
    assert everything == [f"{side}{number}" for number in range(25_000) for side in "st"]
    some = list(iterate_sentences(dataset, arguments(dataset_name="data"), 10))
    assert some == [f"{side}{number}" for number in range(0, 25_000, 2500) for side in "st"]
    assert len(list(iterate_sentences(dataset, arguments(dataset_name="data"), 9_999))) == 2 * 9_999


def test_pairs_held_out_for_validation(tmp_path):
    """Each pair is in one of the two splits, in its order, the same at every call."""
    pairs = [(f"s{number}", f"t{number}") for number in range(20)]
    args = arguments(train_files=["a", "b"], validation_size=5)
    dataset = Dataset.from_dict(rows(pairs))
    parts, again = (hold_out(dataset, args) for _ in range(2))
    assert [part[:] for part in parts] == [part[:] for part in again]
    train, validation = ([pair["en"] for pair in part["translation"]] for part in parts)
    assert (len(train), len(validation), len({*train, *validation})) == (15, 5, 20)
    for side in (train, validation):
        assert side == sorted(side, key=lambda text: int(text[1:])) != [f"s{number}" for number in range(len(side))]
    for limit in (4, 9):
        args.max_eval_samples = limit
        assert [pair["en"] for pair in hold_out(dataset, args)[1]["translation"]] == validation[:limit]
    args.validation_size = 20
    with pytest.raises(UserError, match="validation_size must be below 20, the number of training pairs after cleani"):
        hold_out(dataset, args)


def test_duplicates_of_held_out_pairs_are_not_trained_on(write_recipe, tmp_path):
    name = parquet(tmp_path / "data", train=rows([(f"s{n}", f"t{n}") for n in range(10)] * 2), test=rows(PAIRS))
    options = {"dataset_name": name, "validation_size": 5, "remove_duplicates": True, "vocab_size": 300}
    task = translation.Translation(parse_recipe(write_recipe(**options)), None)
    assert (len(task.train_set), len(task.validation_set)) == (5, 5)
    sources = [{tuple(ids) for ids in part["input_ids"]} for part in (task.train_set, task.validation_set)]
    assert len(sources[0] | sources[1]) == 10
    # Loading leaves the validation split to `hold_out`.
    assert set(load_translation_dataset(arguments(dataset_name=name, validation_size=5))) == {"train", "test"}


# Text files


def test_text_files_give_one_pair_a_line(tmp_path):
    files = text_files(tmp_path, b"A dog.\nTwo cats.\n\n", "Ein Hund.\nZwei Kätzchen.\nLeer.\n".encode())
    dataset = load_train(train_files=files)
    assert dataset.column_names == ["translation"]
    assert dataset[:]["translation"] == [
        {"en": "A dog.", "de": "Ein Hund."},
        {"en": "Two cats.", "de": "Zwei Kätzchen."},
        {"en": "", "de": "Leer."},
    ]


def test_only_newlines_separate_lines(tmp_path):
    source = "\ufeffone\u2028still one\r\ntwo\x0b\x0c\x1c\x85\nthr\ree"
    dataset = load_train(train_files=text_files(tmp_path, source.encode(), b"eins\nzwei\ndrei\n"))
    assert [pair["en"] for pair in dataset["translation"]] == [
        "one\u2028still one",
        "two\x0b\x0c\x1c\x85",
        "thr\ree",
    ]


def test_text_files_are_cached_until_they_change(tmp_path):
    files = text_files(tmp_path, b"one\n", b"eins\n")
    first = load_train(train_files=files)
    again = load_train(train_files=files)
    assert first._fingerprint == again._fingerprint and first.cache_files == again.cache_files
    assert first.cache_files  # on disk, not in memory

    text_files(tmp_path, b"two\n", b"zwei\n")
    os.utime(files[0], (0, 0))
    assert load_train(train_files=files)[0]["translation"] == {"en": "two", "de": "zwei"}


def test_the_splits_that_are_asked_for_are_loaded_and_limited(tmp_path):
    lines = b"1\n2\n3\n4\n"
    args = arguments(
        train_files=text_files(tmp_path, lines, lines),
        validation_files=text_files(tmp_path, lines, lines, "validation"),
        max_train_samples=2,
        max_eval_samples=9,
    )
    corpus = load_translation_dataset(args, ("train", "validation"))
    assert {split: len(dataset) for split, dataset in corpus.items()} == {"train": 2, "validation": 4}
    assert [pair["de"] for pair in corpus["train"]["translation"]] == ["1", "2"]
    with pytest.raises(
        UserError, match=r"^test_files is not set: give the source and the target file of the test split\.$"
    ):
        load_translation_dataset(args)
    args.validation_files = None
    with pytest.raises(
        UserError, match="^validation_files is not set: .* of the validation split, or set validation_s"
    ):
        load_translation_dataset(args, ("train", "validation"))


@pytest.mark.parametrize(("longer", "shorter"), [("en", "de"), ("de", "en")])
def test_misaligned_files(tmp_path, longer, shorter):
    content = {longer: b"1\n2\n3\n4\n5", shorter: b"1\n2\n3\n"}
    message = refused(train_files=text_files(tmp_path, content["en"], content["de"]))
    assert message == (
        f"The files of a pair need equally many lines, but {tmp_path}/train.{longer} has 5 and "
        f"{tmp_path}/train.{shorter} only 3."
    )


def test_bytes_that_are_not_utf8(tmp_path):
    files = text_files(tmp_path, b"1\n2\n3\n", "eins\nzwölf\n".encode() + "fünf\n".encode("latin-1"))
    assert refused(train_files=files) == (f"{files[1]}, line 3 is not UTF-8: byte 0xfc at byte offset 13.")


def test_missing_and_empty_files(tmp_path):
    files = text_files(tmp_path, b"1\n", b"")
    assert refused(train_files=files) == f"{files[1]} is empty."
    os.remove(files[0])
    assert refused(train_files=files) == f"train_files names a file that does not exist: {files[0]}."


# Datasets


def test_a_folder_of_parquet_files(tmp_path):
    name = parquet(tmp_path / "data", train=rows(PAIRS), dev=rows(PAIRS[:1]), test=rows(PAIRS[1:]))
    corpus = load_translation_dataset(arguments(dataset_name=name, max_train_samples=2, max_predict_samples=1))
    assert list(corpus) == ["train", "validation", "test"]
    assert corpus["train"][:] == rows(PAIRS[:2]) and corpus["test"][:] == rows(PAIRS[1:2])
    assert corpus["validation"][:] == rows(PAIRS[:1])


def test_other_columns_are_left_out(tmp_path):
    table = rows([("a", "b", "c"), ("d", "e", None)], ("de", "en", "fr")) | {"id": [1, 2]}
    features = Features({"translation": Translation(["de", "en", "fr"]), "id": Dataset.from_dict(table).features["id"]})
    for folder, schema in [("struct", None), ("translation", features)]:
        dataset = load_train(dataset_name=parquet(tmp_path / folder, features=schema, train=table))
        assert [(pair["en"], pair["de"]) for pair in dataset["translation"]] == [("b", "a"), ("e", "d")]
        assert dataset.column_names == ["translation"]


def test_a_folder_written_with_save_to_disk(tmp_path):
    DatasetDict(train=Dataset.from_dict(rows(PAIRS))).save_to_disk(tmp_path / "saved")
    assert load_train(dataset_name=str(tmp_path / "saved"))[:] == rows(PAIRS)


def test_splits_by_other_names(tmp_path):
    name = parquet(tmp_path / "data", train=rows(PAIRS), test=rows(PAIRS[1:]))
    args = arguments(dataset_name=name, validation_split="test")
    assert load_translation_dataset(args, ("validation",))["validation"][:] == rows(PAIRS[1:])
    with pytest.raises(UserError) as error:
        load_translation_dataset(arguments(dataset_name=name))
    assert str(error.value) == (
        f"Dataset {name!r} has no split 'validation', only train, test: set validation_split to one of these, or "
        "set validation_size."
    )


FILES = {"dataset_name": None, "train_files": ["a", "b"], "validation_files": ["c", "d"], "test_files": ["a", "b"]}


@pytest.mark.parametrize(
    ("values", "both"),
    [
        ({"test_split": "train"}, "train_split and test_split are both 'train'"),
        ({"validation_split": "train"}, "train_split and validation_split are both 'train'"),
        (FILES, "train_files and test_files are both ['a', 'b']"),
        (FILES | {"test_files": ["./a", f"{os.getcwd()}/b"]}, "train_files and test_files are both ['a', 'b']"),
    ],
)
def test_splits_that_are_the_training_split(values, both):
    """Before any is loaded."""
    with pytest.raises(UserError) as error:
        load_translation_dataset(arguments(**{"dataset_name": "none"} | values))
    assert str(error.value) == f"{both}: what was trained on cannot tell how good a model is."


def test_a_test_split_that_is_the_validation_split(tmp_path, caplog):
    """As users of ImageNet have it, whose test images have no labels."""
    name = parquet(tmp_path / "data", train=rows(PAIRS), validation=rows(PAIRS))
    load_translation_dataset(arguments(dataset_name=name, test_split="validation"))
    (record,) = caplog.records
    assert record.message.startswith("validation_split and test_split are both 'validation': a checkpoint that is chos")


def test_a_dataset_without_the_language(tmp_path):
    name = parquet(tmp_path / "data", train=rows(PAIRS))
    where = f"Dataset {name!r}, split 'train', has no language"
    assert refused(dataset_name=name, target_lang="deu") == (
        f"{where} 'deu', only de, en: set target_lang to one of these; did you mean 'de'?"
    )
    assert (
        refused(dataset_name=name, source_lang="vi") == f"{where} 'vi', only de, en: set source_lang to one of these."
    )


def test_a_dataset_without_the_column(tmp_path):
    name = parquet(tmp_path / "data", train={"en": ["a"], "de": ["b"]})
    assert refused(dataset_name=name) == f"Dataset {name!r}, split 'train', has no column 'translation', only en, de."
    name = parquet(tmp_path / "flat", train={"translation": ["a"]})
    assert refused(dataset_name=name) == (
        f"Dataset {name!r}, split 'train', has a column 'translation' that is not a dictionary from language to "
        "sentence."
    )


def test_rows_that_are_not_text(tmp_path):
    many = [("a", "b")] * 10_001
    name = parquet(tmp_path / "null", train=rows([*many, ("a", None)]), test=rows([*many, ("a", None)]))
    with pytest.raises(UserError) as error:
        load_translation_dataset(arguments(dataset_name=name), ("test",))
    message = f"Dataset {name!r}, split 'test', row 10001 (counted from 0) has no text for language 'de'."
    assert str(error.value) == message
    limited = arguments(dataset_name=name, max_predict_samples=10_001)
    assert len(load_translation_dataset(limited, ("test",))["test"]) == 10_001
    assert load_train(dataset_name=name)[-1]["translation"] == {"en": "a", "de": None}, "left to clean_corpus"

    name = parquet(tmp_path / "pair", test={"translation": [{"en": "a", "de": "b"}, None]})
    with pytest.raises(UserError, match=r"row 1 \(counted from 0\) has no text for language 'en'\."):
        load_translation_dataset(arguments(dataset_name=name), ("test",))

    name = parquet(tmp_path / "number", train=rows([("a", 1)]))
    assert refused(dataset_name=name) == (
        f"Dataset {name!r}, split 'train', has int64 values instead of strings for language 'de'."
    )


def test_an_empty_split(tmp_path):
    features = Features({"translation": Translation(["en", "de"])})
    name = parquet(tmp_path / "data", features=features, train={"translation": []})
    assert refused(dataset_name=name) == (
        f'Dataset {name!r} cannot be loaded: Instruction "train" corresponds to no data.'
    )


def test_datasets_that_cannot_be_loaded(tmp_path):
    missing = str(tmp_path / "missing")
    assert refused(dataset_name=missing) == f"There is no dataset {missing!r}: no such file or folder."
    message = refused(dataset_name="nobody/nothing")
    assert message.startswith("Dataset 'nobody/nothing' cannot be loaded: ")
    assert message.endswith(", and there is no such folder; a private one needs `hf auth login`.")

    name = parquet(tmp_path / "data", train=rows(PAIRS))
    message = refused(dataset_name=name, dataset_config_name="de-en")
    assert message.startswith(f"Dataset {name!r} cannot be loaded: BuilderConfig 'de-en' not found")

    (tmp_path / "data" / "train.parquet").write_bytes(b"not parquet")
    assert refused(dataset_name=name).startswith(f"Dataset {name!r} cannot be loaded: Parquet magic bytes not found")

    (tmp_path / "bare").mkdir()
    assert refused(dataset_name=str(tmp_path / "bare")).startswith(f"Dataset '{tmp_path}/bare' cannot be loaded: ")
