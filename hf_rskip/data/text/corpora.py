"""Loads parallel corpora from the Hub, local folders, CLDR or text files, in one format and checked."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, NamedSplit, Translation
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from ...checks import did_you_mean
from ...errors import UserError
from ...lines import decode_lines
from ..loading import load_named_dataset, select_split
from .arguments import DataArguments
from .columns import keep_rows

_HOLD_OUT_SEED = 0


def load_translation_dataset(
    args: DataArguments, splits: Sequence[str] = ("train", "validation", "test")
) -> DatasetDict:
    """Loads the corpus that `args` names.

    Args:
        splits: The splits that are needed, out of "train", "validation" and "test".

    Returns:
        A dataset for each of `splits`, under these names whatever the corpus calls them, with the one column
        `translation`: a dictionary from each of the two language codes, maybe others, to a string. No split is empty.
        In the training split alone, text may be missing: [`~hf_rskip.data.text.cleaning.clean_corpus`] drops such
        pairs. With `validation_size` there is no validation split: [`hold_out`] makes one.

    Raises:
        UserError: if something is missing, misaligned, empty or not text; the message names the file and line, or the
            dataset, split and row.
    """
    args.check_splits(splits)
    corpus = None if args.dataset_name is None else _load_corpus(args)
    loaded = DatasetDict()
    for split in splits:
        if split == "validation" and args.validation_size is not None:
            continue
        dataset = _load_text_files(args, split) if corpus is None else select_split(corpus, args, split)
        dataset = _limit(dataset, args, split)
        loaded[split] = dataset if corpus is None else _select_translation(dataset, args, split)
    return loaded


def _limit(dataset: Dataset, args: DataArguments, split: str) -> Dataset:
    limit = args.sample_limit(split)
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def hold_out(dataset: Dataset, args: DataArguments) -> tuple[Dataset, Dataset]:
    """Splits `validation_size` pairs off, of which `max_eval_samples` are kept; the same at every call.

    Args:
        dataset: A training split after [`~hf_rskip.data.text.cleaning.clean_corpus`]: before it, a pair and its
            duplicate could go to different sides.

    Returns:
        The training split and the validation split.

    Raises:
        UserError: if no training pair would be left.
    """
    if not args.validation_size < len(dataset):
        raise UserError(
            f"validation_size must be below {len(dataset):,}, the number of training pairs after cleaning, not "
            f"{args.validation_size:,}."
        )
    is_held_out = np.zeros(len(dataset), dtype=bool)
    is_held_out[np.random.default_rng(_HOLD_OUT_SEED).choice(len(dataset), args.validation_size, replace=False)] = True
    return keep_rows(dataset, ~is_held_out), _limit(keep_rows(dataset, is_held_out), args, "validation")


def _load_corpus(args: DataArguments) -> DatasetDict:
    if args.dataset_name == "cldr":
        from .cldr import build_cldr_corpus

        return build_cldr_corpus(args.source_lang, args.target_lang)
    return load_named_dataset(args.dataset_name, args.dataset_config_name)


def _select_translation(dataset: Dataset, args: DataArguments, split: str) -> Dataset:
    """Reduces a dataset to its column `translation`, and checks that it has strings in both languages."""
    where = args.describe_split(split)
    if "translation" not in dataset.features:
        raise UserError(f"{where} has no column 'translation', only {', '.join(dataset.features)}.")
    feature = dataset.features["translation"]
    if isinstance(feature, Translation):
        found = dict.fromkeys(feature.languages, "string")
    elif isinstance(feature, dict):
        found = {language: getattr(value, "dtype", "nested") for language, value in feature.items()}
    else:
        raise UserError(f"{where} has a column 'translation' that is not a dictionary from language to sentence.")

    dataset = dataset.select_columns("translation")
    pair = [args.source_lang, args.target_lang]
    for field, language in zip(("source_lang", "target_lang"), pair, strict=True):
        if language not in found:
            known, hint = ", ".join(sorted(found)), did_you_mean(language, found) or "."
            raise UserError(f"{where} has no language {language!r}, only {known}: set {field} to one of these{hint}")
        if found[language] not in ("string", "large_string", "null"):
            raise UserError(f"{where} has {found[language]} values instead of strings for language {language!r}.")

    if split != "train":
        _check_every_row(dataset, pair, where)
    return dataset


def _check_every_row(dataset: Dataset, languages: Iterable[str], where: str) -> None:
    pairs = dataset.with_format("arrow")[:]["translation"]
    for language in languages:
        row = pc.index(pc.is_null(pc.struct_field(pairs, language)), True).as_py()
        if row >= 0:
            raise UserError(f"{where} row {row} (counted from 0) has no text for language {language!r}.")


def iterate_sentences(dataset: Dataset, args: DataArguments, max_pairs: int) -> Iterator[str]:
    """Yields source and target of every pair, or of `max_pairs` pairs at even distances if there are more."""
    count = min(len(dataset), max_pairs)
    chosen = np.arange(count) * len(dataset) // count
    batch_size = 10_000
    for batch, table in enumerate(dataset.with_format("arrow").iter(batch_size)):
        first, end = np.searchsorted(chosen, (batch * batch_size, (batch + 1) * batch_size))
        for pair in table["translation"].take(pa.array(chosen[first:end] - batch * batch_size)).to_pylist():
            yield pair[args.source_lang]
            yield pair[args.target_lang]


def checksum(dataset: Dataset, args: DataArguments) -> int:
    """Computes the CRC-32 of the sentences of both sides in their order; none may be missing."""
    value = 0
    for table in dataset.with_format("arrow").iter(1_000):
        for language in (args.source_lang, args.target_lang):
            side = pc.struct_field(table["translation"].combine_chunks(), language).cast(pa.string())
            lines = pa.ListArray.from_arrays([0, len(side)], side)
            value = zlib.crc32(pc.binary_join(lines, "\n")[0].as_buffer(), value)
    return value


def _load_text_files(args: DataArguments, split: str) -> Dataset:
    field = f"{split}_files"
    if getattr(args, field) is None:
        instead = ", or set validation_size" if split == "validation" else ""
        raise UserError(f"{field} is not set: give the source and the target file of the {split} split{instead}.")
    paths = [Path(file).absolute() for file in getattr(args, field)]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{field} names a file that does not exist: {path}.")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty.")
    languages = [args.source_lang, args.target_lang]
    state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    try:
        return Dataset.from_generator(
            _read_pairs,
            features=Features({"translation": Translation(languages)}),
            gen_kwargs={"source": paths[0], "target": paths[1], "languages": tuple(languages)},
            split=NamedSplit(split),
            fingerprint=Hasher.hash((state, languages, split)),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _read_pairs(source: Path, target: Path, languages: tuple[str, str]) -> Iterator[dict[str, dict[str, str]]]:
    with source.open("rb") as source_lines, target.open("rb") as target_lines:
        pairs = zip_longest(decode_lines(source_lines, str(source)), decode_lines(target_lines, str(target)))
        for number, pair in enumerate(pairs):
            if None in pair:
                if pair[0] is None:
                    shorter, longer, rest = source, target, target_lines
                else:
                    shorter, longer, rest = target, source, source_lines
                total = number + 1 + sum(1 for _ in rest)
                raise UserError(
                    f"The files of a pair need equally many lines, but {longer} has {total:,} and {shorter} only "
                    f"{number:,}."
                )
            yield {"translation": dict(zip(languages, pair, strict=True))}
