"""`hf-rskip compare`."""

import argparse
import os
from pathlib import Path

from ..checks import check_count
from ..data.names import short_names
from ..errors import UserError
from .files import create_folder, read_all_lines
from .options import DECODING, add_decoding_arguments, add_test_set_arguments, count, decoding_kwargs, refuse

_LEAST_SAMPLES = 100
"""Least number of resamples: with fewer, the ends of a 95% interval are one or two extreme resamples."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "systems",
        nargs="+",
        metavar="SYSTEM",
        help="folder or Hub id of a trained model, or UTF-8 text file with a translation a line; the baseline first",
    )
    add_test_set_arguments(parser)
    parser.add_argument(
        "--n_samples",
        type=count,
        help="resamples, at least 100 (default: 1000 of the bootstrap, 10000 of the randomisation)",
    )
    parser.add_argument("--output_dir", help="write tables, sentences and a picture to this folder")
    parser.epilog = "The environment variable SACREBLEU_SEED (default: 12345) seeds the resamples."
    add_decoding_arguments(parser, ensemble=False)


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Prints how systems differ from the first one, and writes the details to `--output_dir`.

    Case does not count if one of the models gives none.
    """
    from transformers import AutoModelForSeq2SeqLM

    from ..decoding.loading import load_config, load_translator
    from ..decoding.translate import translate
    from ..evaluation.bleu import choose_tokenizer
    from ..evaluation.comparison import check_translations, compare_systems
    from ..evaluation.comparison_report import QUESTIONS, format_signatures, format_table, write_comparison
    from ..evaluation.evaluate import lowercases
    from ..evaluation.significance import read_seed
    from .corpus import find_languages, load_test_set

    names = short_names(args.systems, lambda system: os.path.basename(os.path.normpath(system)))
    if len(names) < 2:
        raise UserError("A comparison needs at least two systems: the baseline, then what to compare with it.")
    decoding = decoding_kwargs(args)
    files = {system: read_all_lines(system) for system in args.systems if Path(system).is_file()}
    configs = {system: load_config(system, AutoModelForSeq2SeqLM) for system in args.systems if system not in files}
    if not configs:
        refuse(args, DECODING, "is for models, and all systems are files of translations.")
    if args.n_samples is not None:
        check_count("--n_samples", args.n_samples, _LEAST_SAMPLES)
    languages = find_languages(args, configs)
    bleu_tokenize = choose_tokenizer(args.bleu_tokenize, languages[1])
    read_seed()
    sources, references = load_test_set(args, *languages, args.max_samples)
    for system, lines in files.items():
        check_translations(system, lines, references)
    folder = create_folder(args.output_dir) if args.output_dir else None
    translations, lowercase = {}, False
    for system in args.systems:
        if system in files:
            translations[names[system]] = files[system]
        else:
            model, tokenizer = load_translator(system)
            lowercase = lowercase or lowercases(tokenizer)
            translations[names[system]] = translate(model, tokenizer, sources, **decoding)
    comparison = compare_systems(sources, references, translations, args.n_samples, bleu_tokenize, lowercase)
    print(format_table(comparison), *format_signatures(comparison), QUESTIONS, sep="\n")
    if folder:
        write_comparison(comparison, folder)
