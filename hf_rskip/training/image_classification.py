"""The task of image classification: from images to accuracies on their test split."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ..data.images.loading import ImageDatasets, load_image_dataset
from ..data.images.pixels import CroppedImages, decode_images, make_image_processor, stream_images
from ..errors import UserError, first_line
from ..models import RSkipResNetConfig, RSkipResNetForImageClassification
from ..recipe.describe import describe_model
from ..recipe.parsing import Recipe
from .checkpoints import read_state
from .image_trainer import ImageTrainer
from .start_model import load_start_model
from .task import Task


class ImageClassification(Task):
    """Trains on labelled images, and evaluates and tests by accuracy; without validation images only tests."""

    def __init__(self, recipe: Recipe, checkpoint: Path | None):
        super().__init__(recipe, checkpoint)
        if recipe.data.validation_split is None and recipe.data.validation_size is None:
            _do_without_validation(recipe)
        images = load_image_dataset(recipe.data)
        self.class_names = images.class_names
        metric = (recipe.training.metric_for_best_model or "").removeprefix("eval_")
        if metric == "top5_accuracy" and len(self.class_names) <= 5:
            count = len(self.class_names)
            raise UserError(f"metric_for_best_model top5_accuracy is always 1 for {count} classes: choose accuracy.")
        self.sets = {split: _prepare(images, split, recipe, checkpoint) for split in images.splits}
        learned = {} if recipe.data.streaming else {split: self.sets[split] for split in self.sets if split != "test"}
        self.checksums = {split: part.checksum() for split, part in learned.items()}

    def create_model(self) -> RSkipResNetForImageClassification:
        model = create_model(self.recipe, self.class_names)
        if self.checkpoint:  # its weights may fit other classes
            old, new = RSkipResNetConfig.from_pretrained(self.checkpoint).id2label, model.config.id2label
            if old != new:
                raise UserError(f"{self.checkpoint} was trained with id2label {old!r} and cannot go on with {new!r}.")
        _check_last_batch(model.config, self.sets["train"], self.recipe)
        if self.recipe.training.channels_last:
            model.to(memory_format=torch.channels_last)
        return model

    def create_trainer(self, model: PreTrainedModel, callbacks: list[TrainerCallback]) -> ImageTrainer:
        return ImageTrainer(
            data_args=self.recipe.data,
            model=model,
            args=self.recipe.training,
            train_dataset=self.sets["train"],
            eval_dataset=self.sets.get("validation"),
            processing_class=make_image_processor(self.recipe.data),
            callbacks=callbacks,
        )

    def describe(self, trainer: ImageTrainer) -> None:
        config, streamed = trainer.model.config, self.recipe.data.streaming
        sizes = ", ".join(f"{split} {len(part):,}" for split, part in self.sets.items() if not streamed)
        print(f"images: {sizes or 'streamed'}; {len(self.class_names):,} classes")
        shape = f"{' + '.join(map(str, config.depths))} blocks of {config.hidden_sizes} channels"
        describe_model(trainer.model, self.recipe, self.recipe.model.architecture or shape)

    def test(self, trainer: ImageTrainer) -> tuple[dict[str, float], list[int], list[int]]:
        predicted = trainer.predict(self.sets["test"], metric_key_prefix="test")
        return predicted.metrics, predicted.predictions[:, 0].tolist(), predicted.label_ids.tolist()


def _do_without_validation(recipe: Recipe) -> None:
    """Turns evaluations off; refuses keys that need validation images."""
    training = recipe.training
    uses = [key for key in ("load_best_model_at_end", "eval_on_start") if getattr(training, key)]
    uses += training.find_uses_of_evaluations()
    if "eval_strategy" in recipe.given and training.eval_strategy != IntervalStrategy.NO:
        uses.append("eval_strategy")
    if uses:
        raise UserError(f"{uses[0]} needs validation images: set validation_split or validation_size.")
    training.eval_strategy = IntervalStrategy.NO


def _prepare(images: ImageDatasets, split: str, recipe: Recipe, checkpoint: Path | None):
    """Decodes the images of a split, or opens the stream of them."""
    dataset, data, training = images.splits[split], recipe.data, recipe.training
    if data.streaming:
        if training.max_steps <= 0:
            raise UserError("streaming needs max_steps, as the number of images is not known before they are read.")
        # The Trainer does not know where in which epoch a stream was: a resumed run reads it anew, in another order.
        training.ignore_data_skip = True
        resumed_at = 0 if checkpoint is None else read_state(checkpoint)["global_step"]
        return stream_images(dataset, data, split, training.seed + resumed_at)
    if data.random_resized_crop and split == "train":
        return CroppedImages(dataset, data, split)
    return decode_images(dataset, data, split)


def create_model(recipe: Recipe, class_names: list[str]) -> RSkipResNetForImageClassification:
    """A new model of the recipe's configuration, or the one that it starts from."""
    start = recipe.training.model_name_or_path
    if start and recipe.model.architecture:
        raise UserError("architecture cannot be set with model_name_or_path, which brings its own.")
    labels = {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}
    labels |= {"image_column": recipe.data.image_column, "label_column": recipe.data.label_column}
    if start:
        new = {
            "classifier.": f"the classifier is new, for {len(class_names):,} classes",
            ".skip.": "the norms of the skip connections are new",
        }
        asked = recipe.model.config_fields(recipe.given)
        return load_start_model(start, RSkipResNetForImageClassification, asked, labels, new)
    try:
        return RSkipResNetForImageClassification(recipe.model.make_config(recipe.given, **labels))
    except ValueError as error:
        raise UserError(f"{first_line(error)}.") from error


def _check_last_batch(config: RSkipResNetConfig, train_set, recipe: Recipe) -> None:
    """Refuses a batch of one image on feature maps of 1 x 1, of which batch normalisation has no variance."""
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
