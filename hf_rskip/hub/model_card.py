"""The model card of a trained translation model: data for the template in `model_cards/`."""

import json
import platform
import re
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerState

from ..models import SKIP_CONNECTIONS, SkipConnection
from ..training.arguments import Recipe
from .training_curve import CURVE_NAME, draw_training_curve

_VERSIONS = ("hf_rskip", "torch", "transformers", "datasets", "accelerate", "sacrebleu")
_SCORES = {"bleu": "BLEU", "chrf": "chrF"}
_LICENCES = {"cldr": "Made from Unicode CLDR ([Unicode License v3](https://www.unicode.org/license.txt))."}


def write_model_card(
    folder: str | Path,
    recipe: Recipe,
    model: PreTrainedModel,
    state: TrainerState,
    metrics: dict[str, float | str],
    example: str,
) -> None:
    """Writes `README.md` and the picture in it: what the model is, how to use it, its scores, and how it was made.

    The code of the card loads the model by the name of its folder; [`push_folder`] puts its id on the Hub there.

    Args:
        folder: where the model was saved.
        recipe, model, state: of the training.
        metrics: `train_runtime` in seconds and the `test_` scores with their signatures.
        example: a source sentence for the code to translate.
    """
    data, config, name = recipe.data, model.config, Path(folder).resolve().name
    corpus = data.dataset_name or " and ".join(Path(file).name for file in data.train_files)
    draw_training_curve(state.log_history, Path(folder) / CURVE_NAME)
    card = ModelCard.from_template(
        _metadata(recipe, config, name, corpus, metrics),
        template_str=_template().read_text(encoding="utf-8"),
        model_name=name,
        model_id=name,
        # JSON writes a string as Python would.
        example=json.dumps(example, ensure_ascii=False),
        source_lang=data.source_lang,
        target_lang=data.target_lang,
        corpus=f"`{Path(corpus).name if Path(corpus).exists() else corpus}`",
        licence=_LICENCES.get(corpus, "Its licence is that of its source."),
        parameters=f"{model.num_parameters():,}",
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        d_model=config.d_model,
        formula=_formula(SKIP_CONNECTIONS[config.skip_type]),
        skip_connection=SKIP_CONNECTIONS[config.skip_type].describe(config),
        results=[
            {
                "split": data.test_split,
                "metric": title,
                "score": f"{metrics[f'test_{key}']:.2f}",
                "signature": metrics[f"test_{key}_signature"].replace("|", "\\|"),  # or it would end the cell
            }
            for key, title in _SCORES.items()
        ],
        steps=f"{state.global_step:,}",
        epochs=f"{state.epoch:.1f}",
        minutes=f"{metrics['train_runtime'] / 60:.1f}",
        processes=recipe.training.world_size,
        device=_device_name(),
        versions=", ".join(f"{package} {version(package)}" for package in _VERSIONS),
        recipe=yaml.safe_dump(recipe.keys, allow_unicode=True, sort_keys=False).strip(),
    )
    card.save(Path(folder) / "README.md")


def _metadata(recipe: Recipe, config, name: str, corpus: str, metrics: dict) -> ModelCardData:
    data = recipe.data
    return ModelCardData(
        # The Hub refuses a card with anything else.
        language=[code for code in (data.source_lang, data.target_lang) if re.fullmatch(r"[a-z]{2,3}(-\w+)*", code)],
        library_name="transformers",
        pipeline_tag="translation",
        tags=["hf_rskip", config.skip_type, "arxiv:2105.07205"],
        metrics=list(_SCORES),
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="translation",
                dataset_type=Path(corpus).name,
                dataset_name=Path(corpus).name,
                dataset_split=data.test_split,
                metric_type=key,
                metric_name=f"{title} ({metrics[f'test_{key}_signature']})",
                metric_value=round(metrics[f"test_{key}"], 2),
            )
            for key, title in _SCORES.items()
        ],
    )


def _formula(skip: type[SkipConnection]) -> str:
    return skip.formula or skip.__doc__.strip().splitlines()[0]


def _template():
    """In an installed package the folder `model_cards` is inside the package, in the repository beside it."""
    packaged = files("hf_rskip").joinpath("model_cards", "template.md")
    return packaged if packaged.is_file() else Path(__file__).parents[2] / "model_cards" / "template.md"


def _device_name() -> str:
    if torch.accelerator.is_available():
        return torch.get_device_module().get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
