"""Whole runs of image classification: what they leave behind, kills, streaming, and that they learn."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, load_dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_rskip import RSkipResNetBackbone
from hf_rskip.cli.main import main
from hf_rskip.errors import UserError
from hf_rskip.models import SKIP_CONNECTIONS
from hf_rskip.models.configuration_rskip_resnet import ARCHITECTURES
from hf_rskip.recipe.parsing import parse_recipe
from hf_rskip.training.image_classification import create_model

README = Path(__file__).parents[2] / "README.md"
RECIPES = README.parent / "recipes"
TIMES = ("runtime", "per_second")


def history(folder):
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [
        {key: value for key, value in entry.items() if not key.endswith(TIMES) and key != "train_loss"}
        for entry in entries
    ]


# What a run leaves


def test_the_folder_of_a_finished_run(trained_resnet):
    names = {path.name for path in trained_resnet.folder.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
        "training_curve.png",
        "all_results.json",
        "trainer_state.json",
    }
    results = json.loads((trained_resnet.folder / "all_results.json").read_text())
    assert results["test_accuracy"] > 0.9
    # Of four classes all are among the best five; the other two the Trainer would only guess.
    assert not results.keys() & {"test_top5_accuracy", "train_samples_per_second", "total_flos"}
    config = json.loads((trained_resnet.folder / "config.json").read_text())
    assert config["id2label"] == {"0": "blue", "1": "green", "2": "red", "3": "yellow"}
    for line in ("images: train 280, test 40, validation 40; 4 classes", "skip_recursions: 2", "images/s", "top-1"):
        assert line in trained_resnet.out


def test_its_score_is_that_of_the_model_and_the_image_processor(trained_resnet, cifar_folder):
    """Without a line of the training code: the Auto classes, image by image."""
    model = AutoModelForImageClassification.from_pretrained(trained_resnet.folder).eval()
    processor = AutoImageProcessor.from_pretrained(trained_resnet.folder)
    test = load_dataset(cifar_folder)["test"]
    losses, hits = [], []
    for example in test:
        with torch.no_grad():
            logits = model(**processor(example["img"], return_tensors="pt")).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(example["label"])))
        hits.append(int(logits.argmax()) == example["label"])
    results = json.loads((trained_resnet.folder / "all_results.json").read_text())
    assert results["test_accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert results["test_loss"] == pytest.approx(float(sum(losses) / len(losses)), abs=1e-5)


def test_the_pipeline_and_the_backbone(trained_resnet, cifar_folder):
    classify = pipeline("image-classification", model=str(trained_resnet.folder))
    images = load_dataset(cifar_folder)["test"][:8]
    names = [max(scores, key=lambda score: score["score"])["label"] for scores in classify(images["img"])]
    assert names == ["blue", "green", "red", "yellow"] * 2
    backbone = RSkipResNetBackbone.from_pretrained(trained_resnet.folder, out_features=["stem", "stage2"])
    assert [len(maps[0]) for maps in backbone(torch.zeros(1, 3, 32, 32)).feature_maps] == [8, 16]


def test_evaluate_prints_the_score_of_the_run(trained_resnet, cifar_folder, capsys):
    assert main(["evaluate", str(trained_resnet.folder), "--dataset_name", cifar_folder]) == 0
    scores = json.loads(capsys.readouterr().out)
    results = json.loads((trained_resnet.folder / "all_results.json").read_text())
    assert scores["accuracy"] == results["test_accuracy"] and scores["images"] == 40


def test_evaluate_and_probe_know_the_columns_of_the_training(write_image_recipe, cifar_folder, tmp_path, capsys):
    """Where there are two of images and two of classes; a dataset with other names needs options."""
    folder, splits = tmp_path / "data", load_dataset(cifar_folder)
    folder.mkdir()
    names = splits["train"].features["label"].names
    for split, dataset in splits.items():
        dataset = dataset.map(lambda row: {"other": row["img"], "colour": names[row["label"]]})
        dataset.to_parquet(folder / f"{split}.parquet")
    columns = {"image_column": "img", "label_column": "colour"}
    recipe = write_image_recipe(dataset_name=str(folder), **columns, max_steps=1)
    assert main(["train", str(recipe)]) == 0, capsys.readouterr().err
    model, split = str(recipe.parent / "output"), ["--dataset_name", str(folder)]
    results = json.loads((recipe.parent / "output" / "all_results.json").read_text())
    capsys.readouterr()
    for words in ([], ["--image_column", "other", "--label_column", "label"]):
        assert main(["evaluate", model, *split, *words]) == 0
        assert json.loads(capsys.readouterr().out)["accuracy"] == results["test_accuracy"]
    assert main(["probe", model, *split]) == 0
    capsys.readouterr()
    assert main(["evaluate", model, "--dataset_name", cifar_folder]) == 2
    assert "has no column 'colour', only img, label: set label_column." in capsys.readouterr().err


def test_evaluate_refuses_options_of_translation(trained_resnet, cifar_folder, capsys):
    for option in (
        *("--gnmt_length_penalty", "--max_len_a", "--max_len_b"),
        *("--ensemble", "--bleu_tokenize", "--max_batch_tokens"),
    ):
        assert main(["evaluate", str(trained_resnet.folder), "--dataset_name", cifar_folder, option, "1"]) == 2
        assert f"{option} is for models that translate" in capsys.readouterr().err


def test_evaluate_prepares_images_as_the_image_processor_says(trained_resnet, cifar_folder, tmp_path, capsys):
    """Against the pipeline of Transformers, for a processor that training does not write."""
    folder = tmp_path / "model"
    shutil.copytree(trained_resnet.folder, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    changes = {"size": {"shortest_edge": 80}, "resample": 3, "image_mean": [0.9, 0.1, 0.1]}
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | changes))
    assert main(["evaluate", str(folder), "--dataset_name", cifar_folder, "--batch_size", "16"]) == 0
    scores = json.loads(capsys.readouterr().out)
    test = load_dataset(cifar_folder)["test"]
    best = [
        answer[0]["label"] for answer in pipeline("image-classification", model=str(folder))(test["img"][:], top_k=1)
    ]
    names = test.features["label"].names
    hits = [name == names[label] for name, label in zip(best, test["label"], strict=True)]
    assert scores["accuracy"] == sum(hits) / len(hits)


def test_the_card(trained_resnet, run_cli):
    card = (trained_resnet.folder / "README.md").read_text()
    assert "{{" not in card and "{%" not in card
    assert "pipeline_tag: image-classification" in card and "skip_norm_axes: sample" in card
    accuracy = json.loads((trained_resnet.folder / "all_results.json").read_text())["test_accuracy"]
    assert f"| accuracy (top-1) | {accuracy:.2%} |" in card
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, flags=re.DOTALL)[1])
    assert recipe["task"] == "image-classification" and recipe["hidden_sizes"] == [8, 16]


# Ways to train


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_milestones": [1, 2], "ema_decay": 0.5, "num_train_epochs": 3},
        {"bf16": True, "channels_last": True, "label_smoothing_factor": 0.1},
        {"architecture": "resnet20_cifar", "hidden_sizes": None, "depths": None, "embedding_size": None},
        {"load_best_model_at_end": True, "early_stopping_patience": 2, "ema_decay": 0.5},
        {"validation_size": None, "eval_strategy": None, "eval_steps": None},
        {"random_resized_crop": True, "optim": "adamw_torch", "learning_rate": 0.01},
    ],
    ids=["steps and average", "bfloat16", "architecture", "best model", "no validation", "resized crops"],
)
def test_it_learns(write_image_recipe, changes):
    fixed = {"image_size": 16, "num_train_epochs": 4, "eval_steps": 9, "save_steps": 9, "logging_steps": 9}
    path = write_image_recipe(**fixed | changes)
    assert main(["train", str(path)]) == 0
    results = json.loads((path.parent / "output" / "all_results.json").read_text())
    assert results["test_accuracy"] > 0.7


def test_the_best_model_is_the_best_average(write_image_recipe):
    """With a moving average, the scores by which it is chosen are those of the average, and so is what is left."""
    path = write_image_recipe(load_best_model_at_end=True, ema_decay=0.9, save_total_limit=9, drop_path_rate=0.0)
    assert main(["train", str(path)]) == 0
    folder = path.parent / "output"
    state = json.loads((folder / "trainer_state.json").read_text())
    average = load_file(Path(state["best_model_checkpoint"], "moving_average.safetensors"))
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(value, average[f"module.{name}"]), name


@pytest.fixture
def no_wait(monkeypatch):
    """At the end of each epoch of a stream `datasets` waits for five seconds, lest the process ends while it reads."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def test_streaming(write_image_recipe, imagenet_folder, no_wait):
    """The code of the ImageNet recipe, on a small folder of the same schema."""
    recipe = yaml.safe_load((RECIPES / "imagenet" / "resnet50.yaml").read_text())
    small = {
        "dataset_name": imagenet_folder,
        "architecture": None,
        "image_size": 32,
        "max_steps": 12,
        "warmup_steps": 2,
        "save_steps": 6,
        "logging_steps": 3,
        "shuffle_buffer_size": 32,
        "per_device_train_batch_size": 16,
        "dataloader_num_workers": 0,
        "learning_rate": 0.05,
    }
    del recipe["output_dir"]
    path = write_image_recipe(**{**recipe, "validation_size": None, "eval_strategy": None, **small})
    assert main(["train", str(path)]) == 0
    results = json.loads((path.parent / "output" / "all_results.json").read_text())
    assert results["test_accuracy"] > 0.7
    assert results["test_samples_per_second"] > 0


TINY = {"embedding_size": None, "hidden_sizes": None, "depths": None, "layer_type": None, "stem_type": None}


def test_a_dropped_last_batch_is_one_of_training(write_image_recipe, cifar_folder, capsys):
    path = write_image_recipe(dataloader_drop_last=True, per_device_eval_batch_size=16, max_steps=3)
    assert main(["train", str(path)]) == 0
    results = json.loads((path.parent / "output" / "all_results.json").read_text())
    # Of 40 images, not of the 32 in whole batches.
    assert results["test_accuracy"] * 40 == pytest.approx(round(results["test_accuracy"] * 40))
    assert main(["evaluate", str(path.parent / "output"), "--dataset_name", cifar_folder]) == 0
    scores = json.loads("{" + capsys.readouterr().out.rpartition("{")[2])
    assert scores["accuracy"] == results["test_accuracy"]


def test_a_resumed_stream_is_read_anew(write_image_recipe, imagenet_folder, no_wait):
    """Also after its first epoch, of 3 steps; in another order, as the place in the stream is not known."""
    recipe = {
        "dataset_name": imagenet_folder,
        "test_split": "validation",
        "streaming": True,
        "validation_size": None,
        "eval_strategy": None,
        "eval_steps": None,
        "max_steps": 5,
        "save_steps": 4,
    }
    path = write_image_recipe(**recipe)
    folder = path.parent / "output"
    assert main(["train", str(path)]) == 0
    shutil.rmtree(folder / "checkpoint-5")
    (folder / "recipe.json").unlink()  # as if it had not finished
    assert main(["train", str(path), "--resume_from_checkpoint", "true"]) == 0
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 5


def test_fine_tuning(trained_resnet, write_image_recipe):
    """A start model brings its shape; with a learning rate of zero the weights stay, and so does the score."""
    path = write_image_recipe(**TINY, model_name_or_path=str(trained_resnet.folder), max_steps=3, learning_rate=0.0)
    assert main(["train", str(path)]) == 0
    before = load_file(trained_resnet.folder / "model.safetensors")
    after = load_file(path.parent / "output" / "model.safetensors")
    parameters = [name for name in before if "running" not in name and "num_batches" not in name]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in parameters)


def test_weights_of_a_start_model_that_are_not_used_are_counted(trained_resnet, write_image_recipe, capsys):
    """K = 1 has no use for the second norm of each of the two blocks; a shape of another model is refused."""
    start, names = str(trained_resnet.folder), ["blue", "green", "red", "yellow"]
    create_model(parse_recipe(write_image_recipe(**TINY, model_name_or_path=start, skip_recursions=1), []), names)
    assert f"note: 4 weights of {start} are not used, such as resnet.encoder." in capsys.readouterr().out
    recipe = parse_recipe(write_image_recipe(**TINY | {"embedding_size": 16}, model_name_or_path=start), [])
    with pytest.raises(UserError, match=r"asks \(embedding_size 16 in place of 8\), such as resnet\.embedder"):
        create_model(recipe, names)


def test_a_start_model_whose_keys_or_weights_do_not_fit(trained_resnet, write_image_recipe, tmp_path):
    start, names = tmp_path / "start", ["blue", "green", "red", "yellow"]
    shutil.copytree(trained_resnet.folder, start)
    weights = load_file(start / "model.safetensors")
    lost = "resnet.embedder.embedder.convolution.weight"
    save_file(
        {name: weight for name, weight in weights.items() if name != lost},
        start / "model.safetensors",
        {"format": "pt"},
    )
    for changes, said in (
        ({}, f"{str(start)!r} has no weights for its own configuration, such as {lost}."),
        ({"depths": [1]}, "`depths` must be a list of 2, as `hidden_sizes`, not [1]."),
    ):
        recipe = parse_recipe(write_image_recipe(**TINY | changes, model_name_or_path=str(start)), [])
        with pytest.raises(UserError) as error:
            create_model(recipe, names)
        assert str(error.value) == said


def test_fine_tuning_with_other_classes_and_another_skip_connection(
    trained_resnet, write_image_recipe, tmp_path, capsys
):
    """Two of the colours, K = 3: a new classifier and new norms, on the old convolutions."""
    for split, count in {"train": 60, "test": 20}.items():
        images = load_dataset(yaml.safe_load(trained_resnet.recipe.read_text())["dataset_name"])[split]
        two = images.filter(lambda label: label < 2, input_columns="label").select(range(count // 2))
        two = two.cast_column("label", ClassLabel(names=["sky", "grass"]))
        two.to_parquet(tmp_path / f"{split}.parquet")
    path = write_image_recipe(
        **TINY,
        dataset_name=str(tmp_path),
        validation_size=4,
        per_device_train_batch_size=8,
        model_name_or_path=str(trained_resnet.folder),
        skip_recursions=3,
    )
    assert main(["train", str(path)]) == 0
    said = capsys.readouterr().out
    assert "note: the classifier is new, for 2 classes" in said and "the norms of the skip connections are new" in said
    results = json.loads((path.parent / "output" / "all_results.json").read_text())
    assert results["test_accuracy"] > 0.9


@pytest.mark.slow
def test_a_killed_run_resumes_as_if_nothing_had_happened(trained_resnet, start_cli, warm_python, tmp_path, capfd):
    """SIGKILL after the second checkpoint; momentum, schedule, crops, flips and drawn depths go on where they were."""
    folder = tmp_path / "output"
    process = start_cli("train", trained_resnet.recipe, "--output_dir", folder, python=[warm_python])
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-6" / "trainer_state.json").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (folder / "all_results.json").exists()
    words = ["train", trained_resnet.recipe, "--output_dir", folder, "--resume_from_checkpoint", "true"]
    assert main([str(word) for word in words]) == 0
    assert "resuming from" in capfd.readouterr().out
    whole = load_file(trained_resnet.folder / "model.safetensors")
    resumed = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert history(folder) == history(trained_resnet.folder)
    assert "(since it was last resumed; it was at step " in (folder / "README.md").read_text()
    assert "resumed" not in (trained_resnet.folder / "README.md").read_text()


def test_another_model_cannot_go_on(trained_resnet, tmp_path, capsys):
    shutil.copytree(trained_resnet.folder, tmp_path / "output")
    words = ["--output_dir", str(tmp_path / "output"), "--resume_from_checkpoint", "true", "--skip_recursions", "1"]
    assert main(["train", str(trained_resnet.recipe), *words]) == 2
    assert "was trained with skip_recursions 2 and cannot go on with 1" in capsys.readouterr().err


def test_a_residual_kind_of_ones_own(write_image_recipe):
    """The class of the README, which knows nothing of images."""
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    code = next(example for example in examples if "LayerScale" in example)
    exec(code, {"__name__": "kinds"})
    try:
        path = write_image_recipe(skip_type="layer_scale", num_train_epochs=1)
        assert main(["train", str(path)]) == 0
        weights = load_file(path.parent / "output" / "model.safetensors")
        scales = [value for name, value in weights.items() if name.endswith("skip.scale")]
        assert len(scales) == 2 and all((scale != 0.1).any() for scale in scales)
        assert "import kinds  # defines its skip connection" in (path.parent / "output" / "README.md").read_text()
    finally:
        del SKIP_CONNECTIONS["layer_scale"]


# Recipes


@pytest.mark.parametrize(
    "path", sorted(RECIPES.glob("cifar10/*.yaml")) + sorted(RECIPES.glob("imagenet/*.yaml")), ids=str
)
def test_every_recipe_is_valid(path, tmp_path):
    recipe = parse_recipe(path, ["--output_dir", str(tmp_path), "--bf16", "false"])
    assert recipe.task == "image-classification" and recipe.model.architecture in ARCHITECTURES


def test_a_start_model_of_another_kind(write_image_recipe, tmp_path, capsys):
    ResNetForImageClassification(ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(tmp_path)
    assert main(["train", str(write_image_recipe(**TINY, model_name_or_path=str(tmp_path)))]) == 2
    assert "is a model of type 'resnet', not 'rskip_resnet': `hf-rskip convert resnet`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_strategy": "epoch"}, "eval_strategy needs validation images: set validation_split or validation_size"),
        (
            {"eval_strategy": None, "save_strategy": "epoch", "load_best_model_at_end": True},
            "load_best_model_at_end needs validation images",
        ),
        ({"eval_on_start": True}, "eval_on_start needs validation images"),
        (
            {"eval_strategy": None, "average_checkpoints": 2, "average_checkpoints_by": "best"},
            "average_checkpoints_by best needs validation images",
        ),
        (
            {"eval_strategy": None, "lr_scheduler_type": "reduce_lr_on_plateau"},
            "lr_scheduler_type reduce_lr_on_plateau needs validation images",
        ),
        ({"eval_strategy": None, "save_strategy": "best"}, "save_strategy best needs validation images"),
        ({"save_strategy": "best"}, "save_strategy best needs evaluations, but eval_strategy is no"),
        ({"lr_milestones": [2, 1]}, "lr_milestones must be rising numbers of epochs"),
        ({"lr_milestones": [1], "max_steps": 5}, "lr_milestones are epochs: set num_train_epochs, not max_steps, or"),
        ({"ema_decay": 1.0}, "ema_decay must be a number from 0 to below 1, not 1.0"),
        ({"momentum": -0.1}, "momentum must be a number from 0 to below 1"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov needs a momentum above 0"),
        ({"architecture": "resnet19"}, "architecture must be one of resnet20_cifar, "),
        ({"hidden_sizes": [8, 16, 32]}, "`depths` must be a list of 3, as `hidden_sizes`"),
        ({"skip_norm": "group_norm"}, "`skip_norm` must be one of layer_norm, rms_norm, batch_norm, none"),
        ({"task": "segmentation"}, "task must be one of translation, image-classification, not 'segmentation'"),
        ({"vocab_size": 100}, "is a key of task translation, and the task is image-classification"),
        (
            {"architecture": "resnet20_cifar"},
            "`skip_recursions` has no effect on the plain network: give a `skip_type`",
        ),
        ({"streaming": True}, "streaming needs max_steps"),
        ({"lr_milestones": [float("inf")]}, "lr_milestones must be rising numbers of epochs"),
        ({"num_train_epochs": 0}, "num_train_epochs must be a number above 0"),
        ({"image_size": 2, "crop_padding": 0, "per_device_train_batch_size": 29}, "A batch of one image occurs"),
        ({"test_split": "train"}, "train_split and test_split are both 'train'"),
        ({"metric_for_best_model": "top5_accuracy"}, "top5_accuracy is always 1 for 4 classes: choose accuracy"),
        ({"metric_for_best_model": "eval_top5_accuracy"}, "top5_accuracy is always 1 for 4 classes"),
        ({"metric_for_best_model": "bleu"}, "metric_for_best_model must be one of accuracy, top5_accuracy, loss"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(write_image_recipe, capsys, changes, message):
    fixed = {"validation_size": None, "eval_strategy": "no", "eval_steps": None}
    if "architecture" in changes:
        fixed |= {**TINY, "skip_recursions": 2}
    path = write_image_recipe(**{**fixed, **changes})
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (path.parent / "output" / "config.json").exists()
