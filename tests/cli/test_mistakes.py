"""What new users get wrong: one sentence each, and no traceback."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image

from hf_rskip.cli.main import main

MISTAKES = yaml.safe_load(Path(__file__).with_name("mistakes.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def names(trained, trained_resnet, corpus_folder, cifar_folder, write_recipe, write_image_recipe):
    """What stands for what in the commands."""
    return {
        "MODEL": trained.folder,
        "RESNET": trained_resnet.folder,
        "CORPUS": corpus_folder,
        "IMAGES": cifar_folder,
        "RECIPE": write_recipe(),
        "IMAGE_RECIPE": write_image_recipe(),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The folder that the commands run in."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("folder", "data", "outputs", "pictures/train/cat", "pictures/test/cat"):
        (folder / name).mkdir(parents=True)
    for split in ("train", "test"):
        Image.new("RGB", (8, 8)).save(folder / "pictures" / split / "cat" / "1.png")
    vocabulary = {"type": "WordLevel", "vocab": {"<unk>": 0, "house": 1}, "unk_token": "<unk>"}
    texts = {
        "file": "",
        "empty.txt": "",
        "sentences.txt": "the cat .\na mouse .\nthe old woman .\n",
        "two.txt": "die Katze .\neine Maus .\n",
        "list.yaml": "- seed\n",
        "twice.yaml": "seed: 1\nseed: 2\n",
        "study.yaml": "recipe: recipe.yaml\noutput_dir: study\nseeds: [1]\n",
        "table.csv": "a,b\n1,2\n",
        "words.json": json.dumps({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": vocabulary}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "latin.txt").write_bytes(b"stra\xdfe\n")
    return folder


def test_there_are_enough():
    commands = [mistake["command"] for mistake in MISTAKES]
    assert len(commands) == len(set(commands)) >= 45


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake["command"])
def test_a_mistake(mistake, names, files, monkeypatch, capfd):
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    paths = [word.split("/") for word in shlex.split(mistake["command"])]
    try:
        code = main(["/".join([str(names.get(first, first)), *rest]) for first, *rest in paths])
    except SystemExit as stop:  # of argparse, after how the command is used
        code = stop.code
    out, err = capfd.readouterr()
    *_, line = err.splitlines()
    assert code == mistake["code"] and not out.strip()
    assert line.startswith("hf-rskip") and ": error: " in line and mistake["sentence"] in line
    assert "Traceback" not in err and "(`--debug` shows where)" not in line
    assert sorted(files.rglob("*")) == before
