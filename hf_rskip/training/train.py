"""Trains by a recipe: from data to a tested model, the same way for all tasks."""

import errno
from contextlib import nullcontext

from safetensors import SafetensorError
from transformers import set_seed

from ..errors import UserError
from ..evaluation.predictions import write_predictions
from ..hub.model_card import write_model_card
from ..manifest import check_model
from ..recipe.describe import describe_resumption
from ..recipe.parsing import Recipe, check_configuration
from .checkpoints import find_checkpoint
from .image_classification import ImageClassification
from .output_lock import locked
from .resuming import (
    CurrentSteps,
    begin_record,
    check_data,
    complete_metrics,
    finished_results,
    write_record,
)
from .translation import Translation

_TASKS = {"translation": Translation, "image-classification": ImageClassification}


def train(recipe: Recipe) -> dict[str, float | str]:
    """Trains by the recipe, evaluates on the test split, and leaves model, card and scores in `output_dir`: the last
    model, or with `load_best_model_at_end` the best.

    Returns:
        What `all_results.json` holds.

    Raises:
        [`UserError`]: if the data, the configuration or `output_dir` cannot be used, before any training starts; if
            another run is writing into `output_dir`, and if the disk is full.
        [`Preempted`], [`Diverged`]: see [`~hf_rskip.training.recipe_trainer.RecipeTrainer`].
    """
    if recipe.training.model_name_or_path:
        check_model(recipe.training.model_name_or_path)
    check_configuration(recipe)
    with locked(recipe.training.output_dir) if recipe.training.process_index == 0 else nullcontext():
        try:
            results = finished_results(recipe)
            return _train(recipe) if results is None else results
        except (OSError, SafetensorError) as error:
            if not _is_full(error):
                raise
            raise UserError(
                f"The disk is full ({error}): with space again, go on with `--resume_from_checkpoint true`."
            ) from error


def _train(recipe: Recipe) -> dict[str, float | str]:
    training = recipe.training
    with training.main_process_first(desc="preparing the data"):
        checkpoint = find_checkpoint(training.output_dir, training.resume_from_checkpoint)
        record = begin_record(recipe, checkpoint)
        task = _TASKS[recipe.task](recipe, checkpoint)
        check_data(record, task.checksums)
    set_seed(training.seed)
    model = task.create_model()
    callbacks = [CurrentSteps(not {"logging_steps", "logging_strategy"}.isdisjoint(recipe.given))]
    trainer = task.create_trainer(model, callbacks)
    trainer.record = record
    if trainer.is_world_process_zero():
        task.describe(trainer)
        if checkpoint:
            print(f"resuming from {checkpoint}, {describe_resumption(record['resumed'][-1])}", flush=True)

    trained = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    with trainer.stop.raised(trainer.state.global_step):
        if checkpoint:
            complete_metrics(trained.metrics, recipe, record, trainer.state.global_step)
        trainer.use_average()
        trainer.save_model(_internal_call=True)  # pushed later, with the scores and the card
        trainer.save_state()
        scores, predictions, references = task.test(trainer)
        trainer.log_metrics("test", scores)
        metrics = {**trained.metrics, **scores}
        for part, values in {"train": trained.metrics, "test": scores, "all": metrics}.items():
            trainer.save_metrics(part, values, combined=False)  # combining would keep results of an earlier run
        if trainer.is_world_process_zero():
            write_predictions(training.output_dir, predictions, references)
            write_model_card(training.output_dir, recipe, trainer.model, trainer.state, metrics, record, task.example)
            write_record(training.output_dir, record, trainer.state.global_step)
            print(f"model, card and scores: {training.output_dir}", flush=True)
        if training.push_to_hub:
            trainer.push_to_hub()
    return metrics


def _is_full(error: Exception) -> bool:
    """Whether the disk is full; an error of safetensors says so in its text only."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in codes or any(f"(os error {code})" in str(error) for code in codes)
