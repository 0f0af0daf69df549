"""Drops unusable training pairs before tokenization."""

from functools import partial
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value

from .arguments import DataArguments
from .columns import read_column
from .preprocessing import drop_pairs

# Unicode's control characters, without those that are white space.
_CONTROL_CHARACTERS = r"[\x00-\x08\x0E-\x1B\x7F-\x{84}\x{86}-\x{9F}]"


def clean_corpus(dataset: Dataset, args: DataArguments) -> tuple[Dataset, dict[str, int]]:
    """Drops pairs by their text, before tokenization.

    A pair goes if a side is missing or blank, has control characters (bytes of a broken file, or of a misread
    encoding: taking them out would leave the damaged words) or more than `max_characters`, or if, with
    `remove_duplicates`, the same pair came before. Tabs, line breaks and the other controls that are white space stay.
    The verdicts are cached on disk beside the dataset. In memory are one byte a pair, and 8 more with
    `remove_duplicates`, of which two pairs are then the same if their hashes of 64 bits are.

    Args:
        dataset: The training split of [`~hf_rskip.data.text.corpora.load_translation_dataset`].

    Returns:
        The remaining pairs in their order, and the number of pairs dropped for each reason; a pair counts for the
        first reason that applies.

    Raises:
        UserError: if no pair remains.
    """
    names = ["empty", "with control characters", f"longer than {args.max_characters:,} characters", "duplicate"]
    columns = {"reason": Value("uint8")} | ({"hash": Value("uint64")} if args.remove_duplicates else {})
    verdicts = dataset.with_format("arrow").map(
        partial(
            _judge,
            languages=(args.source_lang, args.target_lang),
            max_characters=args.max_characters,
            with_hash=args.remove_duplicates,
        ),
        batched=True,
        batch_size=10_000,
        remove_columns=dataset.column_names,
        features=Features(columns),
        num_proc=args.preprocessing_num_workers,
        desc="Cleaning",
    )
    number = read_column(verdicts, "reason")
    reasons = {name: number == index for index, name in enumerate(names, start=1)}
    if args.remove_duplicates:
        candidates = np.flatnonzero(number == 0)
        _, first = np.unique(read_column(verdicts, "hash")[candidates], return_index=True)
        reasons["duplicate"] = number == 0
        reasons["duplicate"][candidates[first]] = False
    return drop_pairs(dataset, reasons, "cleaning", args)


def _judge(table: pa.Table, languages: tuple[str, str], max_characters: int, with_hash: bool) -> pa.Table:
    """Returns for each pair the number of the reason to drop it, 0 for none, and a hash of both sides."""
    sides = [pc.fill_null(pc.struct_field(table["translation"], name).cast("string"), "") for name in languages]

    def either(applies):
        return pc.or_(*map(applies, sides))

    blank = either(lambda side: pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(side)), 0))
    control = either(lambda side: pc.match_substring_regex(side, _CONTROL_CHARACTERS))
    long = either(lambda side: pc.greater(pc.utf8_length(side), max_characters))
    reason = np.select([blank, control, long], [1, 2, 3]).astype(np.uint8)
    columns = {"reason": reason}
    if with_hash:
        pairs = zip(*(side.to_pylist() for side in sides), strict=True)
        digests = b"".join(blake2b("\0".join(pair).encode(), digest_size=8).digest() for pair in pairs)
        columns["hash"] = np.frombuffer(digests, np.uint64)
    return pa.table(columns)
