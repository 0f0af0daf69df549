"""The interface between a task (data, model, scores) and the training that all tasks share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, TrainerCallback

from ..recipe.parsing import Recipe
from .recipe_trainer import RecipeTrainer


class Tested(NamedTuple):
    """Scores, predictions and references of the test split: texts, or numbers of classes."""

    metrics: dict[str, Any]
    """Scores by name, with the prefix `test_`."""
    predictions: Sequence
    references: Sequence


class Task(ABC):
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

    def __init__(self, recipe: Recipe, checkpoint: Path | None):
        self.recipe, self.checkpoint = recipe, checkpoint

    @abstractmethod
    def create_model(self) -> PreTrainedModel:
        """Creates the model."""

    @abstractmethod
    def create_trainer(self, model: PreTrainedModel, callbacks: list[TrainerCallback]) -> RecipeTrainer:
        """Creates the Trainer with model and data."""

    @abstractmethod
    def describe(self, trainer: RecipeTrainer) -> None:
        """Prints the sizes of the data and of the model."""

    @abstractmethod
    def test(self, trainer: RecipeTrainer) -> Tested:
        """Tests the trained model; called on every process."""

    @abstractmethod
    def write_card(self, trainer: RecipeTrainer, metrics: dict[str, Any]) -> None:
        """Writes the model card; `metrics` are those of training and test."""
