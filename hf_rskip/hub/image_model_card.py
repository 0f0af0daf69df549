"""The model card of a trained image classifier: data for the template in `model_cards/`."""

from pathlib import Path

from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerState

from ..recipe.parsing import Recipe
from .model_card import eval_result, save_card
from .training_curve import Curve

_SCORES = {"accuracy": "accuracy (top-1)", "top5_accuracy": "accuracy (top-5)"}


def write_image_model_card(
    folder: str | Path,
    recipe: Recipe,
    model: PreTrainedModel,
    state: TrainerState,
    metrics: dict[str, float],
    record: dict,
) -> None:
    """Writes `README.md` and the picture in it: what the model is, how to use it, its scores, and how it was made.

    Args:
        folder: where the model was saved.
        recipe, model, state: of the training.
        metrics: `train_runtime` in seconds, `test_accuracy` from 0 to 1 and, of more than five classes, the same of
            `test_top5_accuracy`.
        record: of [`~hf_rskip.training.resuming.begin_record`].
    """
    data, config = recipe.data, model.config
    test_split = f"Split `{data.test_split}`"
    if data.max_predict_samples is not None:
        test_split += f", at most {data.max_predict_samples:,} of its images"
    scores = {key: title for key, title in _SCORES.items() if f"test_{key}" in metrics}
    save_card(
        folder,
        "image_template.md",
        recipe,
        model,
        state,
        dataset=data.dataset_name,
        scores=[
            eval_result(recipe, data.dataset_name, "accuracy", title, round(metrics[f"test_{key}"], 4))
            for key, title in scores.items()
        ],
        metrics=metrics,
        record=record,
        loss="training loss (nats an image)",
        curve=Curve("eval_accuracy", "validation accuracy (%)", scale=100),
        architecture=recipe.model.architecture or f"ResNet of {config.layer_type} blocks",
        depths=" + ".join(map(str, config.depths)),
        hidden_sizes=", ".join(map(str, config.hidden_sizes)),
        num_classes=f"{config.num_labels:,}",
        image_size=data.image_size,
        test_split=test_split,
        results=[{"metric": title, "score": f"{metrics[f'test_{key}']:.2%}"} for key, title in scores.items()],
    )
