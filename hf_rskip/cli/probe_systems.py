"""Probes the models, recipes and tables that `hf-rskip probe` names."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from transformers import AutoModelForImageClassification, AutoModelForSeq2SeqLM

from ..data.names import check_different, short_names
from ..data.text.tokenizer import load_tokenizer
from ..decoding.loading import classifies_images, load_complete, load_image_processor
from ..errors import UserError
from ..probing.batches import SAMPLES, image_batch, random_batch, sentence_batch, spread
from ..probing.callback import TABLE_NAME
from ..probing.figure import draw_probes
from ..probing.probe import probe
from ..probing.table import ProbedModel, format_summary, read_table, write_table
from ..recipe.parsing import parse_recipe
from ..training.checkpoints import checkpoint_step, list_checkpoints
from ..training.initial import begin_recipe
from .corpus import find_languages, load_test_images, load_test_set
from .files import create_folder
from .options import refuse

_RECIPE_KEYS = (
    *("dataset_name", "dataset_config_name", "source_lang", "target_lang", "image_column", "label_column"),
    "label_smoothing_factor",
)
_RANDOM_SEED = 0
_OF_IMAGES, _OF_TRANSLATION = ("image_column", "label_column"), ("test_files", "source_lang", "target_lang")
_NOT_RANDOM = ("dataset_config_name", "split", "source_lang", "target_lang", *_OF_IMAGES)
_PROBED = ("dataset_name", "test_files", "random_data", *_NOT_RANDOM, "samples", "label_smoothing_factor")
"""Options that tables, which were probed before, do not need."""


def probe_systems(args: argparse.Namespace, rest: list[str]) -> None:
    """Prints a summary of the probes, and writes table and pictures to `--output_dir`; `rest` are keys of recipes."""
    _check(args, rest)
    names = _name([*args.systems, *args.run], args.names)
    folder = create_folder(args.output_dir) if args.output_dir else None
    probed = list(_probe_all(args, rest, names))
    print(format_summary(probed))
    if folder:
        write_table(probed, folder / TABLE_NAME)
        pictures = draw_probes(probed, folder)
        print(f"table and pictures: {', '.join(str(path) for path in [folder / TABLE_NAME, *pictures])}")


def _kind(system: str | Path) -> str:
    return {".yaml": "recipe", ".yml": "recipe", ".csv": "table"}.get(Path(system).suffix, "model")


def _check(args: argparse.Namespace, rest: list[str]) -> None:
    kinds = [_kind(system) for system in args.systems]
    if not kinds and not args.run:
        raise UserError("Nothing to probe is named: give a model, a recipe or a probe.csv, or --run FOLDER.")
    if rest and "recipe" not in kinds:
        raise UserError(f"unrecognized arguments: {' '.join(rest)} (keys are for recipes, and none is given)")
    has_data = args.dataset_name or args.test_files or args.random_data
    if ("model" in kinds or args.run) and not has_data:
        raise UserError("A model is probed on data: give --dataset_name, --test_files or --random_data.")
    if args.label_smoothing_factor is not None and not 0 <= args.label_smoothing_factor < 1:
        raise UserError(f"label_smoothing_factor must be from 0 to below 1, not {args.label_smoothing_factor}.")
    models = [system for system, kind in zip(args.systems, kinds, strict=True) if kind == "model"]
    for run in args.run:
        if not Path(run).is_dir():
            raise UserError(f"There is no folder {run!r}.")
        if not list_checkpoints(run):
            raise UserError(f"{run!r} has no checkpoints to probe.")
        models.append(str(list_checkpoints(run)[0]))
    of_images = {classifies_images(model) for model in models}
    if args.random_data:
        refuse(args, _NOT_RANDOM, "has no effect with --random_data")
    if not models:
        refuse(args, ["split"], "is for models, and none is given: a recipe is probed on its training split")
    if "recipe" in kinds:
        return
    refuse(args, ["seeds"], "is for recipes, and none is given")
    if not models:
        refuse(args, _PROBED, "has no effect on an earlier table, and nothing else is given")
    if of_images == {False}:
        refuse(args, _OF_IMAGES, "is for models that classify images, and none is given")
    if of_images == {True}:
        refuse(args, _OF_TRANSLATION, "is for models that translate, and none is given")


def _name(systems: list[str], names: list[str] | None) -> dict[str, str]:
    """Names each system by `--names`, or by the last part of its path where that tells them apart."""
    if names is None:
        return short_names(systems, _last_part)
    check_different(systems)
    if len(names) != len(systems) or len(set(names)) < len(names):
        raise UserError(f"--names must give each of the {len(systems)} systems a name of its own, not {names}.")
    return dict(zip(systems, names, strict=True))


def _last_part(system: str) -> str:
    path = Path(system).absolute()
    name = (path.parent if _kind(path) == "table" else path).name
    return name.removesuffix(".yaml").removesuffix(".yml")


def _probe_all(args: argparse.Namespace, rest: list[str], names: dict[str, str]) -> Iterator[ProbedModel]:
    for system in args.systems:
        if _kind(system) == "table":
            yield from _rename(read_table(system), names, system, args.names is not None)
        elif _kind(system) == "recipe":
            for seed in args.seeds or [None]:
                yield _probe_recipe(system, names[system], seed, args, rest)
        else:
            _print_loss(names[system], args.label_smoothing_factor)
            yield _probe_model(system, names[system], None, args)
    for run in args.run:
        _print_loss(names[run], args.label_smoothing_factor)
        for checkpoint in list_checkpoints(run):
            yield _probe_model(str(checkpoint), names[run], checkpoint_step(checkpoint), args)


def _rename(tables: list[ProbedModel], names: dict[str, str], system: str, is_given: bool) -> list[ProbedModel]:
    """Names the models of an earlier table: as they were if it is the only system, else with a prefix."""
    if is_given and len({table.model for table in tables}) == 1:
        return [replace(table, model=names[system]) for table in tables]
    if len(names) == 1 and not is_given:
        return tables
    return [replace(table, model=f"{names[system]}: {table.model}") for table in tables]


def _probe_recipe(path: str, name: str, seed: int | None, args: argparse.Namespace, rest: list[str]) -> ProbedModel:
    given = {key: getattr(args, key) for key in _RECIPE_KEYS} | {"seed": seed}
    words = [f"--{key}={value}" for key, value in given.items() if value is not None]
    if args.test_files:
        words += ["--train_files", *args.test_files]
    recipe = parse_recipe(path, [*rest, *words])
    smoothing = recipe.training.label_smoothing_factor or None
    _print_loss(name, smoothing)
    model, batch = begin_recipe(recipe, args.samples or SAMPLES, args.random_data)
    return ProbedModel(name, recipe.training.seed, 0, probe(model.to(recipe.training.device), batch, smoothing))


def _probe_model(path: str, name: str, step: int | None, args: argparse.Namespace) -> ProbedModel:
    is_image_model = classifies_images(path)
    model = load_complete(AutoModelForImageClassification if is_image_model else AutoModelForSeq2SeqLM, path)
    samples = args.samples or SAMPLES
    if args.random_data:
        batch = random_batch(model.config, samples, args.random_data, _RANDOM_SEED)
    elif is_image_model:
        if args.dataset_name is None:
            raise UserError("An image classifier is probed on a --dataset_name or on --random_data.")
        data, images = load_test_images(args, model.config)
        dataset = images.splits["test"]
        batch = image_batch(load_image_processor(path), dataset.select(spread(dataset, samples)), data, "test")
    else:
        sources, targets = load_test_set(args, *find_languages(args, {path: model.config}))
        rows = spread(sources, samples)
        texts = [sources[row] for row in rows], [targets[row] for row in rows]
        batch = sentence_batch(model, load_tokenizer(path), *texts)
    return ProbedModel(name, None, step, probe(model, batch, args.label_smoothing_factor or None))


def _print_loss(name: str, smoothing: float | None) -> None:
    print(f"{name}: gradients of the cross-entropy{f' with label smoothing {smoothing:g}' if smoothing else ''}")
