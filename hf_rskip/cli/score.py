"""`hf-rskip score`."""

import argparse
import math
import sys

from ..data.text.arguments import DataArguments
from ..data.text.corpora import load_translation_dataset
from ..decoding.loading import load_ensemble
from ..decoding.score import score
from ..errors import UserError
from ..evaluation.evaluate import split_languages
from .evaluate import find_languages
from .translate import check_output, new_file, open_file, read_lines, write_lines

_COLUMNS = ("log_probability", "token_count", "token_log_probabilities", "tokens")


def score_translations(args: argparse.Namespace) -> None:
    """Writes the names of the columns and a line a pair, between tabs: the sum and the number of tokens, and if asked
    the log-probability of each token and the tokens themselves, between blanks.

    The perplexity of all pairs goes to standard error.
    """
    if bool(args.source_file) != bool(args.target_file):
        raise UserError("--source_file and --target_file need each other")
    for option in ("dataset_config_name", "source_lang", "target_lang"):
        if args.source_file and getattr(args, option) is not None:
            raise UserError(f"--{option} is for a --dataset_name, and --source_file is given")
    if args.source_file and args.split != "test":
        raise UserError("--split is for a --dataset_name, and --source_file is given")
    check_output(args.output_file, [args.source_file, args.target_file])
    with new_file(args.output_file) as file:
        write_lines(file, _score_lines(args))


def _score_lines(args: argparse.Namespace) -> list[str]:
    model, tokenizer = load_ensemble([args.model, *args.ensemble])
    if args.source_file:
        sources, targets = _read(args.source_file), _read(args.target_file)
        if len(sources) != len(targets):
            raise UserError(
                f"{args.source_file!r} has {len(sources)} lines and {args.target_file!r} has {len(targets)}"
            )
        sources, targets = sources[: args.max_samples], targets[: args.max_samples]
    else:
        source_lang, target_lang = find_languages(args, {args.model: model.config})
        data = DataArguments(
            dataset_name=args.dataset_name,
            dataset_config_name=args.dataset_config_name,
            source_lang=source_lang,
            target_lang=target_lang,
            test_split=args.split,
            max_predict_samples=args.max_samples,
        )
        dataset = load_translation_dataset(data, splits=("test",))["test"]
        sources, targets = split_languages(dataset, data.source_lang, data.target_lang)
    if not sources:
        raise UserError("There is nothing to score")
    log_probs = score(model, tokenizer, sources, targets, args.max_batch_tokens)
    lines = ["\t".join(_COLUMNS if args.per_token else _COLUMNS[:2])]
    for values, target in zip(log_probs, targets, strict=True):
        row = [f"{sum(values):.6f}", str(len(values))]
        if args.per_token:
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(text_target=target).input_ids)
            row += [" ".join(f"{value:.6f}" for value in values), " ".join(tokens)]
        lines.append("\t".join(row))
    total, count = sum(map(sum, log_probs)), sum(map(len, log_probs))
    print(f"perplexity: {math.exp(-total / count):.4f} over {count:,} tokens", file=sys.stderr)
    return lines


def _read(path: str) -> list[str]:
    with open_file(path, "rb") as file:
        return [line for lines in read_lines(file, path) for line in lines]
