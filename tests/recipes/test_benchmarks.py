"""The benchmarks of skip connections run, at sizes that say nothing about speed."""

import csv
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

from hf_rskip import RSkipConfig, RSkipForConditionalGeneration
from hf_rskip.conversion.ctranslate2 import export_ctranslate2
from hf_rskip.data.text.tokenizer import train_tokenizer

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture
def run(warm_python):
    def run(script, output, arguments, *paths):
        command = [warm_python, str(BENCHMARKS / script), *arguments.split(), *map(str, paths), "--output", str(output)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        with output.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert all(row["device"] and row["torch"] and row["commit"] and row["date"] for row in rows)
        return rows

    return run


def test_skip_kernels(run, tmp_path):
    arguments = (
        "--shapes 128x64 16x8x32x32 --channels_last --recursions 1 3 --rounds 2 --warmup 1"
        " --implementations reference closed_form auto --step tiny"
    )
    rows = run("skip_kernels.py", tmp_path / "rows.csv", arguments, "--plot", tmp_path / "plot.pdf")
    keys = {(row["what"], row["shape"], row["implementation"], row["affine"], row["K"]) for row in rows}
    assert len(keys) == len(rows)
    counts = [sum(row["what"] == what for row in rows) for what in ("skip", "layer", "training step")]
    assert counts == [20, 8, 7]
    for row in rows[:28]:
        assert 0 < float(row["forward_ms"]) < float(row["total_ms"]) and float(row["total_to_K1"]) > 0
        if (row["what"], row["implementation"]) == ("skip", "reference"):
            assert row["eager_to_this"] == "1.000"
    kept = {
        (row["implementation"], row["affine"], row["K"]): float(row["kept_MiB"])
        for row in rows
        if (row["what"], row["shape"]) == ("skip", "16x8x32x32")
    }
    assert kept["reference", "per_step", "3"] > 2 * kept["reference", "per_step", "1"]
    assert kept["closed_form", "per_step", "3"] < kept["reference", "per_step", "1"]
    assert (tmp_path / "plot.pdf").read_bytes().startswith(b"%PDF")


def test_training_step(run, tmp_path):
    arguments = "--shape tiny --batch_size 2 --length 8 --recursions 1 2 --affines last --rounds 1 --warmup 1 --bf16"
    rows = run("training_step.py", tmp_path / "rows.csv", arguments)
    names = [("fused", "1"), ("fused", "2"), ("eager", "2"), ("marian", "1")]
    assert [(row["implementation"], row["K"]) for row in rows] == names
    assert all(float(row["total_ms"]) > 0 and float(row["marian_to_this"]) > 0 for row in rows)
    assert rows[0]["total_to_K1"] == rows[-1]["marian_to_this"] == "1.000"


def test_serving(run, corpus_folder, pairs, tmp_path, monkeypatch):
    tokenizer = train_tokenizer((pair["en"] for pair in pairs["train"]), 300)
    config = RSkipConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, skip_type="xskip", skip_scale=2.0
    )
    config.source_lang, config.target_lang = "en", "de"
    torch.manual_seed(0)
    model = RSkipForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export_ctranslate2(model, tokenizer, tmp_path / "exports/ctranslate2")
    paths = tmp_path / "model", corpus_folder, "--exports", tmp_path / "exports", "--plot", tmp_path / "plot.png"
    arguments = "--sentences 5 --num_beams 2 --max_new_tokens 6 --rounds 1"
    rows = run("serving.py", tmp_path / "rows.csv", arguments, *paths)
    assert [row["engine"] for row in rows] == ["torch", "ctranslate2"]  # of the others there is no export
    assert all(float(row["tokens_per_second"]) > 0 and row["same"] == "1.000" for row in rows)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.syspath_prepend(BENCHMARKS)
    find_folders = runpy.run_path(str(BENCHMARKS / "serving.py"))["find_folders"]
    with pytest.raises(SystemExit, match="onnx needs an export in"):
        find_folders(tmp_path / "model", tmp_path / "exports", ["torch", "onnx"])
