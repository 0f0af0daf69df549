"""The interface between a task (data, model, scores) and the training that all tasks share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from ..recipe.parsing import Recipe
from .recipe_trainer import RecipeTrainer


class Task:
    """One run of a recipe; [`~hf_rskip.training.train.train`] calls the methods in their order here.

    Making one reads and prepares the data, on the main process first.

    Args:
        recipe: of this task.
        checkpoint: to resume from.

    Raises:
        [`UserError`]: if the data cannot be used; so do the methods, before any training, of what they make.
    """

    checksums: dict[str, int]
    """Checksums of training and validation data, by split; streams have none."""

    example: str | None = None
    """An input for the model card."""

    def __init__(self, recipe: Recipe, checkpoint: Path | None):
        self.recipe, self.checkpoint = recipe, checkpoint

    def create_model(self) -> PreTrainedModel:
        """Creates the model."""

    def create_trainer(self, model: PreTrainedModel, callbacks: list[TrainerCallback]) -> RecipeTrainer:
        """Creates the Trainer with model and data."""

    def describe(self, trainer: RecipeTrainer) -> None:
        """Prints the sizes of the data and of the model."""

    def test(self, trainer: RecipeTrainer) -> tuple[dict[str, Any], Sequence, Sequence]:
        """Tests the trained model; called on every process.

        Returns:
            Scores by name, with the prefix `test_`, and predictions and references: texts, or numbers of classes.
        """
