"""Trains an image classifier from a recipe: data, model, Trainer, test."""

from dataclasses import asdict
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback, set_seed
from transformers.trainer_utils import IntervalStrategy

from ..data.image_processor import make_image_processor
from ..data.images import ImageDatasets, load_image_dataset
from ..data.pixels import CroppedImages, decode_images, stream_images
from ..errors import UserError
from ..hub.image_model_card import write_image_model_card
from ..models import RSkipResNetConfig, RSkipResNetForImageClassification
from .checkpoints import find_checkpoint
from .describe import describe_model
from .image_trainer import ImageTrainer
from .recipe import Recipe


def train(recipe: Recipe) -> dict[str, float]:
    """Trains, evaluates on the test split, and leaves the model in `output_dir`: the last one, or with
    `load_best_model_at_end` the best.

    Returns:
        What `all_results.json` holds.

    Raises:
        [`UserError`]: if the data, the configuration or `output_dir` cannot be used; before any training starts.
    """
    data, training = recipe.data, recipe.training
    with training.main_process_first(desc="preparing the images"):
        checkpoint = find_checkpoint(training.output_dir, training.resume_from_checkpoint)
        images = load_image_dataset(data)
        if "validation" not in images.splits:
            _do_without_validation(recipe)
        sets = {split: _prepare(images, split, recipe) for split in images.splits}
    set_seed(training.seed)
    model = _create_model(recipe, images.class_names)
    if checkpoint:
        _check_same_model(model.config, checkpoint)
    if training.channels_last:
        model.to(memory_format=torch.channels_last)

    callbacks = []
    if training.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(training.early_stopping_patience))
    trainer = ImageTrainer(
        data_args=data,
        model=model,
        args=training,
        train_dataset=sets["train"],
        eval_dataset=sets.get("validation"),
        processing_class=make_image_processor(data),
        callbacks=callbacks,
    )
    if trainer.is_world_process_zero():
        sizes = ", ".join(f"{split} {len(part):,}" for split, part in sets.items() if not data.streaming)
        print(f"images: {sizes or 'streamed'}; {len(images.class_names):,} classes")
        describe_model(model, recipe)
        if checkpoint:
            print(f"resuming from {checkpoint}", flush=True)

    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.use_moving_average()
    trainer.use_average_of_checkpoints()
    trainer.save_model(_internal_call=True)  # pushed later, with the scores and the card
    trainer.save_state()
    test_metrics = trainer.predict(sets["test"], metric_key_prefix="test").metrics
    trainer.log_metrics("test", test_metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_metrics("test", test_metrics)
    metrics = {**result.metrics, **test_metrics}
    if trainer.is_world_process_zero():
        write_image_model_card(training.output_dir, recipe, trainer.model, trainer.state, metrics)
    if training.push_to_hub:
        trainer.push_to_hub()
    return metrics


def _do_without_validation(recipe: Recipe) -> None:
    """The model is evaluated at the end only, on the test split, unless the recipe asks for more."""
    training = recipe.training
    for key in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(training, key):
            raise UserError(f"{key} needs validation images: set validation_split or validation_size.")
    if "eval_strategy" in recipe.keys and training.eval_strategy != IntervalStrategy.NO:
        raise UserError("eval_strategy needs validation images: set validation_split or validation_size.")
    training.eval_strategy = IntervalStrategy.NO


def _prepare(images: ImageDatasets, split: str, recipe: Recipe):
    """A split as the Trainer takes it."""
    dataset, data = images.splits[split], recipe.data
    if data.streaming:
        return stream_images(dataset, data, split, recipe.training.seed)
    if data.random_resized_crop and split == "train":
        return CroppedImages(dataset, data, split)
    return decode_images(dataset, data, split)


def _create_model(recipe: Recipe, class_names: list[str]) -> RSkipResNetForImageClassification:
    """A new model of the recipe's configuration, or the one that it starts from."""
    start, architecture = recipe.training.model_name_or_path, recipe.model.architecture
    fields = {
        key: value
        for key, value in asdict(recipe.model).items()
        if value is not None and key != "architecture" and (key in recipe.keys or not (start or architecture))
    }
    labels = {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}
    try:
        if start:
            model, info = RSkipResNetForImageClassification.from_pretrained(
                start, **fields, **labels, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
            )
        elif architecture:
            return RSkipResNetForImageClassification(RSkipResNetConfig.from_name(architecture, **fields, **labels))
        else:
            return RSkipResNetForImageClassification(RSkipResNetConfig(**fields, **labels))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(str(error).strip().splitlines()[0]) from error
    # A classifier of other classes starts anew; anything else that does not fit is a mistake.
    foreign = {key for key, *_ in info["mismatched_keys"]} | set(info["missing_keys"])
    foreign = sorted(key for key in foreign if not key.startswith("classifier."))
    if foreign:
        raise UserError(f"{start!r} has no weights for what the recipe asks, such as {foreign[0]}")
    return model


def _check_same_model(config: RSkipResNetConfig, checkpoint: Path) -> None:
    """A run must not go on as another model than it began; where the weights fit all the same, nobody would notice."""
    before = RSkipResNetConfig.from_pretrained(checkpoint)
    for field in [*RSkipResNetConfig.__annotations__, "id2label"]:
        old, new = getattr(before, field), getattr(config, field)
        if old != new:
            raise UserError(f"{checkpoint} was trained with {field} {old!r} and cannot go on with {new!r}.")
