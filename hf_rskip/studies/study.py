"""Studies: one recipe, forms of it, seeds, and perhaps a grid of settings; each combination is a cell.

With `tune` it has two stages: the cells of the grid, and, at the setting that is best for a form, those of the seeds.
"""

import hashlib
import itertools
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ..atomic import replace_text
from ..checks import did_you_mean
from ..data.names import check_name
from ..errors import UserError
from ..evaluation.bleu import choose_tokenizer
from ..models import SKIP_CONNECTIONS
from ..recipe.describe import find_idle_keys
from ..recipe.parsing import (
    Recipe,
    check_configuration,
    check_values,
    group_words,
    parse_values,
    read_yaml,
)

METRICS = {"translation": ("bleu", "chrf"), "image-classification": ("accuracy",)}
"""Metrics by which studies of each task compare, the default first."""
_OF_THE_STUDY = ("seed", "output_dir", "resume_from_checkpoint", "task")
"""Keys of a recipe that forms and grids cannot set."""
_OF_THE_TEST = ("target_lang", "test_split", "max_predict_samples")
"""Keys of a recipe that choose the test set, which is one for all cells."""
_NAMED = {"dataset_name": "dataset", "model_name_or_path": "model", "tokenizer_name": "tokenizer"}
"""Keys of a recipe that name a folder or Hub id, and of what."""

_LONGEST_NAME = 200
"""Longest name of a cell's folder, in bytes of UTF-8; file systems take 255."""

Setting = tuple[tuple[str, Any], ...]
"""A point of the grid: pairs of key and value; empty without a grid."""


@dataclass(frozen=True)
class Cell:
    """One training of a study.

    Attributes:
        number: from 1, in the order of the study.
        form: its name in the study.
        setting: its point of the grid.
        seed: of the training.
        keys: of its recipe.
        folder: of its own: `recipe.yaml`, `log.txt`, `result.json`, and the training's output folder `run`.
    """

    number: int
    form: str
    setting: Setting
    seed: int
    keys: dict[str, Any]
    folder: Path

    @property
    def recipe_path(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    def command(self, modules: Sequence[str] = ()) -> str:
        """The command that trains the cell alone; `modules` are imported first."""
        words = ["hf-rskip", "train", str(self.recipe_path)]
        for module in modules:
            words += ["--import_module", module]
        return shlex.join(words)

    def __str__(self) -> str:
        return f"{name_point(self.form, self.setting)}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """A parsed study.

    Attributes:
        path: of its file.
        output_dir: of its results.
        metric: by which forms are compared, a name of [`METRICS`].
        bleu_tokenize: sacreBLEU's `tokenize`; `None` where the task does not translate.
        baseline: the form that others are compared with.
        contrasts: further pairs of forms that are compared, the first with the second.
        margin: the difference, in points of 100, below which two forms count as equivalent.
        forms: all names, in order, with the keys of their recipes, without a setting.
        settings: the points of the grid, in order; a single empty one without a grid.
        seeds: of each form at each setting; with `tune_seeds`, at its own best setting.
        tune_seeds: of each form at each setting, to choose one; `None` in a study of one stage.
        beyond: with `tune_seeds`, forms that were best at the edge of the grid, and the points that were added for it.
        impossible: likewise, points that no recipe can have, which were not added.
        chosen: with `tune_seeds`, the setting of each form, `None` where nothing finished; `None` before it is known.
        trains_at: the validation score, in points of 100, that a cell which trains reaches at least.
        keep_models: whether finished cells keep weights and checkpoints.
        cells: all of them, in order; with `tune_seeds`, those that are known so far.
    """

    path: Path
    output_dir: Path
    metric: str
    bleu_tokenize: str | None
    baseline: str
    contrasts: list[tuple[str, str]]
    margin: float | None
    forms: dict[str, dict[str, Any]]
    settings: list[Setting]
    seeds: list[int]
    tune_seeds: list[int] | None
    beyond: list[tuple[str, Setting]]
    impossible: list[tuple[str, Setting]]
    chosen: dict[str, Setting | None] | None
    trains_at: float | None
    keep_models: bool
    cells: list[Cell]

    @property
    def judge(self) -> str | None:
        """The key of the file that judges by the validation scores of cells, if one does."""
        if self.tune_seeds is not None:
            return "tune"
        if len(self.settings) > 1:
            return "grid"
        return None if self.trains_at is None else "trains_at"

    @property
    def is_growing(self) -> bool:
        """Whether more cells follow from the results of those that are known."""
        return self.tune_seeds is not None and self.chosen is None


@dataclass(frozen=True)
class _StudyFile:
    """The keys of a study's file; `null` unsets a key."""

    recipe: str
    output_dir: str
    seeds: list
    forms: dict
    overrides: dict = field(default_factory=dict)
    baseline: str | None = None
    contrasts: list = field(default_factory=list)
    margin: float | None = None
    grid: dict = field(default_factory=dict)
    tune: dict | None = None
    metric: str | None = None
    trains_at: float | None = None
    keep_models: bool = False


def read_study(path: str | Path, overrides: list[str], output_dir: str | None = None) -> Study:
    """Reads a study and parses the recipes of its cells; with `tune`, of the first stage.

    Args:
        path: of the YAML.
        overrides: keys of the recipe for all cells, as words of a command line; before those of the file.
        output_dir: in place of that of the file.

    Raises:
        [`UserError`]: if the file is no study, or one of its cells no recipe.
    """
    path = Path(path)
    file = _check_file(read_yaml(path, "study"), str(path))
    recipe_path = path.parent / file.recipe
    given = _underscored(group_words(overrides))
    overrides = _underscored(file.overrides)
    recipe = _underscored(read_yaml(recipe_path))
    common = {**recipe, **overrides, **given}
    tune = file.tune or {"grid": file.grid, "seeds": file.seeds}
    grid = _underscored(tune["grid"])
    forms = {name: _underscored(keys or {}) for name, keys in file.forms.items()}
    _check_disjoint(forms, grid, {**overrides, **given}, str(path))
    for keys, place in (
        (recipe, str(recipe_path)),
        (overrides, f"the overrides of {path}"),
        (given, "the command line"),
        *((keys, f"the form {name!r} of {path}") for name, keys in forms.items()),
        *(({key: point}, f"the grid of {path}") for key, points in grid.items() for point in points),
    ):
        check_values(keys, place, common.get("task"))
    if any(file.metric in known for known in METRICS.values()):
        common.setdefault("metric_for_best_model", file.metric)
    own, forms = forms, {name: {**common, **keys} for name, keys in forms.items()}
    settings = [tuple(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]
    folder = Path(output_dir or file.output_dir)
    cells, recipes = _make_cells(path, folder, forms, itertools.product(forms, settings, tune["seeds"]))
    idle = list(map(_find_idle, recipes))
    for where, keys, form in [("the grid", grid, None), *((f"the form {name!r}", own[name], name) for name in own)]:
        found = [part for cell, part in zip(cells, idle, strict=True) if form in (None, cell.form)]
        for key in keys:
            if all(key in part for part in found):
                raise UserError(f"{key} in {where} of {path} has no effect {found[0][key]}.")
    tokenizers = [
        choose_tokenizer(recipe.training.bleu_tokenize, recipe.data.target_lang)
        for recipe in recipes
        if recipe.task == "translation"
    ]
    of_the_test = {key: [recipe.values.get(key) for recipe in recipes] for key in _OF_THE_TEST}
    for key, values in ({"bleu_tokenize": tokenizers} | of_the_test).items():
        if len(set(values)) > 1:
            different = ", ".join(map(str, dict.fromkeys(values)))
            raise UserError(f"{key} must be one for all cells of {path}, which are compared by it, not {different}.")
    if any(recipe.training.push_to_hub for recipe in recipes):
        raise UserError(f"push_to_hub is not for the cells of {path}: `hf-rskip push` sends one of their models.")
    study = Study(
        path=path,
        output_dir=folder,
        metric=_choose_metric(file.metric, recipes[0]),
        bleu_tokenize=tokenizers[0] if tokenizers else None,
        baseline=file.baseline or next(iter(forms)),
        contrasts=[tuple(pair) for pair in file.contrasts],
        margin=file.margin,
        forms=forms,
        settings=settings,
        seeds=file.seeds,
        tune_seeds=tune["seeds"] if file.tune else None,
        beyond=[],
        impossible=[],
        chosen=None,
        trains_at=file.trains_at,
        keep_models=file.keep_models,
        cells=cells,
    )
    for recipe in recipes if study.judge else ():
        judges = f"{study.judge} in {path} judges by validation scores"
        if recipe.training.eval_strategy == "no":
            raise UserError(f"{judges}: eval_strategy cannot be 'no'.")
        if recipe.task == "translation" and not recipe.training.predict_with_generate:
            raise UserError(f"{judges}: predict_with_generate must be true.")
        if recipe.task == "image-classification" and not (recipe.data.validation_split or recipe.data.validation_size):
            raise UserError(f"{judges}: set validation_split or validation_size.")
    return study


def add_cells(study: Study, points: Iterable[tuple[str, Setting, int]]) -> Study:
    """Adds cells, each of a form, a setting and a seed, unless the study has them."""
    known = {(cell.form, str(cell.setting), cell.seed) for cell in study.cells}
    points = [point for point in points if (point[0], str(point[1]), point[2]) not in known]
    further, _ = _make_cells(study.path, study.output_dir, study.forms, points, study.cells)
    return replace(study, cells=further)


def _make_cells(
    path: Path,
    folder: Path,
    forms: dict[str, dict[str, Any]],
    points: Iterable[tuple[str, Setting, int]],
    before: Sequence[Cell] = (),
) -> tuple[list[Cell], list[Recipe]]:
    """Returns the cells `before` with the new ones, and the recipes of the new ones."""
    cells, recipes = list(before), []
    for form, setting, seed in points:
        name = "-".join([form, *(f"{key}-{value}" for key, value in setting), f"seed-{seed}"])
        cell_folder = folder / "cells" / _as_folder_name(name)
        values = {**forms[form], **dict(setting), "seed": seed, "output_dir": str(cell_folder / "run")}
        values = {key: value for key, value in values.items() if value is not None and key != "resume_from_checkpoint"}
        try:
            recipes.append(parse_values(values, [], str(path)))
        except UserError as error:
            raise UserError(f"{path}, cell {name_point(form, setting)}: {error}") from error
        cells.append(Cell(len(cells) + 1, form, setting, seed, values, cell_folder))
    _check_unique_folders(cells)
    return cells, recipes


def describe_setting(setting: Setting) -> str:
    """`key value` of each key, separated by commas."""
    return ", ".join(f"{key} {value}" for key, value in setting)


def name_point(form: str, setting: Setting) -> str:
    """The form and, in a grid, its setting."""
    return f"{form}, {describe_setting(setting)}" if setting else form


def varying_keys(settings: list[Setting]) -> list[str]:
    """The keys of a grid that have more than one value in it."""
    return [key for key, _ in settings[0] if len({str(dict(point).get(key)) for point in settings}) > 1]


def check_cells(cells: list[Cell]) -> None:
    """Raises a [`UserError`] if a cell names a residual kind, a folder or a file that does not exist, no model, or its
    training data for validation or test."""
    for cell in {(cell.form, str(cell.setting)): cell for cell in cells}.values():
        for key, what in _NAMED.items():
            if cell.keys.get(key) is not None:
                check_name(cell.keys[key], what)
        for key in ("train_files", "validation_files", "test_files"):
            for path in cell.keys.get(key) or ():
                if not Path(path).is_file():
                    raise UserError(f"{key} names a file that does not exist: {path}.")
        try:
            recipe = parse_values(cell.keys, [], str(cell))
            recipe.data.check_splits(("train", "validation", "test"))
            check_configuration(recipe)
        except UserError as error:
            raise UserError(f"{name_point(cell.form, cell.setting)}: {error}") from error


def write_recipe(cell: Cell) -> None:
    """Writes the whole recipe of a cell, by which `hf-rskip train` repeats it."""
    replace_text(cell.recipe_path, yaml.safe_dump(cell.keys, sort_keys=False, allow_unicode=True))


def find_difference(cell: Cell) -> str | None:
    """Finds a key with another value in the recipe of the cell's folder: see [`compare_recipes`]."""
    return compare_recipes(read_yaml(cell.recipe_path), cell) if cell.recipe_path.exists() else None


def compare_recipes(before: dict[str, Any], cell: Cell) -> str | None:
    """The first key that has another value, once parsed, in the recipe of a cell than `before`, as `key old, not new`.

    `None` if all are equal.
    """
    if before == cell.keys:
        return None
    old, new = (parse_values(keys, [], str(cell)).given for keys in (before, cell.keys))
    differing = [key for key in [*new, *old] if old.get(key) != new.get(key)]
    return f"{differing[0]} {old.get(differing[0])}, not {new.get(differing[0])}" if differing else None


def _check_file(values: dict, where: str) -> _StudyFile:
    known = {part.name: part for part in fields(_StudyFile)}
    for key in values:
        if key not in known:
            raise UserError(f"Unknown key {key!r} in {where}{did_you_mean(key, known)}")
    values = {key: value for key, value in values.items() if value is not None}
    for key, part in known.items():
        if key not in values and part.default is MISSING and part.default_factory is MISSING:
            raise UserError(f"{where} has no {key}.")
    file = _StudyFile(**values)

    def check(holds: bool, name: str, what: str, value: Any) -> None:
        if not holds:
            raise UserError(f"{name} must be {what}, not {value!r}, in {where}.")

    def check_seeds(seeds: Any, name: str) -> None:
        whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
        check(whole and 0 < len(seeds) == len(set(seeds)), name, "a list of different whole numbers", seeds)

    def check_grid(grid: Any, name: str) -> None:
        lists = isinstance(grid, dict) and all(isinstance(points, list) and points for points in grid.values())
        lists = lists and all(points.count(point) == 1 for points in grid.values() for point in points)
        check(lists, name, "a mapping from keys of the recipe to lists of different values", grid)
        for point in itertools.chain(*grid.values()):
            is_word = isinstance(point, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", point)
            check(not is_word, name, "of numbers that YAML takes for such, with a point as in 1.0e-3", point)

    for key in ("recipe", "output_dir", "baseline", "metric"):
        check(isinstance(getattr(file, key), str | None), key, "a word", getattr(file, key))
    forms, contrasts, tune = file.forms, file.contrasts, file.tune
    check_seeds(file.seeds, "seeds")
    check(isinstance(forms, dict) and forms, "forms", "a mapping from names to keys of the recipe", forms)
    for name, keys in forms.items():
        proper = isinstance(name, str) and name.isprintable() and name.strip() and isinstance(keys, dict | None)
        check(proper, f"The form {name!r}", "a name of one line and a mapping of keys", keys)
    pairs = isinstance(contrasts, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in contrasts)
    pairs = pairs and all(isinstance(name, str) for pair in contrasts for name in pair)
    once = pairs and all(len(set(pair)) == 2 for pair in contrasts)
    once = once and len(set(map(frozenset, contrasts))) == len(contrasts)
    check(once, "contrasts", "a list of pairs [form, form] of two forms, each pair once", contrasts)
    named = [("contrasts", name) for pair in contrasts for name in pair]
    for key, name in [*named, *([] if file.baseline is None else [("baseline", file.baseline)])]:
        if name not in forms:
            hint = did_you_mean(name, forms) or f", but {', '.join(forms)}."
            raise UserError(f"{key} {name!r} is none of the forms in {where}{hint}")
    check(isinstance(file.overrides, dict), "overrides", "a mapping of keys of the recipe", file.overrides)
    check_grid(file.grid, "grid")
    if tune is not None:
        parts = isinstance(tune, dict) and set(tune) == {"grid", "seeds"} and tune["grid"]
        check(parts, "tune", "a mapping of grid and seeds", tune)
        if file.grid:
            raise UserError(f"grid and tune, which has a grid of its own, cannot both stand in {where}.")
        check_grid(tune["grid"], "the grid of tune")
        check_seeds(tune["seeds"], "the seeds of tune")
    for key in ("trains_at", "margin"):
        number = getattr(file, key)
        proper = isinstance(number, int | float | None) and not isinstance(number, bool)
        check(proper and abs(number or 0) <= 100, key, "a number, in points of 100", number)
    if file.margin is not None and not (file.margin > 0 and contrasts):
        raise UserError(f"margin must be above 0, and needs contrasts, in {where}.")
    check(isinstance(file.keep_models, bool), "keep_models", "true or false", file.keep_models)
    return file


def _as_folder_name(name: str) -> str:
    """Replaces all but letters, digits, `_`, `.` and `+` by dashes; truncates a long name and appends a hash."""
    folder = re.sub(r"[^\w.+]+", "-", name)
    if len(folder.encode()) <= _LONGEST_NAME:
        return folder
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return folder.encode()[: _LONGEST_NAME - 13].decode(errors="ignore") + f"-{digest}"


def _underscored(values: dict) -> dict:
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _check_disjoint(forms: dict[str, dict], grid: dict, overrides: dict, where: str) -> None:
    """A key has one place: the forms, the grid, or the overrides of file and command line; some have none of these."""
    by_forms = {key for keys in forms.values() for key in keys}
    places = {"the forms": by_forms, "the grid": set(grid), "the overrides": set(overrides)}
    for place, keys in places.items():
        for key in _OF_THE_STUDY:
            if key in keys and not (key == "task" and place == "the overrides"):
                hint = ": the study has seeds" if key == "seed" else ""
                raise UserError(f"{key} cannot be set by {place} of {where}{hint}.")
    for (one, keys), (other, others) in itertools.combinations(places.items(), 2):
        if keys & others:
            raise UserError(f"{min(keys & others)} is set by {one} of {where} and by {other}.")


def _find_idle(recipe: Recipe) -> dict[str, str]:
    """The keys without an effect, each with the reason; none where the model is not known before it is loaded."""
    model = recipe.model
    if recipe.training.model_name_or_path or model.skip_type not in {*SKIP_CONNECTIONS, None}:
        return {}
    try:
        return dict(find_idle_keys(recipe, model if recipe.task == "translation" else model.make_config(recipe.given)))
    except ValueError:  # [`check_cells`] names it
        return {}


def _check_unique_folders(cells: list[Cell]) -> None:
    by_folder: dict[Path, Cell] = {}
    for cell in cells:
        if (other := by_folder.setdefault(cell.folder, cell)) is not cell:
            raise UserError(f"The cells {str(other)!r} and {str(cell)!r} would share a folder: give them other names.")


def _choose_metric(metric: str | None, recipe: Recipe) -> str:
    known = METRICS[recipe.task]
    if metric is not None and metric not in known:
        raise UserError(f"metric must be one of {', '.join(known)} (task: {recipe.task}), not {metric!r}.")
    return metric or known[0]
