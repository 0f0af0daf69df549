"""`hf-rskip score`."""

import argparse
import math
import sys

from ..errors import UserError
from .files import check_output, new_file, read_all_lines, write_lines
from .options import add_model_argument, add_split_arguments, count

_COLUMNS = ("log_probability", "token_count", "token_log_probabilities", "tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    corpus = parser.add_mutually_exclusive_group(required=True)
    corpus.add_argument("--dataset_name", help="Hub id or folder with a `translation` column, or cldr")
    corpus.add_argument("--source_file", help="UTF-8 text, a sentence a line; with --target_file")
    parser.add_argument("--target_file", help="its translations")
    add_split_arguments(parser)
    parser.add_argument("--max_samples", type=count, help="only the first so many sentences")
    parser.add_argument("--ensemble", nargs="+", default=[], metavar="MODEL", help="average probabilities with these")
    parser.add_argument("--per_token", action="store_true", help="add every token and its log-probability")
    parser.add_argument("--output_file", help="default: standard output")
    parser.add_argument("--max_batch_tokens", type=count, default=4096, help="padded tokens a batch")


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Writes the names of the columns and a line a pair, between tabs: the sum and the number of tokens, and if asked
    the log-probability of each token and the tokens themselves, between blanks.

    The perplexity of all pairs goes to standard error.
    """
    if bool(args.source_file) != bool(args.target_file):
        raise UserError("--source_file and --target_file need each other")
    defaults = {"dataset_config_name": None, "source_lang": None, "target_lang": None, "split": "test"}
    for option, default in defaults.items():
        if args.source_file and getattr(args, option) != default:
            raise UserError(f"--{option} is for a --dataset_name, and --source_file is given")
    check_output(args.output_file, [args.source_file, args.target_file])
    with new_file(args.output_file) as file:
        write_lines(file, _score_lines(args))


def _score_lines(args: argparse.Namespace) -> list[str]:
    from ..decoding.loading import load_ensemble
    from ..decoding.score import score
    from .corpus import find_languages, load_test_set

    model, tokenizer = load_ensemble([args.model, *args.ensemble])
    if args.source_file:
        sources, targets = read_all_lines(args.source_file), read_all_lines(args.target_file)
        if len(sources) != len(targets):
            raise UserError(
                f"{args.source_file!r} has {len(sources)} lines and {args.target_file!r} has {len(targets)}"
            )
        sources, targets = sources[: args.max_samples], targets[: args.max_samples]
    else:
        sources, targets = load_test_set(args, *find_languages(args, {args.model: model.config}), args.max_samples)
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
    total, number = sum(map(sum, log_probs)), sum(map(len, log_probs))
    print(f"perplexity: {math.exp(-total / number):.4f} over {number:,} tokens", file=sys.stderr)
    return lines
