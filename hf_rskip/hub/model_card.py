"""The model card of a trained translation model."""

import platform
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerState

from ..models import SKIP_CONNECTIONS
from ..training.arguments import Recipe

_VERSIONS = ("torch", "transformers", "datasets", "accelerate", "sacrebleu")


def write_model_card(
    folder: str | Path,
    recipe: Recipe,
    model: PreTrainedModel,
    state: TrainerState,
    metrics: dict[str, float | str],
    example: str,
) -> None:
    """Writes `README.md`: what the model is, how to use it, its scores, and the recipe that makes it again.

    Args:
        folder: where the model was saved.
        recipe, model, state: of the training.
        metrics: `train_runtime` in seconds and the `test_` scores with their signatures.
        example: a source sentence for the code to translate.
    """
    data, config, name = recipe.data, model.config, Path(folder).resolve().name
    corpus = data.dataset_name or " and ".join(Path(file).name for file in data.train_files)
    scores = {"bleu": "BLEU", "chrf": "chrF"}
    card_data = ModelCardData(
        language=[data.source_lang, data.target_lang],
        library_name="transformers",
        pipeline_tag="translation",
        tags=["hf_rskip", config.skip_type],
        metrics=list(scores),
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
            for key, title in scores.items()
        ],
    )
    card = ModelCard.from_template(
        card_data,
        template_str=files(__package__).joinpath("model_card_template.md").read_text(encoding="utf-8"),
        model_name=name,
        model_id=name,
        example=example.replace("\\", "\\\\").replace('"', '\\"'),
        source_lang=data.source_lang,
        target_lang=data.target_lang,
        parameters=f"{model.num_parameters():,}",
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        d_model=config.d_model,
        skip_connection=SKIP_CONNECTIONS[config.skip_type].describe(config),
        bleu=f"{metrics['test_bleu']:.2f}",
        bleu_signature=metrics["test_bleu_signature"].replace("|", "\\|"),
        chrf=f"{metrics['test_chrf']:.2f}",
        chrf_signature=metrics["test_chrf_signature"].replace("|", "\\|"),
        steps=f"{state.global_step:,}",
        epochs=f"{state.epoch:.1f}",
        minutes=f"{metrics['train_runtime'] / 60:.1f}",
        processes=recipe.training.world_size,
        device=_device_name(),
        versions=", ".join(f"{package} {version(package)}" for package in _VERSIONS),
        recipe=yaml.safe_dump(recipe.keys, allow_unicode=True, sort_keys=False).strip(),
    )
    card.save(Path(folder) / "README.md")


def _device_name() -> str:
    if torch.accelerator.is_available():
        return torch.get_device_module().get_device_name()
    return f"{platform.machine()} CPU with {torch.get_num_threads()} threads"
