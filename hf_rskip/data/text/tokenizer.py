"""The joint subword vocabulary of both languages."""

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ...atomic import write_then_rename
from ...errors import UserError
from ...manifest import TOKENIZER_FILES, check_model
from ..names import check_name

PAD, BOS, EOS, UNK = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
_USUAL_NAMES = {
    "pad_token": (PAD, "[PAD]"),
    "bos_token": (BOS, "<bos>", "[BOS]", "[CLS]"),
    "eos_token": (EOS, "<eos>", "[EOS]", "[SEP]", "<|endoftext|>"),
    "unk_token": (UNK, "[UNK]"),
}
"""Names of the special tokens in files of the package `tokenizers`; a tokenizer trained here has the first ones."""


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    lowercase: bool = False,
    model_max_length: int | None = None,
    cache_file: Path | None = None,
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer.

    Any text can be tokenized without unknown tokens, and decoding gives it back exactly, up to Unicode NFC (and case,
    if `lowercase`). `</s>` is appended to every sequence. The same texts in the same order give the same vocabulary.

    Args:
        texts: Sentences of both languages; read once, if at all.
        vocab_size: Largest number of tokens, including 256 bytes and 4 special tokens. Texts with fewer different
            subwords give a smaller vocabulary: `len(tokenizer)` is the actual size.
        model_max_length: Number of tokens beyond which `truncation=True` truncates, `None` for no limit.
        cache_file: Holds what was trained from the same texts before, or will; `None` for no such file.

    Returns:
        A tokenizer that `save_pretrained` writes so that plain `AutoTokenizer.from_pretrained` can load it.

    Raises:
        UserError: if `vocab_size` has no room for all bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    minimum = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < minimum:
        raise UserError(
            f"vocab_size must be at least {minimum} ({len(alphabet)} bytes and {len(SPECIAL_TOKENS)} special tokens), "
            f"not {vocab_size}."
        )
    tokenizer = None
    if cache_file is not None and cache_file.exists():
        with suppress(Exception):  # tokenizers raises no narrower class for a file torn by a power failure
            tokenizer = Tokenizer.from_file(str(cache_file))
    if tokenizer is None:
        tokenizer = _train_backend(texts, vocab_size, lowercase)
        if cache_file is not None:
            with write_then_rename(cache_file) as part:
                tokenizer.save(str(part))
    return _wrap(
        tokenizer,
        **{kind: names[0] for kind, names in _USUAL_NAMES.items()},
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def _train_backend(texts: Iterable[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # The first word of a sentence gets the space that other words have, so that both are the same token. ByteLevel's
    # own `add_prefix_space` adds none to text that starts with one, and decoding could not tell the two apart.
    case = [normalizers.Lowercase()] if lowercase else []
    tokenizer.normalizer = normalizers.Sequence([*case, normalizers.NFC(), normalizers.Prepend(" ")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", left=1, right=0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a subword that occurs once cannot be learned
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = _append(EOS, tokenizer)
    return tokenizer


def _append(eos: str, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    """Appends the end token to every sequence."""
    return processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, tokenizer.token_to_id(eos))]
    )


def _wrap(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **options,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # "</s>" in a user's sentence is four characters, not the end of it
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads an existing tokenizer from a folder, the Hub or a file of the package `tokenizers`.

    Raises:
        UserError: if there is none, it needs a package that is not installed, or it cannot serve translation: it needs
            a padding token, and an end-of-sequence token that it puts into every sequence (without it a model never
            learns to stop). A file gets what it lacks of these.
    """
    tokenizer = find_tokenizer(name)
    if tokenizer is None:
        raise UserError(f"There is no tokenizer {name!r}, neither in such a folder nor on the Hub.")
    for kind in ("pad_token", "eos_token"):
        if getattr(tokenizer, kind) is None:
            raise UserError(
                f"The tokenizer {name!r} has no {kind}, which translation needs: "
                f"`tokenizer.add_special_tokens({{{kind!r}: ...}})` and `save_pretrained` give it one."
            )
    if tokenizer.eos_token_id not in tokenizer("").input_ids:
        raise UserError(
            f"The tokenizer {name!r} does not end a sequence with its eos_token {tokenizer.eos_token!r}: set the "
            "`post_processor` of its `backend_tokenizer` to a `TemplateProcessing` that does, and save it."
        )
    return tokenizer


def find_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """Loads the tokenizer of a folder or Hub id, also one that cannot serve translation; `None` if there is none."""
    check_name(name, "tokenizer")
    if os.path.isfile(name):
        return _load_file(name)
    check_model(name, TOKENIZER_FILES)
    try:
        return AutoTokenizer.from_pretrained(name)
    except ImportError as error:
        raise UserError(
            f"The tokenizer of {name!r} needs a package that is not installed (most often sentencepiece): "
            "`pip install 'hf_rskip[marian]'`."
        ) from error
    except (OSError, ValueError, TypeError):  # TypeError: a MarianTokenizer without any of its files
        return None


def _load_file(path: str) -> PreTrainedTokenizerFast:
    """The special tokens are those that have a usual name; padding and the end token are added where there are none."""
    try:
        backend = Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises no narrower class
        raise UserError(f"{path!r} is not a file of the package `tokenizers`: {error}.") from error
    vocabulary = backend.get_vocab()
    special = {kind: next((t for t in names if t in vocabulary), None) for kind, names in _USUAL_NAMES.items()}
    special |= {kind: special[kind] or _USUAL_NAMES[kind][0] for kind in ("pad_token", "eos_token")}
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special.values() if t])
    eos = special["eos_token"]
    if eos not in backend.encode("").tokens:
        end, earlier = _append(eos, backend), backend.post_processor
        backend.post_processor = end if earlier is None else processors.Sequence([earlier, end])
    return _wrap(backend, **special)


def check_known(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], name: str) -> None:
    """Raises a [`UserError`] if the tokenizer called `name` makes unknown tokens of most of `texts`."""
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]
    unknown = ids.count(tokenizer.unk_token_id)
    if 2 * unknown > len(ids):
        raise UserError(
            f"The tokenizer {name!r} does not know this corpus: {unknown / len(ids):.0%} of its tokens are "
            f"{tokenizer.unk_token!r}."
        )
