"""`hf-rskip compare`."""

import argparse
import os
from pathlib import Path

from transformers import AutoModelForSeq2SeqLM

from ..data.names import check_different
from ..decoding.loading import load_config, load_model
from ..decoding.translate import translate
from ..errors import UserError
from ..evaluation.bleu import choose_tokenizer
from ..evaluation.comparison import check_translations, compare_systems
from ..evaluation.comparison_report import QUESTIONS, format_signatures, format_table, write_comparison
from ..evaluation.evaluate import lowercases
from ..evaluation.significance import read_seed
from .evaluate import find_languages, load_test_set
from .translate import generation_kwargs, open_file, read_lines

_LEAST_SAMPLES = 100
"""With fewer, the ends of a 95% interval are the one or two most extreme resamples."""


def compare(args: argparse.Namespace) -> None:
    """Prints how systems differ from the first one, and writes the details to `--output_dir`.

    Case does not count if one of the models gives none.
    """
    names, generation = _name_systems(args.systems), generation_kwargs(args)
    files = {system: _read_translations(system) for system in args.systems if Path(system).is_file()}
    configs = {system: load_config(system, AutoModelForSeq2SeqLM) for system in args.systems if system not in files}
    for option in ["max_batch_tokens"] * (args.max_batch_tokens is not None) + list(generation):
        if not configs:
            raise UserError(f"--{option} is for models, and all systems are files of translations.")
    if args.n_samples is not None and args.n_samples < _LEAST_SAMPLES:
        raise UserError(f"--n_samples must be at least {_LEAST_SAMPLES}, not {args.n_samples}.")
    source_lang, target_lang = find_languages(args, configs)
    bleu_tokenize = choose_tokenizer(args.bleu_tokenize, target_lang)
    read_seed()
    sources, references = load_test_set(args, source_lang, target_lang)
    for system, lines in files.items():
        check_translations(system, lines, references)
    folder = create_folder(args.output_dir) if args.output_dir else None
    translations, lowercase = {}, False
    for system in args.systems:
        if system in files:
            translations[names[system]] = files[system]
        else:
            model, tokenizer = load_model(system)
            lowercase = lowercase or lowercases(tokenizer)
            translations[names[system]] = translate(
                model, tokenizer, sources, args.max_batch_tokens or 4096, **generation
            )
    comparison = compare_systems(sources, references, translations, args.n_samples, bleu_tokenize, lowercase)
    print(format_table(comparison), *format_signatures(comparison), QUESTIONS, sep="\n")
    if folder:
        write_comparison(comparison, folder)


def _name_systems(systems: list[str]) -> dict[str, str]:
    """A short name for each: the last part of the path, where that tells them apart."""
    check_different(systems)
    if len(systems) < 2:
        raise UserError("A comparison needs at least two systems: the baseline, then what to compare with it.")
    short = [os.path.basename(os.path.normpath(system)) for system in systems]
    return dict(zip(systems, short if len(set(short)) == len(short) else systems, strict=True))


def _read_translations(path: str) -> list[str]:
    with open_file(path, "rb") as file:
        lines = [line for block in read_lines(file, path) for line in block]
    if not lines:
        raise UserError(f"{path} is empty.")
    return lines


def create_folder(path: str) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path!r} cannot be a folder: {error.strerror}.") from error
    return folder
