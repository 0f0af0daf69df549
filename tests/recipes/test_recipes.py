"""Every recipe of the tree trains: two steps of it, made small, on a tiny corpus of the schema that it names."""

import json
import re
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, Features, Translation

from hf_rskip import RSkipResNetConfig, parse_recipe
from hf_rskip.cli import main
from hf_rskip.recipe.describe import find_idle_keys

RECIPES = Path(__file__).parents[2] / "recipes"
FOLDERS = [RECIPES, *(path for path in RECIPES.iterdir() if path.is_dir() and path.name != "accelerate")]
ALL = sorted(path.relative_to(RECIPES).as_posix() for folder in FOLDERS for path in folder.glob("*.yaml"))

# What decides size, speed and hardware; all else is as in the recipe.
SMALL = {
    "common": {
        "max_steps": 2,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 1,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "bf16": "false",
        "dataloader_num_workers": 0,
        "use_cpu": "true",
        "report_to": "none",
    },
    "translation": {
        "vocab_size": 300,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_source_length": 64,
        "max_target_length": 64,
        "max_new_tokens": 8,
        "per_device_train_batch_tokens": 256,
        "preprocessing_num_workers": 1,
        "max_eval_samples": 4,
        "max_predict_samples": 4,
    },
    "image-classification": {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "depths": [1, 1],
        "embedding_size": 8,
        "hidden_sizes": [32, 64],
        "image_size": 32,
        "max_predict_samples": 8,
        "shuffle_buffer_size": 16,
    },
}


@pytest.fixture(scope="module")
def en_vi_folder(pairs, tmp_path_factory) -> str:
    """The tiny corpus under the language codes of an English-Vietnamese one."""
    folder = tmp_path_factory.mktemp("en-vi")
    features = Features({"translation": Translation(["en", "vi"])})
    for split, rows in pairs.items():
        rows = [{"en": pair["en"], "vi": pair["de"]} for pair in rows]
        Dataset.from_dict({"translation": rows}, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.mark.parametrize("name", ALL)
def test_two_steps_of_every_recipe(name, corpus_folder, en_vi_folder, cifar_folder, imagenet_folder, tmp_path, capsys):
    values = yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))
    task = values.get("task", "translation")
    if task == "translation":
        folder = en_vi_folder if values["target_lang"] == "vi" else corpus_folder
    else:
        folder = imagenet_folder if name.startswith("imagenet/") else cifar_folder
    changes = SMALL["common"] | SMALL[task] | {"output_dir": tmp_path / "output", "dataset_name": folder}
    if "global_batch_tokens" in values:
        changes["global_batch_tokens"] = 512
    if "dataset_config_name" in values:
        changes["dataset_config_name"] = "default"  # that of a folder
    if task == "image-classification":
        changes |= {"validation_size": 40} if "validation_size" in values else {"eval_strategy": "no"}
    if "lr_milestones" in values:  # of epochs: two, of a step each
        changes |= {"lr_milestones": [1], "num_train_epochs": 2, "max_train_samples": 8}
        del changes["max_steps"]
    words = []
    for key, value in changes.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    code = main(["train", str(RECIPES / name), *words])
    assert code == 0, capsys.readouterr().err
    state = json.loads((tmp_path / "output" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    results = json.loads((tmp_path / "output" / "all_results.json").read_text())
    assert ("test_bleu" if task == "translation" else "test_accuracy") in results


def test_every_recipe_folder_has_a_readme_that_names_its_recipes():
    for name in ALL:
        folder = (RECIPES / name).parent
        if folder != RECIPES:
            assert Path(name).name in (folder / "README.md").read_text(encoding="utf-8"), name


def test_wmt14_is_as_published():
    for name, averaged in (("base", 5), ("big", 20)):
        recipe = yaml.safe_load((RECIPES / f"wmt14-en-de/{name}.yaml").read_text())
        assert recipe["learning_rate"] == pytest.approx((recipe["d_model"] * 4000) ** -0.5, rel=1e-4)
        assert recipe["global_batch_tokens"] == 25_000 and recipe["average_checkpoints"] == averaged


@pytest.mark.parametrize("name", ["resnet20", "preact_resnet110"])
def test_the_forms_of_the_cifar10_readme(name, capsys):
    """Each row of its table makes another skip connection of the recipe, and no key is without effect."""
    rows = re.findall(r"^\| .* \| `(--.*)` \|$", (RECIPES / "cifar10/README.md").read_text(), re.MULTILINE)
    assert len(rows) == 4
    for row in rows:
        recipe = parse_recipe(RECIPES / f"cifar10/{name}.yaml", row.replace(" K", " 2").split())
        fields = {key: value for key, value in recipe.given.items() if key.startswith("skip_")}
        config = RSkipResNetConfig.from_name(recipe.model.architecture, **fields)
        assert all(key not in dict(find_idle_keys(recipe, config)) for key in fields)
