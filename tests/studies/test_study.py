import pytest
import yaml

from hf_rskip.errors import UserError
from hf_rskip.studies.study import check_cells, find_difference, read_study, write_recipe


@pytest.fixture
def write_study(write_recipe, tmp_path):
    """Writes a study of two forms and two seeds, with changes (`None` leaves a key out)."""

    def write(**changes):
        values = {
            "recipe": str(write_recipe()),
            "output_dir": str(tmp_path / "output"),
            "seeds": [1, 2],
            "forms": {"post-LN": {"skip_recursions": 1}, "rSkip K=2": {"skip_recursions": 2}},
            **changes,
        }
        path = tmp_path / "study.yaml"
        values = {key: value for key, value in values.items() if value is not None}
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def test_cells_are_the_product_of_forms_settings_and_seeds(write_study, tmp_path):
    grid = {"learning_rate": [1e-3, 2e-3], "warmup-steps": [5, 7]}
    study = read_study(write_study(grid=grid), ["--num_train_epochs", "1", "--d_model=16", "--dropout", "null"])
    assert [cell.number for cell in study.cells] == list(range(1, 17))
    said = [
        (cell.keys["skip_recursions"], cell.keys["learning_rate"], cell.keys["warmup_steps"], cell.seed)
        for cell in study.cells
    ]
    assert said == [
        (k, rate, steps, seed) for k in (1, 2) for rate in (1e-3, 2e-3) for steps in (5, 7) for seed in (1, 2)
    ]
    assert {(cell.keys["num_train_epochs"], cell.keys["d_model"]) for cell in study.cells} == {("1", "16")}
    assert all("dropout" not in cell.keys for cell in study.cells)
    assert len({cell.folder for cell in study.cells}) == 16
    assert (study.baseline, study.metric) == ("post-LN", "bleu")
    assert str(study.cells[-1]) == "rSkip K=2, learning_rate 0.002, warmup_steps 7, seed 2"


def test_the_recipe_is_found_beside_the_study_and_the_output_folder_can_be_another(write_study, write_recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(write_recipe().read_text())
    study = read_study(write_study(recipe="recipe.yaml"), [], output_dir=str(tmp_path / "elsewhere"))
    assert study.cells[0].keys["output_dir"] == str(tmp_path / "elsewhere/cells/post-LN-seed-1/run")


def test_overrides_are_between_the_recipe_and_the_command_line(write_study):
    path = write_study(overrides={"dropout": 0.3, "num-train-epochs": 7})
    keys = read_study(path, ["--dropout", "0.4"]).cells[0].keys
    assert (keys["dropout"], keys["num_train_epochs"]) == ("0.4", 7)


def test_metrics_of_images(write_study, write_image_recipe):
    study = read_study(write_study(recipe=str(write_image_recipe())), [])
    assert study.metric == "accuracy"


WRONG = {
    "no seeds": ({"seeds": None}, [], "has no seeds"),
    "seeds": ({"seeds": [1, 1]}, [], "seeds must be a list of different whole numbers, not [1, 1]"),
    "no numbers": ({"seeds": 3}, [], "seeds must be a list"),
    "unknown": ({"seed": [1]}, [], "Unknown key 'seed'"),
    "hint": ({"base_line": "post-LN"}, [], "did you mean 'baseline'?"),
    "baseline": ({"baseline": "post-NL"}, [], "did you mean 'post-LN'?"),
    "contrast": ({"contrasts": [["post-LN", "rskip K=2"]]}, [], "contrasts 'rskip K=2' is none of the forms"),
    "contrasts": ({"contrasts": ["post-LN"]}, [], "contrasts must be a list of pairs [form, form]"),
    "forms": ({"forms": ["post-LN"]}, [], "forms must be a mapping"),
    "form": ({"forms": {"a": 3}}, [], "The form 'a' must be"),
    "key of a form": (
        {"forms": {"a": {"skip_tpye": "xskip"}}},
        [],
        "study.yaml (task: translation); did you mean 'skip_type'?",
    ),
    "value of a form": ({"forms": {"a": {"dropout": "much"}}}, [], "cell a: "),
    "seed in a form": ({"forms": {"a": {"seed": 1}}}, [], "seed cannot be set by the forms"),
    "grid": ({"grid": {"learning_rate": 0.1}}, [], "grid must be a mapping from keys of the recipe to lists"),
    "grid and forms": ({"grid": {"skip_recursions": [1]}}, [], "skip_recursions is set by the forms"),
    "forms and command": ({}, ["--skip_recursions", "3"], "and by the overrides"),
    "forms and overrides": ({"overrides": {"skip_recursions": 3}}, [], "and by the overrides"),
    "overrides": ({"overrides": [1]}, [], "overrides must be a mapping of keys of the recipe, not [1]"),
    "seed by command": ({}, ["--seed", "3"], "seed cannot be set by the overrides"),
    "word": ({}, ["oops"], "'oops' where a --key was expected"),
    "unknown by command": ({}, ["--dropuot", ".1"], "did you mean 'dropout'?"),
    "metric": ({"metric": "rouge"}, [], "metric must be one of bleu, chrf (task: translation), not 'rouge'"),
    "trains_at": ({"trains_at": "high"}, [], "trains_at must be a number"),
    "keep_models": ({"keep_models": 1}, [], "keep_models must be true or false"),
    "key in overrides": ({"overrides": {"dropuot": 0.1}}, [], "in the overrides of "),
    "key in the grid": ({"grid": {"dropuot": [0.1]}}, [], "in the grid of "),
    "list in a form": ({"forms": {"a": {"dropout": [0.1]}}}, [], "takes one value, not a list, in the form 'a' of"),
    "tokenizers": ({"forms": {"a": {}, "b": {"bleu_tokenize": "char"}}}, [], "bleu_tokenize must be one for all cells"),
    "test sets": (
        {"grid": {"max_predict_samples": [5, 7]}},
        [],
        "max_predict_samples must be one for all cells of",
    ),
    "nothing of a form": (
        {"forms": {"K=1": {}, "s=2": {"skip_scale": 2}}},
        [],
        "skip_scale in the form 's=2' of",
    ),
    "nothing of a grid": ({"grid": {"skip_scale": [1, 2]}}, [], "has no effect with skip_type rskip."),
    "a word for YAML": ({"grid": {"learning_rate": ["1e-3", "2e-3"]}}, [], "with a point as in 1.0e-3, not '1e-3', in"),
    "a value twice": ({"grid": {"dropout": [0, 0.0]}}, [], "to lists of different values, not {'dropout': [0, 0.0]}"),
    "names": ({"forms": {"a b": {}, "a/b": {}}}, [], "would share a folder"),
    "tune": ({"tune": {"grid": {"learning_rate": [1e-3]}}}, [], "tune must be a mapping of grid and seeds, not"),
    "grid of tune": ({"tune": {"grid": {"learning_rate": 1}, "seeds": [1]}}, [], "the grid of tune must be a mapping"),
    "seeds of tune": ({"tune": {"grid": {"dropout": [0.1]}, "seeds": [1.5]}}, [], "the seeds of tune must be a list"),
    "tune and grid": (
        {"tune": {"grid": {"learning_rate": [1e-3]}, "seeds": [1]}, "grid": {"warmup_steps": [1]}},
        [],
        "grid and tune, which has a grid of its own, cannot both stand",
    ),
    "tune unseen": (
        {"tune": {"grid": {"learning_rate": [1e-3]}, "seeds": [1]}},
        ["--eval_strategy=no", "--load_best_model_at_end=false", "--early_stopping_patience=null"],
        "judges by validation scores: eval_strategy cannot be 'no'",
    ),
    "grid unseen": (
        {"grid": {"learning_rate": [1e-3, 2e-3]}},
        ["--predict_with_generate=false", "--metric_for_best_model=loss"],
        "grid in",
    ),
    "margin": ({"margin": "small"}, [], "margin must be a number"),
    "a form with itself": ({"contrasts": [["post-LN", "post-LN"]]}, [], "of two forms, each pair once"),
    "a contrast twice": (
        {"contrasts": [["post-LN", "rSkip K=2"], ["rSkip K=2", "post-LN"]]},
        [],
        "of two forms, each pair once",
    ),
    "no names": ({"contrasts": [[["post-LN"], "rSkip K=2"]]}, [], "contrasts must be a list of pairs"),
    "form of two lines": ({"forms": {"a\nb": {}}}, [], "must be a name of one line"),
    "trains_at unseen": (
        {"trains_at": 5},
        ["--predict_with_generate=false", "--metric_for_best_model=loss"],
        "trains_at in",
    ),
    "push": ({}, ["--push_to_hub", "true"], "push_to_hub is not for the cells of"),
    "margin of everything": ({"margin": float("inf")}, [], "margin must be a number, in points of 100"),
    "margin for nothing": ({"margin": 0.5}, [], "margin must be above 0, and needs contrasts"),
    "no recipe": ({"recipe": "none.yaml"}, [], "There is no recipe"),
}  # fmt: skip


@pytest.mark.parametrize("changes, words, message", WRONG.values(), ids=WRONG)
def test_mistakes_are_named(write_study, changes, words, message):
    with pytest.raises(UserError) as error:
        read_study(write_study(**changes), words)
    assert message in str(error.value)


def test_residual_kinds_and_data_that_are_not_there(write_study):
    check_cells(read_study(write_study(), []).cells)
    cells = read_study(write_study(forms={"mine": {"skip_type": "layer_scale"}}), []).cells
    with pytest.raises(UserError, match="mine: `skip_type` must be one of .*--import_module.*, not 'layer_scale'"):
        check_cells(cells)
    for form, message in (
        ({"dataset_name": "./none"}, "There is no dataset './none'"),
        ({"tokenizer_name": "./none"}, "There is no tokenizer './none'"),
        ({"dataset_name": None, "train_files": ["no.en", "no.de"]}, "train_files names a file that does not exist: no"),
        ({"d_model": 17}, "a: `d_model` must be a multiple of"),
        ({"dataset_name": "d", "test_split": "train"}, "a: train_split and test_split are both 'train'"),
    ):
        cells = read_study(write_study(forms={"a": form}), []).cells
        with pytest.raises(UserError, match=message):
            check_cells(cells)


def test_folders_of_any_script_and_length(write_study, tmp_path):
    forms = {"残差接続": {}, "残差 K=2": {}, "長" * 100 + "1": {}, "長" * 100 + "2": {}}
    folders = [cell.folder for cell in read_study(write_study(forms=forms, seeds=[1]), []).cells]
    assert [folder.name for folder in folders[:2]] == ["残差接続-seed-1", "残差-K-2-seed-1"]
    for folder in folders:
        folder.mkdir(parents=True)  # each one new, and none too long
        (folder / ".result.json-1234567").touch()


def test_a_folder_of_another_recipe_is_told_by_its_key(write_study):
    cell = read_study(write_study(), []).cells[0]
    cell.folder.mkdir(parents=True)
    write_recipe(cell)
    assert find_difference(cell) is None
    same = read_study(write_study(), ["--learning_rate", "0.01"]).cells[0]  # the recipe says 1e-2
    assert find_difference(same) is None
    other = read_study(write_study(), ["--learning_rate", "0.02"]).cells[0]
    assert find_difference(other) == "learning_rate 0.01, not 0.02"
    fewer = read_study(write_study(), ["--warmup_steps", "null"]).cells[0]
    assert find_difference(fewer) == "warmup_steps 10, not None"
