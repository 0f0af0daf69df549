"""The Trainer for images against a plain training loop, in one process and in two.

This file is also the program of the two processes: `torchrun --nproc_per_node 2 test_image_trainer.py FOLDER`.
"""

import copy
import multiprocessing
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback, set_seed

from hf_rskip.data.images.arguments import ImageDataArguments
from hf_rskip.data.images.augmentation import normalize
from hf_rskip.data.images.pixels import ImageTensors
from hf_rskip.models import RSkipResNetConfig, RSkipResNetForImageClassification
from hf_rskip.recipe.images import ImageTrainingArguments
from hf_rskip.training.image_trainer import ImageTrainer

NESTEROV = {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1}
PLAIN = {"crop_padding": 0, "horizontal_flip": False}


class Recorder(TrainerCallback):
    """The weights and statistics after each step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states.append({name: value.clone() for name, value in model.state_dict().items()})


class RecordingTrainer(ImageTrainer):
    """Remembers the labels and the images, as the model gets them, of the batches it trains on."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.drawn = []
        self.model.register_forward_pre_hook(self.remember, with_kwargs=True)

    def remember(self, model, args, kwargs):
        if model.training:
            self.drawn.append((self.labels, kwargs["pixel_values"].clone()))

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.labels = inputs["labels"].clone()
        return super().compute_loss(model, inputs, *args, **kwargs)


def create_images(count):
    generator = torch.Generator().manual_seed(5)
    pixel_values = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageTensors(pixel_values, torch.arange(count) % 4)


def create_model():
    set_seed(0)
    config = RSkipResNetConfig(
        embedding_size=8,  # with 4 and channels last, torch 2.13 writes beyond its memory on CPUs without AVX-512
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        stem_type="cifar",
        num_labels=4,
        skip_norm="batch_norm",
        skip_recursions=2,
    )
    return RSkipResNetForImageClassification(config)


def create_trainer(folder, count=32, data=None, model=None, **arguments):
    fixed = {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    quiet = {
        "eval_strategy": "no",
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "constant",
        "learning_rate": 0.05,
        "num_train_epochs": 1,
    }
    recorder = Recorder()
    trainer = RecordingTrainer(
        data_args=ImageDataArguments(dataset_name="none", image_size=8, **(PLAIN if data is None else data)),
        model=model or create_model(),
        args=ImageTrainingArguments(**fixed, **quiet | arguments),
        train_dataset=create_images(count),
        eval_dataset=create_images(12),
        callbacks=[recorder],
    )
    trainer.recorder = recorder
    return trainer


def train_plainly(batches, accumulation=1, learning_rates=None, smoothing=0.0, **sgd):
    """The loop that a textbook writes: batches of labels and images, the mean over all images of a step."""
    model = create_model().train()
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4} | sgd)
    states = []
    for step in range(0, len(batches), accumulation):
        if learning_rates:
            optimizer.param_groups[0]["lr"] = learning_rates[step // accumulation]
        part = batches[step : step + accumulation]
        total = sum(len(labels) for labels, _ in part)
        for labels, images in part:
            loss = F.cross_entropy(model(images).logits, labels, reduction="sum", label_smoothing=smoothing) / total
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append(copy.deepcopy(model.state_dict()))
    return states


def assert_equal_states(states, expected):
    assert len(states) == len(expected)
    for state, peer in zip(states, expected, strict=True):
        torch.testing.assert_close(state, peer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "plain"),
    [
        ({}, {}),
        (
            {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
            {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
        ),
        ({"label_smoothing_factor": 0.2}, {"smoothing": 0.2}),
        ({"gradient_accumulation_steps": 3}, {"accumulation": 3}),
        ({"gradient_accumulation_steps": 3, "label_smoothing_factor": 0.2}, {"accumulation": 3, "smoothing": 0.2}),
        ({"channels_last": True}, {}),
    ],
    ids=["sgd", "nesterov", "smoothing", "accumulation", "accumulation and smoothing", "channels last"],
)
def test_training_is_that_of_a_plain_loop(tmp_path, arguments, plain):
    """Weights, and the running statistics of batch normalisation, after every step; the last batch is a smaller one."""
    trainer = create_trainer(tmp_path, count=44, **arguments)
    trainer.train()
    assert [len(labels) for labels, _ in trainer.drawn] == [8, 8, 8, 8, 8, 4]
    assert_equal_states(trainer.recorder.states, train_plainly(trainer.drawn, **plain))


def test_every_image_is_seen_once_an_epoch_and_normalised(tmp_path):
    trainer = create_trainer(tmp_path, num_train_epochs=2)
    trainer.train()
    data = trainer.data_args
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.image_mean, data.image_std))
    expected = sorted(create_images(32).pixel_values.flatten(1).tolist())
    for epoch in (trainer.drawn[:4], trainer.drawn[4:]):
        values = (torch.cat([images for _, images in epoch]) * std + mean) * 255
        torch.testing.assert_close(values, values.round(), rtol=0, atol=1e-3)
        assert sorted(values.round().int().flatten(1).tolist()) == expected
    assert not torch.equal(trainer.drawn[0][1], trainer.drawn[4][1])


def test_the_steps_of_a_schedule(tmp_path):
    """Warm-up over 2 steps, then a tenth after epoch 1 and after epoch 2.5; 4 steps an epoch."""
    trainer = create_trainer(
        tmp_path, num_train_epochs=3, lr_milestones=[1, 2.5], lr_gamma=0.1, warmup_steps=2, logging_steps=1
    )
    trainer.train()
    rates = [0.025, *[0.05] * 3, *[0.005] * 6, *[0.0005] * 2]
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx(rates)
    assert_equal_states(trainer.recorder.states, train_plainly(trainer.drawn, learning_rates=rates))


def test_the_moving_average(tmp_path):
    """Against its recursion over the recorded weights, in float64; it is what is evaluated and what is left."""
    trainer = create_trainer(tmp_path, num_train_epochs=2, ema_decay=0.8)
    trainer.train()
    expected, *states = [{name: value.double() for name, value in state.items()} for state in trainer.recorder.states]
    for state in states:
        expected = {name: 0.8 * expected[name] + 0.2 * value for name, value in state.items()}
    floating = [name for name in expected if not name.endswith("num_batches_tracked")]
    accuracy = trainer.evaluate()["eval_loss"]
    trainer.use_average()
    final = trainer.model.state_dict()
    for name in floating:
        torch.testing.assert_close(final[name].double(), expected[name], rtol=1e-5, atol=1e-6)
    assert trainer.evaluate()["eval_loss"] == accuracy


@pytest.mark.parametrize("split", ["train", "eval", "test"])
def test_the_workers_of_a_data_loader_outlive_a_signal(tmp_path, split):
    """Sent by another process, as that of their parent ends them without an error; most batches are still to come."""
    arguments = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "dataloader_num_workers": 1}
    trainer = create_trainer(tmp_path, count=12, **arguments)
    given = {"train": (), "eval": (), "test": (create_images(12),)}[split]
    others = multiprocessing.active_children()
    batches = iter(getattr(trainer, f"get_{split}_dataloader")(*given))
    first = next(batches)
    (worker,) = set(multiprocessing.active_children()).difference(others)
    for number in ("TERM", "INT"):
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    labels = torch.cat([batch["labels"] for batch in [first, *batches]])
    assert sorted(labels.tolist()) == sorted(create_images(12).labels.tolist())


# Evaluation


def mean_loss(data, model):
    """Over the 12 images at once."""
    images = create_images(12)
    pixel_values = normalize(images.pixel_values, data.image_mean, data.image_std)
    return F.cross_entropy(model.eval()(pixel_values).logits, images.labels).item()


@pytest.mark.parametrize("size", [1, 5, 12])
def test_the_validation_loss_is_the_mean_over_images(tmp_path, size):
    trainer = create_trainer(tmp_path, per_device_eval_batch_size=size)
    expected = mean_loss(trainer.data_args, create_model())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_validation_loss_is_that_of_any_number_of_processes(two_processes):
    data = ImageDataArguments(dataset_name="none")
    for result in two_processes:
        model = create_model()
        model.load_state_dict(result["average"])
        expected = mean_loss(data, model)
        assert [scores["eval_loss"] for scores in result["eval"]] == pytest.approx([expected] * 2, rel=1e-5)


# Augmentation


def test_crops_and_flips_are_drawn_anew_for_each_batch(tmp_path):
    trainer = create_trainer(tmp_path, count=8, data={"crop_padding": 2}, num_train_epochs=12)
    trainer.train()
    seen = [images[labels == 0] for labels, images in trainer.drawn]
    assert len({tuple(images.flatten().tolist()) for images in seen}) > 8


def test_a_resumed_run_draws_what_the_whole_one_draws(tmp_path):
    arguments = {"data": {"crop_padding": 2}, "num_train_epochs": 2, "ema_decay": 0.8, "lr_milestones": [1]}
    whole = create_trainer(tmp_path, **arguments, save_strategy="steps", save_steps=3, save_total_limit=None)
    whole.train()
    resumed = create_trainer(tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert len(resumed.drawn) == 5
    for (labels, images), (own_labels, own_images) in zip(whole.drawn[3:], resumed.drawn, strict=True):
        assert torch.equal(labels, own_labels) and torch.equal(images, own_images)
    for trainer in (whole, resumed):
        trainer.use_average()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


# Two processes


def run_two(folder):
    """Two steps with the moving average, evaluated and saved."""
    trainer = create_trainer(
        folder,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=5,
        num_train_epochs=1,
        count=16,
        ema_decay=0.5,
        save_strategy="epoch",
    )
    trainer.train()
    before = trainer.evaluate()
    state = trainer.model.state_dict()
    trainer.use_average()
    return {
        "drawn": trainer.drawn,
        "state": state,
        "average": trainer.model.state_dict(),
        "eval": (before, trainer.evaluate()),
        "rank": trainer.args.process_index,
    }


@pytest.fixture(scope="module")
def two_processes(warm_python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    command = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, folder]
    subprocess.run(list(map(str, command)), check=True, timeout=240)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_processes_see_different_images(two_processes):
    seen = [torch.cat([images for _, images in result["drawn"]]).flatten(1) for result in two_processes]
    assert [len(images) for images in seen] == [8, 8]
    assert torch.cdist(*seen).min() > 1e-3


def test_running_statistics_are_those_of_all_processes(two_processes):
    """The mean over the processes of the exponential averages of their own batches, for the stem, in float64."""
    first, second = two_processes
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    model = create_model().double()
    weight = model.resnet.embedder.embedder.convolution.weight
    name = "resnet.embedder.embedder.normalization.running_"
    means, variances = [], []
    # Before the first step the weights are the initial ones, and the stem's statistics after it follow from them alone.
    for result in two_processes:
        features = F.conv2d(result["drawn"][0][1].double(), weight, padding=1)
        means.append(0.1 * features.mean((0, 2, 3)))
        variances.append(0.9 + 0.1 * features.var((0, 2, 3)))
    recorded = two_processes[0]["first"]
    torch.testing.assert_close(recorded[name + "mean"].double(), sum(means) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(recorded[name + "var"].double(), sum(variances) / 2, rtol=1e-4, atol=1e-5)


def main():
    folder = sys.argv[1]
    result = run_two(folder)
    trainer = create_trainer(f"{folder}/first", per_device_train_batch_size=4, count=16, max_steps=1)
    trainer.train()
    trainer.average_running_statistics()
    result["first"] = trainer.model.state_dict()
    result["drawn"] = trainer.drawn + result["drawn"][1:]
    torch.save(result, f"{folder}/rank{result['rank']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
