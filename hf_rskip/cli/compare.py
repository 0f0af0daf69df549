"""`hf-rskip compare`."""

import argparse
import os
from pathlib import Path

from ..decoding.loading import load_model
from ..decoding.translate import translate
from ..errors import UserError
from ..evaluation.comparison import check_settings, check_translations, compare_systems
from ..evaluation.comparison_report import format_signatures, format_table, write_comparison
from .evaluate import load_config, load_test_set
from .translate import generation_kwargs, open_file, read_lines


def compare(args: argparse.Namespace) -> None:
    """Prints how systems differ from the first one, and writes the details to `--output_dir`."""
    names = _name_systems(args.systems)
    check_settings(args.bleu_tokenize)
    files = {system: _read_translations(system) for system in args.systems if Path(system).is_file()}
    models = [system for system in args.systems if system not in files]
    sources, references = load_test_set(args, *(_language(args, key, models) for key in ("source_lang", "target_lang")))
    for system, lines in files.items():
        check_translations(system, lines, references)
    folder = create_folder(args.output_dir) if args.output_dir else None
    translations = {}
    for system in args.systems:
        if system in files:
            translations[names[system]] = files[system]
        else:
            model = load_model(system)
            translations[names[system]] = translate(*model, sources, args.max_batch_tokens, **generation_kwargs(args))
    comparison = compare_systems(sources, references, translations, args.n_samples, args.bleu_tokenize)
    print(format_table(comparison), *format_signatures(comparison), sep="\n")
    if folder:
        write_comparison(comparison, folder)


def _name_systems(systems: list[str]) -> dict[str, str]:
    """A short name for each: the last part of the path, where that tells them apart."""
    for system in systems:
        if systems.count(system) > 1:
            raise UserError(f"{system!r} is given twice.")
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


def _language(args: argparse.Namespace, key: str, models: list[str]) -> str:
    """The language of the command line, or the one that the models agree on."""
    if given := getattr(args, key):
        return given
    said = {model: language for model in models if (language := getattr(load_config(model), key, None))}
    if len(set(said.values())) > 1:
        raise UserError(
            f"The models differ in their {key}: {', '.join(f'{m} has {code!r}' for m, code in said.items())}."
        )
    if said:
        return next(iter(said.values()))
    if args.test_files:
        return key  # no language is needed to pair two files
    raise UserError(f"No model says what the {key} is: give --{key}.")


def create_folder(path: str) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path!r} cannot be a folder: {error.strerror}.") from error
    return folder
