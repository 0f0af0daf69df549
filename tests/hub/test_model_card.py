"""The card that training writes and `hf-rskip push` sends: valid metadata, code that runs, a table that renders."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import TrainerState

from hf_rskip.decoding.loading import load_model
from hf_rskip.hub.model_card import write_model_card
from hf_rskip.hub.training_curve import draw_training_curve
from hf_rskip.recipe.parsing import parse_recipe, parse_values

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def card(trained):
    return ModelCard.load(trained.folder / "README.md")


def test_the_metadata(card, trained):
    results = json.loads((trained.folder / "all_results.json").read_text())
    assert card.data.language == ["en", "de"] and card.data.pipeline_tag == "translation"
    assert card.data.datasets is None  # it is a folder
    scores = {result.metric_type: result for result in card.data.eval_results}
    assert scores.keys() == {"bleu", "chrf"}
    for name, result in scores.items():
        assert result.metric_value == round(results[f"test_{name}"], 2)
        assert results[f"test_{name}_signature"] in result.metric_name
    # Written and read again it is the same.
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_the_scores_are_those_of_the_test_files(trained, tmp_path):
    """Not of the files that the model was trained on; and of how many pairs."""
    files = {split: [f"{split}.en", f"{split}.de"] for split in ("train", "validation", "test")}
    keys = yaml.safe_load(trained.recipe.read_text()) | {f"{split}_files": names for split, names in files.items()}
    del keys["dataset_name"]
    recipe = parse_values(keys | {"max_predict_samples": 5, "output_dir": str(tmp_path)}, [], "recipe")
    model, _ = load_model(str(trained.folder))
    metrics = json.loads((trained.folder / "all_results.json").read_text())
    state = TrainerState.load_from_json(str(trained.folder / "trainer_state.json"))
    write_model_card(tmp_path, recipe, model, state, metrics, {"values": {}, "resumed": []}, "the cat")
    card = ModelCard.load(tmp_path / "README.md")
    for score in card.data.eval_results:
        assert score.dataset_name == score.dataset_type == "test.en and test.de" and score.dataset_split is None
    assert "Data: `train.en and train.de`" in card.text
    assert "| test.en and test.de, at most its first 5 pairs | BLEU |" in card.text


def test_the_hub_accepts_it(hub, card, run_with_package, trained):
    code = f"from huggingface_hub import ModelCard\nModelCard.load({str(trained.folder / 'README.md')!r}).validate()"
    result = run_with_package(code)
    assert result.code == 0, result.err
    assert hub.requests == ["POST /api/validate-yaml"]


def test_what_it_says(card, trained):
    text = card.text
    assert "y_1 = LN(x + F(x)), y_k = LN(x + y_{k-1}), output y_K" in text and "skip_recursions: 2" in text
    assert "2105.07205" in text and "learning_rate: 0.01" in text and "torch 2." in text and "CPU" in text
    assert "{{" not in text and "{%" not in text
    assert (trained.folder / "training_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "(training_curve.png)" in text


def test_the_signatures_do_not_break_the_table(card):
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert all(len(re.split(r"(?<!\\)\|", row)) == 6 for row in rows), rows


def test_its_code_runs(hub, cli, run_with_package, run_without_package, trained):
    assert cli("push", trained.folder, "tiny", "--with-code").code == 0
    text = hub.files("user/tiny")["README.md"].decode()
    package, code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    first_door = run_with_package(package)
    assert first_door.code == 0 and first_door.out.startswith("['"), first_door.err
    second_door = run_without_package(code)
    assert (second_door.code, second_door.out) == (0, first_door.out), second_door.err


def test_a_local_card_loads_its_folder_and_needs_no_code_of_the_hub(trained, trained_resnet, run_with_package):
    for run in (trained, trained_resnet):
        text = (run.folder / "README.md").read_text()
        assert "trust_remote_code" not in text and "(`pip install .` in a clone of its repository)" in text
        (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        assert f'"{run.folder}"' in code
        result = run_with_package(code)
        assert result.code == 0, result.err


def test_a_folder_that_has_moved_and_is_pushed_without_code(hub, cli, trained, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(trained.folder, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    card = folder / "README.md"
    card.write_text(card.read_text() + '\nCompare it with from_pretrained("other/model").\n')
    assert cli("push", folder, "moved").code == 0
    text = hub.files("user/moved")["README.md"].decode()
    assert text.count('from_pretrained("user/moved")') == 2 and 'from_pretrained("other/model")' in text
    assert str(trained.folder) not in text and "trust_remote_code" not in text


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_it_was_fine_tuned_from(trained, model_and_tokenizer, tmp_path, is_folder):
    """A model and a corpus of the Hub are in the metadata, a folder and what is made on the spot in the text alone."""
    model, _ = model_and_tokenizer
    start = str(tmp_path / "base") if is_folder else "user/base"
    (tmp_path / "base").mkdir()
    corpus = "cldr" if is_folder else "user/corpus"
    recipe = parse_recipe(trained.recipe, ["--model_name_or_path", start, "--dataset_name", corpus])
    state = TrainerState.load_from_json(trained.folder / "trainer_state.json")
    metrics = json.loads((trained.folder / "all_results.json").read_text())
    write_model_card(tmp_path, recipe, model, state, metrics, {"values": {}, "resumed": []}, "the cat .")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == (None if is_folder else "user/base")
    assert card.data.datasets == (None if is_folder else ["user/corpus"])
    assert f"Fine-tuned from `{'base' if is_folder else 'user/base'}`. Data: " in card.text


def test_the_url_of_the_package():
    """What the card links to."""
    (url,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"].values()
    assert all(f"[hf_rskip]({url})" in card.read_text() for card in ROOT.glob("model_cards/*/README.md"))


def test_the_card_of_a_resnet(hub, cli, run_with_package, run_without_package, trained_resnet):
    """Valid metadata, and code that runs with the package and without."""
    card = ModelCard.load(trained_resnet.folder / "README.md")
    results = json.loads((trained_resnet.folder / "all_results.json").read_text())
    (score,) = card.data.eval_results  # of four classes there is no top-5 accuracy
    assert score.metric_value == round(results["test_accuracy"], 4) and "top-5" not in card.text
    assert cli("push", trained_resnet.folder, "resnet", "--with-code").code == 0
    files = hub.files("user/resnet")
    assert files.keys() >= {"preprocessor_config.json", "model.safetensors", "modeling_rskip_resnet.py"}
    assert not any(name.endswith((".bin", ".pt")) for name in files)
    package, code = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), flags=re.DOTALL)
    first_door = run_with_package(package)
    assert first_door.code == 0 and first_door.out.startswith("[{'label': 'blue'"), first_door.err
    second_door = run_without_package(code)
    assert (second_door.code, second_door.out) == (0, first_door.out), second_door.err


def test_a_picture_without_scores(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    draw_training_curve(history, tmp_path / "curve.png", "loss", "eval_bleu", "BLEU", 1)
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_every_package_is_in_the_wheel():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("hf_rskip/**/__init__.py")}
    assert set(packages) == found | {"hf_rskip.accelerate_profiles", "hf_rskip.model_cards"}
