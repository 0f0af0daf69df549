"""Fills the templates of model cards, for all tasks."""

from importlib.metadata import metadata
from importlib.resources import files
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerState

from ..data.names import is_path
from ..environment import describe_device, read_versions
from ..models import SKIP_CONNECTIONS
from ..recipe.describe import describe_resumption, find_idle_keys
from ..recipe.parsing import Recipe
from .training_curve import CURVE_NAME, Curve, draw_training_curve


def save_card(
    folder: str | Path,
    template: str,
    recipe: Recipe,
    model: PreTrainedModel,
    state: TrainerState,
    *,
    dataset: str,
    scores: list[EvalResult],
    metrics: dict,
    record: dict,
    loss: str,
    curve: Curve,
    language: list[str] | None = None,
    **values,
) -> None:
    """Fills a template of `model_cards/`, and writes it as `README.md` and the picture in it.

    The code of a card loads the model from its folder; [`push_folder`] puts its id on the Hub there.

    Args:
        template: name of the file.
        dataset: what the model was trained on; a path is shown by its last part.
        scores: for the metadata, each of [`eval_result`].
        loss, curve: the two lines of the picture; see [`draw_training_curve`].
        language: codes of the languages, for the metadata.
        values: what else the template names. The other arguments are those of the functions that call this one.
    """
    draw_training_curve(state.log_history, Path(folder) / CURVE_NAME, loss, curve)
    config, name, start = model.config, Path(folder).resolve().name, recipe.training.model_name_or_path
    skip, seconds = SKIP_CONNECTIONS[config.skip_type], metrics["train_runtime"]
    idle = dict(find_idle_keys(recipe, config))
    keys = {key: value for key, value in recipe.keys.items() if key not in idle}
    card = ModelCard.from_template(
        ModelCardData(
            language=language,
            library_name="transformers",
            pipeline_tag=recipe.task,
            tags=["hf_rskip", config.skip_type, "arxiv:2105.07205"],
            metrics=list(dict.fromkeys(score.metric_type for score in scores)),
            base_model=None if start is None or is_path(start) else start,
            model_name=name,
            eval_results=scores,
        ),
        template_str=_template(template).read_text(encoding="utf-8"),
        model_name=name,
        model_id=str(folder),
        package=_package(),
        start=None if start is None else name_dataset(start),
        corpus=f"`{name_dataset(dataset)}`",
        parameters=f"{model.num_parameters():,}",
        formula=(skip.__doc__ or skip.__name__).strip().splitlines()[0],
        skip_connection=skip.describe(config),
        skip_module=None if skip.__module__.startswith("hf_rskip.") else skip.__module__,
        steps=f"{state.global_step:,}",
        epochs=f"{state.epoch:.1f}",
        time=f"{seconds:.1f} seconds" if seconds < 60 else f"{seconds / 60:.1f} minutes",
        resumed="; ".join(map(describe_resumption, record["resumed"])),
        processes=recipe.training.world_size,
        device=describe_device(),
        versions=", ".join(f"{package} {version}" for package, version in read_versions().items()),
        recipe=yaml.safe_dump(keys, allow_unicode=True, sort_keys=False).strip(),
        **values,
    )
    card.save(Path(folder) / "README.md")


def eval_result(recipe: Recipe, dataset: str, metric: str, name: str, value: float) -> EvalResult:
    """A score of the test split of `dataset`, for the metadata."""
    return EvalResult(
        task_type=recipe.task,
        dataset_type=name_dataset(dataset),
        dataset_name=name_dataset(dataset),
        dataset_split=recipe.data.test_split if recipe.data.dataset_name else None,
        metric_type=metric,
        metric_name=name,
        metric_value=value,
    )


def name_dataset(dataset: str) -> str:
    """A Hub id as it is, and of a path the last part."""
    return Path(dataset).name if Path(dataset).exists() else dataset


def _package() -> str:
    """This package, as a link to the first of its URLs."""
    url = next((entry.partition(", ")[2] for entry in metadata("hf_rskip").get_all("Project-URL") or []), None)
    return f"[hf_rskip]({url})" if url else "`hf_rskip`"


def _template(name: str):
    """Finds a template: `model_cards` is inside an installed package, and beside it in the repository."""
    packaged = files("hf_rskip").joinpath("model_cards", name)
    return packaged if packaged.is_file() else Path(__file__).parents[2] / "model_cards" / name
