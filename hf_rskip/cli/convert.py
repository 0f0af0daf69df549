"""`hf-rskip convert`."""

import argparse

from ..errors import UserError
from .options import add_test_set_arguments, refuse

_OF_FOLD = (
    *("dataset_name", "dataset_config_name", "test_files", "split"),
    *("source_lang", "target_lang", "max_samples", "bleu_tokenize"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "architecture",
        choices=["marian", "resnet", "fold"],
        help="what SOURCE is; fold: a translation model of this package, to become post-LN",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder or Hub id of a checkpoint; for resnet also a file with a state dict of torchvision or timm",
    )
    parser.add_argument("output", metavar="OUTPUT", help="new or empty folder")
    parser.add_argument(
        "--skip_recursions", type=int, help="K of marian; more than 1 is for fine-tuning (default: 1, the same output)"
    )
    group = parser.add_argument_group("sentence pairs of fold, on which it measures and compares")
    add_test_set_arguments(group, required=False)


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Writes a checkpoint as another model of this package."""
    from ..conversion.output import new_folder
    from ..manifest import MODEL_FILES, write_manifest

    _check_options(args)
    output = new_folder(args.output)
    model, processor, what = {"marian": _marian, "resnet": _resnet, "fold": _fold}[args.architecture](args)
    model.save_pretrained(output)
    if processor is not None:
        processor.save_pretrained(output)
    write_manifest(output, MODEL_FILES)
    print(f"{output}: {what}")


def _check_options(args: argparse.Namespace) -> None:
    if args.skip_recursions is not None and args.architecture != "marian":
        reasons = {"resnet": "a ResNet is converted with the plain sums that it has", "fold": "K is 1 after folding"}
        raise UserError(f"`--skip_recursions` is for marian: {reasons[args.architecture]}")
    if args.architecture != "fold":
        refuse(args, _OF_FOLD, f"is for fold: {args.architecture} is converted without data")
    elif not args.dataset_name and not args.test_files:
        refuse(args, _OF_FOLD, "needs a --dataset_name or --test_files")


def _marian(args: argparse.Namespace) -> tuple:
    from ..conversion.marian import convert_marian_checkpoint

    recursions = 1 if args.skip_recursions is None else args.skip_recursions
    return *convert_marian_checkpoint(args.source, recursions), f"rskip, K = {recursions}"


def _resnet(args: argparse.Namespace) -> tuple:
    from ..conversion.resnet import convert_resnet_checkpoint

    return *convert_resnet_checkpoint(args.source), "xskip, no norm"


def _fold(args: argparse.Namespace) -> tuple:
    """Folds a model, which K > 1 needs sentence pairs for, and compares the two on these if there are any."""
    from ..conversion.fold import fold, is_frozen, measured
    from ..decoding.loading import load_config, load_model
    from ..decoding.score import score
    from ..evaluation.bleu import choose_tokenizer
    from ..evaluation.evaluate import evaluate_translation
    from ..models import SKIP_CONNECTIONS
    from .corpus import find_languages, load_test_set

    config, statistics = load_config(args.source), None
    has_pairs, frozen = bool(args.dataset_name or args.test_files), is_frozen(config)
    if frozen and not has_pairs:
        raise UserError("K > 1 is folded with means over data: give sentence pairs by --dataset_name or --test_files")
    if has_pairs:
        if args.dataset_name:
            args.split = args.split or "validation"
        languages = find_languages(args, {args.source: config})
        tokenize = choose_tokenizer(args.bleu_tokenize, languages[1])
        sources, references = load_test_set(args, *languages, args.max_samples)
    model, tokenizer = load_model(args.source)
    if frozen:
        with measured(model) as statistics:
            score(model, tokenizer, sources, references)
    folded = fold(model, statistics)
    if folded.config.learned_positions and not config.learned_positions:
        print("embeddings and positions are scaled: `tie_word_embeddings` is false, `learned_positions` true")
    if has_pairs:
        evaluated = [evaluate_translation(each, tokenizer, sources, references, tokenize) for each in (model, folded)]
        (old, old_lines), (new, new_lines) = evaluated
        for name, title in (("bleu", "BLEU"), ("chrf", "chrF")):
            print(f"{title}: {old[name]:.2f} before, {new[name]:.2f} after")
        same = sum(x == y for x, y in zip(old_lines, new_lines, strict=True))
        print(f"translations that are the same: {same} of {len(sources)}")
    how = "exactly but for rounding and eps"
    if frozen:
        how = "with the means of this data for what its inner norms divide by"
        print("these pairs gave the means: what folding costs, `hf-rskip compare` tells on others")
    return folded, tokenizer, f"rskip, K = 1, in place of {SKIP_CONNECTIONS[config.skip_type].describe(config)}, {how}"
