"""Trains an image classifier from a recipe: data, model, Trainer, test."""

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from ..data.image_processor import make_image_processor
from ..data.images import ImageDatasets, load_image_dataset
from ..data.pixels import CroppedImages, decode_images, stream_images
from ..decoding.loading import load_config
from ..errors import UserError
from ..evaluation.predictions import write_predictions
from ..hub.image_model_card import write_image_model_card
from ..models import RSkipResNetConfig, RSkipResNetForImageClassification
from ..studies.probe_callback import ProbeCallback
from ..studies.probe_data import training_images
from .checkpoints import check_same_model, find_checkpoint
from .describe import describe_model
from .image_trainer import ImageTrainer
from .recipe import Recipe
from .resuming import (
    CurrentSteps,
    EarlyStopping,
    begin_record,
    check_data,
    complete_metrics,
    describe_resumption,
    write_record,
)


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
        record = begin_record(recipe, checkpoint)
        images = load_image_dataset(data)
        if "validation" not in images.splits:
            _do_without_validation(recipe)
        if training.metric_for_best_model == "top5_accuracy" and len(images.class_names) <= 5:
            count = len(images.class_names)
            raise UserError(f"metric_for_best_model top5_accuracy is always 1 for {count} classes: choose accuracy.")
        sets = {split: _prepare(images, split, recipe, checkpoint) for split in images.splits}
        learned = {} if data.streaming else {split: sets[split] for split in sets if split != "test"}
        check_data(record, {split: part.checksum() for split, part in learned.items()})
    set_seed(training.seed)
    model = create_model(recipe, images.class_names)
    if checkpoint:
        check_same_model(model.config, checkpoint, ["id2label"])
    _check_last_batch(model.config, sets["train"], recipe)
    if training.channels_last:
        model.to(memory_format=torch.channels_last)

    callbacks = [CurrentSteps(not {"logging_steps", "logging_strategy"}.isdisjoint(recipe.keys))]
    if training.early_stopping_patience:
        callbacks.append(EarlyStopping(training.early_stopping_patience))
    if training.probe_steps:
        batch = training_images(sets["train"], data)
        callbacks.append(ProbeCallback(batch, training.probe_steps, training.label_smoothing_factor or None))
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
        shape = f"{' + '.join(map(str, model.config.depths))} blocks of {model.config.hidden_sizes} channels"
        describe_model(model, recipe, recipe.model.architecture or shape)
        if checkpoint:
            print(f"resuming from {checkpoint}, {describe_resumption(record['resumed'][-1])}", flush=True)

    trainer.record = record
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if checkpoint:
        complete_metrics(result.metrics, recipe, record, trainer.state.global_step)
    trainer.use_average()
    trainer.save_model(_internal_call=True)  # pushed later, with the scores and the card
    trainer.save_state()
    predicted = trainer.predict(sets["test"], metric_key_prefix="test")
    test_metrics = predicted.metrics
    trainer.log_metrics("test", test_metrics)
    metrics = {**result.metrics, **test_metrics}
    for part, values in {"train": result.metrics, "test": test_metrics, "all": metrics}.items():
        trainer.save_metrics(part, values, combined=False)  # which would keep what an earlier run left
    if trainer.is_world_process_zero():
        write_predictions(training.output_dir, predicted.predictions[:, 0].tolist(), predicted.label_ids.tolist())
        write_image_model_card(training.output_dir, recipe, trainer.model, trainer.state, metrics, record)
        write_record(training.output_dir, record, trainer.state.global_step)
        print(f"model, card and scores: {training.output_dir}", flush=True)
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


def _prepare(images: ImageDatasets, split: str, recipe: Recipe, checkpoint: Path | None):
    """A split as the Trainer takes it."""
    dataset, data, training = images.splits[split], recipe.data, recipe.training
    if data.streaming:
        if training.max_steps <= 0:
            raise UserError("streaming needs max_steps, as the number of images is not known before they are read.")
        # The Trainer does not know where in which epoch a stream was: a resumed run reads it anew, in another order.
        training.ignore_data_skip = True
        resumed = 0 if checkpoint is None else TrainerState.load_from_json(checkpoint / TRAINER_STATE_NAME).global_step
        return stream_images(dataset, data, split, training.seed + resumed)
    if data.random_resized_crop and split == "train":
        return CroppedImages(dataset, data, split)
    return decode_images(dataset, data, split)


def create_model(recipe: Recipe, class_names: list[str]) -> RSkipResNetForImageClassification:
    """A new model of the recipe's configuration, or the one that it starts from."""
    start, architecture = recipe.training.model_name_or_path, recipe.model.architecture
    if start and architecture:
        raise UserError("architecture cannot be set with model_name_or_path, which brings its own.")
    fields = {
        key: value
        for key, value in asdict(recipe.model).items()
        if value is not None and key != "architecture" and (key in recipe.keys or not (start or architecture))
    }
    labels = {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}
    labels |= {"image_column": recipe.data.image_column, "label_column": recipe.data.label_column}
    try:
        if start:
            model_type = load_config(start).model_type
            if model_type != RSkipResNetConfig.model_type:
                hint = ": `hf-rskip convert resnet` makes one of it" if model_type == "resnet" else ""
                raise UserError(
                    f"{start!r} is a model of type {model_type!r}, not {RSkipResNetConfig.model_type!r}{hint}."
                )
            model, info = RSkipResNetForImageClassification.from_pretrained(
                start, **fields, **labels, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
            )
        elif architecture:
            return RSkipResNetForImageClassification(RSkipResNetConfig.from_name(architecture, **fields, **labels))
        else:
            return RSkipResNetForImageClassification(RSkipResNetConfig(**fields, **labels))
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(f"The weights of {start!r} cannot be read: {error}.") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(str(error).strip().splitlines()[0]) from error
    # A classifier of other classes and other skip connections start anew; what else does not fit is a mistake.
    foreign = {key for key, *_ in info["mismatched_keys"]} | set(info["missing_keys"])
    if any(key.startswith("classifier.") for key in foreign):
        print(f"note: the classifier is new, for {len(class_names):,} classes", flush=True)
    if any(".skip." in key for key in foreign):
        print("note: the norms of the skip connections are new", flush=True)
    foreign = sorted(key for key in foreign if not key.startswith("classifier.") and ".skip." not in key)
    if foreign:
        raise UserError(f"{start!r} has no weights for what the recipe asks, such as {foreign[0]}")
    return model


def _check_last_batch(config: RSkipResNetConfig, train_set, recipe: Recipe) -> None:
    """Batch normalisation has no variance of a single value: refuses a batch of one image on maps of 1 x 1."""
    training = recipe.training
    if recipe.data.streaming or training.dataloader_drop_last:
        return
    stride = 2 ** (len(config.depths) - 1 + config.downsample_in_first_stage)
    stride *= {"cifar": 1, "imagenet": 4}[config.stem_type]
    size = training.per_device_train_batch_size
    if recipe.data.image_size <= stride and (size == 1 or len(train_set) % (size * training.world_size) == 1):
        raise UserError(
            f"A batch of one image occurs, whose last feature maps are of one position at image_size "
            f"{recipe.data.image_size}, too few for batch normalisation: set dataloader_drop_last, another "
            "per_device_train_batch_size or a larger image_size."
        )
