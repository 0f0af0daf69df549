"""The model card of a trained model: fills a template of `model_cards/`, and draws the picture in it."""

import json
import re
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
from .training_curve import CURVE_NAME, draw_training_curve

_SCORES = {"bleu": "BLEU", "chrf": "chrF", "accuracy": "accuracy (top-1)", "top5_accuracy": "accuracy (top-5)"}
_LICENCES = {"cldr": "Made from Unicode CLDR ([Unicode License v3](https://www.unicode.org/license.txt))."}


def write_model_card(
    folder: str | Path,
    recipe: Recipe,
    model: PreTrainedModel,
    state: TrainerState,
    metrics: dict[str, float | str],
    record: dict,
    example: str | None = None,
) -> None:
    """Writes `README.md` and the picture in it: what the model is, how to use it, its scores, and how it was made.

    The code of a card loads the model from its folder; [`push_folder`] puts its id on the Hub there.

    Args:
        folder: where the model was saved.
        recipe, model, state: of the training.
        metrics: `train_runtime` in seconds and the `test_` scores; BLEU and chrF from 0 to 100 with their signatures,
            accuracies from 0 to 1.
        record: of [`~hf_rskip.training.resuming.begin_record`].
        example: a source sentence for the code to translate.
    """
    data, config, start = recipe.data, model.config, recipe.training.model_name_or_path
    dataset = data.dataset_name
    corpus, test_corpus = _name_data(data, "train_files"), _name_data(data, "test_files")
    if recipe.task == "translation":
        template, loss, curve = "translation_template.md", "nats a token", ("eval_bleu", "validation BLEU", 1)
        languages, digits, kind = [data.source_lang, data.target_lang], 2, "f"
    else:
        template, loss, curve = "image_template.md", "nats an image", ("eval_accuracy", "validation accuracy (%)", 100)
        languages, digits, kind = [], 4, "%"
    draw_training_curve(state.log_history, Path(folder, CURVE_NAME), f"training loss ({loss})", *curve)
    split = data.test_split if data.dataset_name else None
    scores, results = [], []
    for key, title in _SCORES.items():
        if f"test_{key}" not in metrics:
            continue
        value, signature = metrics[f"test_{key}"], metrics.get(f"test_{key}_signature", "")
        scores.append(
            EvalResult(
                task_type=recipe.task,
                dataset_type=test_corpus,
                dataset_name=test_corpus,
                dataset_split=split,
                metric_type=key.removeprefix("top5_"),
                metric_name=f"{title} ({signature})" if signature else title,
                metric_value=round(value, digits),
            )
        )
        signature = signature.replace("|", "\\|")  # a plain bar would end the cell
        results.append({"metric": title, "score": f"{value:.2{kind}}", "signature": signature})
    skip, seconds, name = SKIP_CONNECTIONS[config.skip_type], metrics["train_runtime"], Path(folder).resolve().name
    training, kept = recipe.training, None
    if training.load_best_model_at_end and training.average_checkpoints is None and state.best_model_checkpoint:
        kept = f"{int(Path(state.best_model_checkpoint).name.rpartition('-')[2]):,}"
    idle = dict(find_idle_keys(recipe, config))
    keys = {key: value for key, value in recipe.given.items() if key not in idle}
    card = ModelCard.from_template(
        ModelCardData(
            # The Hub refuses cards with other codes.
            language=[code for code in languages if re.fullmatch(r"[a-z]{2,3}(-\w+)*", code)] or None,
            library_name="transformers",
            pipeline_tag=recipe.task,
            tags=["hf_rskip", config.skip_type, "arxiv:2105.07205"],
            metrics=list(dict.fromkeys(score.metric_type for score in scores)),
            datasets=None if dataset in (None, "cldr") or is_path(dataset) else [dataset],
            base_model=None if start is None or is_path(start) else start,
            model_name=name,
            eval_results=scores,
        ),
        template_str=_template(template).read_text(encoding="utf-8"),
        model_name=name,
        model_id=str(folder),
        package=_package(),
        start=None if start is None else _name_dataset(start),
        data=data,
        config=config,
        architecture=getattr(recipe.model, "architecture", None),
        corpus=f"`{corpus}`",
        licence=_LICENCES.get(data.dataset_name, "Its licence is that of its source."),
        example=json.dumps(example, ensure_ascii=False),  # JSON writes a string as Python would
        test_split=split or test_corpus,
        results=results,
        parameters=f"{model.num_parameters():,}",
        formula=(skip.__doc__ or skip.__name__).strip().splitlines()[0],
        skip_connection=skip.describe(config),
        skip_module=None if skip.__module__.startswith("hf_rskip.") else skip.__module__,
        steps=f"{state.global_step:,}",
        epochs=f"{state.epoch:.1f}",
        time=f"{seconds:.1f} seconds" if seconds < 60 else f"{seconds / 60:.1f} minutes",
        kept=kept,
        kept_by=(training.metric_for_best_model or "").removeprefix("eval_"),
        resumed="; ".join(map(describe_resumption, record["resumed"])),
        processes=recipe.training.world_size,
        device=describe_device(),
        versions=", ".join(f"{package} {version}" for package, version in read_versions().items()),
        recipe=yaml.safe_dump(keys, allow_unicode=True, sort_keys=False).strip(),
    )
    card.save(Path(folder) / "README.md")


def _name_data(data, files: str) -> str:
    """The data set, or the files under that key."""
    if data.dataset_name:
        return _name_dataset(data.dataset_name)
    return " and ".join(Path(file).name for file in getattr(data, files))


def _name_dataset(dataset: str) -> str:
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
