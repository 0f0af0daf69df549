"""The initial model of a recipe, and a batch of its training split: what a probe measures before training."""

from dataclasses import asdict

from transformers import DataCollatorForSeq2Seq, PreTrainedModel, set_seed

from ..data.images.loading import load_image_dataset
from ..data.images.pixels import decode_images, stream_images
from ..data.text.cleaning import clean_corpus
from ..data.text.corpora import load_translation_dataset
from ..data.text.preprocessing import filter_by_length, tokenize_corpus
from ..errors import UserError, first_line
from ..manifest import check_model
from ..models import RSkipConfig, RSkipForConditionalGeneration
from ..probing.batches import SAMPLES, Batch, random_batch, spread, training_images, training_sentences
from ..recipe.parsing import Recipe
from .image_classification import create_model as create_image_model
from .translation_model import create_model as create_translation_model
from .translation_model import make_tokenizer

_RANDOM_CLASSES = 10


def begin_recipe(
    recipe: Recipe, samples: int = SAMPLES, random_size: int | None = None
) -> tuple[PreTrainedModel, Batch]:
    """The model with the weights that the recipe's seed gives it, and a batch to probe it on.

    Args:
        samples: sentence pairs or images of the batch.
        random_size: makes the batch up, as [`~hf_rskip.probing.batches.random_batch`] does, from the same seed; no
            data is read then, and no tokenizer needed.

    Raises:
        [`UserError`]: if the data or the configuration cannot be used.
    """
    if recipe.training.model_name_or_path:
        check_model(recipe.training.model_name_or_path)
    if random_size is not None:
        set_seed(recipe.training.seed)
        model = _model_without_data(recipe)
        return model, random_batch(model.config, samples, random_size, recipe.training.seed)
    return (_begin_images if recipe.task == "image-classification" else _begin_translation)(recipe, samples)


def _model_without_data(recipe: Recipe) -> PreTrainedModel:
    if recipe.task == "image-classification":
        return create_image_model(recipe, [str(number) for number in range(_RANDOM_CLASSES)])
    if recipe.training.model_name_or_path:
        raise UserError("With model_name_or_path, probe that model itself: it does not begin at random.")
    try:
        return RSkipForConditionalGeneration(RSkipConfig(**asdict(recipe.model)))
    except ValueError as error:
        raise UserError(f"{first_line(error)}.") from error


def _begin_translation(recipe: Recipe, samples: int) -> tuple[PreTrainedModel, Batch]:
    data = recipe.data
    train_set, _ = clean_corpus(load_translation_dataset(data, splits=("train",))["train"], data)
    tokenizer = make_tokenizer(recipe, train_set)
    some = train_set.select(spread(train_set, 4 * samples))  # more than needed, as some may be too long
    some, _ = filter_by_length(tokenize_corpus(some, tokenizer, data), data)
    set_seed(recipe.training.seed)
    model = create_translation_model(recipe, tokenizer)
    return model, training_sentences(DataCollatorForSeq2Seq(tokenizer), some, samples)


def _begin_images(recipe: Recipe, samples: int) -> tuple[PreTrainedModel, Batch]:
    data = recipe.data
    images = load_image_dataset(data, splits=("train",))
    dataset = images.splits["train"]
    if data.streaming:
        dataset = stream_images(dataset, data, "train", recipe.training.seed)
    else:
        dataset = decode_images(dataset.select(spread(dataset, samples)), data, "train")
    set_seed(recipe.training.seed)
    return create_image_model(recipe, images.class_names), training_images(dataset, data, samples)
