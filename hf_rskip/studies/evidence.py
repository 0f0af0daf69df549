"""The evidence of a study: recipes, results, predictions and probes of its finished cells in one compressed file.

From it `hf-rskip study` makes the report again on another machine, and goes on where the folders of cells are gone.
"""

import json
import os
import sys
from pathlib import Path

import pyarrow
import yaml
from pyarrow import parquet

from ..atomic import replace_text, write_then_rename
from ..data.images.loading import load_image_dataset
from ..data.names import is_path
from ..data.text.corpora import load_translation_dataset
from ..errors import UserError
from ..evaluation.bleu import scored_form
from ..evaluation.evaluate import split_languages
from ..evaluation.predictions import PREDICTIONS_NAME
from ..probing.callback import TABLE_NAME
from ..recipe.parsing import parse_values
from .cell import is_done, parse_result, read_result, write_result
from .study import Cell, Study, compare_recipes, name_point, write_recipe

EVIDENCE_NAME = "evidence.parquet"
_PATHS = ("output_dir", "dataset_name", "train_files", "validation_files", "test_files", "tokenizer_name")
"""Keys of a recipe whose values are paths; that of `model_name_or_path` may be one."""
_TEXTS = (PREDICTIONS_NAME, TABLE_NAME)
_SCHEMA = pyarrow.schema(
    {
        **{"form": pyarrow.string(), "setting": pyarrow.string(), "seed": pyarrow.int64()},
        **dict.fromkeys(("recipe", "result", *_TEXTS), pyarrow.string()),
    }
)


def write_evidence(study: Study) -> None:
    """Writes [`EVIDENCE_NAME`] to the study's folder: a row for each cell that finished or diverged.

    A row has the cell's recipe without paths, its result, test predictions and probes.
    """
    rows = [_pack(cell) for cell in study.cells if is_done(cell)]
    if rows:
        with write_then_rename(study.output_dir / EVIDENCE_NAME) as part:
            parquet.write_table(pyarrow.Table.from_pylist(rows, schema=_SCHEMA), part, compression="zstd")


def restore_cells(study: Study) -> None:
    """Restores the cells without a result from the evidence in the study's folder or beside its file, and says so.

    Raises:
        [`UserError`]: if the evidence cannot be read, or a cell was run with another recipe or, where the data are on
            this machine, tested on others.
    """
    for path in (study.output_dir / EVIDENCE_NAME, study.path.with_name(EVIDENCE_NAME)):
        missing = {_identify(cell): cell for cell in study.cells if not is_done(cell)}
        rows = _read_rows(path) if missing else []
        found = [(row, cell) for row in rows if (cell := missing.get((row["form"], row["setting"], row["seed"])))]
        references = _load_references(found[0][1]) if found else None
        for row, cell in found:
            _unpack(row, cell, path, references)
        if found:
            cells = "1 cell is" if len(found) == 1 else f"{len(found)} cells are"
            print(f"note: {cells} restored from {path}, trained on the data of its study", file=sys.stderr)


def _identify(cell: Cell) -> tuple[str, str, int]:
    return cell.form, json.dumps(dict(cell.setting)), cell.seed


def _find_places(keys: dict) -> dict:
    """The keys of a recipe that name places of this machine, with their values."""
    return {
        key: value
        for key, value in keys.items()
        if key in _PATHS or (key == "model_name_or_path" and is_path(str(value)))
    }


def _pack(cell: Cell) -> dict:
    form, setting, seed = _identify(cell)
    keys = {key: value for key, value in cell.keys.items() if key not in _find_places(cell.keys)}
    texts = {name: cell.folder / name for name in _TEXTS}
    return {
        "form": form,
        "setting": setting,
        "seed": seed,
        "recipe": yaml.safe_dump(keys, sort_keys=False, allow_unicode=True),
        "result": json.dumps(read_result(cell), ensure_ascii=False),
        **{name: path.read_text(encoding="utf-8") if path.exists() else None for name, path in texts.items()},
    }


def _read_rows(path: Path) -> list[dict]:
    try:
        return parquet.read_table(path, schema=_SCHEMA).to_pylist() if path.exists() else []
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{str(path)!r} is not the evidence of a study: {' '.join(str(error).split())}.") from error


def _unpack(row: dict, cell: Cell, path: Path, references: list | None) -> None:
    try:
        keys, result = dict(yaml.safe_load(row["recipe"])), parse_result(row["result"])
        tested = json.loads(row[PREDICTIONS_NAME])["references"] if row[PREDICTIONS_NAME] else None
    except (ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{str(path)!r} is damaged: the row of {cell} cannot be read ({error}).") from error
    difference = compare_recipes({**_find_places(cell.keys), **keys}, cell)
    if difference is None and tested and references and _normalize(tested) != _normalize(references):
        difference = "test data that are not those of this study"
    if difference:
        elsewhere = ", or choose another output_dir" if path.parent == cell.folder.parents[1] else ""
        raise UserError(
            f"{str(path)!r}: the cell {name_point(cell.form, cell.setting)} was run with {difference}: remove the "
            f"file{elsewhere}."
        )
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_recipe(cell)
    for name in _TEXTS:
        if row[name] is not None:
            replace_text(cell.folder / name, row[name])
    write_result(cell, **result)


def _load_references(cell: Cell) -> list | None:
    """The references of the test split, one for all cells of a study; `None` where it is not on this machine."""
    recipe = parse_values(cell.keys, [], str(cell))
    data = recipe.data
    places = getattr(data, "test_files", None) or [data.dataset_name or ""]
    if getattr(data, "streaming", False) or any(place != "cldr" and not os.path.exists(place) for place in places):
        return None
    if recipe.task == "translation":
        test_set = load_translation_dataset(data, ("test",))["test"]
        return split_languages(test_set, data.source_lang, data.target_lang)[1]
    return load_image_dataset(data, ("train", "test")).splits["test"]["label"][:]


def _normalize(references: list) -> list:
    """References in the form in which they are scored, without case; classes as they are."""
    return scored_form(references, lowercase=True)[0] if isinstance(references[0], str) else references
