"""Whole runs: what they leave behind, kills, new residual kinds, and that they learn."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_rskip.cli.main import main
from hf_rskip.errors import UserError
from hf_rskip.models import SKIP_CONNECTIONS, SkipConnection
from hf_rskip.training.translation import Translation

TIMES = {"runtime", "per_second"}


# What a run leaves


def test_the_folder_of_a_finished_run(trained):
    names = {path.name for path in trained.folder.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "all_results.json",
        "trainer_state.json",
    }
    results = json.loads((trained.folder / "all_results.json").read_text())
    assert results.keys() >= {"test_bleu", "test_chrf", "test_bleu_signature", "test_chrf_signature", "train_loss"}
    assert not results.keys() & {"train_samples_per_second", "total_flos"}, "the Trainer does not know them"
    assert 0 < results["test_bleu"] <= 100 and "tok:13a" in results["test_bleu_signature"]
    config = json.loads((trained.folder / "config.json").read_text())
    assert (config["source_lang"], config["target_lang"]) == ("en", "de")
    assert config.get("use_cache", True) is not False, "the Trainer turns it off"
    generation = json.loads((trained.folder / "generation_config.json").read_text())
    assert (generation["num_beams"], generation["max_new_tokens"]) == (2, 24)
    assert generation.get("use_cache", True) is not False
    assert all(line in trained.out for line in ("of 320 pairs kept", "parameters, vocabulary of", "BLEU"))


def test_validation_pairs_beyond_the_positions_are_counted(capsys):
    task = Translation.__new__(Translation)
    task.recipe = SimpleNamespace(training=SimpleNamespace(process_index=0))
    task.validation_set = Dataset.from_dict({"source_length": [4, 9, 3, 8], "target_length": [7, 3, 2, 9]})
    assert task._for_the_loss(9)["target_length"] == [2, 3, 7, 9]
    assert capsys.readouterr().out == ""
    assert task._for_the_loss(8)["target_length"] == [2, 7]
    assert capsys.readouterr().out == "validation: 2 of 4 pairs have more tokens than positions, so no loss\n"
    with pytest.raises(UserError, match="No validation pair fits max_position_embeddings 2"):
        task._for_the_loss(2)


def test_the_model_is_the_best_one(trained):
    state = json.loads((trained.folder / "trainer_state.json").read_text())
    scores = {entry["step"]: entry["eval_bleu"] for entry in state["log_history"] if "eval_bleu" in entry}
    assert list(scores) == [*range(4, state["global_step"] + 1, 4)]
    assert scores[state["best_global_step"]] == max(scores.values()) == state["best_metric"]
    saved = load_file(trained.folder / "model.safetensors")
    best = load_file(trained.folder / f"checkpoint-{state['best_global_step']}" / "model.safetensors")
    assert saved.keys() == best.keys() and all(torch.equal(saved[name], best[name]) for name in saved)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_model_generates(trained, pairs, num_beams):
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(trained.folder).eval()
    inputs = tokenizer([pair["en"] for pair in pairs["test"][:8]], return_tensors="pt", padding=True)
    cached = model.generate(**inputs, num_beams=num_beams)
    assert torch.equal(cached, model.generate(**inputs, num_beams=num_beams, use_cache=False))
    texts = tokenizer.batch_decode(cached, skip_special_tokens=True)
    assert all({"die", "eine", "sieht", "mag", "hört"} & set(text.split()) for text in texts)


# Kills


# New kinds


class Highway(SkipConnection):
    """g * x + (1 - g) * F with a learned gate for each feature."""

    def __init__(self, size, norm, eps):
        super().__init__()
        self.gate = torch.nn.Parameter(torch.zeros(size))

    def forward(self, x, branch, mask=None):
        return torch.lerp(branch, x, self.gate.sigmoid())


def test_a_new_residual_kind_is_one_row(monkeypatch, write_recipe, capfd):
    monkeypatch.setitem(SKIP_CONNECTIONS, "highway", Highway)
    recipe = write_recipe(skip_type="highway", skip_norm="none", max_steps=8, num_beams=1)
    assert main(["train", str(recipe)]) == 0, capfd.readouterr().err
    assert "model: skip_type: highway, " in capfd.readouterr().out
    model = AutoModelForSeq2SeqLM.from_pretrained(recipe.parent / "output")
    gates = [module.gate for module in model.modules() if isinstance(module, Highway)]
    assert len(gates) == 5 and all(gate.abs().max() > 0 for gate in gates)


# Learning


@pytest.mark.slow
def test_it_learns_to_reverse_digits(write_recipe, tmp_path):
    rng = random.Random(0)
    digits = ["".join(rng.choices("0123456789", k=rng.randint(3, 5))) for _ in range(4000)]
    for split, rows in {"train": digits[:3900], "validation": digits[3900:3950], "test": digits[3950:]}.items():
        rows = [{"forth": " ".join(row), "back": " ".join(reversed(row))} for row in rows]
        Dataset.from_dict({"translation": rows}).to_parquet(tmp_path / f"{split}.parquet")
    recipe = write_recipe(
        dataset_name=str(tmp_path),
        source_lang="forth",
        target_lang="back",
        d_model=64,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        dropout=0.0,
        learning_rate="5e-3",
        warmup_steps=100,
        lr_scheduler_type="linear",
        num_train_epochs=12,
        seed=4,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        early_stopping_patience=None,
    )
    assert main(["train", str(recipe)]) == 0
    results = json.loads((recipe.parent / "output" / "all_results.json").read_text())
    assert results["test_bleu"] > 80  # 86 to 100 with three seeds


def test_the_attention_backend_is_a_key(write_recipe, capfd):
    quick = {
        "early_stopping_patience": None,
        "max_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
    }
    assert main(["train", str(write_recipe(attn_implementation="eager", **quick))]) == 0, capfd.readouterr().err
    assert main(["train", str(write_recipe(attn_implementation="no_such", **quick))]) == 2
    assert "no_such" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"), [("skip_recursions", 3), ("dropout", 0.5), ("target_lang", "fr"), ("skip_type", "xskip")]
)
def test_a_run_cannot_go_on_as_another_model(key, value, trained, tmp_path, capfd):
    output = tmp_path / "output"
    shutil.copytree(trained.folder, output)
    overrides = ["--output_dir", str(output), "--resume_from_checkpoint", "true", f"--{key}", str(value)]
    assert main(["train", str(trained.recipe), *overrides]) == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert key in message if key != "target_lang" else "'fr'" in message


def test_fine_tuning_starts_from_the_model_it_names(trained, write_recipe, capfd):
    start = {"model_name_or_path": str(trained.folder), "vocab_size": None, "learning_rate": 0, "max_steps": 1}
    recipe = write_recipe(**start, dropout=0.3)
    assert main(["train", str(recipe)]) == 0, capfd.readouterr().err
    output = recipe.parent / "output"
    before, after = (load_file(folder / "model.safetensors") for folder in (trained.folder, output))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert json.loads((output / "config.json").read_text())["dropout"] == 0.3
    for key, value in {"skip_recursions": 3, "d_model": 64}.items():
        assert main(["train", str(write_recipe(**start, **{key: value}))]) == 2
        sentence = (
            f"has no weights for what the recipe asks ({key} {value} in place of {value // 2 + value % 2}), such as"
        )
        assert sentence in capfd.readouterr().err
    assert main(["train", str(write_recipe(**start, skip_recursions=1))]) == 0
    assert "weights of " in (out := capfd.readouterr().out) and " are not used, such as model." in out
