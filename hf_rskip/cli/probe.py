"""`hf-rskip probe`."""

import argparse

from .options import add_corpus_arguments, add_image_arguments, count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "systems",
        nargs="*",
        metavar="SYSTEM",
        help="folder or Hub id of a model, RECIPE.yaml for the model that it begins with, or an earlier probe.csv",
    )
    parser.add_argument("--run", nargs="+", default=[], metavar="FOLDER", help="every checkpoint of these trainings")
    corpus = parser.add_mutually_exclusive_group()
    add_corpus_arguments(parser, corpus, " or images")
    corpus.add_argument(
        "--random_data",
        nargs="?",
        type=count,
        const=32,
        metavar="SIZE",
        help="random tokens, SIZE a sentence, or images of SIZE x SIZE (default: 32); no data is read",
    )
    add_image_arguments(parser)
    parser.add_argument("--samples", type=count, help="sentence pairs or images (default: 32)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="of recipes (default: their own)")
    parser.add_argument(
        "--label_smoothing_factor", type=float, help="of the loss (default: a recipe's own, 0 of models)"
    )
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="of the systems, then of the runs, in table, CSV and pictures"
    )
    parser.add_argument("--output_dir", metavar="FOLDER", help="write probe.csv and pictures to this folder")
    parser.usage = "hf-rskip probe [SYSTEM ...] [--run FOLDER ...] [options] [--key value ...]"
    parser.epilog = (
        "A recipe is probed on its own training split, a model on the data given. Other keys override recipes'. "
        "The summary has a row a stack: the gradient norm at its bottom over that at its top; the factor by which each "
        "sublayer changes it on the way down; the standard deviation of input x and output y over features; and "
        "medians over the sublayers of the angle between x and y and of the effective skip weight r, with which y, but "
        "for the gain of its norm, is parallel to r x + F(x). probe.csv has a row a sublayer; its columns are "
        "explained in recipes/studies/README.md."
    )


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Probes systems; `rest` are keys of recipes."""
    from .probe_systems import probe_systems

    probe_systems(args, rest)
