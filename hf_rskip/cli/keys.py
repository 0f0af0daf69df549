"""`hf-rskip keys`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="TASK | WORD",
        help="translation (default) or image-classification, and a word of the keys to be printed (default: all)",
    )
    parser.usage = "hf-rskip keys [translation | image-classification] [WORD]"


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Prints the keys of a task, or those that contain a word."""
    from ..recipe.parsing import TASKS, describe_keys

    task = args.words.pop(0) if args.words and args.words[0] in TASKS else "translation"
    print(describe_keys(task, " ".join(args.words) or None))
