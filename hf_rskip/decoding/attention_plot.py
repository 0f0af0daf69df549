"""Cross-attention of a translation to its source tokens, and its picture."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError, first_line
from ..picture import new_figure, save_figure
from .score import tokenize_pairs


def cross_attention(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, target: str
) -> tuple[torch.Tensor, list[str], list[str]]:
    """The cross-attention of a given translation, mean of the heads of the last decoder layer.

    Returns:
        Weights `(target tokens, source tokens)` whose rows, each of them where its token is predicted, sum to 1; and
        the target tokens and source tokens, end tokens with them.

    Raises:
        [`UserError`]: if a sentence has more tokens than the model has positions.
    """
    pair = tokenize_pairs(model, tokenizer, [source], [target])
    input_ids, labels = (torch.tensor(ids, device=model.device) for ids in pair)
    attn_implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the others give no weights
    try:
        with torch.inference_mode():
            decoder_input_ids = model.prepare_decoder_input_ids_from_labels(labels)
            output = model(input_ids, decoder_input_ids=decoder_input_ids, output_attentions=True, use_cache=False)
    finally:
        model.set_attn_implementation(attn_implementation)
    tokens = ([tokenizer.decode(token).strip() for token in ids[0]] for ids in (labels, input_ids))
    return output.cross_attentions[-1][0].mean(0).cpu(), *tokens


def plot_attention(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, target: str, path: str
) -> None:
    """Draws [`cross_attention`] as a picture; the ending of `path` gives its format.

    Raises:
        [`UserError`]: if a sentence has more tokens than the model has positions, or the picture cannot be written.
    """
    weights, target_tokens, source_tokens = cross_attention(model, tokenizer, source, target)
    rows, columns = weights.shape
    figure = new_figure(2.5 + 0.35 * columns, 2 + 0.3 * rows)
    axes = figure.subplots()
    # cividis reads the same with any colour vision, and in grey.
    image = axes.imshow(weights.numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    # A `$` would begin a formula.
    axes.set_xticks(range(columns), source_tokens, rotation=60, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(rows), target_tokens, parse_math=False)
    axes.set_xlabel("source token")
    axes.set_ylabel("predicted token")
    figure.colorbar(image, label="cross-attention, last layer, mean of heads")
    try:
        save_figure(figure, Path(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path!r} cannot be written: {first_line(error)}") from error
