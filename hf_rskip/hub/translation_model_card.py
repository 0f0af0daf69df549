"""The model card of a trained translation model: data for the template in `model_cards/`."""

import json
import re
from pathlib import Path

from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerState

from ..recipe.parsing import Recipe
from .model_card import eval_result, save_card
from .training_curve import Curve

_SCORES = {"bleu": "BLEU", "chrf": "chrF"}
_LICENCES = {"cldr": "Made from Unicode CLDR ([Unicode License v3](https://www.unicode.org/license.txt))."}


def write_model_card(
    folder: str | Path,
    recipe: Recipe,
    model: PreTrainedModel,
    state: TrainerState,
    metrics: dict[str, float | str],
    record: dict,
    example: str,
) -> None:
    """Writes `README.md` and the picture in it: what the model is, how to use it, its scores, and how it was made.

    Args:
        folder: where the model was saved.
        recipe, model, state: of the training.
        metrics: `train_runtime` in seconds and the `test_` scores with their signatures.
        record: of [`~hf_rskip.training.resuming.begin_record`].
        example: a source sentence for the code to translate.
    """
    data, config = recipe.data, model.config
    corpus, test_corpus = (
        data.dataset_name or " and ".join(Path(file).name for file in files)
        for files in (data.train_files, data.test_files)
    )
    test_split = data.test_split if data.dataset_name else test_corpus
    if data.max_predict_samples is not None:
        test_split += f", at most its first {data.max_predict_samples:,} pairs"
    save_card(
        folder,
        "translation_template.md",
        recipe,
        model,
        state,
        dataset=corpus,
        scores=[
            eval_result(
                recipe,
                test_corpus,
                key,
                f"{title} ({metrics[f'test_{key}_signature']})",
                round(metrics[f"test_{key}"], 2),
            )
            for key, title in _SCORES.items()
        ],
        metrics=metrics,
        record=record,
        loss="training loss (nats a token)",
        curve=Curve("eval_bleu", "validation BLEU"),
        # The Hub refuses a card with anything else.
        language=[code for code in (data.source_lang, data.target_lang) if re.fullmatch(r"[a-z]{2,3}(-\w+)*", code)],
        # JSON writes a string as Python would.
        example=json.dumps(example, ensure_ascii=False),
        source_lang=data.source_lang,
        target_lang=data.target_lang,
        licence=_LICENCES.get(corpus, "Its licence is that of its source."),
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        d_model=config.d_model,
        results=[
            {
                "split": test_split,
                "metric": title,
                "score": f"{metrics[f'test_{key}']:.2f}",
                "signature": metrics[f"test_{key}_signature"].replace("|", "\\|"),  # or it would end the cell
            }
            for key, title in _SCORES.items()
        ],
    )
