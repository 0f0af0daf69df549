"""The studies run on data as they come."""

import subprocess
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, Features, Translation
from transformers import GenerationConfig

from hf_rskip import RSkipConfig, RSkipForConditionalGeneration
from hf_rskip.data.text.tokenizer import train_tokenizer
from hf_rskip.models import RSkipResNetConfig, RSkipResNetForImageClassification
from hf_rskip.recipe.parsing import parse_recipe
from hf_rskip.studies.study import read_study

STUDIES = Path(__file__).parents[2] / "recipes" / "studies"


@pytest.mark.slow
def test_growing_recursions_on_pairs_with_missing_and_long_sides(recipe, pairs, warm_python, tmp_path):
    long = {"en": "the cat " * 60, "de": "die Katze"}
    bad = [{"en": None, "de": "die Katze"}, {"en": "the cat", "de": None}, {"en": "", "de": "die Katze"}, long]
    for split, rows in pairs.items():
        rows = [*bad, *rows] if split == "train" else rows
        features = Features({"translation": Translation(["en", "de"])})
        Dataset.from_dict({"translation": rows}, features=features).to_parquet(tmp_path / "corpus" / f"{split}.parquet")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"dataset_name": str(tmp_path / "corpus")}))
    tokenizer = train_tokenizer([side for pair in pairs["train"] for side in pair.values()], 320)
    widths = {name: recipe[name] for name in recipe.keys() & RSkipConfig.__dataclass_fields__.keys() - {"vocab_size"}}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = RSkipConfig(vocab_size=len(tokenizer), skip_recursions=1, **widths, **special)
    model = RSkipForConditionalGeneration(config)
    model.generation_config = GenerationConfig(max_new_tokens=8, **special)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    words = [tmp_path / "model", "--recipe", tmp_path / "recipe.yaml", "--gains", 10, "--max_steps", 2]
    command = [warm_python, STUDIES / "grow_recursions.py", *words]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    *_, as_it_is, grown = result.stdout.splitlines()
    assert as_it_is.startswith("| K = 1 |") and grown.startswith("| K = 2, gain 10 |")


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*/study.yaml")), ids=lambda path: path.parent.name)
def test_every_cell_of_every_study_is_a_recipe_and_every_form_a_model(path, tmp_path):
    study = read_study(path, ["--dataset_name", str(tmp_path)], str(tmp_path / "output"))
    assert study.baseline in study.forms
    readme = (STUDIES / "README.md").read_text(encoding="utf-8")
    assert path.parent.name in readme and "hf-rskip study" in path.read_text(encoding="utf-8")
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 300}
    for cell in {cell.form: cell for cell in study.cells}.values():
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(cell.keys))
        model = vars(parse_recipe(file, []).model)
        if study.bleu_tokenize is not None:
            RSkipForConditionalGeneration(RSkipConfig(**(model | sizes)))
        else:
            name = model.pop("architecture")
            config = RSkipResNetConfig.from_name(name, **{k: v for k, v in model.items() if v is not None})
            RSkipResNetForImageClassification(config)
