"""`hf-rskip probe`: recipes at initialisation, trained models, whole trainings, and earlier tables."""

import re
import shutil

import pytest

from hf_rskip.cli import main
from hf_rskip.probing.table import read_table


@pytest.fixture
def run(capfd):
    """Runs `hf-rskip probe` in this process; returns what it prints."""

    def run(*words):
        code = main(["probe", *map(str, words)])
        captured = capfd.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


@pytest.fixture
def fail(capfd):
    def fail(*words):
        assert main(["probe", *map(str, words)]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        return line.removeprefix("hf-rskip: error: ")

    return fail


def test_recipes_at_initialisation(run, write_recipe, write_image_recipe, tmp_path):
    options = ("--random_data", 8, "--samples", 4)
    out = run(
        write_recipe(), *options, "--seeds", 1, 2, "--encoder_layers", 5, "--skip_norm=none", "--output_dir", tmp_path
    )
    assert "recipe: gradients of the cross-entropy with label smoothing 0.1" in out
    table = read_table(tmp_path / "probe.csv")
    assert [(item.model, item.seed, item.step, len(item.sublayers)) for item in table] == [
        ("recipe", 1, 0, 13),
        ("recipe", 2, 0, 13),
    ]
    assert table[0].sublayers[0].tokens == 4 * 8
    assert all(row.skip_weight == pytest.approx(2, abs=1e-4) for row in table[0].sublayers)  # K = 2 without a norm
    assert {path.name for path in tmp_path.iterdir()} == {
        "probe.csv", "gradients.png", "activations.png", "angle.png", "skip_weight.png"
    }  # fmt: skip
    assert re.search(r"\| recipe +\| 2 +\| 0 +\| encoder +\| 10 ", out)
    assert "| 2 " in run(write_image_recipe(), *options, "--depths", 1, 1)


def test_recipes_on_their_own_data(run, write_recipe, write_image_recipe, tmp_path):
    run(write_recipe(), write_image_recipe(), "--samples", 6, "--output_dir", tmp_path)
    sentences, images = read_table(tmp_path / "probe.csv")
    assert sentences.model.endswith("recipe.yaml") and sentences.model != images.model  # both are called recipe
    assert 6 * 4 < sentences.sublayers[0].tokens < 6 * 32
    assert images.sublayers[0].tokens == 6 * 32 * 32
    assert images.sublayers[-1].tokens == 6 * 16 * 16


def test_models_trainings_and_earlier_tables(run, trained, trained_resnet, corpus_folder, cifar_folder, tmp_path):
    run(trained.folder, "--dataset_name", corpus_folder, "--label_smoothing_factor", 0.1, "--output_dir", tmp_path)
    (model,) = read_table(tmp_path / "probe.csv")
    assert (model.model, model.seed, model.step, len(model.sublayers)) == ("output", None, None, 5)
    assert model.sublayers[0].loss < 4 and model.sublayers[0].gain_rms[0] != 1

    out = run(tmp_path / "probe.csv", "--random_data", "--run", trained.folder)
    steps = [int(path.name[11:]) for path in trained.folder.glob("checkpoint-*")]
    for step in steps:
        assert re.search(rf"\| output +\| {step} +\| encoder ", out)

    run(trained_resnet.folder, "--dataset_name", cifar_folder, "--output_dir", tmp_path / "images")
    (images,) = read_table(tmp_path / "images" / "probe.csv")
    assert len(images.sublayers) == 2 and images.sublayers[0].loss < 1.4
    earlier = run(tmp_path / "images" / "probe.csv", "--output_dir", tmp_path / "again")
    assert "encoder" in earlier
    for name in ("probe.csv", "gains.png"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "images" / name).read_bytes()


def test_systems_are_named(run, fail, write_recipe, tmp_path):
    options = ("--random_data", 8, "--samples", 4, "--output_dir", tmp_path)
    assert "| K = 1 " in run(write_recipe(), *options, "--names", "K = 1")
    tables = [tmp_path / "probe.csv", shutil.copy(tmp_path / "probe.csv", tmp_path / "other.csv")]
    run(*tables, "--names", "one", "two", "--output_dir", tmp_path / "both")
    assert [item.model for item in read_table(tmp_path / "both" / "probe.csv")] == ["one", "two"]
    assert "--names must give each of the 2 systems a name of its own" in fail(*tables, "--names", "one")
    assert "--names must give each of the 2 systems a name of its own" in fail(*tables, "--names", "one", "one")


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_what_rezero_has_no_number_for_is_explained(run, write_recipe, tmp_path):
    keys = ("--skip_type", "rezero", "--skip_recursions", "null", "--output_dir", tmp_path)
    out = run(write_recipe(), "--random_data", 8, "--samples", 4, *keys)
    assert "| inf " in out and "skip weight inf: F has no part in y" in out
    assert "| 0 / 0 " in out and "0 / 0: the loss does not depend on the stack" in out and "nan" not in out


def test_mistakes_are_one_sentence(fail, write_recipe, trained, trained_resnet, tmp_path):
    assert "Nothing to probe is named" in fail()
    assert "A model is probed on data: give --dataset_name" in fail(trained.folder)
    assert "keys are for recipes" in fail(trained.folder, "--random_data", "--encoder_layers", 3)
    assert "did you mean '--encoder_layers'" in fail(write_recipe(), "--encoder_layer", 3)
    assert "There is no folder" in fail("--run", tmp_path / "missing", "--random_data")
    assert "has no checkpoints" in fail("--run", tmp_path, "--random_data")
    assert "given twice" in fail(trained.folder, trained.folder, "--random_data")
    assert "missing': no such file or folder." in fail(tmp_path / "missing", "--random_data")
    assert "--test_files is for models that translate" in fail(trained_resnet.folder, "--test_files", "a", "b")
    assert "must be from 0 to below 1" in fail(trained.folder, "--random_data", "--label_smoothing_factor", 1)
    table, recipe, resnet = tmp_path / "table.csv", write_recipe(), trained_resnet.folder
    for words, message in (
        ((trained.folder, "--random_data", "--seeds", 1), "--seeds is for recipes, and none is given"),
        ((recipe, "--split", "test"), "--split is for models, and none is given: a recipe is probed on its training"),
        ((table, "--seeds", 1), "--seeds is for recipes, and none is given"),
        ((table, "--samples", 4), "--samples has no effect on an earlier table, and nothing else is given"),
        ((table, "--dataset_name", "data"), "--dataset_name has no effect on an earlier table, and nothing else is"),
        ((table, "--label_smoothing_factor", 0), "--label_smoothing_factor has no effect on an earlier table"),
        ((trained.folder, "--dataset_name", "data", "--image_column", "a"), "--image_column is for models that classi"),
        ((resnet, "--dataset_name", "data", "--target_lang", "de"), "--target_lang is for models that translate, and"),
        ((recipe, "--random_data", "--source_lang", "en"), "--source_lang has no effect with --random_data"),
    ):
        assert message in fail(*words)
    (tmp_path / "empty.csv").write_text("")
    assert "not a table" in fail(tmp_path / "empty.csv")
